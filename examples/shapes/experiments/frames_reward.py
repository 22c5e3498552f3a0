"""
The reward model's network, fed with decoded frames instead of latents: the reward of RGB ReFL in this world.

    python -m examples.shapes.experiments.frames_reward --decodes all --output_dir outputs/frames_reward \\
        --train_dataset outputs/demo/latents/labelled --validation_dataset outputs/demo/latents/held_out

Blocks, pooling and head are those of the latent reward model, made of the same generator; only the patch embedding is
new. It learns from what the VAE makes of the same latents, as often and at the same pace as the latent one, but without
noise: decoded frames have none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKLWan
from diffusers.optimization import get_scheduler
from sklearn.metrics import roc_auc_score
from torch import nn
from tqdm import tqdm, trange

from examples.shapes.judge import write_json
from hy_prfl.configs.parser import parse_config
from hy_prfl.data.collators import LabeledBatch, collate_labeled
from hy_prfl.data.dataset import load_latent_dataset, rows_with_label
from hy_prfl.data.schema import table_to_rows
from hy_prfl.losses import binary_reward_loss
from hy_prfl.models.loading import load_transformer
from hy_prfl.models.reward_model import BACKBONE_CONFIG, WanRewardModel


# A token of the latent reward model covers 4 frames of 16 x 16 pixels; its patches are of 2 x 2 of these cubes.
CUBE = (4, 8, 8)
TASK, NETWORK = "motion_quality", "network"


class FramesReward(nn.Module):
    """
    Latents -> frames -> logit.

    Args:
        vae (`AutoencoderKLWan`):
            Decodes; frozen.
        network (`WanRewardModel`):
            Takes cubes of pixels as channels, see `fold_frames`.
        decodes (`"first"` or `"all"`):
            The first latent frame, which is one frame of video, or all of them.
    """

    def __init__(self, vae: AutoencoderKLWan, network: WanRewardModel, decodes: Literal["first", "all"]) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False)
        self.network = network
        self.num_decoded = 1 if decodes == "first" else None
        shape = (1, -1, 1, 1, 1)
        self.register_buffer("latents_mean", torch.tensor(vae.config.latents_mean).view(shape))
        self.register_buffer("latents_std", torch.tensor(vae.config.latents_std).view(shape))

    def forward(self, latents: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Logits `(batch_size,)` of clean latents `(batch_size, num_channels, num_frames, height, width)`."""
        return self.judge(self.decode(latents), prompt_embeds)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Cubes of the frames, see `fold_frames`."""
        latents = latents[:, :, : self.num_decoded] * self.latents_std + self.latents_mean
        return fold_frames(self.vae.decode(latents).sample)

    def judge(self, cubes: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Logits of cubes."""
        timestep = torch.zeros(len(cubes), device=cubes.device)
        return self.network(hidden_states=cubes, timestep=timestep, encoder_hidden_states=prompt_embeds).logits


def fold_frames(frames: torch.Tensor) -> torch.Tensor:
    """
    Frames `(batch_size, 3, 4k + 1, height, width)` to cubes `(batch_size, 768, k + 1, height / 8, width / 8)`.

    The first frame counts four times, as the VAE's first latent frame is of one frame only.
    """
    depth, height, width = CUBE
    frames = torch.cat([frames[:, :, :1].expand(-1, -1, depth - 1, -1, -1), frames], dim=2)
    batch_size, channels, num_frames, *size = frames.shape
    cubes = frames.reshape(
        batch_size, channels, num_frames // depth, depth, size[0] // height, height, size[1] // width, width
    )
    return cubes.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def make_network(pretrained_model_name_or_path: str, num_layers: int, seed: int) -> WanRewardModel:
    """The network with the weights of the generator's first blocks, but for the patch embedding, pooling and head."""
    transformer = load_transformer(pretrained_model_name_or_path)
    torch.manual_seed(seed)
    backbone = {name: transformer.config[name] for name in BACKBONE_CONFIG}
    network = WanRewardModel(**(backbone | {"in_channels": 3 * math.prod(CUBE)}), num_layers=num_layers)
    network.condition_embedder.load_state_dict(transformer.condition_embedder.state_dict())
    for block, source in zip(network.blocks, transformer.blocks[:num_layers], strict=True):
        block.load_state_dict(source.state_dict())
    return network


