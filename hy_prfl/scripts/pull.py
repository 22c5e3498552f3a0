r"""
Downloads a repository from the Hugging Face Hub, or one folder of it, into a new folder.

    hy-prfl pull --repo_id user/reward --output_dir outputs/reward_model
    hy-prfl pull --repo_id user/clips --repo_type dataset --output_dir data/train

Run the same command again to continue an interrupted pull.
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

    # Imported here, so that a misspelt option is reported before torch is loaded.
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
