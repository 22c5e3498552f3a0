"""Pushes models and datasets to the Hugging Face Hub and pulls them, with readable errors."""

import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff, validate_repo_id

from ..data.dataset import load_latent_dataset
from ..formats.weight_files import check_output_dir
from ..version import __version__
from .files import add_card, model_files, stage


logger = logging.getLogger(__name__)

RepoType = Literal["model", "dataset"]

PENDING_FILE = "hub_pending.json"
SNAPSHOT_PREFIX = ".hub-"
NO_TOKEN = "There is no Hugging Face token: log in with `hf auth login`, or set HF_TOKEN to a token with write access."


# Retries of hf_xet, which transfers large files. By default it retries silently for six minutes; with these settings it
# gives up a request after at most 30 seconds. hf_xet reads them when the process first uses it.
XET_RETRIES = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "4", "HF_XET_CLIENT_RETRY_BASE_DELAY": "2s"}
for _name, _value in XET_RETRIES.items():
    os.environ.setdefault(_name, _value)
# Form in which hf_xet reports an HTTP status.
XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((?P<status>\d{3})\s*(?P<phrase>[^)]*)\)")

# Seconds between log messages while an upload runs.
SECONDS_BETWEEN_MESSAGES = 60.0


class HubError(RuntimeError):
    """A request to the Hub failed for a reason that may be temporary: no network, a quota, a fault of the Hub."""


def failure_reason(error: BaseException) -> str:
    """One line on why a call to the Hub failed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set"
        # The Hub answers 404 if the token has no access to a repository, and 401 if it does not know the token.
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code == 401 and _had_token(cause):
            return "the token was refused"
        if isinstance(cause, RepositoryNotFoundError):
            return "there is no such repository, or this token has no access to it"
        if isinstance(cause, RevisionNotFoundError):
            return "there is no such revision"
        if isinstance(cause, HfHubHTTPError):
            code = cause.response.status_code
            message = (cause.server_message or cause.response.reason_phrase).splitlines()[0].rstrip(".")
            return "the token was refused" if code == 401 else f"the Hub answered {code}: {message}"
        if isinstance(cause, HTTPError):
            return f"{constants.ENDPOINT} cannot be reached ({type(cause).__name__}: {cause})"
        xet_answer = XET_STATUS.search(str(cause)) if isinstance(cause, (OSError, RuntimeError)) else None
        if xet_answer is not None:
            status, phrase = xet_answer.group("status", "phrase")
            return "the token was refused" if status == "401" else f"the Hub answered {status}: {phrase}"
        if isinstance(cause, (ConnectionError, TimeoutError)):
            line = next(iter(str(cause).splitlines()), "").rstrip(".")
            return f"the storage of {constants.ENDPOINT} cannot be reached ({line})"
        cause = cause.__cause__
    line = next(iter(str(error).splitlines()), "").rstrip(".")
    # ValueErrors of this package and of the client have readable messages; for others the type is shown too.
    return line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}"


def _had_token(error: HfHubHTTPError) -> bool:
    return "authorization" in error.response.request.headers


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Convert errors of the client to a [`HubError`] of one line. A `ValueError` (a mistake of the user) is not changed."""
    try:
        yield
    # If a part of an upload fails, the client raises a RuntimeError with the reason as its cause.
    except (HTTPError, OSError, RuntimeError) as error:
        raise HubError(f"{what}: {failure_reason(error)}.") from error


def hub_api(token: str | None = None) -> HfApi:
    """The client, with the given token or the stored one."""
    return HfApi(token=token, library_name="hy_prfl", library_version=__version__)


