r"""
Downloads a repository of the Hugging Face Hub, or one folder of it, into a new folder.

    hy-prfl pull --repo_id user/reward --output_dir outputs/reward_model
    hy-prfl pull --repo_id user/clips --repo_type dataset --output_dir data/train

A pull that was cut off goes on where it was when it is started again.
"""

from collections.abc import Sequence

from ..configs.hub import PullConfig
from ..configs.outputs import check_output_folders
from ..configs.parser import parse_config
from .running import run


def main(argv: Sequence[str] | None = None) -> None:
    """Pull one repository."""
    config = parse_config(PullConfig, argv, description=__doc__)
    check_output_folders(config, "output_dir")

    # Only now, so that nobody waits for torch to hear of a misspelt option.
    from ..hub import pull

    folder = pull(
        config.repo_id,
        config.output_dir,
        revision=config.revision,
        repo_type=config.repo_type,
        subfolder=config.subfolder,
        token=config.token,
    )
    print(f"Pulled {config.repo_id}: {folder}")


if __name__ == "__main__":
    run(main)
