"""
Measures time, memory and FLOPs of a trainer's updates with hooks on the models and the device's own clock.

A measurement runs the trainer's own `train()`, with data, updates, schedule and log. The first update is the warm-up;
its FLOPs are counted. The next updates are timed. Where a rollout serves several updates, "an update" is the mean of so
many, from one rollout to the next. On the CPU one more update follows with torch's profiler, which
reports each allocation and release. The memory is the peak of the allocated bytes; tensors from before the update are
counted one by one. With CUDA the memory is `max_memory_allocated` over the timed updates. Then the run ends.

Framework overhead is the share of an update's time that is neither in a forward of the generator or the reward model,
nor in a backward pass. A backward pass is counted from when the gradient reaches a model's output to its end. So
sampler, losses, data, log, clipping and optimizer count as overhead; the share of the optimizer is also given
separately. With CUDA, times are events on the device's stream: work of the host while the device computes is not
overhead.
"""

import gc
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from hy_prfl.planning.simulation import FLOPS
from hy_prfl.runtime.attention import use_attention_backend
from hy_prfl.trainers.prfl_trainer import PRFLTrainer


class FlopMeter(TorchDispatchMode):
    """
    Counts FLOPs by the formulas of torch's FLOP counter, including those of activation checkpointing.

    `FlopCounterMode` itself cannot be used: its module hooks fail for a gradient with respect to a leaf, and the
    trainer takes the reward's gradient in this way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in FLOPS:
            self.flops += FLOPS[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


class Finished(Exception):  # noqa: N818  # not an error
    """Raised when all measurements are done."""


class Stopwatch:
    """
    Times on the clock of the device.

    Args:
        device (`torch.device`):
            With CUDA a time is an event in the device's stream, after all work that was queued before.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"

    def now(self) -> Any:
        """The current time."""
        if not self.on_cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two times. Call `wait` first."""
        return start.elapsed_time(end) / 1000 if self.on_cuda else end - start


class Spans:
    """Time intervals of the models' forwards and backwards, and of the optimizer's steps."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.spans: list[tuple[str, Any, Any]] = []
        self._start: dict[str, Any] = {}

    def watch_model(self, model: nn.Module) -> None:
        """Record each call of a model, and each backward pass that starts at its output."""
        model.register_forward_pre_hook(lambda *_: self._begin("forward"))
        model.register_forward_hook(self._forward_ends)

    def watch_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Record each step of an optimizer."""
        optimizer.register_step_pre_hook(lambda *_: self._begin("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self._end("optimizer"))

    def seconds(self, *kinds: str) -> float:
        """Total seconds of the intervals of these kinds."""
        return sum(self.stopwatch.seconds(start, end) for kind, start, end in self.spans if kind in kinds)

    def count(self, kind: str) -> int:
        """Number of intervals of a kind."""
        return sum(each == kind for each, _, _ in self.spans)

    def _begin(self, kind: str) -> None:
        self._start[kind] = self.stopwatch.now()

    def _end(self, kind: str) -> None:
        self.spans.append((kind, self._start.pop(kind), self.stopwatch.now()))

    def _forward_ends(self, model: nn.Module, args: Any, output: Any) -> None:
        self._end("forward")
        result = output if isinstance(output, torch.Tensor) else output[0]
        if result.requires_grad:
            result.register_hook(self._backward_begins)

    def _backward_begins(self, grad: torch.Tensor) -> None:
        self._begin("backward")
        # Called at the end of the whole backward pass, as in DDP. A tensor's hook would run only for its tensor.
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end("backward"))


@dataclass
class Measurement:
    """
    Time, memory and FLOPs of the updates of one case.

    Args:
        seconds (`list[float]`):
            Seconds of each timed update, from the start of a step to the start of the next.
        flops (`float`):
            FLOPs of matrix products, convolutions and attention in one update, including activation checkpointing.
        peak_bytes (`int`):
            Peak of the allocated bytes in an update.
        overhead, optimizer (`float`):
            Median share of an update's time outside the models, and in the optimizer.
        num_forwards, num_backwards (`float`):
            Calls of the models, and backward passes, in one update.
    """

    seconds: list[float]
    flops: float
    peak_bytes: int
    overhead: float
    optimizer: float
    num_forwards: float
    num_backwards: float


class Recorder:
    """
    Measures the updates of a trainer while it trains.

    Args:
        trainer (`PRFLTrainer`):
            A trainer that has not started yet.
        num_updates (`int`):
            Minimum number of timed updates.
        min_seconds (`float`):
            Minimum total seconds of the timed updates.
    """

    def __init__(self, trainer: PRFLTrainer, num_updates: int, min_seconds: float) -> None:
        self.trainer = trainer
        self.stopwatch = Stopwatch(trainer.accelerator.device)
        self.spans = Spans(self.stopwatch)
        # Updates from one rollout to the next.
        self.cycle = trainer.config.rollout_interval
        # The first cycle is not compiled, because the FLOP meter cannot see compiled code; the second one compiles.
        self.first = (2 if trainer.config.compile else 1) * self.cycle
        self.num_updates, self.min_seconds = num_updates, min_seconds
        self.index = -1
        self.began = 0.0
        self.moments: list[Any] = []
        self.updates: list[Spans] = []
        self.flops = 0.0
        self.peak_bytes = 0

    def update(self, train_step: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Run one step of the trainer, with the measurements that are due."""
        self.index += 1
        if self.index < self.cycle:
            return self._count(train_step)
        if self.index < self.first:
            return train_step()
        if self.index == self.first:
            self._begin()
        num_timed, rest = divmod(self.index - self.first, self.cycle)
        if rest > 0:
            return train_step()
        self._next_update()
        if num_timed < self.num_updates or perf_counter() < self.began + self.min_seconds:
            return train_step()
        self.stopwatch.wait()
        if self.stopwatch.on_cuda:
            self.peak_bytes = torch.cuda.max_memory_allocated()
        else:
            self.peak_bytes = most_bytes_alive(self.trainer, train_step)
        raise Finished

    def result(self) -> Measurement:
        """The results."""
        seconds, overhead, optimizer = [], [], []
        for start, end, spans in zip(self.moments, self.moments[1:], self.updates, strict=False):
            whole = self.stopwatch.seconds(start, end)
            seconds.append(whole / self.cycle)
            overhead.append(1 - spans.seconds("forward", "backward") / whole)
            optimizer.append(spans.seconds("optimizer") / whole)
        return Measurement(
            seconds=seconds,
            flops=self.flops,
            peak_bytes=self.peak_bytes,
            overhead=statistics.median(overhead),
            optimizer=statistics.median(optimizer),
            num_forwards=self.updates[0].count("forward") / self.cycle,
            num_backwards=self.updates[0].count("backward") / self.cycle,
        )

    def _count(self, train_step: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """One step with the FLOP meter, without compilation and with torch's own kernels, which it can count."""
        trainer, kept = self.trainer, self.trainer.config
        meter = FlopMeter()
        with ExitStack() as stack:
            for model in (trainer.unwrapped, *trainer.reward.models):
                stack.enter_context(use_attention_backend(model, "native"))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(meter)
            trainer.config = replace(kept, rollout_attention_backend=None)
            metrics = train_step()
            trainer.config = kept
        self.flops += meter.flops / self.cycle
        return metrics

    def _begin(self) -> None:
        for model in (self.trainer.unwrapped, *self.trainer.reward.models):
            self.spans.watch_model(model)
        self.spans.watch_optimizer(self.trainer.updates.optimizer.optimizer)
        gc.collect()
        self.stopwatch.wait()
        if self.stopwatch.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        self.began = perf_counter()

    def _next_update(self) -> None:
        """End the current update and start the next."""
        self.moments.append(self.stopwatch.now())
        closed = Spans(self.stopwatch)
        closed.spans, self.spans.spans = self.spans.spans, []
        if self.index > self.first:
            self.updates.append(closed)


class Measured:
    """Mixin for a trainer. Its steps are measured by `recorder`."""

    recorder: Recorder

    def train_step(self) -> dict[str, torch.Tensor]:
        """One step, measured."""
        return self.recorder.update(super().train_step)  # type: ignore[misc]


def measure(trainer: Any, num_updates: int, min_seconds: float = 0.0) -> Measurement:
    """Run a trainer with the mixin [`Measured`] until all is measured. The trainer cannot be used afterwards."""
    trainer.recorder = Recorder(trainer, num_updates, min_seconds)
    try:
        trainer.train()
    except Finished:
        return trainer.recorder.result()
    raise RuntimeError("The run ended before everything was measured.")


def most_bytes_alive(trainer: PRFLTrainer, train_step: Callable[[], object]) -> int:
    """
    Peak of the allocated bytes in a step on the CPU.

    Tensors from before the step are counted one by one. Allocations in the step are taken from the profiler, which
    records each allocation and release of torch's CPU allocator, also inside kernels.
    """
    gc.collect()
    tensors = [*trainer.unwrapped.parameters(), *trainer.unwrapped.buffers()]
    tensors += [part for model in trainer.reward.models for part in (*model.parameters(), *model.buffers())]
    for state in trainer.updates.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    tensors += [parameter.grad for parameter in trainer.unwrapped.parameters() if parameter.grad is not None]
    tensors = [part for tensor in tensors for part in _parts(tensor)]
    before = sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return before + peak


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold the memory of a tensor: integers and scales of a quantised one."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of the fastest of some products of large square matrices."""
    size, repeats = (8192, 20) if device.type == "cuda" else (1536, 8)
    stopwatch = Stopwatch(device)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        start = stopwatch.now()
        torch.mm(left, right)
        end = stopwatch.now()
        stopwatch.wait()
        best = min(best, stopwatch.seconds(start, end))
    return 2 * size**3 / best
