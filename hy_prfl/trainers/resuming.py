"""Continues a run from a checkpoint, and logs how it differs from an uninterrupted run."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed

from ..configs.base import TrainingConfig, names_in
from ..formats.checkpoints import check_files, read_state
from ..formats.layout import EXPERT_FOLDERS
from ..formats.lora import lora_sources
from ..formats.training_state import load_checkpoint, read_schedule
from ..runtime.provenance import CONFIG_FILE, path_identity
from ..runtime.sharding import Masters
from .resumed_options import OTHER_DATA, OTHER_START, RULES, Change, find_changes
from .updates import Updates


logger = get_logger(__name__)

# Options that name what a run starts from.
LORA_OPTIONS = ("lora_path", "lora_2_path")
START_OPTIONS = ("transformer_path", "transformer_2_path", *LORA_OPTIONS)


class Launch(Protocol):
    """The part of a run that [`resume`] reads: its launch and its models."""

    accelerator: Accelerator
    num_replicas: int
    model_identities: Mapping[str, Mapping[str, str]]

    @property
    def engine(self) -> str: ...


class Resumable(Protocol):
    """The part of a trainer that [`resume`] reads and restores."""

    config: Any
    accelerator: Accelerator
    lr_scheduler: Any
    optimizer_options: list[dict[str, Any]]
    updates: Updates
    masters: Masters
    max_train_steps: int
    global_step: int
    dataset_digests: dict[str, str]

    @property
    def run(self) -> Launch: ...
    def load_state(self, state: dict[str, Any]) -> None: ...
    def read_model(self, directory: Path) -> Mapping[str, torch.Tensor]: ...
    def load_average(self, directory: Path) -> None: ...
    def load_own(self, directory: Path, state: dict[str, Any]) -> None: ...
    def forget_outdated(self, changed: Collection[str]) -> None: ...


def check_checkpoint(
    checkpoint: Path,
    config: TrainingConfig,
    *,
    trainer: str,
    engine: str,
    num_processes: int,
    identities: Mapping[str, Mapping[str, str]],
) -> None:
    """
    Refuse a checkpoint that a run cannot resume from, before anything large is loaded.

    Args:
        trainer (`str`):
            Name of the trainer's class.
        engine (`str`):
            Engine of the optimizer, see [`~hy_prfl.trainers.run.Run`].
        num_processes (`int`):
            Processes of the run.
        identities (`Mapping`):
            Result of [`model_identities`].

    Raises:
        ValueError: If it is incomplete, of another trainer or beyond `max_train_steps`, or if an option has changed that
            must not change.
    """
    state = read_state(checkpoint)
    if state.get("trainer", trainer) != trainer:
        raise ValueError(
            f"`resume_from_checkpoint`: {checkpoint} was written by {state['trainer']}, this is {trainer}."
        )
    check_files(checkpoint, with_optimizer=_keeps_optimizer(state, engine=engine, num_processes=num_processes))
    _find_changes(checkpoint, config, engine)
    _check_start(state, checkpoint, identities)
    if config.max_train_steps is not None:
        check_steps(checkpoint, state["global_step"], config.max_train_steps)


def check_steps(checkpoint: Path, step: int, max_train_steps: int) -> None:
    """Raise a `ValueError` if a checkpoint has more updates than `max_train_steps`."""
    if step > max_train_steps:
        raise ValueError(
            f"`max_train_steps` must be at least {step}, the step of {checkpoint}, got {max_train_steps}. Resume from an "
            "earlier checkpoint, or raise it."
        )


def resume(trainer: Resumable, checkpoint: Path) -> None:
    """
    Continue from a checkpoint, and log how the run differs from an uninterrupted one.

    Moments and positions come from the checkpoint, options from the configuration. DeepSpeed's optimizer states fit only
    the number of processes that saved them: with another number, or another engine, the moments start from zero.
    """
    state = read_state(checkpoint)
    check_steps(checkpoint, state["global_step"], trainer.max_train_steps)
    engine, num_processes = trainer.run.engine, trainer.accelerator.num_processes
    changes = _find_changes(checkpoint, trainer.config, engine)
    trainer.load_state(state)
    if _keeps_optimizer(state, engine=engine, num_processes=num_processes):
        # Loading replaces ZeRO's limit of the gradient norm by the checkpoint's.
        zero_optimizer = trainer.updates.optimizer.optimizer
        clip_grad = getattr(zero_optimizer, "clip_grad", None)
        load_checkpoint(trainer.accelerator, checkpoint)
        if clip_grad is not None:
            zero_optimizer.clip_grad = clip_grad
    else:
        trainer.masters.write(trainer.masters.share_of(trainer.read_model(checkpoint)))
        trainer.lr_scheduler.load_state_dict(read_schedule(checkpoint))
        logger.warning(
            "%s was written by %d processes with %s, this run has %d with %s: the moments of AdamW start from zero.",
            checkpoint,
            state["num_processes"],
            state["engine"],
            num_processes,
            engine,
        )
    _apply_optimizer_options(trainer)
    trainer.load_average(checkpoint)
    trainer.load_own(checkpoint, state)
    _log_changes(trainer, state, changes)
    changed = {change.name for change in changes if change.ignored is None}
    changed |= _changed_datasets(trainer, state) | _changed_models(trainer, state)
    if "seed" in changed:
        set_seed(trainer.config.seed, device_specific=True)
    trainer.forget_outdated(changed)
    logger.info("Continuing from %s, after step %d of %d.", checkpoint, trainer.global_step, trainer.max_train_steps)


def model_identities(config: TrainingConfig) -> dict[str, dict[str, str]]:
    """
    Identities by which other files at the same path are noticed: option -> folder or Hub id -> identity of its files, see
    [`~hy_prfl.runtime.provenance.path_identity`]. JSON values.
    """
    pipeline = config.pretrained_model_name_or_path
    folders = [f"{pipeline}/{name}" for name in (*EXPERT_FOLDERS.values(), "vae", "scheduler")]
    sources = {"pretrained_model_name_or_path": [folder for folder in folders if Path(folder).is_dir()] or [pipeline]}
    for path in getattr(config, "reward_models", None) or []:
        sources.setdefault("reward_models", []).append(path)
    sources["monitor_reward_models"] = list(getattr(config, "monitor_reward_models", ()))
    for option in ("reward_model", *START_OPTIONS):
        path = getattr(config, option, None)
        if path is not None:
            # The folder of a run holds more than its LoRA, and other files in it keep changing.
            sources[option] = [path] if option not in LORA_OPTIONS else lora_sources(path)
    return {option: {source: path_identity(source) for source in found} for option, found in sources.items() if found}


def _check_start(state: Mapping[str, Any], checkpoint: Path, identities: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse changed files of the models that the run started from: a checkpoint lacks some of their weights."""
    for option in START_OPTIONS:
        before = state.get("models", {}).get(option, {})
        for source, identity in identities.get(option, {}).items():
            if before.get(source, identity) != identity:
                raise ValueError(
                    f"`{option}`: the files of '{source}' have changed since the run of {checkpoint} started (names, sizes "
                    f"or times): {OTHER_START.note}."
                )


