r"""
Trains PAVRM, the reward model on noisy latents.

    accelerate launch --config_file accelerate_configs/ddp.yaml -m hy_prfl.scripts.train_reward \
        --config examples/reward/wan2.1_t2v_1.3b_480p_bce.yaml --train_dataset data/train --output_dir outputs/reward
"""

from collections.abc import Sequence

from ..configs.parser import parse_config
from ..configs.reward import RewardTrainingConfig
from ..distributed import leave_processes, set_up_logging
from ..trainers.dry_run import dry_run
from ..trainers.reward_trainer import RewardTrainer


def main(argv: Sequence[str] | None = None) -> None:
    """Train a reward model."""
    set_up_logging()
    config = parse_config(RewardTrainingConfig, argv, description=__doc__)
    if config.dry_run:
        dry_run(RewardTrainer, config)
    else:
        RewardTrainer(config).train()


if __name__ == "__main__":
    main()
    leave_processes()
