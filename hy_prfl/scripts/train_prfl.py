r"""
Fine-tunes a Wan generator on a latent reward.

    accelerate launch --config_file accelerate_configs/ddp.yaml -m hy_prfl.scripts.train_prfl \
        --config examples/prfl/wan2.1_t2v_1.3b_480p_lora.yaml --train_dataset data/train \
        --reward_model outputs/reward/best --output_dir outputs/prfl
"""

import logging
from collections.abc import Sequence

from ..configs.parser import parse_config
from ..configs.prfl import PRFLTrainingConfig
from ..trainers.prfl_trainer import PRFLTrainer


def main(argv: Sequence[str] | None = None) -> None:
    """Train a generator."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    PRFLTrainer(parse_config(PRFLTrainingConfig, argv, description=__doc__)).train()


if __name__ == "__main__":
    main()