def _keeps_optimizer(state: Mapping[str, Any], *, engine: str, num_processes: int) -> bool:
    """Whether the checkpoint's optimizer states fit this run."""
    is_same = (state["engine"], state["num_processes"]) == (engine, num_processes)
    return is_same or state["engine"] == engine == "whole"


def _find_changes(checkpoint: Path, config: TrainingConfig, engine: str) -> list[Change]:
    path = checkpoint / CONFIG_FILE
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: the options of the run that wrote it cannot be read: {error}") from error
    if not isinstance(before, dict):
        raise ValueError(f"{path}: expected the options of the run that wrote it, got {before!r}.")
    return find_changes(before, config, engine)


def _apply_optimizer_options(trainer: Resumable) -> None:
    """Put back the configured options of AdamW and peaks of the schedule, which loading has replaced."""
    schedule = trainer.lr_scheduler
    peaks = [options["initial_lr"] for options in trainer.optimizer_options]
    rates = [peak * share(schedule.last_epoch) for peak, share in zip(peaks, schedule.lr_lambdas, strict=True)]
    schedule.load_state_dict({**schedule.state_dict(), "base_lrs": peaks, "_last_lr": rates})
    # Not always the optimizer that the schedule was made with: DeepSpeed has its own for host memory.
    schedule.optimizer = trainer.updates.optimizer
    groups = schedule.optimizer.param_groups
    for group, options, rate in zip(groups, trainer.optimizer_options, rates, strict=True):
        group.update(options, lr=rate)


def _log_changes(trainer: Resumable, state: Mapping[str, Any], changes: list[Change]) -> None:
    for change in changes:
        logger.warning("%s", change)
    is_same = (state["engine"], state["num_processes"]) == (trainer.run.engine, trainer.accelerator.num_processes)
    if not is_same:
        logger.warning("The number of processes or the engine has changed: dropout draws other numbers.")
    precision = trainer.accelerator.mixed_precision
    if state.get("mixed_precision", precision) != precision:
        logger.warning(
            "`mixed_precision` of the launch was %s before the checkpoint and is %s now: applied.",
            state["mixed_precision"],
            precision,
        )
    before = state["num_replicas"], state["train_batch_size"]
    now = trainer.run.num_replicas, trainer.config.train_batch_size
    if before[0] * before[1] != now[0] * now[1]:
        logger.warning(
            "A global micro-batch was %d x %d clips and is %d x %d: the epoch continues with other clips, some of "
            "them seen already, and with other noise.",
            *before,
            *now,
        )


def _changed_datasets(trainer: Resumable, state: Mapping[str, Any]) -> set[str]:
    """Options whose datasets have other rows than before the checkpoint; logs each."""
    before, changed = state.get("datasets", {}), set()
    for name in ("train_dataset", "prompt_dataset", "validation_dataset"):
        for source in names_in(getattr(trainer.config, name, None)):
            if source in before and before[source] != trainer.dataset_digests[source]:
                changed.add(name)
                note = "" if name == "validation_dataset" else f": {OTHER_DATA.note}"
                logger.warning("`%s`: the rows of %s have changed since the checkpoint%s.", name, source, note)
    return changed


def _changed_models(trainer: Resumable, state: Mapping[str, Any]) -> set[str]:
    """Options whose models have other files than before the checkpoint; logs each."""
    before, changed = state.get("models", {}), set()
    for option, identities in trainer.run.model_identities.items():
        note = RULES[type(trainer.config)][option].note
        for source, identity in identities.items():
            if before.get(option, {}).get(source, identity) != identity:
                changed.add(option)
                logger.warning(
                    "`%s`: the files of %s have changed since the checkpoint (names, sizes or times)%s.",
                    option,
                    source,
                    note and f": {note}",
                )
    return changed
