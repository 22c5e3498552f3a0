r"""
Pushes the result of a run, a model folder or a latent dataset to the Hugging Face Hub.

    hy-prfl push --folder outputs/reward --repo_id user/reward --private
    hy-prfl push --folder data/train --repo_id user/clips --repo_type dataset

If the uploads of a run failed during training, only `--folder` is needed: the run has stored its repository.
"""

from collections.abc import Sequence

from ..configs.hub import PushConfig
from ..configs.inputs import check_paths
from ..configs.parser import parse_config
from .running import run


def main(argv: Sequence[str] | None = None) -> None:
    """Push one folder."""
    config = parse_config(PushConfig, argv, description=__doc__)
    check_paths(config, "folder")

    # Imported here, so that a misspelt option is reported before torch is loaded.
    from ..hub import push_folder

    url = push_folder(
        config.folder,
        config.repo_id,
        private=config.private or None,
        repo_type=config.repo_type,
        revision=config.revision,
        commit_message=config.commit_message,
        token=config.token,
    )
    print(f"Pushed {config.folder}: {url}")


if __name__ == "__main__":
    run(main)
