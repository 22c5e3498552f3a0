"""
Time, memory and FLOPs of the updates of a trainer, taken from outside: hooks of the models, and the device's own clock.

A run is the trainer's own `train()`: data, updates, schedule and log. In its first update, which warms up, FLOPs are
counted. The next ones are timed, so many and for so long as asked. On the CPU one more follows, with torch's profiler on, which reports each allocation and
release: the memory is the most bytes that were alive, tensors that were there before counted one by one. With CUDA it is
`max_memory_allocated` over the timed updates. The next update is not made.

Framework overhead is the share of an update's time that is neither in a forward of the generator or of the reward model,
nor in a backward pass, from the moment that the gradient reaches a model's output to the end of that pass. So the sampler,
the losses, data, log and clipping count as overhead, and the optimizer too, which is also given by itself. With CUDA
these moments are events on the device's own stream: what the host does while the device computes costs nothing there.
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
    Counts operations by the formulas of torch's FLOP counter, recomputed ones too.

    Not with `FlopCounterMode` itself: its hooks on modules do not bear a gradient taken with respect to a leaf, which is
    how the trainer takes the reward's.
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
    """All that was to be measured has been."""


class Stopwatch:
    """
    Moments on the clock of the device that computes.

    Args:
        device (`torch.device`):
            With CUDA a moment is an event, which the device reaches when it has done what it was given before.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"

    def now(self) -> Any:
        """This moment."""
        if not self.on_cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two moments; `wait` before."""
        return start.elapsed_time(end) / 1000 if self.on_cuda else end - start


class Spans:
    """Intervals that the models' forwards and backwards, and the optimizer, were at work."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.spans: list[tuple[str, Any, Any]] = []
        self._start: dict[str, Any] = {}

    def watch_model(self, model: nn.Module) -> None:
        """Record each call of a model, and the backward pass that begins at what it returns."""
        model.register_forward_pre_hook(lambda *_: self._begin("forward"))
        model.register_forward_hook(self._forward_ends)

    def watch_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Record each step of an optimizer."""
        optimizer.register_step_pre_hook(lambda *_: self._begin("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self._end("optimizer"))

    def seconds(self, *kinds: str) -> float:
        """Sum of the intervals of these kinds."""
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
        # Called when the whole backward pass is over, as DDP does it; a tensor's hook knows only its own tensor.
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end("backward"))


@dataclass
class Measurement:
    """
    What the updates of one case took.

    Args:
        seconds (`list[float]`):
            Each timed update, from the beginning of a step to the beginning of the next.
        flops (`int`):
            Multiplications and additions of matrix products, convolutions and attention in one update, recomputed ones
            too.
        peak_bytes (`int`):
            Most bytes alive in an update.
        overhead, optimizer (`float`):
            Median share of an update outside of the models, and in the optimizer.
        num_forwards, num_backwards (`int`):
            Calls of the models, and backward passes, in one update.
    """

    seconds: list[float]
    flops: int
    peak_bytes: int
    overhead: float
    optimizer: float
    num_forwards: int
    num_backwards: int


class Recorder:
    """
    Measures the updates of a trainer while it trains.

    Args:
        trainer (`PRFLTrainer`):
            The trainer, not started yet.
        num_updates (`int`):
            Updates to time, at least.
        min_seconds (`float`):
            Seconds that the timed updates take together, at least.
    """

    def __init__(self, trainer: PRFLTrainer, num_updates: int, min_seconds: float) -> None:
        self.trainer = trainer
        self.stopwatch = Stopwatch(trainer.accelerator.device)
        self.spans = Spans(self.stopwatch)
        # Compilation happens in the second update: the FLOP meter does not see into compiled code.
        self.first = 2 if trainer.config.compile else 1
        self.num_updates, self.min_seconds = num_updates, min_seconds
        self.index = -1
        self.began = 0.0
        self.moments: list[Any] = []
        self.updates: list[Spans] = []
        self.flops = self.peak_bytes = 0

    def update(self, train_step: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Do one step of the trainer, and whatever is measured in it."""
        self.index += 1
        if self.index == 0:
            return self._count(train_step)
        if self.index < self.first:
            return train_step()
        if self.index == self.first:
            self._begin()
        self._next_update()
        if self.index < self.first + self.num_updates or perf_counter() < self.began + self.min_seconds:
            return train_step()
        self.stopwatch.wait()
        if self.stopwatch.on_cuda:
            self.peak_bytes = torch.cuda.max_memory_allocated()
        else:
            self.peak_bytes = most_bytes_alive(self.trainer, train_step)
        raise Finished

    def result(self) -> Measurement:
        """What was measured."""
        seconds, overhead, optimizer = [], [], []
        for start, end, spans in zip(self.moments, self.moments[1:], self.updates, strict=False):
            seconds.append(self.stopwatch.seconds(start, end))
            overhead.append(1 - spans.seconds("forward", "backward") / seconds[-1])
            optimizer.append(spans.seconds("optimizer") / seconds[-1])
        return Measurement(
            seconds=seconds,
            flops=self.flops,
            peak_bytes=self.peak_bytes,
            overhead=statistics.median(overhead),
            optimizer=statistics.median(optimizer),
            num_forwards=self.updates[0].count("forward"),
            num_backwards=self.updates[0].count("backward"),
        )

    def _count(self, train_step: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """One step with the FLOP meter, which knows neither compiled code nor kernels that are not torch's own."""
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
        self.flops = meter.flops
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
        """Close an update and open the next."""
        self.moments.append(self.stopwatch.now())
        closed = Spans(self.stopwatch)
        closed.spans, self.spans.spans = self.spans.spans, []
        if self.index > self.first:
            self.updates.append(closed)


class Measured:
    """Mixin for a trainer, whose steps its recorder then measures."""

    recorder: Recorder

    def train_step(self) -> dict[str, torch.Tensor]:
        """One step, measured."""
        return self.recorder.update(super().train_step)  # type: ignore[misc]


def measure(trainer: Any, num_updates: int, min_seconds: float = 0.0) -> Measurement:
    """Let a trainer with the mixin [`Measured`] train until enough is known. It cannot be used after that."""
    trainer.recorder = Recorder(trainer, num_updates, min_seconds)
    try:
        trainer.train()
    except Finished:
        return trainer.recorder.result()
    raise RuntimeError("The run ended before everything was measured.")


def most_bytes_alive(trainer: PRFLTrainer, train_step: Callable[[], object]) -> int:
    """
    Most bytes of tensors alive at a time in a step on the CPU.

    What is there before it is counted tensor by tensor, what comes and goes in it by the allocator's own records: torch
    reports each allocation and release on the CPU to the profiler, those inside of kernels too.
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
    """What holds the memory of a tensor: of a quantised one its integers and scales."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of the best of some products of large square matrices: what the device can do, as far as measured."""
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
