"""`--dry_run`: one step of a recipe on random latents of its real shape, and what memory and time it took."""

import dataclasses
import logging
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from ..configs.base import TrainingConfig, check, names_in
from ..configs.prfl import PRFLTrainingConfig
from ..configs.reward import RewardTrainingConfig
from ..data.dataset import latent_shapes, load_latent_dataset, read_columns
from ..data.encoding import vae_fingerprint
from ..data.synthetic import synthetic_dataset
from ..formats.pipeline_info import PipelineInfo
from ..planning.workloads import TEXT_TOKENS, images_of_clip
from ..runtime.device_memory import peak_device_memory
from ..runtime.distributed import gather_records, mean_over_ranks
from .base import Trainer


logger = logging.getLogger(__name__)

GIGA = 1e9
# Options that a dry run turns off, with the value that does.
LEFT_OUT: dict[str, Any] = {
    "validation_dataset": None,
    "resume_from_checkpoint": None,
    "report_to": ["none"],
    "push_to_hub": False,
    "hub_model_id": None,
    "hub_private_repo": False,
    "hub_push_checkpoints": None,
}


@dataclasses.dataclass(frozen=True)
class DryRunReport:
    """
    Time and memory of one step, of the process that needed most. A gigabyte is 10^9 bytes.

    Args:
        latents_shape (`tuple[int, ...]`):
            `(num_channels, num_frames, height, width)` of each clip.
        num_processes, engine:
            How the step was run.
        on_device (`bool`):
            Whether memory is that of tensors on an accelerator; otherwise it is the memory of the whole process.
        loading_seconds, loading_memory (`float`):
            Time to load models, optimizer and batches, and the peak memory until then.
        step_seconds, step_memory (`float`):
            Time of the step, and the peak memory since the process began. It is the first step, which also chooses
            kernels and allocates the optimizer's states, and, if rollouts are reused, walks a new chain.
        metrics (`dict[str, float]`):
            Metrics that the step would have logged.
        reusing_seconds (`float`, *optional*), rollout_interval (`int`, defaults to 1):
            Time of a second step that reuses the first one's rollouts, and number of updates for each new one.
    """

    latents_shape: tuple[int, ...]
    num_processes: int
    engine: str
    on_device: bool
    loading_seconds: float
    loading_memory: float
    step_seconds: float
    step_memory: float
    metrics: dict[str, float]
    reusing_seconds: float | None = None
    rollout_interval: int = 1

    def __str__(self) -> str:
        kind = "on the device" if self.on_device else "of the process"
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        reusing, number = "", self.rollout_interval
        if self.reusing_seconds is not None:
            reusing = f"  reusing step {self.reusing_seconds:10.1f} s, {number - 1} of {number} are such; the first has a rollout\n"
        return (
            f"dry run: latents {' x '.join(map(str, self.latents_shape))}, {self.num_processes} process(es), "
            f"engine {self.engine}\n"
            f"  loading   {self.loading_seconds:10.1f} s {self.loading_memory:10.2f} GB {kind}, at most\n"
            f"  one step  {self.step_seconds:10.1f} s {self.step_memory:10.2f} GB {kind}, at most\n"
            f"{reusing}"
            f"  {metrics}"
        )


