"""The training loop: updates, logging, validation, checkpoints, resuming. Knows no loss."""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, set_seed
from datasets import Dataset
from diffusers.optimization import get_scheduler
from torch import nn
from tqdm import tqdm

from ..compatibility import check_rows_fit
from ..configs.base import TrainingConfig, check, names_in
from ..data.collators import LatentBatch
from ..data.dataset import latent_shapes, rows_digest
from ..flow_matching import make_generator, noise_levels, sample_noise
from ..formats.checkpoints import AVERAGE_FOLDER, abandon
from ..formats.training_state import save_checkpoint
from ..runtime.context_parallel import check_divisible
from ..runtime.distributed import any_rank, mean_over_ranks
from ..runtime.provenance import CONFIG_FILE, save_config
from ..runtime.quantization import keep_out_of_ddp
from ..runtime.sharding import Masters, forget_deepspeed_in_transformers
from .averaging import WeightAverage
from .resuming import resume
from .run import Run
from .signals import signals_caught
from .updates import Updates


logger = get_logger(__name__)


def as_datasets(given: Dataset | Sequence[Dataset] | None) -> list[Dataset]:
    """The datasets that a trainer was given: none, one or several."""
    if given is None:
        return []
    return [given] if isinstance(given, Dataset) else list(given)


def check_named(config: TrainingConfig, **datasets: Dataset | Sequence[Dataset] | None) -> None:
    """Raise a `ValueError` if a dataset was given without an option that names it, or the other way round."""
    for option, given in datasets.items():
        name, number = getattr(config, option), len(as_datasets(given))
        requirement = f"{number} names, one for each dataset"
        if number < 2:
            requirement = "a name for the dataset" if number else "left out if no such dataset is given"
        check(len(names_in(name)) == number, option, name, requirement)


def check_dataset(run: Run, dataset: Dataset, source: str, model_config: Mapping[str, Any]) -> None:
    """
    Refuse rows that the model cannot take, or whose tokens cannot be divided among the ranks that share a clip.

    Raises:
        ValueError: If a row does not fit; names `source`, and the row or the option.
    """
    check_rows_fit(dataset, source, model_config, takes_first_frame=run.pipeline.takes_first_frame)
    check_divisible(
        run.config.context_parallel_degree,
        num_heads=model_config["num_attention_heads"],
        patch_size=model_config["patch_size"],
        shapes=latent_shapes(dataset),
        source=source,
    )