@dataclass(kw_only=True)
class FramesRewardConfig:
    """Options that are not here are those of `train_reward.yaml`."""

    train_dataset: str = field(metadata={"help": "Latent dataset with labels."})
    validation_dataset: str = field(metadata={"help": "Latent dataset with labels, for the AUC."})
    output_dir: str = field(metadata={"help": "Folder for the network and metrics.json."})
    decodes: Literal["first", "all"] = field(metadata={"help": "Decode the first latent frame, or all."})
    pretrained_model_name_or_path: str = field(
        default="examples/shapes/pretrained", metadata={"help": "The pipeline of the generator."}
    )
    num_layers: int = field(default=4, metadata={"help": "Blocks."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    lr_warmup_steps: int = field(default=20, metadata={"help": "Updates of warm-up; cosine decay follows."})
    train_batch_size: int = field(default=32, metadata={"help": "Clips in an update."})
    max_train_steps: int = field(default=400, metadata={"help": "Updates."})
    seed: int = field(default=0, metadata={"help": "Seed of the order of the clips and of new weights."})


class LabelledClips:
    """Rows with a label, decoded once."""

    def __init__(self, path: str, reward: FramesReward, batch_size: int) -> None:
        self.dataset = load_latent_dataset(path)
        self.rows, self.labels = rows_with_label(self.dataset, TASK, path)
        positions = torch.arange(len(self.rows)).split(batch_size)
        with torch.no_grad():
            self.cubes = torch.cat([
                reward.decode(self._collate(some).clips.latents) for some in tqdm(positions, desc="Decoding")
            ])  # fmt: skip

    def batch(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cubes, prompt embeddings and labels of the rows at these positions among those that have a label."""
        batch = self._collate(positions)
        return self.cubes[positions], batch.clips.prompt_embeds, batch.labels

    def _collate(self, positions: torch.Tensor) -> LabeledBatch:
        rows = [table_to_rows(self.dataset[self.rows[position]])[0] for position in positions.tolist()]
        return collate_labeled(rows, task=TASK).to(torch.device("cpu"))


def train(config: FramesRewardConfig) -> dict[str, float]:
    """Train the network, write it, and return its AUC on the validation clips."""
    network = make_network(config.pretrained_model_name_or_path, config.num_layers, config.seed)
    vae = AutoencoderKLWan.from_pretrained(config.pretrained_model_name_or_path, subfolder="vae")
    reward = FramesReward(vae, network, config.decodes)
    # Frozen with the latent one too; the patch embedding is new here.
    network.condition_embedder.requires_grad_(False)
    clips = LabelledClips(config.train_dataset, reward, config.train_batch_size)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in network.parameters() if parameter.requires_grad], lr=config.learning_rate
    )
    schedule = get_scheduler(
        "cosine",
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    generator = torch.Generator().manual_seed(config.seed)
    for _ in trange(config.max_train_steps, desc="Updates"):
        order = torch.randperm(len(clips.rows), generator=generator)[: config.train_batch_size]
        cubes, prompt_embeds, labels = clips.batch(order)
        loss = binary_reward_loss(reward.judge(cubes, prompt_embeds), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    unseen = LabelledClips(config.validation_dataset, reward, config.train_batch_size)
    metrics = {"auc": area_under_curve(reward, unseen, config.train_batch_size)}
    network.save_pretrained(Path(config.output_dir) / NETWORK)
    write_json(Path(config.output_dir) / "metrics.json", metrics)
    return metrics


@torch.no_grad()
def area_under_curve(reward: FramesReward, clips: LabelledClips, batch_size: int) -> float:
    """AUC on clean clips."""
    logits = []
    for positions in torch.arange(len(clips.rows)).split(batch_size):
        cubes, prompt_embeds, _ = clips.batch(positions)
        logits += reward.judge(cubes, prompt_embeds).tolist()
    return float(roc_auc_score(clips.labels, logits))


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(FramesRewardConfig, argv, description=__doc__)
    print(f"{config.output_dir}: AUC {train(config)['auc']:.3f}")


if __name__ == "__main__":
    main()
