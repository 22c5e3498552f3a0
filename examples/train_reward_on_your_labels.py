r"""
Trains a reward model on your own labelled videos.

    python examples/train_reward_on_your_labels.py --labels my_videos/labels.csv --output_dir outputs/my_reward \
        --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --task blur_quality

The CSV file has the columns `video,caption,blur_quality` and a line for each video. A label is 1 or 0, good or poor, or
empty if unknown. Relative paths are looked up in the working directory, then in the folder of the file. Run under
`accelerate launch` to use several GPUs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from datasets import load_from_disk

from hy_prfl import RewardTrainer, RewardTrainingConfig
from hy_prfl.configs.parser import parse_config
from hy_prfl.models.loading import make_reward_model
from hy_prfl.scripts.preprocess import main as preprocess


@dataclass(kw_only=True)
class Config:
    labels: str = field(metadata={"help": "CSV, JSON or JSON Lines: video, caption, label."})
    output_dir: str = field(metadata={"help": "Folder for the dataset and the model."})
    pretrained_model_name_or_path: str = field(metadata={"help": "Pipeline whose first blocks are used."})
    task: Literal["text_alignment", "blur_quality", "physics_quality", "human_quality", "motion_quality"] = field(
        default="motion_quality", metadata={"help": "Label to learn."}
    )
    num_frames: int = field(default=81, metadata={"help": "Frames of a clip, 4k + 1."})
    resolution: int = field(default=480, metadata={"help": "Short side of a clip."})
    num_layers: int = field(default=8, metadata={"help": "Number of the generator's blocks that are used."})
    max_train_steps: int = field(default=1000, metadata={"help": "Updates."})
    validation_share: float = field(default=0.1, metadata={"help": "Share of the videos that is held out."})


def main(argv: Sequence[str] | None = None) -> RewardTrainer:
    config = parse_config(Config, argv, description=__doc__)
    folder = Path(config.output_dir)

    # 1. Encode videos and captions. Clips that are encoded already are not encoded again.
    preprocess(
        [
            f"--manifest={config.labels}",
            f"--output_dir={folder / 'data'}",
            f"--pretrained_model_name_or_path={config.pretrained_model_name_or_path}",
            f"--num_frames={config.num_frames}",
            "--min_num_frames=5",
            f"--resolution={config.resolution}",
        ]
    )

    # 2. Hold out some rows, to select the best model. You may use any dataset with these columns.
    rows = load_from_disk(folder / "data").train_test_split(config.validation_share, seed=0)

    # 3. Make a model that predicts the label from latents at any noise level. The launch determines its type.
    options = RewardTrainingConfig(
        output_dir=str(folder),
        pretrained_model_name_or_path=config.pretrained_model_name_or_path,
        train_dataset=f"{folder / 'data'}, all but the held-out rows",
        validation_dataset=f"{folder / 'data'}, the held-out rows",
        task=config.task,
        max_train_steps=config.max_train_steps,
        gradient_checkpointing=True,
        validation_steps=100,
        checkpointing_steps=100,
        checkpoints_total_limit=2,
    )
    run = RewardTrainer.set_up_run(options)
    reward_model = make_reward_model(
        config.pretrained_model_name_or_path, num_layers=config.num_layers, dtype=run.trained_dtype, shard=run.shard
    )
    trainer = RewardTrainer(
        options, reward_model=reward_model, train_dataset=rows["train"], validation_dataset=rows["test"], run=run
    )
    trainer.train()
    print(f"The model is in {folder / 'best'}: accuracy {trainer.best_metric:.2f} on the held-out videos.")
    return trainer


if __name__ == "__main__":
    main()