class Trainer(ABC):
    """
    Runs `train_step` until `max_train_steps`. A subclass defines the step, the validation and the files of the model.

    The subclass first prepares the model as its [`Run`] requires, then calls this constructor, which builds the optimizer
    and its schedule and hands model and optimizer to Accelerate. Afterwards the trainer is complete.

    Args:
        config (`TrainingConfig`):
            Options of the run.
        run (`Run`):
            Processes, precision, checkpoint and reports of the run.
        model (`nn.Module`):
            The model to train. Its frozen parameters have `requires_grad` off.
        parameter_groups (`list[dict]`):
            Optimizer groups, each with its learning rate.
        datasets (`Mapping[str, Dataset]`):
            Datasets for training and validation, by the paths in the options.
        batches_per_epoch (`int`):
            Batches of one epoch on one process; sets the number of steps if `max_train_steps` is left out.
    """

    # Names of the files and folders in `output_dir` that the trainer writes besides checkpoints.
    results: Sequence[str] = ()

    def __init__(
        self,
        config: TrainingConfig,
        *,
        run: Run,
        model: nn.Module,
        parameter_groups: list[dict[str, Any]],
        datasets: Mapping[str, Dataset],
        batches_per_epoch: int,
    ) -> None:
        self.config = config
        self.run = run
        self.output_dir = run.output_dir
        self.accelerator = run.accelerator
        self.weight_dtype = run.weight_dtype
        self.context_parallel = run.context_parallel
        self.noise_levels = noise_levels(config)
        self.global_step = 0
        self.dataset_digests = {source: rows_digest(dataset) for source, dataset in datasets.items()}
        self.interrupted = False
        # The reason to end the run before its last step, the same on all ranks; a subclass may set it in `validate`.
        self.stop_reason: str | None = None
        updates_per_epoch = -(-batches_per_epoch // config.gradient_accumulation_steps)
        self.max_train_steps = config.max_train_steps or config.num_train_epochs * updates_per_epoch
        optimizer = torch.optim.AdamW(
            parameter_groups,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            # The fused kernel is faster, and makes no temporary copies of the weights.
            fused=True,
        )
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=self.max_train_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        # Put back after a checkpoint is loaded, which replaces them. `initial_lr` is the peak of the schedule.
        self.optimizer_options = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in optimizer.param_groups
        ]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        trainable = {names[id(parameter)]: parameter for group in parameter_groups for parameter in group["params"]}
        for name, parameter in trainable.items():
            found = f"{parameter.dtype} of '{name}'"
            check(parameter.dtype == run.trained_dtype, "model", found, f"in {run.trained_dtype} where it is trained")
        self.unwrapped = model
        keep_out_of_ddp(model)
        # The schedule is not prepared: Accelerate would advance it once per process.
        self.wrapped, prepared_optimizer = self.accelerator.prepare(model, optimizer)
        self.updates = Updates(
            self.accelerator,
            prepared_optimizer,
            list(trainable.values()),
            max_grad_norm=config.max_grad_norm,
            max_skipped_updates=config.max_skipped_updates,
        )
        self.masters = Masters(trainable, prepared_optimizer)
        self.average = WeightAverage(self.masters, decay=config.ema_decay) if config.use_ema else None
        if self.accelerator.state.deepspeed_plugin is not None:
            forget_deepspeed_in_transformers()
        # New weights start equal on all ranks; from here on dropout may differ.
        set_seed(config.seed, device_specific=True)
        self.accelerator.register_for_checkpointing(self.lr_scheduler)
        self.accelerator.register_save_state_pre_hook(self._save_model_hook)
        self.accelerator.register_load_state_pre_hook(self._load_model_hook)

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any) -> "Trainer":
        """Build the trainer with the models and datasets that the options name."""

    @abstractmethod
    def start_streams(self) -> None:
        """Open the batch streams at the position that belongs to `global_step`."""

    @abstractmethod
    def train_step(self) -> dict[str, torch.Tensor]:
        """Do one step and return scalars to log."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Evaluate the model and return scalars to log. A collective."""

    def measure_start(self) -> dict[str, float]:
        """
        Validate the model that the run starts from, if needed, before a checkpoint is loaded. A collective.

        Returns:
            Metrics to log at step 0; empty unless a subclass measures some.
        """
        return {}

    def validation_notes(self) -> dict[str, str]:
        """Text about the last validation, for `metrics.jsonl`."""
        return {}

    @abstractmethod
    def save_model(self, directory: Path) -> None:
        """Write the trained weights into `directory`, in the format users load. A collective."""

    def save_result(self, directory: Path) -> None:
        """Write the result of a finished run: the weights of `save_model`, averaged if an average is kept."""
        with self.averaged_weights():
            self.save_model(directory)

    @abstractmethod
    def read_model(self, directory: Path) -> Mapping[str, torch.Tensor]:
        """Read what `save_model` wrote, by the names of the trained parameters."""

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Context in which the model has the averaged weights, if an average is kept."""
        return nullcontext() if self.average is None else self.average.in_model()

    def save_average(self, directory: Path) -> None:
        """Write the averaged weights to `directory/ema`, if an average is kept. A collective."""
        if self.average is None:
            return
        if self.accelerator.is_main_process:
            (directory / AVERAGE_FOLDER).mkdir()
        with self.averaged_weights():
            self.save_model(directory / AVERAGE_FOLDER)

    def load_average(self, directory: Path) -> None:
        """Load what `save_average` wrote, each rank its share; if there is nothing, restart from the weights."""
        if self.average is not None and (directory / AVERAGE_FOLDER).is_dir():
            self.average.load(self.read_model(directory / AVERAGE_FOLDER))
        elif self.average is not None:
            self.average.restart()

    def save_own(self, directory: Path) -> None:  # noqa: B027
        """Write the state that each rank keeps for itself; a subclass may have some."""

    def load_own(self, directory: Path, state: dict[str, Any]) -> None:  # noqa: B027
        """Load what `save_own` wrote, where it fits this run. `state` is the checkpoint's."""

    def forget_outdated(self, changed: Collection[str]) -> None:  # noqa: B027
        """
        Drop restored state that changed options have made meaningless.

        Args:
            changed (`Collection[str]`):
                Options that have changed since the checkpoint, or whose dataset or model has.
        """

    def begin_update(self, num_backwards: int) -> int:
        """
        Let the next `num_backwards` backward passes add up to one update.

        Returns:
            `int`: the number by which the engine divides each gradient. DeepSpeed always divides by the number that it
            was set up with.
        """
        self.updates.begin()
        self.accelerator.gradient_accumulation_steps = num_backwards
        self.accelerator.step = 0
        return num_backwards if self.run.engine == "whole" else self.run.backwards_per_update

    def train(self) -> None:
        """Train to the end, from the beginning or from the checkpoint that the options name."""
        self._start_run()
        self.start_streams()
        progress = tqdm(
            total=self.max_train_steps,
            initial=self.global_step,
            desc="Steps",
            disable=not self.accelerator.is_main_process,
        )
        with signals_caught(self._interrupt):
            while self.global_step < self.max_train_steps and not self.interrupted and self.stop_reason is None:
                metrics = self.train_step()
                self.lr_scheduler.step()
                self.global_step += 1
                progress.update()
                self._after_step(metrics, progress)
        progress.close()
        is_finished = self.global_step == self.max_train_steps and self.stop_reason is None
        if self.stop_reason is not None:
            self.run.reports.note_stop(self.stop_reason, global_step=self.global_step)
            logger.warning(
                "Stopped after step %d, without a result: %s. The last checkpoint is complete.",
                self.global_step,
                self.stop_reason,
            )
        elif not is_finished:
            logger.warning(
                "Interrupted after step %d; continue with --resume_from_checkpoint latest.", self.global_step
            )
        else:
            self.save_result(self.output_dir)
            self.run.reports.note_result(global_step=self.global_step)
            logger.info("Finished %d steps: %s", self.global_step, self.output_dir)
        self.accelerator.end_training()
        if is_finished:
            self.run.reports.finish(global_step=self.global_step)

    def generators(self, stream: int, micro_step: int, batch_size: int) -> list[torch.Generator]:
        """
        One generator for each sample of this process's micro-batch.

        It is seeded by the sample's place in the global batch, so a run draws the same noise for the same clips on any
        number of processes, and a resumed run continues the same draws.

        Args:
            stream (`int`):
                Number of the purpose of the draws; each purpose has a random stream of its own.
            micro_step (`int`):
                Micro-batch within the step.
        """
        first = self.run.replica * batch_size
        return [
            make_generator(self.config.seed, stream, self.global_step, micro_step, first + index)
            for index in range(batch_size)
        ]

    def draw_noise(
        self,
        stream: int,
        micro_step: int,
        batch: LatentBatch,
        timestep_range: tuple[float, float] = (-math.inf, math.inf),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw noise in the shape of the batch's latents, and a noise level for each clip."""
        generators = self.generators(stream, micro_step, len(batch))
        sigmas = self.noise_levels.sample(generators, timestep_range)
        noise = sample_noise(batch.latents_shape, generators)
        return noise.to(self.accelerator.device), sigmas.to(self.accelerator.device)

    def shared_generator(self, stream: int, micro_step: int) -> torch.Generator:
        """Generator with the same seed on all ranks, for draws that decide on control flow."""
        return make_generator(self.config.seed, stream, self.global_step, micro_step)

    def state(self) -> dict[str, Any]:
        """State that a checkpoint keeps besides Accelerate's own, as JSON values."""
        return {
            "global_step": self.global_step,
            "num_skipped_updates": self.updates.num_skipped,
            "num_processes": self.accelerator.num_processes,
            "num_replicas": self.run.num_replicas,
            "train_batch_size": self.config.train_batch_size,
            "engine": self.run.engine,
            "trainer": type(self).__name__,
            "mixed_precision": self.accelerator.mixed_precision,
            "datasets": self.dataset_digests,
            "models": self.run.model_identities,
            "num_averaged": self.average.num_averaged if self.average else 0,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.global_step = state["global_step"]
        self.updates.num_skipped = state["num_skipped_updates"]
        if self.average is not None:
            # Checkpoints of reward models from older versions have no average.
            self.average.num_averaged = state.get("num_averaged", 0)

    def _start_run(self) -> None:
        start_metrics = self.measure_start()
        if self.run.checkpoint is not None:
            resume(self, self.run.checkpoint)
        abandoned = None
        if self.accelerator.is_main_process:
            abandoned = abandon(self.output_dir, self.global_step, self.results)
        if abandoned is not None:
            logger.warning(
                "The run continues after step %d. Files of later steps were moved to %s: %s. Checkpoints among them count "
                "towards `checkpoints_total_limit`; files that were pushed to the Hub stay in its history.",
                self.global_step,
                abandoned,
                ", ".join(sorted(path.name for path in abandoned.iterdir())),
            )
        self.run.reports.start(
            self.global_step, pipeline=self.run.pipeline, checkpoint=self.run.checkpoint, abandoned=abandoned
        )
        if start_metrics and self.global_step == 0:
            self.run.reports.log_validation(start_metrics, self.validation_notes(), global_step=0)
        elif start_metrics:
            # Not a line of the metrics: the one of step 0 is of the earlier measurements.
            values = ", ".join(f"{name} {value:.4g}" for name, value in start_metrics.items())
            logger.warning("The base, measured again for the validations from here on: %s.", values)

    def _after_step(self, metrics: dict[str, torch.Tensor], progress: tqdm) -> None:
        config, is_last = self.config, self.global_step == self.max_train_steps
        if self.global_step % config.logging_steps == 0 or is_last:
            values = mean_over_ranks(self.accelerator, metrics)
            values["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
            progress.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
            self.run.reports.log(values, global_step=self.global_step, prefix="train")
        self.interrupted = any_rank(self.accelerator, self.interrupted)
        if config.validation_dataset and (self.global_step % config.validation_steps == 0 or is_last):
            validated = self.validate()
            self.run.reports.log_validation(validated, self.validation_notes(), global_step=self.global_step)
        ends = is_last or self.interrupted or self.stop_reason is not None
        if self.global_step % config.checkpointing_steps == 0 or ends:
            checkpoint = save_checkpoint(
                self.accelerator,
                self.output_dir,
                step=self.global_step,
                state=self.state(),
                write_config=lambda folder: save_config(config, folder / CONFIG_FILE),
                total_limit=config.checkpoints_total_limit,
                delete_first=config.delete_checkpoints_first,
            )
            if not is_last:
                self.run.reports.checkpoint_saved(checkpoint, global_step=self.global_step)

    def _interrupt(self) -> None:
        self.interrupted = True

    def _save_model_hook(self, models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        self.save_model(Path(output_dir))
        self.save_average(Path(output_dir))
        self.save_own(Path(output_dir))
        weights.clear()

    def _load_model_hook(self, models: list[nn.Module], input_dir: str) -> None:
        # DeepSpeed's engine has restored its own share of weights and optimizer by now.
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            self.masters.write(self.masters.share_of(self.read_model(Path(input_dir))))
        models.clear()
