"""If a recipe does not fit: the cheapest changes with which it does."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..configs.prfl import PRFLTrainingConfig
from .estimate import Estimate, Request, estimate


Change = tuple[str, Callable[[Request], Request]]


def cheapest_changes(request: Request, *, capacity: float, reserved: float) -> tuple[list[str], Estimate | None]:
    """
    Find changes with which a recipe fits.

    They are taken up one after the other, the cheapest first, until it fits; then each that turns out not to be needed is
    dropped again, the most expensive first.

    Args:
        capacity (`float`):
            Bytes of a GPU.
        reserved (`float`):
            See [`estimate`].

    Returns:
        The options to set, and the needs of the run with them; None if nothing helps.
    """

    def apply(changes: list[Change]) -> Estimate:
        changed = request
        for _, change in changes:
            changed = change(changed)
        return estimate(changed, reserved=reserved)

    taken: list[Change] = []
    for name, change in possible_changes(request):
        # Of one option the later, more costly value takes the place of the earlier one.
        option = name.split()[0]
        taken = [*(each for each in taken if each[0].split()[0] != option), (name, change)]
        if apply(taken).peak <= capacity:
            break
    else:
        return [], None
    for candidate in reversed(taken[:-1]):
        fewer = [each for each in taken if each is not candidate]
        if apply(fewer).peak <= capacity:
            taken = fewer
    return [name for name, _ in taken], apply(taken)


def possible_changes(request: Request) -> list[Change]:
    """Options that save memory, the cheapest first: those that cost little time, then much time, then quality."""
    training, engine = request.training, request.engine
    changes: list[Change] = []
    if not training.gradient_checkpointing:
        changes.append(_set("--gradient_checkpointing true", gradient_checkpointing=True))
    is_prfl = isinstance(training, PRFLTrainingConfig)
    if is_prfl and not training.shard_reward_model and engine.num_gpus > 1:
        changes.append(_set("--shard_reward_model true", shard_reward_model=True))
    if engine.zero_stage < 2 and engine.num_gpus > 1:
        changes.append(_spread("--zero_stage 2", zero_stage=2))
    if engine.zero_stage < 3 and engine.num_gpus > 1:
        changes.append(_spread("--zero_stage 3", zero_stage=3))
    if not training.offload_activations:
        changes.append(_set("--offload_activations true", offload_activations=True, gradient_checkpointing=True))
    if is_prfl and not training.rerun_gradient_step:
        changes.append(_set("--rerun_gradient_step true", rerun_gradient_step=True))
    for degree in (2, 4, 8):
        if degree > training.context_parallel_degree and _divides(request, degree):
            changes.append(_set(f"--context_parallel_degree {degree}", context_parallel_degree=degree))
    if engine.num_gpus > 1 and not engine.offload:
        changes.append(_spread("--offload true (with --zero_stage 3)", zero_stage=3, offload=True))
    if training.lora_rank is None:
        changes.append(_set("--lora_rank 32", lora_rank=32))
    return changes


def _set(name: str, **options: Any) -> Change:
    return name, lambda request: replace(request, training=replace(request.training, **options))


def _spread(name: str, **options: Any) -> Change:
    return name, lambda request: replace(request, engine=replace(request.engine, **options))


def _divides(request: Request, degree: int) -> bool:
    heads = request.transformer_config["num_attention_heads"]
    return all(count % degree == 0 for count in (request.engine.num_gpus, heads, request.num_tokens))