def dry_run(make_trainer: Callable[[Any], Trainer], config: TrainingConfig) -> DryRunReport:
    """
    Load everything and run one step on random latents, without keeping anything; a second one if rollouts are reused.

    Models, engine, options and shapes are those of the real run. A collective.

    Args:
        make_trainer (`Callable`):
            Builds the trainer from its options.
        config (`TrainingConfig`):
            Options of the trainer. Clips have the size `dry_run_size`, or that of the largest clip of `train_dataset`.
            For Wan2.2 TI2V 5B the dataset also decides whether clips start with an image; with `dry_run_size` they
            do not.

    Raises:
        ValueError: If the pipeline's VAE cannot encode clips of `dry_run_size`.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hy_prfl_dry_run_") as folder:
        dataset_dir = Path(folder) / "data"
        latents_shape = write_inputs(config, dataset_dir)
        changes = {**LEFT_OUT, "train_dataset": str(dataset_dir), "output_dir": str(Path(folder) / "run")}
        if isinstance(config, PRFLTrainingConfig):
            changes |= {"prompt_dataset": None, "monitor_reward_models": [], "on_hacking": None}
        if isinstance(config, RewardTrainingConfig):
            changes |= {"train_dataset_weights": None, "validation_random_timesteps": 0}
        trainer = make_trainer(dataclasses.replace(config, **changes))
        trainer.start_streams()
        loading_seconds, loading_memory = time.perf_counter() - start, peak_memory(trainer.accelerator.device)
        start = time.perf_counter()
        metrics = mean_over_ranks(trainer.accelerator, trainer.train_step())
        step_seconds, step_memory = time.perf_counter() - start, peak_memory(trainer.accelerator.device)
        interval = config.rollout_interval if isinstance(config, PRFLTrainingConfig) else 1
        reusing_seconds = 0.0
        if interval > 1:
            trainer.global_step += 1
            start = time.perf_counter()
            mean_over_ranks(trainer.accelerator, trainer.train_step())
            reusing_seconds = time.perf_counter() - start
        measured = gather_records([(loading_seconds, loading_memory, step_seconds, step_memory, reusing_seconds)])
        most = [max(values) for values in zip(*measured, strict=True)]
        trainer.accelerator.end_training()
    report = DryRunReport(
        latents_shape=latents_shape,
        num_processes=trainer.accelerator.num_processes,
        engine=trainer.run.engine,
        on_device=trainer.accelerator.device.type != "cpu",
        loading_seconds=most[0],
        loading_memory=most[1] / GIGA,
        step_seconds=most[2],
        step_memory=most[3] / GIGA,
        metrics=metrics,
        reusing_seconds=most[4] if interval > 1 else None,
        rollout_interval=interval,
    )
    logger.info("%s", report)
    return report


def write_inputs(config: TrainingConfig, folder: Path) -> tuple[int, ...]:
    """Write the rows of a dry run, each process for itself, and return the shape of their latents."""
    path, revision = config.pretrained_model_name_or_path, config.revision
    vae = AutoencoderKLWan.from_pretrained(path, subfolder="vae", revision=revision, variant=config.variant)
    transformer = PipelineInfo.read(path, revision).transformer
    condition_channels = transformer["in_channels"] - transformer["out_channels"]
    if config.dry_run_size is None:
        shapes = [shapes_of_largest(source) for source in names_in(config.train_dataset)]
        latents_shape, condition_shape = max(shapes, key=lambda found: math.prod(found[0]))
    else:
        latents_shape = shape_of_latents(vae, config.dry_run_size)
        condition_shape = (condition_channels, *latents_shape[1:]) if condition_channels else None
    image_dim = transformer["image_dim"]
    num_images, num_tokens = images_of_clip(transformer)
    image_tokens = (num_tokens,) if num_images == 1 else (num_images, num_tokens)
    dataset = synthetic_dataset(
        latents_shape=latents_shape,
        text_dim=transformer["text_dim"],
        text_tokens=TEXT_TOKENS,
        vae_fingerprint=vae_fingerprint(vae),
        condition_shape=condition_shape,
        image_embeds_shape=None if image_dim is None else (*image_tokens, image_dim),
    )
    dataset.save_to_disk(folder)
    return latents_shape


def shapes_of_largest(path: str) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Shapes of the latents of a dataset's largest clip, and of its image condition if it has one."""
    dataset = load_latent_dataset(path)
    shapes = latent_shapes(dataset)
    index = max(range(len(shapes)), key=lambda index: math.prod(shapes[index]))
    condition_shape = read_columns(dataset, ["condition_shape"])[index]["condition_shape"]
    return shapes[index], None if condition_shape is None else tuple(condition_shape)


def shape_of_latents(vae: AutoencoderKLWan, size: list[int]) -> tuple[int, ...]:
    """
    `(num_channels, num_frames, height, width)` of the latents of a clip of this size.

    Raises:
        ValueError: If the VAE cannot encode such a clip.
    """
    num_frames, height, width = size
    temporal, spatial = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    fits = num_frames % temporal == 1 and height % spatial == 0 and width % spatial == 0
    check(fits, "dry_run_size", size, f"{temporal}k + 1 frames, height and width multiples of {spatial}")
    return vae.config.z_dim, (num_frames - 1) // temporal + 1, height // spatial, width // spatial


def peak_memory(device: torch.device) -> float:
    """Peak memory in bytes: of tensors on an accelerator, or of the whole process on the CPU."""
    peak = peak_device_memory(device)
    if peak is not None:
        return float(peak)
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
