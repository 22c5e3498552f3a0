"""The training loop: updates, logging, validation, checkpoints, resuming. Knows no loss."""

import dataclasses
import json
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, set_seed
from datasets import Dataset
from diffusers import AutoencoderKLWan
from diffusers.optimization import get_scheduler
from torch import nn
from tqdm import tqdm

from ..checkpointing import find_checkpoint, load_checkpoint, save_checkpoint
from ..configs.base import TrainingConfig, check, save_config
from ..data.collators import LatentBatch
from ..data.dataset import check_rows_fit, latent_shapes
from ..data.encoding import vae_fingerprint
from ..distributed import all_finite, any_rank, build_accelerator, forget_deepspeed_in_transformers, mean_over_ranks
from ..flow_matching import make_generator, sample_noise, sample_sigmas
from ..models.context_parallel import ContextParallelGroup, check_divisible


logger = get_logger(__name__)

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"


class Trainer(ABC):
    """
    Runs `train_step` until `max_train_steps`; a subclass says what a step, a validation and the trained model are.

    Construction is in two parts: a subclass calls `super().__init__`, opens its data and loads its models, and then
    calls `prepare`. All that is cheap to check comes before anything large is loaded.

    Args:
        config (`TrainingConfig`):
            Options of the run.
        backwards_per_update (`int`):
            Number of backward passes that add up to one optimizer update.
    """

    def __init__(self, config: TrainingConfig, *, backwards_per_update: int) -> None:
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.checkpoint = find_checkpoint(self.output_dir, config.resume_from_checkpoint)
        report_to = [name for name in config.report_to if name != "none"]
        available = [str(tracker) for tracker in get_available_trackers()]
        for name in report_to:
            check(name in available, "report_to", name, f"`none` or one of the trackers installed here: {available}")
        self.accelerator = build_accelerator(
            gradient_accumulation_steps=backwards_per_update,
            train_batch_size=config.train_batch_size,
            log_with=report_to,
            output_dir=self.output_dir,
        )
        set_seed(config.seed)
        # Ranks that share a clip are one replica: they get the same rows and draw the same noise.
        degree = config.context_parallel_degree
        self.context_parallel = ContextParallelGroup(degree) if degree > 1 else None
        self.num_replicas, self.replica = (
            self.accelerator.num_processes // degree,
            self.accelerator.process_index // degree,
        )
        self.global_step = 0
        self.interrupted = False

    @abstractmethod
    def start_streams(self) -> None:
        """Open the batch streams at the position that belongs to `global_step`."""

    @abstractmethod
    def train_step(self) -> dict[str, torch.Tensor]:
        """Do one step and return scalars to log."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Evaluate the model and return scalars to log. A collective."""

    @abstractmethod
    def save_model(self, directory: Path) -> None:
        """Write the trained weights into `directory`, in the format users load. A collective."""

    def save_result(self, directory: Path) -> None:
        """Write what the run is for, once it is finished; `save_model` unless a subclass knows better."""
        self.save_model(directory)

    @abstractmethod
    def load_model(self, directory: Path) -> None:
        """Load what `save_model` wrote into the model in training."""

    def pipeline_vae_fingerprint(self) -> str:
        """Identity of the VAE of the pipeline that is trained; latents of another VAE mean nothing to it."""
        vae = AutoencoderKLWan.from_pretrained(
            self.config.pretrained_model_name_or_path,
            subfolder="vae",
            revision=self.config.revision,
            variant=self.config.variant,
        )
        return vae_fingerprint(vae)

    def check_dataset(self, dataset: Dataset, source: str, model_config: Mapping[str, Any]) -> None:
        """Refuse rows that the model cannot take, or that do not divide over the ranks that share a clip."""
        check_rows_fit(
            dataset,
            source,
            num_channels=model_config["out_channels"],
            text_dim=model_config["text_dim"],
            image_dim=model_config["image_dim"],
            patch_size=model_config["patch_size"],
        )
        check_divisible(
            self.config.context_parallel_degree,
            num_heads=model_config["num_attention_heads"],
            patch_size=model_config["patch_size"],
            shapes=latent_shapes(dataset),
            source=source,
        )

    def save_rank_state(self, directory: Path) -> None:  # noqa: B027
        """Write what only this rank knows and `Accelerator.save_state` does not; nothing unless a subclass does."""

    def load_rank_state(self, directory: Path) -> None:  # noqa: B027
        """Load what `save_rank_state` wrote."""

    @property
    def weight_dtype(self) -> torch.dtype:
        """Type of the weights that do not train; those that do are float32."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision, torch.float32)

    def prepare(self, model: nn.Module, parameter_groups: list[dict[str, Any]], batches_per_epoch: int) -> nn.Module:
        """
        Make optimizer and schedule, hand model and optimizer to Accelerate, and return the wrapped model.

        Args:
            model (`nn.Module`):
                The model, its frozen parameters without `requires_grad`.
            parameter_groups (`list[dict]`):
                Optimizer groups, each with its learning rate.
            batches_per_epoch (`int`):
                Batches of one epoch on one process; sets the number of steps if `max_train_steps` is left out.
        """
        config = self.config
        updates_per_epoch = -(-batches_per_epoch // config.gradient_accumulation_steps)
        self.max_train_steps = config.max_train_steps or config.num_train_epochs * updates_per_epoch
        optimizer = torch.optim.AdamW(
            parameter_groups,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=self.max_train_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        self.trainable_parameters = [parameter for group in parameter_groups for parameter in group["params"]]
        # The schedule is not prepared: Accelerate would advance it once per process.
        wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        if self.accelerator.state.deepspeed_plugin is not None:
            forget_deepspeed_in_transformers()
        # New weights start equal on all ranks; from here on dropout may differ.
        set_seed(config.seed, device_specific=True)
        self.accelerator.register_for_checkpointing(self.lr_scheduler)
        self.accelerator.register_save_state_pre_hook(self._save_model_hook)
        self.accelerator.register_load_state_pre_hook(self._load_model_hook)
        return wrapped

    def train(self) -> None:
        """Train to the end, from the beginning or from the checkpoint that the configuration names."""
        self._start_run()
        self.start_streams()
        progress = tqdm(
            total=self.max_train_steps,
            initial=self.global_step,
            desc="Steps",
            disable=not self.accelerator.is_main_process,
        )
        with self._catch_signals():
            while self.global_step < self.max_train_steps and not self.interrupted:
                metrics = self.train_step()
                self.lr_scheduler.step()
                self.global_step += 1
                progress.update()
                self._after_step(metrics, progress)
        progress.close()
        if self.global_step < self.max_train_steps:
            logger.warning(
                "Interrupted after step %d; continue with --resume_from_checkpoint latest.", self.global_step
            )
        else:
            self.save_result(self.output_dir)
            logger.info("Finished %d steps: %s", self.global_step, self.output_dir)
        self.accelerator.end_training()

    def backward(self, loss: torch.Tensor, sample_ids: Iterable[str], value: torch.Tensor | None = None) -> None:
        """
        Accumulate the gradient of `loss`, after all ranks agreed that it is finite.

        Args:
            loss (`torch.Tensor`):
                Scalar to differentiate.
            sample_ids (`Iterable[str]`):
                Rows of the micro-batch, for the message.
            value (`torch.Tensor`, *optional*):
                The loss to look at, if `loss` is only a surrogate with the same gradient.

        Raises:
            FloatingPointError: On every rank, if the loss is not finite on one of them.
        """
        value = loss if value is None else value
        if not all_finite(self.accelerator, torch.stack([value.detach().float(), loss.detach().float()])):
            raise FloatingPointError(
                f"Step {self.global_step}, rank {self.accelerator.process_index}: a loss is not finite on some rank. "
                f"Here it is {value.detach()}, for the rows {', '.join(sample_ids)}."
            )
        self.accelerator.backward(loss)

    def optimizer_step(self) -> None:
        """Clip and update if this backward pass was the last of its update; otherwise keep accumulating."""
        if self.accelerator.sync_gradients:
            self.grad_norm = self.accelerator.clip_grad_norm_(self.trainable_parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def generators(self, stream: int, micro_step: int, batch_size: int) -> list[torch.Generator]:
        """
        One generator for each sample of this process's micro-batch.

        It is seeded by the sample's place in the global batch, so a run draws the same noise for the same clips on any
        number of processes, and a resumed run goes on with the same draws.

        Args:
            stream (`int`):
                Tells apart draws of different purpose.
            micro_step (`int`):
                Micro-batch within the step.
        """
        first = self.replica * batch_size
        return [
            make_generator(self.config.seed, stream, self.global_step, micro_step, first + index)
            for index in range(batch_size)
        ]

    def draw_noise(self, stream: int, micro_step: int, batch: LatentBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise of the shape of the batch's latents, and a noise level for each clip from the configured law."""
        config = self.config
        generators = self.generators(stream, micro_step, len(batch))
        sigmas = sample_sigmas(
            generators,
            weighting_scheme=config.weighting_scheme,
            flow_shift=config.flow_shift,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
        )
        noise = sample_noise(batch.latents_shape, generators)
        return noise.to(self.accelerator.device), sigmas.to(self.accelerator.device)

    def shared_generator(self, stream: int, micro_step: int) -> torch.Generator:
        """Generator that is the same on all ranks, for what decides on control flow."""
        return make_generator(self.config.seed, stream, self.global_step, micro_step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the states of Accelerate; JSON values only."""
        return {"global_step": self.global_step, "num_processes": self.accelerator.num_processes}

    def load_state(self, state: dict[str, Any]) -> None:
        """
        Restore what `state` returned.

        Raises:
            ValueError: If the checkpoint was written by another number of processes: which rows were seen would be
                unknown.
        """
        if state["num_processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"`resume_from_checkpoint`: {self.checkpoint} was written by {state['num_processes']} processes, this "
                f"run has {self.accelerator.num_processes}."
            )
        self.global_step = state["global_step"]

    def _start_run(self) -> None:
        if self.checkpoint is not None:
            self.load_state(load_checkpoint(self.accelerator, self.checkpoint))
            logger.info("Continuing from %s.", self.checkpoint)
            self._warn_of_changes(self.checkpoint / CONFIG_FILE)
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.output_dir / CONFIG_FILE)
            self._truncate_metrics()
        options = {
            name: value if isinstance(value, (int, float, str, bool)) else str(value)
            for name, value in dataclasses.asdict(self.config).items()
        }
        self.accelerator.init_trackers(self.config.tracker_project_name, config=options)

    def _warn_of_changes(self, saved: Path) -> None:
        before = yaml.safe_load(saved.read_text(encoding="utf-8"))
        for name, value in dataclasses.asdict(self.config).items():
            if before.get(name) != value and name != "resume_from_checkpoint":
                logger.warning("`%s` was %r before the checkpoint and is %r now.", name, before.get(name), value)

    def _after_step(self, metrics: dict[str, torch.Tensor], progress: tqdm) -> None:
        config, is_last = self.config, self.global_step == self.max_train_steps
        if self.global_step % config.logging_steps == 0 or is_last:
            values = mean_over_ranks(self.accelerator, metrics)
            values["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
            progress.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
            self.log({f"train/{name}": value for name, value in values.items()})
        self.interrupted = any_rank(self.accelerator, self.interrupted)
        if config.validation_dataset and (self.global_step % config.validation_steps == 0 or is_last):
            self.log({f"validation/{name}": value for name, value in self.validate().items()})
        if self.global_step % config.checkpointing_steps == 0 or is_last or self.interrupted:
            save_checkpoint(
                self.accelerator,
                self.output_dir,
                step=self.global_step,
                state=self.state(),
                write_config=lambda folder: save_config(config, folder / CONFIG_FILE),
                total_limit=config.checkpoints_total_limit,
            )

    def log(self, values: dict[str, float]) -> None:
        """Send scalars to the trackers and append them to `metrics.jsonl`."""
        self.accelerator.log(values, step=self.global_step)
        if self.accelerator.is_main_process:
            with (self.output_dir / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.global_step, **values}) + "\n")

    def _truncate_metrics(self) -> None:
        """Drop the lines that a run wrote after the checkpoint it is continued from."""
        path = self.output_dir / METRICS_FILE
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] <= self.global_step]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(path)

    @contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """On SIGINT or SIGTERM finish the step, save and stop; a second signal stops at once."""

        def interrupt(number: int, frame: FrameType | None) -> None:
            self.interrupted = True
            signal.signal(number, previous[number])

        previous = {int(number): signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _save_model_hook(self, models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        self.save_model(Path(output_dir))
        self.save_rank_state(Path(output_dir))
        weights.clear()

    def _load_model_hook(self, models: list[nn.Module], input_dir: str) -> None:
        # DeepSpeed's engine has restored its own share of weights and optimizer by now.
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            self.load_model(Path(input_dir))
        self.load_rank_state(Path(input_dir))
        models.clear()
