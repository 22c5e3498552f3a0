r"""
Scores the videos in a folder with a reward model, and prints a table with the best ones first.

    python examples/score_folder.py --folder my_videos --reward_model outputs/reward/best \
        --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers

The caption of a video is read from a text file beside it, `cat.txt` for `cat.mp4`. Videos without one get `--caption`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hy_prfl.configs.parser import parse_config
from hy_prfl.data.encoding import LatentEncoder
from hy_prfl.data.preprocessing import ClipSettings
from hy_prfl.evaluation.scoring import score_videos
from hy_prfl.models.loading import load_reward_model


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(kw_only=True)
class Config:
    folder: str = field(metadata={"help": "Folder of mp4 files."})
    reward_model: str = field(metadata={"help": "Reward model: a folder or a Hub id."})
    pretrained_model_name_or_path: str = field(metadata={"help": "Pipeline whose VAE and text encoder are used."})
    caption: str = field(default="", metadata={"help": "Caption of videos that have no text file."})
    timesteps: list[int] = field(default_factory=lambda: [201, 400, 600, 800], metadata={"help": "Noise levels."})
    num_frames: int = field(default=81, metadata={"help": "Frames of a clip, 4k + 1."})
    resolution: int = field(default=480, metadata={"help": "Short side that videos are resized to."})


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    config = parse_config(Config, argv, description=__doc__)
    videos = sorted(Path(config.folder).glob("*.mp4"))
    texts = [video.with_suffix(".txt") for video in videos]
    captions = [text.read_text().strip() if text.is_file() else config.caption for text in texts]

    reward_model = load_reward_model(config.reward_model).to(DEVICE)
    encoder = LatentEncoder.from_pretrained(config.pretrained_model_name_or_path, device=DEVICE)
    # Use the same settings as for the clips that the reward model was trained on.
    settings = ClipSettings(num_frames=config.num_frames, min_num_frames=5, resolution=config.resolution)
    logits = score_videos(reward_model, encoder, videos, captions, config.timesteps, clip_settings=settings)

    rewards = {video.name: row.sigmoid().tolist() for video, row in zip(videos, logits, strict=True)}
    print(f"{'video':<32}{'mean':>8}" + "".join(f"{timestep:>8}" for timestep in config.timesteps))
    for name, row in sorted(rewards.items(), key=lambda item: -sum(item[1])):
        print(f"{name:<32}{sum(row) / len(row):>8.3f}" + "".join(f"{reward:>8.3f}" for reward in row))
    return rewards


if __name__ == "__main__":
    main()
