"""Options of every training run: optimizer, schedule, noise levels, checkpoints, logging. Nothing about rewards."""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


LRScheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
Quantization = Literal["int8", "float8", "nf4"]

EMA_DECAY = 0.999


def check(condition: bool, name: str, value: object, requirement: str) -> None:
    """Raise a `ValueError` that names the field, its value and what was expected of it."""
    if not condition:
        raise ValueError(f"`{name}` must be {requirement}, got {value!r}.")


def names_in(value: str | Sequence[str] | None) -> list[str]:
    """The names that an option gives: none, one or several."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def place_of(name: str) -> str:
    """What a folder or Hub id names, so that two spellings of one folder are equal."""
    return os.path.realpath(name) if os.path.exists(name) else name


def check_seed(name: str, value: int, num_processes: int = 1) -> None:
    """Raise a `ValueError` unless numpy takes this seed and the following ones, which the other processes use."""
    limit = 2**32 - num_processes + 1
    check(0 <= value < limit, name, value, f"at least 0 and less than {limit}")


def check_timesteps(name: str, timesteps: Sequence[float]) -> None:
    """Raise a `ValueError` unless there are timesteps, all of them different and in (0, 1000]."""
    are_different = 0 < len(timesteps) == len(set(timesteps))
    check(are_different, name, list(timesteps), "different numbers, at least one")
    for timestep in timesteps:
        check(0 < timestep <= 1000, name, timestep, "in (0, 1000]")


@dataclass(kw_only=True)
class Config:
    """
    Options of a command. Numbers are finite and texts not empty.

    A field whose metadata has `may_be_infinite` or `may_be_empty` is an exception.
    """

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, float):
                    no_limit = bool(option.metadata.get("may_be_infinite")) and item == math.inf
                    requirement = (
                        "a finite number, or inf" if "may_be_infinite" in option.metadata else "a finite number"
                    )
                    check(math.isfinite(item) or no_limit, option.name, item, requirement)
                elif isinstance(item, str) and not option.metadata.get("may_be_empty"):
                    check(bool(item.strip()), option.name, item, "a text that is not empty, or left out")


@dataclass(kw_only=True)
class TrainingConfig(Config):
    """
    Options shared by the trainers.

    Precision and, under DeepSpeed, gradient clipping are not here: they belong to the accelerate and DeepSpeed
    configuration files (see `accelerate_configs/`).

    > Parameters of the run
    > Parameters of the tuning
    > Parameters of the optimization
    > Parameters of the average
    > Parameters of the noise levels that clean clips are trained at
    > Parameters of checkpoints, logging and evaluation
    > Parameters of the Hub
    """

    # Parameters of the run
    output_dir: str = field(metadata={"help": "Folder for checkpoints, logs and the trained model."})
    pretrained_model_name_or_path: str = field(
        metadata={"help": "Diffusers Wan pipeline: a local folder or a Hub id. Its transformer is the base model."}
    )
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the pipeline."})
    variant: str | None = field(default=None, metadata={"help": "Variant of the pipeline's weight files, e.g. fp16."})
    transformer_path: str | None = field(
        default=None,
        metadata={
            "help": "Transformer to start from in place of the pipeline's, of its kind and size: a folder in diffusers' or "
            "Wan's native format, or a file with its config.json beside it."
        },
    )
    lora_path: str | None = field(
        default=None,
        metadata={"help": "LoRA to start from, in any format that `convert` reads: a file or a folder."},
    )
    lora_start: Literal["continue", "merge"] | None = field(
        default=None,
        metadata={
            "help": "How the run uses `lora_path`. continue: train it further; the options for rank, alpha and layers must "
            "match it. merge: add it to the transformer, then train a new LoRA or all weights, as the options say."
        },
    )
    train_dataset: str = field(metadata={"help": "Latent dataset written by `preprocess`: a folder or a Hub id."})
    validation_dataset: str | None = field(
        default=None, metadata={"help": "Latent dataset for validation; without it there is none."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of everything random. Same seed, same run."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Do one step on random latents, report its memory and time, and keep nothing."},
    )
    dry_run_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "Number of frames, height and width of the dry run's clips, in pixels; those of the largest clip of "
            "train_dataset if left out. With it, train_dataset need not exist."
        },
    )

    # Parameters of the tuning
    lora_rank: int | None = field(
        default=None, metadata={"help": "Rank of a LoRA adapter; without it all weights train."}
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "Scale of the adapter, the rank if left out."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter's input."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"], metadata={"help": "Layers that get an adapter."}
    )
    base_quantization: Quantization | None = field(
        default=None,
        metadata={
            "help": "Hold the frozen base of a LoRA adapter in 8 or 4 bits: int8 or float8 (torchao), or nf4 "
            "(bitsandbytes, needs a GPU). On one process or under DDP."
        },
    )

    # Parameters of the optimization
    train_batch_size: int = field(default=1, metadata={"help": "Clips per process and micro-batch."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Micro-batches per update, of each kind of update."}
    )
    num_train_epochs: int = field(
        default=1, metadata={"help": "Passes over the dataset; not used with max_train_steps."}
    )
    max_train_steps: int | None = field(
        default=None, metadata={"help": "Updates of the run; replaces num_train_epochs."}
    )
    learning_rate: float = field(default=5e-6, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler: LRScheduler = field(default="constant", metadata={"help": "Schedule of the learning rate."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Updates of linear warm-up."})
    lr_num_cycles: int = field(default=1, metadata={"help": "Hard restarts of cosine_with_restarts."})
    lr_power: float = field(default=1.0, metadata={"help": "Power of the polynomial schedule."})
    adam_beta1: float = field(default=0.9, metadata={"help": "First moment decay of AdamW."})
    adam_beta2: float = field(default=0.999, metadata={"help": "Second moment decay of AdamW."})
    adam_weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay of AdamW."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Epsilon of AdamW."})
    max_grad_norm: float = field(
        default=1.0,
        metadata={
            "help": "Largest norm of the gradients. With DeepSpeed `gradient_clipping` of its JSON file counts instead.",
            "may_be_infinite": True,
        },
    )
    max_skipped_updates: int = field(
        default=10,
        metadata={
            "help": "Updates with a loss or gradient that is not finite are left out; after this many the run stops."
        },
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "Activation checkpointing: compute block activations again in the backward pass. Slower, less memory."
        },
    )
    gradient_checkpointing_blocks: int | None = field(
        default=None,
        metadata={"help": "How many blocks of the model in training use activation checkpointing; all if left out."},
    )
    offload_activations: bool = field(
        default=False,
        metadata={
            "help": "Keep the inputs of checkpointed blocks in (pinned) host memory, copied while the blocks compute; "
            "also the starts of chained steps."
        },
    )
    attention_backend: str | None = field(
        default=None,
        metadata={
            "help": "Attention kernel where gradients are needed, by diffusers' name: native, _native_cudnn, flash, "
            "_flash_3_hub, ...; torch's own choice if left out."
        },
    )
    allow_tf32: bool | None = field(
        default=None,
        metadata={
            "help": "Let matrix products in float32 round to TF32 on GPUs that have it: torch.backends.cuda.matmul.allow_tf32, "
            "which is left as it is, off, if left out. It makes little difference to runs in bf16."
        },
    )
    compile: bool = field(
        default=False,
        metadata={"help": "Compile the transformer blocks with torch.compile; for one process or DDP."},
    )
    context_parallel_degree: int = field(
        default=1, metadata={"help": "Neighbouring processes that share one clip, each with a part of its tokens."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read the dataset."})

    # Parameters of the average
    use_ema: bool = field(default=False, metadata={"help": "Keep, validate and save an average of the weights."})
    ema_decay: float = field(default=EMA_DECAY, metadata={"help": "Decay of the average of the weights."})

    # Parameters of the noise levels that clean clips are trained at
    weighting_scheme: Literal["uniform", "logit_normal"] = field(
        default="uniform", metadata={"help": "Distribution of the noise levels before the shift."}
    )
    flow_shift: float = field(default=5.0, metadata={"help": "Shift of the noise levels; 1 leaves them uniform."})
    logit_mean: float = field(default=0.0, metadata={"help": "Mean of the logit-normal distribution."})
    logit_std: float = field(default=1.0, metadata={"help": "Standard deviation of the logit-normal distribution."})

    # Parameters of checkpoints, logging and evaluation
    checkpointing_steps: int = field(default=500, metadata={"help": "Updates between two checkpoints."})
    checkpoints_total_limit: int | None = field(
        default=None,
        metadata={"help": "Keep only this many checkpoints; abandoned ones are deleted first, then the oldest."},
    )
    delete_checkpoints_first: bool = field(
        default=False,
        metadata={
            "help": "Delete checkpoints beyond checkpoints_total_limit before a new one is written, not after it: needs "
            "disk space for one checkpoint less. The limit must be 2 or more, so that a complete one always exists."
        },
    )
    validation_steps: int = field(default=500, metadata={"help": "Updates between two validations."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint folder, or `latest` for the newest one in output_dir, if any. Results of "
            "later steps in output_dir are moved to output_dir/abandoned-<n>."
        },
    )
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={"help": "Accelerate trackers by name (tensorboard, wandb, trackio, ...), or `none`."},
    )
    tracker_project_name: str = field(default="hy_prfl", metadata={"help": "Project name given to the trackers."})
    logging_steps: int = field(default=1, metadata={"help": "Updates between two log entries."})
    write_report: bool = field(
        default=True, metadata={"help": "Write the run's page, report.html, at the end; see `hy-prfl report`."}
    )

    # Parameters of the Hub
    push_to_hub: bool = field(
        default=False, metadata={"help": "Push the result, with a model card, to the Hugging Face Hub."}
    )
    hub_model_id: str | None = field(
        default=None,
        metadata={"help": "Repository, `user/name`; the name of output_dir, under the token's account, if left out."},
    )
    hub_private_repo: bool = field(
        default=False, metadata={"help": "Make a new repository private, and refuse one that is public."}
    )
    hub_push_checkpoints: int | None = field(
        default=None, metadata={"help": "Also push every n-th checkpoint, in the background; none if left out."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # Every process adds its rank to the seed.
        check_seed("seed", self.seed, num_processes=int(os.environ.get("WORLD_SIZE", "1")))
        size = self.dry_run_size
        check(self.dry_run or size is None, "dry_run_size", size, "left out without `dry_run`")
        is_size = size is None or (len(size) == 3 and all(number >= 1 for number in size))
        check(is_size, "dry_run_size", size, "frames, height and width, or left out")
        for name in ("hub_model_id", "hub_private_repo", "hub_push_checkpoints"):
            value = getattr(self, name)
            check(self.push_to_hub or not value, name, value, "left out without `push_to_hub`")
        every = self.hub_push_checkpoints
        check(every is None or every >= 1, "hub_push_checkpoints", every, "at least 1, or left out")
        for name in ("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "context_parallel_degree"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("max_train_steps", "checkpoints_total_limit"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "at least 1, or left out")
        limit = self.checkpoints_total_limit
        fits = not self.delete_checkpoints_first or (limit is not None and limit >= 2)
        check(fits, "checkpoints_total_limit", limit, "at least 2 with `delete_checkpoints_first`")
        for name in ("lora_rank", "lora_alpha"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "greater than 0, or left out")
        loras = [name for name in ("lora_path", "lora_2_path") if getattr(self, name, None) is not None]
        start = self.lora_start
        check(not loras or start is not None, "lora_start", start, f"continue or merge with `{''.join(loras[:1])}`")
        check(bool(loras) or start is None, "lora_start", start, "left out without `lora_path`")
        continues = start == "continue"
        check(not continues or self.lora_rank is not None, "lora_rank", self.lora_rank, "given to continue a LoRA")
        for name in ("lora_dropout", "ema_decay"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        is_used = self.use_ema or self.ema_decay == EMA_DECAY
        check(is_used, "ema_decay", self.ema_decay, "left out without `use_ema`")
        base = self.base_quantization
        has_frozen_base = base is None or self.lora_rank is not None
        check(has_frozen_base, "base_quantization", base, "left out without `lora_rank`: only frozen weights can be")
        check(len(self.lora_target_modules) > 0, "lora_target_modules", self.lora_target_modules, "not empty")
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon", "lr_power", "flow_shift", "logit_std"):
            check(getattr(self, name) > 0, name, getattr(self, name), "greater than 0")
        for name in ("adam_beta1", "adam_beta2"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        for name in ("adam_weight_decay", "lr_warmup_steps", "max_skipped_updates", "dataloader_num_workers"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        blocks = self.gradient_checkpointing_blocks
        check(blocks is None or blocks >= 1, "gradient_checkpointing_blocks", blocks, "at least 1, or left out")
        for name in ("gradient_checkpointing_blocks", "offload_activations"):
            value = getattr(self, name)
            check(self.gradient_checkpointing or not value, name, value, "left out without `gradient_checkpointing`")
        parallel = self.context_parallel_degree > 1
        check(not (self.compile and parallel), "compile", self.compile, "false with `context_parallel_degree` above 1")
        check(self.lr_num_cycles >= 1, "lr_num_cycles", self.lr_num_cycles, "at least 1")
        for name in ("checkpointing_steps", "validation_steps", "logging_steps"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
