"""The training loop: updates, logging, validation, checkpoints, resuming. Knows no loss."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, set_seed
from datasets import Dataset
from diffusers import AutoencoderKLWan
from diffusers.optimization import get_scheduler
from torch import nn
from tqdm import tqdm

from ..configs.base import TrainingConfig, check, save_config
from ..data.collators import LatentBatch
from ..data.dataset import check_rows_fit, latent_shapes, rows_digest
from ..data.encoding import takes_first_frame, vae_fingerprint
from ..flow_matching import make_generator, noise_levels, sample_noise
from ..formats.checkpoints import abandon, find_checkpoint, save_checkpoint
from ..runtime.activation_checkpointing import recompute_blocks
from ..runtime.attention import check_attention_backend, set_attention_backend
from ..runtime.context_parallel import ContextParallelGroup, check_divisible
from ..runtime.distributed import TRAINING_TIMEOUT, any_rank, build_accelerator, mean_over_ranks
from ..runtime.provenance import CONFIG_FILE
from ..runtime.sharding import Masters, forget_deepspeed_in_transformers, split_for_zero3
from .reports import Reports, known_trackers
from .resuming import check_checkpoint, model_identities, resume
from .signals import signals_caught
from .updates import Updates


logger = get_logger(__name__)


class Trainer(ABC):
    """
    Runs `train_step` until `max_train_steps`; a subclass says what a step, a validation and the trained model are.

    Construction is in two parts: a subclass calls `super().__init__`, opens its data and loads its models, and then
    calls `prepare`. All that is cheap to check comes before anything large is loaded.

    Args:
        config (`TrainingConfig`):
            Options of the run.
        backwards_per_update (`int`):
            Number of backward passes that add up to one optimizer update; the most there are, if updates differ.
        takes_turns (`bool`, defaults to `False`):
            Whether a backward pass reaches some of the parameters in training only.
    """

    # What it writes besides checkpoints, by name in `output_dir`.
    results: Sequence[str] = ()

    def __init__(self, config: TrainingConfig, *, backwards_per_update: int, takes_turns: bool = False) -> None:
        self.config = config
        self.backwards_per_update = backwards_per_update
        self.output_dir = Path(config.output_dir)
        self.checkpoint = find_checkpoint(self.output_dir, config.resume_from_checkpoint)
        self.accelerator = build_accelerator(
            gradient_accumulation_steps=backwards_per_update,
            train_batch_size=config.train_batch_size,
            log_with=known_trackers(config.report_to),
            output_dir=self.output_dir,
            find_unused_parameters=takes_turns,
        )
        precision = self.accelerator.mixed_precision
        # An update that is not finite is left out before a loss scale could learn from it, and Wan overflows in float16.
        check(precision in ("no", "bf16"), "mixed_precision", precision, "no or bf16")
        if self.checkpoint is not None:
            check_checkpoint(self, self.checkpoint)
        self.reports = Reports(self.accelerator, config)
        set_seed(config.seed)
        # Ranks that share a clip are one replica: they get the same rows and draw the same noise.
        degree = config.context_parallel_degree
        self.context_parallel = ContextParallelGroup(degree, TRAINING_TIMEOUT) if degree > 1 else None
        self.num_replicas, self.replica = (
            self.accelerator.num_processes // degree,
            self.accelerator.process_index // degree,
        )
        self.noise_levels = noise_levels(config)
        self.global_step = 0
        self.dataset_digests: dict[str, str] = {}
        # Before anything is loaded: files that are replaced later are not those of this run.
        self.model_identities = model_identities(config)
        self.interrupted = False
        is_whole = self.engine == "whole"
        check(is_whole or not config.compile, "compile", config.compile, f"false under {self.engine}")

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
    def read_model(self, directory: Path) -> Mapping[str, torch.Tensor]:
        """What `save_model` wrote, by the names of the parameters in training."""

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
        self.dataset_digests[source] = rows_digest(dataset)
        check_rows_fit(
            dataset,
            source,
            num_channels=model_config["out_channels"],
            text_dim=model_config["text_dim"],
            image_dim=model_config["image_dim"],
            condition_channels=model_config["in_channels"] - model_config["out_channels"],
            pos_embed_seq_len=model_config["pos_embed_seq_len"],
            patch_size=model_config["patch_size"],
            takes_first_frame=takes_first_frame(self.config.pretrained_model_name_or_path, self.config.revision),
        )
        check_divisible(
            self.config.context_parallel_degree,
            num_heads=model_config["num_attention_heads"],
            patch_size=model_config["patch_size"],
            shapes=latent_shapes(dataset),
            source=source,
        )

    def save_average(self, directory: Path) -> None:  # noqa: B027
        """Write averaged weights as `save_model` writes the others; nothing unless a subclass keeps an average."""

    def load_average(self, directory: Path) -> None:  # noqa: B027
        """Load what `save_average` wrote."""

    def save_own(self, directory: Path) -> None:  # noqa: B027
        """Write what each rank needs by itself to go on; nothing unless a subclass has some."""

    def load_own(self, directory: Path, state: dict[str, Any]) -> None:  # noqa: B027
        """Load what `save_own` wrote, as far as it fits this run; `state` is that of the checkpoint."""

    def forget_outdated(self, changed: Collection[str]) -> None:  # noqa: B027
        """
        Drop what a checkpoint has restored but means nothing any more.

        Args:
            changed (`Collection[str]`):
                Options that differ from before the checkpoint, or name a dataset whose rows do.
        """

    @property
    def split(self) -> Callable[[nn.Module], None] | None:
        """Splits the weights of a model that is to be trained while it loads, if the engine splits them anyway."""
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is None or plugin.zero_stage != 3:
            return None
        settings = {
            name: plugin.deepspeed_config[name]
            for name in ("zero_optimization", "bf16")
            if name in plugin.deepspeed_config
        }
        return partial(split_for_zero3, deepspeed_config={"train_micro_batch_size_per_gpu": 1, **settings})

    @property
    def trained_dtype(self) -> torch.dtype:
        """Type to load weights in that are to be trained: float32, unless the engine keeps float32 masters of them."""
        return torch.float32 if self.split is None else self.weight_dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        """Type of frozen weights and of all embeddings that models are given; what trains has float32 masters."""
        return torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32

    def set_up_blocks(self, model: Any, *, num_recomputed: int | None) -> None:
        """
        Give a model's blocks what the options ask for: recomputation, attention kernel, share of the tokens, compiler.

        Args:
            model (`ModelMixin`):
                The model, with its adapter if it gets one.
            num_recomputed (`int`, *optional*):
                How many blocks are recomputed with `gradient_checkpointing`, all if left out.
        """
        config = self.config
        if config.gradient_checkpointing:
            recompute_blocks(model, num_blocks=num_recomputed, offload=config.offload_activations)
        if config.attention_backend is not None:
            set_attention_backend(model, config.attention_backend)
        if self.context_parallel is not None:
            self.context_parallel.split(model)
        if config.compile:
            # Generator and reward model share the code of a block, each in several modes and shapes. Beyond its limit
            # torch would go on without compiling, and say nothing.
            torch._dynamo.config.recompile_limit = 64
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            model.compile_repeated_blocks()

    def check_kernel(self, option: str, *, trains: bool, dtype: torch.dtype) -> None:
        """
        Refuse an attention kernel that cannot do what the option of this name wants of it.

        Args:
            option (`str`):
                Name of the option.
            trains (`bool`):
                Whether a backward pass follows.
            dtype (`torch.dtype`):
                Type of the model's weights.
        """
        name = getattr(self.config, option)
        if name is not None:
            check_attention_backend(
                name,
                option=option,
                trains=trains,
                device=self.accelerator.device,
                dtype=dtype,
                autocast=self.accelerator.autocast(),
            )

    def begin_update(self, num_backwards: int) -> int:
        """
        Let the next `num_backwards` backward passes add up to one update.

        Returns:
            `int`: what the engine divides each of them by. DeepSpeed does not ask how many there are, it divides by the
            number that it was set up with.
        """
        self.updates.begin()
        self.accelerator.gradient_accumulation_steps = num_backwards
        self.accelerator.step = 0
        return num_backwards if self.engine == "whole" else self.backwards_per_update

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
            # One kernel for all of it: faster, and without temporary copies as large as the weights.
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
        # What loading a checkpoint must not change; `initial_lr` is the peak of the schedule.
        self.optimizer_options = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in optimizer.param_groups
        ]
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        trainable = {names[id(parameter)]: parameter for group in parameter_groups for parameter in group["params"]}
        # The schedule is not prepared: Accelerate would advance it once per process.
        wrapped, prepared_optimizer = self.accelerator.prepare(model, optimizer)
        self.updates = Updates(
            self.accelerator,
            prepared_optimizer,
            list(trainable.values()),
            max_grad_norm=config.max_grad_norm,
            max_skipped_updates=config.max_skipped_updates,
        )
        self.masters = Masters(trainable, prepared_optimizer)
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
        with signals_caught(self._interrupt):
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
            self.reports.note_result(global_step=self.global_step)
            logger.info("Finished %d steps: %s", self.global_step, self.output_dir)
        self.accelerator.end_training()
        if self.global_step == self.max_train_steps:
            self.reports.finish(global_step=self.global_step)

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

    def draw_noise(
        self,
        stream: int,
        micro_step: int,
        batch: LatentBatch,
        timestep_range: tuple[float, float] = (-math.inf, math.inf),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise of the shape of the batch's latents, and a noise level for each clip."""
        generators = self.generators(stream, micro_step, len(batch))
        sigmas = self.noise_levels.sample(generators, timestep_range)
        noise = sample_noise(batch.latents_shape, generators)
        return noise.to(self.accelerator.device), sigmas.to(self.accelerator.device)

    def shared_generator(self, stream: int, micro_step: int) -> torch.Generator:
        """Generator that is the same on all ranks, for what decides on control flow."""
        return make_generator(self.config.seed, stream, self.global_step, micro_step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the states of Accelerate; JSON values only."""
        return {
            "global_step": self.global_step,
            "num_skipped_updates": self.updates.num_skipped,
            "num_processes": self.accelerator.num_processes,
            "num_replicas": self.num_replicas,
            "train_batch_size": self.config.train_batch_size,
            "engine": self.engine,
            "trainer": type(self).__name__,
            "mixed_precision": self.accelerator.mixed_precision,
            "datasets": self.dataset_digests,
            "models": self.model_identities,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.global_step = state["global_step"]
        self.updates.num_skipped = state["num_skipped_updates"]

    @property
    def engine(self) -> str:
        """What runs the optimizer: `ZeRO-<stage>`, or `whole` if every process has all of it."""
        plugin = self.accelerator.state.deepspeed_plugin
        return "whole" if plugin is None else f"ZeRO-{plugin.zero_stage}"

    def _start_run(self) -> None:
        if self.checkpoint is not None:
            resume(self, self.checkpoint)
        abandoned = None
        if self.accelerator.is_main_process:
            abandoned = abandon(self.output_dir, self.global_step, self.results)
        if abandoned is not None:
            logger.warning(
                "The run goes on after step %d. What later steps have left is moved to %s: %s. Checkpoints in it count "
                "in `checkpoints_total_limit`; what was pushed to the Hub stays in its history.",
                self.global_step,
                abandoned,
                ", ".join(sorted(path.name for path in abandoned.iterdir())),
            )
        self.reports.start(self.global_step, checkpoint=self.checkpoint, abandoned=abandoned)

    def _after_step(self, metrics: dict[str, torch.Tensor], progress: tqdm) -> None:
        config, is_last = self.config, self.global_step == self.max_train_steps
        if self.global_step % config.logging_steps == 0 or is_last:
            values = mean_over_ranks(self.accelerator, metrics)
            values["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
            progress.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
            self.reports.log(values, global_step=self.global_step, prefix="train")
        self.interrupted = any_rank(self.accelerator, self.interrupted)
        if config.validation_dataset and (self.global_step % config.validation_steps == 0 or is_last):
            self.reports.log_validation(self.validate(), global_step=self.global_step)
        if self.global_step % config.checkpointing_steps == 0 or is_last or self.interrupted:
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
                self.reports.checkpoint_saved(checkpoint, global_step=self.global_step)

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
