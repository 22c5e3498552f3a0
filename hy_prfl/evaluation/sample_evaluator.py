"""Samples held-out prompts with fixed noise while the generator trains, and scores the samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from torch import nn
from tqdm import tqdm

from ..data.collators import LatentBatch, collate_latents
from ..data.dataset import latent_shapes
from ..data.sampler import shard_batches
from ..data.schema import table_to_rows
from ..flow_matching import row_noise
from ..inference.generation import decode_latents
from ..inference.video_files import write_video
from ..losses import RewardCombination
from ..models.conditioning import Conditioning
from ..models.reward_model import WanRewardModel
from ..rollout.sampling import sample_latents
from ..runtime.distributed import gather_records
from ..runtime.vae_tiling import VAETiling
from .scoring import score_latents
from .tracking import log_videos


def score_samples(
    model: nn.Module,
    latents: torch.Tensor,
    batch: LatentBatch,
    *,
    timesteps: Sequence[float],
    seed: int,
    accelerator: Accelerator,
    in_use: Callable[[nn.Module], AbstractContextManager[None]],
) -> torch.Tensor:
    """
    Logits `(batch_size, num_timesteps)` of a validation's samples, with the same noise for every reward model.

    Args:
        seed (`int`):
            Seed of the samples. The noise that they are scored with is not the noise that they start from.
        in_use (`Callable`):
            Returns a context in which the model is on the device where it computes.
    """
    with in_use(model), accelerator.autocast():
        return score_latents(model, latents, Conditioning.of(batch), timesteps, row_ids=batch.ids, seed=seed + 1)


class Observer(Protocol):
    """Takes further measurements of the samples."""

    def observe(
        self, transformer: nn.Module, batch: LatentBatch, indices: Sequence[int], latents: torch.Tensor
    ) -> list[dict[str, Any]]:
        """Measurements of each sample of a batch, picklable. All ranks call it equally often."""

    def summarize(self, measured: Sequence[dict[str, Any]], *, logits: torch.Tensor) -> dict[str, float]:
        """
        Metrics of all samples, the same on all ranks.

        Args:
            measured (`Sequence[dict]`):
                One entry for each row, in their order.
            logits (`torch.Tensor` of shape `(num_rows, num_timesteps)`):
                Their logits, of several reward models combined.
        """


class SampleEvaluator:
    """
    Samples the prompts of a dataset and returns the mean reward at fixed timesteps.

    | name | value |
    |---|---|
    | `reward/t<timestep>`, `reward` | mean of `sigmoid(logit)` at one timestep, and over all timesteps |
    | `reward_logit` | mean logit |
    | `reward/<name>` | with several reward models the reward of each; the others are of their combination |
    | `reward_disagreement` | with several reward models the mean standard deviation of their logits |
    | `latents_std` | standard deviation of the samples, which drifts when the reward is hacked |

    Noise depends on row and seed only, so two steps of a run, and two runs, are compared from the same noise.

    Args:
        dataset (`Dataset`):
            Rows whose prompts are sampled; only prompt, image and shape are used.
        reward_models (`Mapping[str, WanRewardModel]`):
            The reward models by name.
        combination (`RewardCombination`):
            Combines their logits into one.
        in_use (`Callable`):
            Returns a context in which a reward model is on the device where it computes.
        vae (`AutoencoderKLWan`, *optional*):
            Decodes the samples to `output_dir/step-<step>/<row>.mp4`; without it nothing is decoded.
        guidance_scale (`float`):
            Scale of classifier-free guidance away from the empty prompt, 1 is none.
        dtype (`torch.dtype`):
            Type of the embeddings that the models get.
        num_replicas, replica (`int`, defaults to 1 and 0):
            Number of data-parallel replicas and the one that this process belongs to.
        vae_tiling (`str`, defaults to `"auto"`):
            Whether the VAE works in tiles, see [`~hy_prfl.runtime.vae_tiling.set_tiling`].
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        reward_models: Mapping[str, WanRewardModel],
        combination: RewardCombination,
        in_use: Callable[[nn.Module], AbstractContextManager[None]],
        scheduler: UniPCMultistepScheduler,
        vae: AutoencoderKLWan | None,
        output_dir: Path,
        num_inference_steps: int,
        guidance_scale: float,
        timesteps: list[int],
        batch_size: int,
        fps: int,
        seed: int,
        dtype: torch.dtype,
        num_replicas: int = 1,
        replica: int = 0,
        vae_tiling: VAETiling = "auto",
    ) -> None:
        self.dataset = dataset
        self.reward_models = dict(reward_models)
        self.combination = combination
        self.in_use = in_use
        self.scheduler = scheduler
        self.vae = vae
        self.vae_tiling = vae_tiling
        self.output_dir = output_dir
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.timesteps = timesteps
        self.batch_size = batch_size
        self.fps = fps
        self.seed = seed
        self.dtype = dtype
        self.num_replicas = num_replicas
        self.replica = replica

    @torch.no_grad()
    def __call__(
        self, transformer: nn.Module, accelerator: Accelerator, *, step: int, observer: Observer | None = None
    ) -> dict[str, float]:
        """
        Sample and score; all ranks do the same number of forwards and get the same result. A collective.

        Args:
            observer (`Observer`, *optional*):
                Takes further measurements of the samples; its metrics are added.
        """
        records: list[tuple[int, list[list[float]], float, dict[str, Any]]] = []
        folder = self.output_dir / f"step-{step}"
        for indices, batch in self._batches(self.dataset, accelerator, "Sampling"):
            latents = self._sample(transformer, batch)
            logits = self._score(latents, batch, accelerator)
            stds = latents.flatten(1).std(dim=1)
            measured: list[dict[str, Any]] = [{} for _ in indices]
            if observer is not None:
                measured = observer.observe(transformer, batch, indices, latents)
            records.extend(zip(indices, logits.tolist(), stds.tolist(), measured, strict=True))
            if self.vae is not None:
                self._write_videos(latents, indices, folder)
        # Rows that fill up a batch come more than once, with the same values.
        by_row = {index: values for index, *values in sorted(gather_records(records), key=lambda record: record[0])}
        # By now all ranks have written their videos.
        videos = {f"validation/{path.stem}": path for path in sorted(folder.glob("*.mp4"))}
        log_videos(accelerator, videos, step=step, fps=self.fps)
        # (num_models, num_rows, num_timesteps)
        model_logits = torch.tensor([logits for logits, _, _ in by_row.values()]).movedim(1, 0)
        all_logits = self.combination(model_logits)
        metrics = {
            f"reward/t{timestep}": float(all_logits[:, column].sigmoid().mean())
            for column, timestep in enumerate(self.timesteps)
        }
        metrics["reward"] = float(all_logits.sigmoid().mean())
        metrics["reward_logit"] = float(all_logits.mean())
        if len(self.reward_models) > 1:
            for name, own_logits in zip(self.reward_models, model_logits, strict=True):
                metrics[f"reward/{name}"] = float(own_logits.sigmoid().mean())
            metrics["reward_disagreement"] = float(self.combination.spread(model_logits).mean())
        metrics["latents_std"] = float(np.mean([std for _, std, _ in by_row.values()]))
        if observer is not None:
            metrics |= observer.summarize([measured for _, _, measured in by_row.values()], logits=all_logits)
        return metrics

    @torch.no_grad()
    def score_clips(self, dataset: Dataset, accelerator: Accelerator) -> torch.Tensor:
        """
        Score clips as the samples are scored. A collective, divided among the replicas, with the same result on all ranks.

        Args:
            dataset (`Dataset`):
                Rows with latents.

        Returns:
            `torch.Tensor` of shape `(num_rows, num_timesteps)`: logits, of several reward models combined; float32 on the
            CPU.
        """
        records: list[tuple[int, list[list[float]]]] = []
        for indices, batch in self._batches(dataset, accelerator, "Scoring real clips"):
            assert batch.latents is not None
            records.extend(zip(indices, self._score(batch.latents, batch, accelerator).tolist(), strict=True))
        by_row = dict(gather_records(records))
        return self.combination(torch.tensor([by_row[index] for index in range(len(dataset))]).movedim(1, 0))

    def _batches(
        self, dataset: Dataset, accelerator: Accelerator, description: str
    ) -> Iterator[tuple[list[int], LatentBatch]]:
        """This replica's batches of a dataset on the device, with the positions of their rows."""
        batches = shard_batches(
            latent_shapes(dataset), batch_size=self.batch_size, num_replicas=self.num_replicas, replica=self.replica
        )
        for indices in tqdm(batches, desc=description, disable=not accelerator.is_main_process, leave=False):
            rows = [table_to_rows(dataset[index])[0] for index in indices]
            yield indices, collate_latents(rows).to(accelerator.device, self.dtype)

    def _score(self, latents: torch.Tensor, batch: LatentBatch, accelerator: Accelerator) -> torch.Tensor:
        """Logits `(batch_size, num_models, num_timesteps)` of clean latents by each reward model."""
        logits = [
            score_samples(
                model,
                latents,
                batch,
                timesteps=self.timesteps,
                seed=self.seed,
                accelerator=accelerator,
                in_use=self.in_use,
            )
            for model in self.reward_models.values()
        ]
        return torch.stack(logits, dim=1)

    def _sample(self, transformer: nn.Module, batch: LatentBatch) -> torch.Tensor:
        noise = [row_noise(row_id, batch.latents_shape, seed=self.seed) for row_id in batch.ids]
        return sample_latents(
            transformer,
            self.scheduler,
            noise=torch.stack(noise).to(batch.prompt_embeds.device),
            num_inference_steps=self.num_inference_steps,
            conditioning=Conditioning.of(batch),
            negative_prompt_embeds=batch.null_prompt_embeds,
            guidance_scale=self.guidance_scale,
        )

    def _write_videos(self, latents: torch.Tensor, indices: list[int], folder: Path) -> None:
        assert self.vae is not None
        folder.mkdir(parents=True, exist_ok=True)
        for index, frames in zip(indices, decode_latents(self.vae, latents, self.vae_tiling), strict=True):
            # Several replicas have the same row if there are fewer rows than replicas.
            write_video(folder / f"{index:04d}.mp4", frames, self.fps, tag=f"-{self.replica}")
