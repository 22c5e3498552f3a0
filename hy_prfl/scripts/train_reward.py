r"""
Trains PAVRM, the reward model on noisy latents.

    accelerate launch --config_file accelerate_configs/ddp.yaml -m hy_prfl.scripts.train_reward \
        --config examples/reward/wan2.1_t2v_1.3b_480p_bce.yaml --train_dataset data/train --output_dir outputs/reward
"""

from collections.abc import Sequence

from ..configs.inputs import check_paths, check_sources
from ..configs.outputs import check_output_folders
from ..configs.parser import parse_config
from ..configs.reward import RewardTrainingConfig
from .running import run


def main(argv: Sequence[str] | None = None) -> None:
    """Train a reward model."""
    config = parse_config(RewardTrainingConfig, argv, description=__doc__)
    check_sources(config, "pretrained_model_name_or_path", "reward_model")
    check_paths(config, "transformer_path", "lora_path")
    # A dry run reads a dataset only for the size of its clips.
    if not config.dry_run:
        check_output_folders(config, "output_dir")
        if config.resume_from_checkpoint != "latest":
            check_paths(config, "resume_from_checkpoint")
        check_sources(config, "train_dataset", "validation_dataset")
    elif config.dry_run_size is None:
        check_sources(config, "train_dataset")

    # Imported here, so that a misspelt option is reported before torch is loaded.
    from ..runtime.messages import set_up_logging
    from ..trainers.dry_run import dry_run
    from ..trainers.reward_trainer import RewardTrainer

    set_up_logging()
    if config.dry_run:
        dry_run(RewardTrainer.from_config, config)
    else:
        RewardTrainer.from_config(config).train()


if __name__ == "__main__":
    run(main)