@contextmanager
def uploading(
    repo_id: str, *, repo_type: RepoType = "model", revision: str | None = None, token: str | None = None
) -> Iterator[None]:
    """
    Context for an upload: request write access to the Hub's storage first, and log every minute that the upload is
    still running.

    Without this, hf_xet would make the request. It hides the Hub's answer and retries silently. Here a refusal is an
    ordinary error, and retries are logged.

    Raises:
        HfHubHTTPError: If the Hub refuses.
    """
    if importlib.util.find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET:
        branch = quote(revision or constants.DEFAULT_REVISION, safe="")
        url = f"{constants.ENDPOINT}/api/{repo_type}s/{repo_id}/xet-write-token/{branch}"
        hf_raise_for_status(http_backoff("GET", url, headers=build_hf_headers(token=token)))
    ended = threading.Event()

    def log_progress() -> None:
        seconds = 0.0
        while not ended.wait(SECONDS_BETWEEN_MESSAGES):
            seconds += SECONDS_BETWEEN_MESSAGES
            logger.warning("The upload to '%s' is still running after %.0f seconds.", repo_id, seconds)

    logging_thread = threading.Thread(target=log_progress, name="hub-upload", daemon=True)
    logging_thread.start()
    try:
        yield
    finally:
        ended.set()
        logging_thread.join()


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` if this is not a valid name of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"'{repo_id}' is not a valid repository name of the form `user/name`: {error}") from error


def open_repo(
    repo_id: str, *, private: bool | None = None, repo_type: RepoType = "model", token: str | None = None
) -> str:
    """
    Create a repository, or check that an existing one can be written to.

    Args:
        repo_id (`str`):
            `user/name`. For a bare `name`, the user is the token's account.
        private (`bool`, *optional*):
            Whether a new repository is private. The account's default if left out.

    Returns:
        `str`: the whole id, `user/name`.

    Raises:
        ValueError: For mistakes of the user: no token or a bad one, a malformed id, no write access, or a public
            repository although a private one was requested.
        HubError: If the Hub cannot be reached.
    """
    check_repo_id(repo_id)
    if (token or get_token()) is None:
        raise ValueError(f"'{repo_id}': {NO_TOKEN}")
    api = hub_api(token)
    with hub_errors(f"'{repo_id}' could not be opened"):
        try:
            if "/" not in repo_id:
                repo_id = f"{api.whoami()['name']}/{repo_id}"
            return api.create_repo(repo_id, private=private, repo_type=repo_type).repo_id
        except HfHubHTTPError as error:
            status, reason = error.response.status_code, failure_reason(error)
            if status == 401:
                raise ValueError(f"'{repo_id}': {reason}. {NO_TOKEN}") from error
            if status not in (402, 403, 409):
                raise
        # It exists already (409), or this token may not create repositories but may write to this one.
        try:
            api.auth_check(repo_id, repo_type=repo_type, write=True)
        except RepositoryNotFoundError as error:
            raise ValueError(f"'{repo_id}' could not be created: {reason}.") from error
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                raise
            raise ValueError(f"'{repo_id}' exists, but this token may not write to it: {reason}.") from error
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise ValueError(f"'{repo_id}' exists and is public, but a private repository was requested.")
    return repo_id


def push_folder(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    repo_type: RepoType = "model",
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """
    Push the result of a run, a model folder or a latent dataset.

    Args:
        folder (`str` or `Path`):
            A run (its [`run_files`] are pushed), a folder with a model in it, or a dataset. A run whose uploads failed
            has a `hub_pending.json`. It is removed when everything is pushed.
        repo_id (`str`, *optional*):
            `user/name`. If left out, the one in `hub_pending.json`.
        private (`bool`, *optional*):
            Whether a new repository is private.
        revision (`str`, *optional*):
            Branch to commit to, created if it does not exist. `main` if left out.

    Returns:
        `str`: URL of the commit.

    Raises:
        ValueError: If the folder holds nothing to push, or for the reasons in [`open_repo`].
        HubError: If the upload failed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder`: there is no folder '{folder}'.")
    pending = _read_pending(folder)
    repo_id = repo_id or pending.get("repo_id")
    if repo_id is None:
        raise ValueError(f"`repo_id` must be given, because there is no {PENDING_FILE} in '{folder}'.")
    is_dataset = any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    if is_dataset != (repo_type == "dataset"):
        found = "a dataset" if is_dataset else "no dataset written by `preprocess`"
        raise ValueError(f"`repo_type` is '{repo_type}', but '{folder}' is {found}.")
    dataset = load_latent_dataset(str(folder)) if is_dataset else None
    files = {} if is_dataset else model_files(folder)

    if private is None:
        private = pending.get("private")
    repo_id = open_repo(repo_id, private=private, repo_type=repo_type, token=token)
    message = commit_message or pending.get("commit_message") or f"Upload {folder.resolve().name}"
    api = hub_api(token)
    with hub_errors(f"'{folder}' was not pushed to '{repo_id}'"):
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        where: dict[str, Any] = {"repo_type": repo_type, "revision": revision}
        if dataset is not None:
            plain = dataset.with_format(None)
            with uploading(repo_id, token=token, **where):
                return plain.push_to_hub(repo_id, revision=revision, token=token, commit_message=message).commit_url
        with tempfile.TemporaryDirectory(prefix=SNAPSHOT_PREFIX, dir=folder) as snapshot:
            staged = stage(files, Path(snapshot))
            add_card(staged, Path(snapshot), repo_id, api)
            with uploading(repo_id, token=token, **where):
                commit = api.upload_folder(repo_id=repo_id, folder_path=snapshot, commit_message=message, **where)
    (folder / PENDING_FILE).unlink(missing_ok=True)
    return commit.commit_url


def _read_pending(folder: Path) -> dict[str, Any]:
    path = folder / PENDING_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def pull(
    repo_id: str,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    repo_type: RepoType = "model",
    subfolder: str | None = None,
    token: str | None = None,
) -> Path:
    """
    Download a repository, or one folder of it, into a new folder, which appears when the download is complete.

    An interrupted pull leaves `.<name>.<commit>.partial` beside `output_dir`. The same pull continues from there.

    Raises:
        ValueError: If `output_dir` is not empty, or the repository has no such `subfolder`.
        HubError: If the download failed.
    """
    output_dir = Path(output_dir).absolute()
    check_output_dir(output_dir)
    check_repo_id(repo_id)
    if subfolder is not None and not re.fullmatch(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)*", subfolder):
        raise ValueError(f"`subfolder` must be the path of a folder, such as 'best', got '{subfolder}'.")
    with hub_errors(f"'{repo_id}' was not pulled"):
        # The commit is pinned, so that a continued pull cannot mix files of two commits.
        commit = hub_api(token).repo_info(repo_id, repo_type=repo_type, revision=revision).sha
        partial_dir = output_dir.with_name(f".{output_dir.name}.{str(commit)[:12]}.partial")
        snapshot_download(
            repo_id,
            repo_type=repo_type,
            revision=commit,
            local_dir=partial_dir,
            allow_patterns=None if subfolder is None else f"{subfolder}/*",
            token=token,
        )
    content = partial_dir if subfolder is None else partial_dir / subfolder
    if not content.is_dir():
        shutil.rmtree(partial_dir, ignore_errors=True)
        raise ValueError(f"`subfolder`: there is no folder '{subfolder}' in '{repo_id}'.")
    # The client's own records of the download.
    shutil.rmtree(partial_dir / ".cache", ignore_errors=True)
    if output_dir.is_dir():
        output_dir.rmdir()
    content.rename(output_dir)
    shutil.rmtree(partial_dir, ignore_errors=True)
    return output_dir
