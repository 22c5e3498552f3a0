r"""
Fine-tunes a Wan generator with PRFL, on the reward of a latent reward model.

    accelerate launch --config_file accelerate_configs/ddp.yaml -m hy_prfl.scripts.train_prfl \
        --config examples/prfl/wan2.1_t2v_1.3b_480p_lora.yaml --train_dataset data/train \
        --reward_model outputs/reward/best --output_dir outputs/prfl
"""

from collections.abc import Sequence

from ..configs.inputs import check_paths, check_sources
from ..configs.outputs import check_output_folders
from ..configs.parser import parse_config
from ..configs.prfl import PRFLTrainingConfig
from .running import run


def main(argv: Sequence[str] | None = None) -> None:
    """Train a generator."""
    config = parse_config(PRFLTrainingConfig, argv, description=__doc__)
    sources = ("pretrained_model_name_or_path", "reward_model", "reward_models", "monitor_reward_models")
    check_sources(config, *sources)
    check_paths(config, "transformer_path", "lora_path", "transformer_2_path", "lora_2_path")
    # A dry run reads a dataset only for the size of its clips.
    if not config.dry_run:
        check_output_folders(config, "output_dir")
        if config.resume_from_checkpoint != "latest":
            check_paths(config, "resume_from_checkpoint")
        check_sources(config, "train_dataset", "validation_dataset", "prompt_dataset")
    elif config.dry_run_size is None:
        check_sources(config, "train_dataset")

    # Imported here, so that a misspelt option is reported before torch is loaded.
    from ..runtime.messages import set_up_logging
    from ..trainers.dry_run import dry_run
    from ..trainers.prfl_trainer import PRFLTrainer

    set_up_logging()
    if config.dry_run:
        dry_run(PRFLTrainer.from_config, config)
    else:
        PRFLTrainer.from_config(config).train()


if __name__ == "__main__":
    run(main)
