r"""
Fine-tunes a Wan generator on a latent reward.

    accelerate launch --config_file accelerate_configs/ddp.yaml -m hy_prfl.scripts.train_prfl \
        --config examples/prfl/wan2.1_t2v_1.3b_480p_lora.yaml --train_dataset data/train \
        --reward_model outputs/reward/best --output_dir outputs/prfl
"""

from collections.abc import Sequence

from ..configs.parser import parse_config
from ..configs.prfl import PRFLTrainingConfig
from ..distributed import leave_processes, set_up_logging
from ..trainers.dry_run import dry_run
from ..trainers.prfl_trainer import PRFLTrainer


def main(argv: Sequence[str] | None = None) -> None:
    """Train a generator."""
    set_up_logging()
    config = parse_config(PRFLTrainingConfig, argv, description=__doc__)
    if config.dry_run:
        dry_run(PRFLTrainer, config)
    else:
        PRFLTrainer(config).train()


if __name__ == "__main__":
    main()
    leave_processes()
