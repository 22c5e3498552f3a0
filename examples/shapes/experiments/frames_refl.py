"""
Tunes the generator by RGB ReFL on a reward of `frames_reward`, with the options of `train_prfl`:

    python -m examples.shapes.experiments.frames_refl --config examples/shapes/train_prfl.yaml \\
        --decodes all --frames_reward outputs/frames_reward --output_dir outputs/frames_refl --step_range 13 18

Not a method of this project: what PRFL is compared with. The latent reward model is read for the checks, and scores the
validation's samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from diffusers import AutoencoderKLWan

from examples.benchmark.rgb_refl import RGBReFLTrainer
from examples.shapes.experiments.frames_reward import NETWORK, FramesReward
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.models.reward_model import WanRewardModel


@dataclass(kw_only=True)
class FramesReFLConfig(PRFLTrainingConfig):
    """
    Options of `train_prfl`, and of the reward of frames.

    > Parameters of the reward of frames
    """

    # Parameters of the reward of frames
    frames_reward: str = field(metadata={"help": "Output folder of `frames_reward`."})
    decodes: Literal["first", "all"] = field(metadata={"help": "Decode the first latent frame, or all."})


def build_reward(vae: AutoencoderKLWan, *, folder: str, decodes: Literal["first", "all"]) -> FramesReward:
    """The trained reward of a folder, frozen."""
    network = WanRewardModel.from_pretrained(Path(folder) / NETWORK)
    return FramesReward(vae, network, decodes).requires_grad_(False).eval()


def build_trainer(config: FramesReFLConfig, trainer: type[RGBReFLTrainer] = RGBReFLTrainer) -> RGBReFLTrainer:
    """The trainer of these options."""
    return trainer.from_config(
        config, build_reward=partial(build_reward, folder=config.frames_reward, decodes=config.decodes)
    )


def main(argv: Sequence[str] | None = None) -> None:
    build_trainer(parse_config(FramesReFLConfig, argv, description=__doc__)).train()


if __name__ == "__main__":
    main()
