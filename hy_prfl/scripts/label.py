r"""
Merge annotations into a latent dataset without encoding anything again.

    hy-prfl label --dataset outputs/clips --annotations labels.csv --output_dir outputs/clips_labelled
"""

from collections.abc import Sequence

from ..configs.label import LabelConfig
from ..configs.parser import parse_config
from ..data.labels import label_dataset, read_annotations
from ..distributed import set_up_logging


def main(argv: Sequence[str] | None = None) -> None:
    set_up_logging()
    config = parse_config(LabelConfig, argv, description="Merge annotations into a latent dataset.")
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
    main()
