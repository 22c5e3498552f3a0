"""Options of `push` and `pull`."""

from dataclasses import dataclass, field
from typing import Literal

from .base import Config


@dataclass(kw_only=True)
class PushConfig(Config):
    """Options of `push`."""

    folder: str = field(
        metadata={"help": "A run, a folder with a model in it, or a dataset written by `preprocess` or `label`."}
    )
    repo_id: str | None = field(
        default=None, metadata={"help": "Repository, `user/name`. If left out, the one in the run's hub_pending.json."}
    )
    repo_type: Literal["model", "dataset"] = field(default="model", metadata={"help": "What the folder contains."})
    private: bool = field(
        default=False, metadata={"help": "Make a new repository private, and refuse an existing public one."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to; main if left out."})
    commit_message: str | None = field(default=None, metadata={"help": "First line of the commit message."})
    token: str | None = field(
        default=None,
        metadata={"help": "Token with write access. If left out, the one of `hf auth login` or HF_TOKEN."},
    )


@dataclass(kw_only=True)
class PullConfig(Config):
    """Options of `pull`."""

    repo_id: str = field(metadata={"help": "Repository, `user/name`."})
    output_dir: str = field(metadata={"help": "New folder for the files."})
    repo_type: Literal["model", "dataset"] = field(default="model", metadata={"help": "Kind of the repository."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit; main if left out."})
    subfolder: str | None = field(default=None, metadata={"help": "Download only this folder of the repository."})
    token: str | None = field(
        default=None, metadata={"help": "Token with read access. If left out, the one of `hf auth login` or HF_TOKEN."}
    )
