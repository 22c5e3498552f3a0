"""What a run sets up before any model: its folder, checkpoint, processes, precision and reports."""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKLWan
from torch import nn

from ..configs.base import TrainingConfig, check
from ..data.encoding import vae_fingerprint
from ..formats.checkpoints import find_checkpoint
from ..formats.pipeline_info import PipelineInfo
from ..runtime.activation_checkpointing import checkpoint_activations
from ..runtime.attention import check_attention_backend, set_attention_backend
from ..runtime.context_parallel import ContextParallelGroup
from ..runtime.distributed import TRAINING_TIMEOUT, build_accelerator
from ..runtime.quantization import Quantizer, check_quantization
from ..runtime.sharding import shard_for_zero3
from .reports import Reports, known_trackers
from .resuming import check_checkpoint, model_identities


# Options that name a kind of quantisation.
QUANTIZATION_OPTIONS = ("base_quantization", "frozen_expert_quantization", "reward_model_quantization")


class Run:
    """
    What a trainer needs before anything large is loaded.

    Models are loaded in its types, and under ZeRO-3 it shards them while they load.

    Args:
        config (`TrainingConfig`):
            Options of the run.
        trainer (`str`):
            Name of the trainer's class; a checkpoint of another one is refused.
        backwards_per_update (`int`):
            Number of backward passes that add up to one optimizer update; the largest, if updates differ.
        takes_turns (`bool`, defaults to `False`):
            Whether some backward passes reach only a part of the trained parameters.

    Raises:
        ValueError: If options, launch or the checkpoint to resume from do not fit together.
        FileNotFoundError: If the checkpoint to resume from does not exist.
    """

    def __init__(
        self, config: TrainingConfig, *, trainer: str, backwards_per_update: int, takes_turns: bool = False
    ) -> None:
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
        # Not float16: Wan overflows in it, and a non-finite update is left out before a loss scale could adapt to it.
        check(precision in ("no", "bf16"), "mixed_precision", precision, "no or bf16")
        # Before anything is loaded: files that are replaced while the run loads or trains count as changed.
        self.model_identities: Mapping[str, Mapping[str, str]] = model_identities(config)
        if self.checkpoint is not None:
            check_checkpoint(
                self.checkpoint,
                config,
                trainer=trainer,
                engine=self.engine,
                num_processes=self.accelerator.num_processes,
                identities=self.model_identities,
            )
        if config.allow_tf32 is not None:
            torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
        self.reports = Reports(self.accelerator, config)
        set_seed(config.seed)
        # Ranks that share a clip are one replica: they get the same rows and draw the same noise.
        degree = config.context_parallel_degree
        self.context_parallel = ContextParallelGroup(degree, TRAINING_TIMEOUT) if degree > 1 else None
        self.num_replicas = self.accelerator.num_processes // degree
        self.replica = self.accelerator.process_index // degree
        is_whole = self.engine == "whole"
        check(is_whole or not config.compile, "compile", config.compile, f"false under {self.engine}")
        for option in QUANTIZATION_OPTIONS:
            kind = getattr(config, option, None)
            reason = f"left out under {self.engine}, which casts and shards weights"
            check(is_whole or kind is None, option, kind, reason)
            check_quantization(option, kind, device=self.accelerator.device)

    @cached_property
    def pipeline(self) -> PipelineInfo:
        """The pipeline that `pretrained_model_name_or_path` names, read once for the whole run."""
        return PipelineInfo.read(self.config.pretrained_model_name_or_path, self.config.revision)

    @property
    def engine(self) -> str:
        """Engine of the optimizer: `ZeRO-<stage>`, or `whole` if every process has all of its state."""
        plugin = self.accelerator.state.deepspeed_plugin
        return "whole" if plugin is None else f"ZeRO-{plugin.zero_stage}"

    @property
    def shard(self) -> Callable[[nn.Module], None] | None:
        """Function that shards the weights of a trained model while it loads; None unless the engine is ZeRO-3."""
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is None or plugin.zero_stage != 3:
            return None
        settings = {
            name: plugin.deepspeed_config[name]
            for name in ("zero_optimization", "bf16")
            if name in plugin.deepspeed_config
        }
        settings["train_micro_batch_size_per_gpu"] = 1
        return partial(shard_for_zero3, deepspeed_config=settings, device=self.accelerator.device)

    @property
    def trained_dtype(self) -> torch.dtype:
        """Type to load trained weights in: float32, unless the engine keeps float32 masters of them."""
        return torch.float32 if self.shard is None else self.weight_dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        """Type of frozen weights, and of the embeddings that models get. Trained weights have float32 masters."""
        return torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32

    def quantizer(self, option: str) -> Quantizer | None:
        """Quantizer of the kind that the option of this name gives; None if it is left out."""
        kind = getattr(self.config, option)
        return None if kind is None else Quantizer(kind, device=self.accelerator.device, dtype=self.weight_dtype)

    def pipeline_vae_fingerprint(self) -> str:
        """Fingerprint of the pipeline's VAE, by which latents of another VAE are refused."""
        vae = AutoencoderKLWan.from_pretrained(
            self.config.pretrained_model_name_or_path,
            subfolder="vae",
            revision=self.config.revision,
            variant=self.config.variant,
        )
        return vae_fingerprint(vae)

    def set_up_blocks(self, model: Any, *, num_checkpointed: int | None) -> None:
        """
        Set up a model's blocks by the options: activation checkpointing, attention kernel, context parallelism, compiler.

        Args:
            model (`ModelMixin`):
                The model, with its adapter if it gets one.
            num_checkpointed (`int`, *optional*):
                How many blocks use activation checkpointing with `gradient_checkpointing`, all if left out.
        """
        config = self.config
        if config.gradient_checkpointing:
            checkpoint_activations(model, num_blocks=num_checkpointed, offload=config.offload_activations)
        if config.attention_backend is not None:
            set_attention_backend(model, config.attention_backend)
        if self.context_parallel is not None:
            self.context_parallel.split(model)
        if config.compile:
            # Generator and reward model share the code of a block, each in several modes and shapes. Beyond its limit
            # torch silently stops compiling.
            torch._dynamo.config.recompile_limit = 64
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            model.compile_repeated_blocks()

    def check_kernel(self, option: str, *, trains: bool, dtype: torch.dtype) -> None:
        """
        Refuse an attention kernel that cannot do what the run needs of it.

        Args:
            option (`str`):
                Name of the option that names the kernel.
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
