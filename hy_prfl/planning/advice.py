"""Finds the cheapest changes of options that make a recipe fit into GPU memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..configs.base import TrainingConfig
from ..configs.prfl import PRFLTrainingConfig
from .estimate import Estimate, Request, estimate


Change = tuple[str, Callable[[Request], Request]]


def cheapest_changes(request: Request, *, capacity: float, reserved: float) -> tuple[list[str], Estimate | None]:
    """
    Find changes of options that make a recipe fit.

    Changes are added one after the other, the cheapest first, until the recipe fits. Then each change that is not
    needed is removed again, the most expensive first.

    Args:
        capacity (`float`):
            Memory of a GPU in bytes.
        reserved (`float`):
            Bytes set aside, see [`estimate`].

    Returns:
        The options to set, and the estimate with them. An empty list and None if no changes are enough.
    """

    def apply(changes: list[Change]) -> Estimate:
        changed = request
        for _, change in changes:
            changed = change(changed)
        return estimate(changed, reserved=reserved)

    taken: list[Change] = []
    possible = [change for change in possible_changes(request) if _is_allowed(change, request)]
    for change in possible:
        # A later value of the same option costs more and replaces the earlier one.
        taken = [*(each for each in taken if _option(each) != _option(change)), change]
        if apply(taken).peak <= capacity:
            break
    else:
        return [], None
    for candidate in reversed(taken[:-1]):
        cheaper = [each for each in possible if _option(each) == _option(candidate)]
        for less in ([], *([each] for each in cheaper[: cheaper.index(candidate)])):
            fewer = [new for each in taken for new in (less if each is candidate else [each])]
            if apply(fewer).peak <= capacity:
                taken = fewer
                break
    return [name for name, _ in taken], apply(taken)


def possible_changes(request: Request) -> list[Change]:
    """Options that save memory, sorted by cost: first those that cost little time, then much time, then quality."""
    training, engine = request.training, request.engine
    checkpointing = "--gradient_checkpointing true"
    changes: list[Change] = []
    if not training.gradient_checkpointing:
        changes.append(_set(checkpointing, gradient_checkpointing=True))
    if isinstance(training, PRFLTrainingConfig) and not (training.shard_reward_model or training.offload_reward_model):
        # Offloaded weights are copied from host memory for each reward. Sharded ones are gathered from other GPUs,
        # block by block.
        option = "shard_reward_model" if engine.num_gpus > 1 else "offload_reward_model"
        changes.append(_set(f"--{option} true", **{option: True}))
    if request.experts.frozen(rolls_out=True, samples=False) and engine.num_gpus > 1:
        changes.append(_set("--shard_frozen_expert true", shard_frozen_expert=True))
    for degree in (2, 4, 8):
        if degree > training.context_parallel_degree and _divides(request, degree):
            changes.append(_set(f"--context_parallel_degree {degree}", context_parallel_degree=degree))
    for stage in (2, 3):
        if engine.zero_stage < stage and engine.num_gpus > 1:
            changes.append(_spread(f"--zero_stage {stage}", zero_stage=stage))
    if not training.offload_activations:
        name = "--offload_activations true"
        name = name if training.gradient_checkpointing else f"{checkpointing} {name}"
        changes.append(_set(name, gradient_checkpointing=True, offload_activations=True))
    if isinstance(training, PRFLTrainingConfig) and not training.rerun_gradient_step:
        changes.append(_set("--rerun_gradient_step true", rerun_gradient_step=True))
    if engine.num_gpus > 1 and not engine.offload:
        changes.append(_spread("--zero_stage 3 --offload true", zero_stage=3, offload=True))
    if training.lora_rank is None:
        changes.append(_set("--lora_rank 32", lora_rank=32))
    if engine.num_gpus == 1:
        # On one GPU only: on several, ZeRO shards the weights, and it does not support quantised ones.
        changes += _quantizations(training)
    return changes


def _quantizations(training: TrainingConfig) -> list[Change]:
    """Quantise the frozen base of an adapter to 8 bits, then to 4."""
    adapter = "" if training.lora_rank is not None else "--lora_rank 32 "
    return [
        _set(f"{adapter}--base_quantization {kind}", lora_rank=training.lora_rank or 32, base_quantization=kind)
        for kind in ("int8", "nf4")
        if training.base_quantization not in (kind, "nf4")
    ]


def _is_allowed(change: Change, request: Request) -> bool:
    """Whether the recipe takes this change. Some of its options exclude each other, and each config checks its own."""
    try:
        change[1](request).check()
    except ValueError:
        return False
    return True


def _option(change: Change) -> str:
    return change[0].split()[0]


def _set(name: str, **options: Any) -> Change:
    return name, lambda request: replace(request, training=replace(request.training, **options))


def _spread(name: str, **options: Any) -> Change:
    return name, lambda request: replace(request, engine=replace(request.engine, **options))


def _divides(request: Request, degree: int) -> bool:
    heads = request.transformer_config["num_attention_heads"]
    return all(count % degree == 0 for count in (request.engine.num_gpus, heads, request.num_tokens))
