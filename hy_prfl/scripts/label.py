r"""
Merges annotations into a latent dataset. Nothing is encoded again.

    hy-prfl label --dataset outputs/clips --annotations labels.csv --output_dir outputs/clips_labelled
"""

from collections.abc import Sequence

from ..configs.inputs import check_files, check_sources
from ..configs.label import LabelConfig
from ..configs.outputs import check_output_folders
from ..configs.parser import parse_config
from .running import run


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(LabelConfig, argv, description="Merge annotations into a latent dataset.")
    check_files(config, "annotations")
    check_sources(config, "dataset")
    check_output_folders(config, "output_dir")

    # Imported here, so that a misspelt option is reported before torch is loaded.
    from ..data.annotations import read_annotations
    from ..data.labels import label_dataset
    from ..runtime.messages import set_up_logging

    set_up_logging()
    annotations = read_annotations(config.annotations)
    counts = label_dataset(
        config.dataset,
        annotations,
        config.output_dir,
        ignore_unknown_ids=config.unknown_ids == "ignore",
        overwrite=config.overwrite,
    )
    print(f"{'task':<18}{'good':>8}{'poor':>8}{'missing':>9}")
    for task, count in counts.items():
        print(f"{task:<18}{count['good']:>8}{count['poor']:>8}{count['missing']:>9}")


if __name__ == "__main__":
    run(main)
