"""
Denoising with the pipeline's own sampler, with gradient through chosen steps only. Independent of the reward.

What a surrogate and the gain of a step are, and which latents are scored, is explained in [`GradientStep`].
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import UniPCMultistepScheduler
from torch import nn

from ..flow_matching import add_noise, sigmas_to_timesteps
from ..models.conditioning import Conditioning
from ..runtime.attention import use_attention_backend
from .gradient_steps import Average, Foresight, GradientStep, surrogate
from .sampling import predict_velocity
from .step_cache import StepCache, forward_steps


AsBase = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class _State:
    """The start of a step: everything that the step depends on, without gradient."""

    index: int
    latents: torch.Tensor
    scheduler: UniPCMultistepScheduler

    def to(self, device: torch.device | str) -> "_State":
        """The same with its own scheduler, and its tensors on `device`."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.model_outputs = [None if each is None else each.to(device) for each in scheduler.model_outputs]
        scheduler.last_sample = None if scheduler.last_sample is None else scheduler.last_sample.to(device)
        return _State(self.index, self.latents.to(device), scheduler)

    def copy(self, device: torch.device, *, with_leaves: bool) -> tuple["_State", dict[str, torch.Tensor]]:
        """A copy to take the step from, and its tensors that take gradient, by their names in `_tensors`."""
        state = self.to(device)
        latents, scheduler = state.latents, state.scheduler
        if not with_leaves:
            return _State(self.index, latents, scheduler), {}
        latents = latents.clone().requires_grad_()
        for tensor in _tensors(latents, scheduler).values():
            tensor.requires_grad_()
        return _State(self.index, latents, scheduler), _tensors(latents, scheduler)


def _tensors(latents: torch.Tensor, scheduler: UniPCMultistepScheduler) -> dict[str, torch.Tensor]:
    """Tensors that the next step depends on: the latents and the history of the solver."""
    named = {f"model_outputs.{index}": output for index, output in enumerate(scheduler.model_outputs)}
    named |= {"latents": latents, "last_sample": scheduler.last_sample}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class _Step:
    """
    Result of a step: the next latents and the velocity, and what is scored.

    `seen`, `timesteps` and `gain` become `latents`, `timesteps` and `gain` of the [`GradientStep`].
    """

    next_latents: torch.Tensor
    velocity: torch.Tensor
    seen: torch.Tensor
    timesteps: torch.Tensor
    gain: torch.Tensor


@dataclass(frozen=True)
class _Stepper:
    """Takes steps of a chain. The options are those of [`walk_with_gradient`]."""

    transformer: nn.Module
    conditioning: Conditioning
    foresight: Foresight | None = None
    stop_input_gradient: bool = False
    as_base: AsBase | None = None

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Velocity of the generator at noisy latents."""
        return predict_velocity(self.transformer, latents, timestep, self.conditioning)

    @torch.no_grad()
    def base_velocity(
        self, scheduler: UniPCMultistepScheduler, index: int, latents: torch.Tensor
    ) -> torch.Tensor | None:
        """Velocity of the base at the start of a step, if `as_base` is given."""
        if self.as_base is None:
            return None
        with self.as_base():
            return self.predict(latents, scheduler.timesteps[index])

    def __call__(
        self,
        scheduler: UniPCMultistepScheduler,
        index: int,
        latents: torch.Tensor,
        *,
        with_gradient: bool,
        velocity: torch.Tensor | None = None,
    ) -> _Step:
        """Take a step; `velocity` is given where the model is not to be called."""
        timestep = scheduler.timesteps[index]
        sigma, next_sigma = scheduler.sigmas[index], scheduler.sigmas[index + 1]
        with torch.set_grad_enabled(with_gradient):
            if velocity is None:
                velocity = self.predict(latents.detach() if self.stop_input_gradient else latents, timestep)
            next_latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            if self.foresight is None:
                timesteps = scheduler.timesteps[index + 1].expand(latents.shape[0])
                return _Step(next_latents, velocity, next_latents, timesteps, gain=sigma - next_sigma)
            sigmas = self.foresight.sigmas(float(next_sigma))
            seen = add_noise(latents - sigma.to(latents) * velocity, self.foresight.noise, sigmas)
            return _Step(
                next_latents, velocity, seen, sigmas_to_timesteps(sigmas), gain=sigma.to(sigmas) * (1 - sigmas)
            )


def _chained_surrogates(
    stepper: _Stepper,
    states: Sequence[_State],
    latents_grad: torch.Tensor,
    *,
    velocity_grad: torch.Tensor | None = None,
    average: Average | None = None,
) -> Iterator[torch.Tensor]:
    """
    Surrogates of consecutive steps, one for each, from the last step to the first.

    Every step is checkpointed as a whole: it is run again with gradient, from a copy of its start, and differentiated by
    itself. So only one step has a graph at a time, and every engine sees ordinary backward passes. The gradient for the
    step before is read from the leaves of this one (the chain rule).
    """
    gradients = {"seen": latents_grad}
    for state in reversed(states):
        # The start of the first step takes no gradient.
        start, leaves = state.copy(latents_grad.device, with_leaves=state is not states[0])
        step = stepper(start.scheduler, start.index, start.latents, with_gradient=True)
        outputs = {"seen": step.seen, "velocity": step.velocity} | _tensors(step.next_latents, start.scheduler)
        if velocity_grad is not None and not leaves:
            gradients = {**gradients, "velocity": velocity_grad}
        # The caller and its engine multiply this scalar by factors of their own before they differentiate it. The probe
        # adds 0 and has a derivative of 1, so its gradient is the product of these factors. It is divided out below.
        probe = latents_grad.new_zeros((), requires_grad=True)
        total = probe + torch.stack([(outputs[name] * gradient).sum() for name, gradient in gradients.items()]).sum()
        del start, step, outputs
        yield total
        if not leaves:
            return
        del total
        assert probe.grad is not None, "The surrogate must be differentiated before the next one is requested."
        gradients = {name: leaf.grad / probe.grad for name, leaf in leaves.items() if leaf.grad is not None}
        if average is not None:
            gradients = {name: average(gradient) for name, gradient in gradients.items()}


def walk_with_gradient(
    transformer: nn.Module,
    scheduler: UniPCMultistepScheduler,
    *,
    noise: torch.Tensor,
    step_indices: Sequence[int],
    num_inference_steps: int,
    conditioning: Conditioning,
    num_chained_steps: int = 1,
    foresight: Foresight | None = None,
    stop_input_gradient: bool = False,
    as_base: AsBase | None = None,
    rerun: bool = False,
    offload: bool = False,
    rollout_attention_backend: str | None = None,
    cache_interval: int = 1,
    boundary: float = 0.0,
) -> Iterator[GradientStep]:
    r"""
    Walk one chain from noise, with gradient only in the steps `step_indices`, and yield at each of them.

    Each is a rollout to one step (paper, equations 7 and 8) that shares the steps before it with the others. The
    solver is multistep: the gradient of a step also passes through its corrector, but neither the latents that it
    starts from nor earlier model outputs take gradient. Use the gradient of a step before you request the next one, so
    that only one graph exists at a time. Every rank must pass the same `step_indices`, because under ZeRO-3 each
    forward pass is a collective.

    Args:
        transformer (`nn.Module`):
            The generator in training, wrapped by its engine. Called by keyword, `return_dict=False`.
        scheduler (`UniPCMultistepScheduler`):
            The pipeline's sampler; its state is reset.
        noise (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            Standard normal start of the chain, float32.
        step_indices (`Sequence[int]`):
            Steps that take gradient, ascending, in `[num_chained_steps - 1, num_inference_steps - 2]`: their results must
            still be noisy.
        num_inference_steps (`int`):
            Steps of the whole chain.
        conditioning (`Conditioning`):
            Prompts and, for image-to-video models, images.
        num_chained_steps (`int`, defaults to 1):
            How many consecutive steps, up to the one of `step_indices`, the gradient passes through. Each is
            checkpointed as a whole, so this costs the memory of one step, and of the latents of all of them.
        offload (`bool`, defaults to `False`):
            Keep the latents, and the solver's history, at which these steps start in host memory.
        foresight (`Foresight`, *optional*):
            Take the reward of the predicted clean latents instead of the next latents.
        stop_input_gradient (`bool`, defaults to `False`):
            Treat the input of the transformer as a constant (DRTune, arXiv 2405.00760): from one chained step to the
            next the gradient passes through the solver only.
        as_base (`Callable`, *optional*):
            Returns a context in which `transformer` is its base, for a LoRA with the adapter off. Then each step has a
            `base_velocity`, which costs one more forward pass without gradient. It precedes the forward passes with
            gradient, as engines allow no other forward pass between these and their backward pass.
        rerun (`bool`, defaults to `False`):
            Take each of these steps without gradient first, and again with gradient when its surrogate is requested. In
            between the step has no activations in memory. Costs one more forward pass. Chained steps always do this.
        rollout_attention_backend (`str`, *optional*):
            Attention kernel of the steps without gradient, by diffusers' name; the model's own if left out.
        cache_interval (`int`, defaults to 1):
            Call the transformer in one of so many steps, and extrapolate the velocity in the others, see
            [`~hy_prfl.rollout.step_cache.StepCache`]. It is called in all steps that the gradient passes through.
        boundary (`float`, defaults to 0.0):
            Timestep below which another expert is called. The velocity of one says nothing about the other's.

    Yields:
        [`GradientStep`], one for each of `step_indices`.

    Raises:
        ValueError: If `step_indices` are out of range or order.
    """
    first, last = num_chained_steps - 1, num_inference_steps - 2
    if not step_indices or list(step_indices) != sorted({*step_indices} & {*range(first, last + 1)}):
        raise ValueError(f"`step_indices` must be ascending and in [{first}, {last}], got {list(step_indices)}.")
    _start_at(scheduler, 0, num_inference_steps, noise.device)
    stepper = _Stepper(transformer, conditioning, foresight, stop_input_gradient, as_base)
    return _walk(
        stepper,
        scheduler,
        latents=noise,
        start_index=0,
        step_indices=step_indices,
        num_chained_steps=num_chained_steps,
        rerun=rerun,
        offload=offload,
        rollout_attention_backend=rollout_attention_backend,
        cache=_open_cache(scheduler, cache_interval, boundary),
    )


def step_from_state(
    transformer: nn.Module,
    scheduler: UniPCMultistepScheduler,
    *,
    latents: torch.Tensor,
    start_index: int,
    num_inference_steps: int,
    conditioning: Conditioning,
    num_chained_steps: int = 1,
    foresight: Foresight | None = None,
    stop_input_gradient: bool = False,
    as_base: AsBase | None = None,
    rerun: bool = False,
    offload: bool = False,
) -> GradientStep:
    """
    Take steps with gradient from a state of a chain that was walked before, see [`record_states`].

    The solver starts without a history, so the first step is of first order (Euler's), and without a corrector.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            Noisy latents before step `start_index`, float32.
        start_index (`int`):
            Index of the first of `num_chained_steps` steps; the last is at most `num_inference_steps - 2`.

        The other arguments are those of [`walk_with_gradient`].

    Raises:
        ValueError: If `start_index` is out of range.
    """
    last = num_inference_steps - 1 - num_chained_steps
    if not 0 <= start_index <= last:
        raise ValueError(f"`start_index` must be in [0, {last}], got {start_index}.")
    _start_at(scheduler, start_index, num_inference_steps, latents.device)
    stepper = _Stepper(transformer, conditioning, foresight, stop_input_gradient, as_base)
    walk = _walk(
        stepper,
        scheduler,
        latents=latents,
        start_index=start_index,
        step_indices=[start_index + num_chained_steps - 1],
        num_chained_steps=num_chained_steps,
        rerun=rerun,
        offload=offload,
        rollout_attention_backend=None,
        cache=None,
    )
    return next(walk)


def _walk(
    stepper: _Stepper,
    scheduler: UniPCMultistepScheduler,
    *,
    latents: torch.Tensor,
    start_index: int,
    step_indices: Sequence[int],
    num_chained_steps: int,
    rerun: bool,
    offload: bool,
    rollout_attention_backend: str | None,
    cache: StepCache | None,
) -> Iterator[GradientStep]:
    """The chain from `latents` before step `start_index` on; see [`walk_with_gradient`]."""
    next_index = start_index
    kept_on = "cpu" if offload else latents.device
    states: deque[_State] = deque(maxlen=num_chained_steps)
    velocities: deque[torch.Tensor] = deque(maxlen=num_chained_steps)
    for step_index in step_indices:
        with use_attention_backend(stepper.transformer, rollout_attention_backend):
            for index in range(next_index, step_index):
                takes_gradient = index > step_index - num_chained_steps
                if takes_gradient:
                    states.append(_State(index, latents, scheduler).to(kept_on))
                step = _rollout_step(stepper, scheduler, index, latents, cache=cache, must_call=takes_gradient)
                velocities.append(step.velocity)
                latents = step.next_latents
        next_index = step_index + 1
        if rerun or num_chained_steps > 1:
            states.append(_State(step_index, latents, scheduler).to(kept_on))
            base_velocity = stepper.base_velocity(scheduler, states[0].index, states[0].latents.to(latents.device))
            step = stepper(scheduler, step_index, latents, with_gradient=False)
            surrogates = partial(_chained_surrogates, stepper, list(states))
        else:
            base_velocity = stepper.base_velocity(scheduler, step_index, latents)
            step = stepper(scheduler, step_index, latents, with_gradient=True)
            surrogates = partial(surrogate, step.seen, step.velocity)
            _forget_gradient(scheduler)
        velocities.append(step.velocity.detach())
        if cache is not None:
            cache.add(step_index, step.velocity)
        latents = step.next_latents.detach()
        yield GradientStep(step.seen.detach(), step.timesteps, step.gain, velocities[0], surrogates, base_velocity)


def _rollout_step(
    stepper: _Stepper,
    scheduler: UniPCMultistepScheduler,
    index: int,
    latents: torch.Tensor,
    *,
    cache: StepCache | None,
    must_call: bool,
) -> _Step:
    """A step without gradient, which the cache may make without a forward pass unless the model must be called."""
    velocity = None if cache is None or must_call else cache.velocity_at(index)
    step = stepper(scheduler, index, latents, with_gradient=False, velocity=velocity)
    if cache is not None and velocity is None:
        cache.add(index, step.velocity)
    return step


def _open_cache(scheduler: UniPCMultistepScheduler, interval: int, boundary: float) -> StepCache | None:
    """A cache for one chain of a sampler whose timesteps are set, if it skips steps."""
    if interval == 1:
        return None
    return StepCache(forward_steps(scheduler.timesteps.tolist(), interval, boundary=boundary))


@torch.no_grad()
def record_states(
    transformer: nn.Module,
    scheduler: UniPCMultistepScheduler,
    *,
    noise: torch.Tensor,
    step_indices: Sequence[int],
    num_inference_steps: int,
    conditioning: Conditioning,
    rollout_attention_backend: str | None = None,
    cache_interval: int = 1,
    boundary: float = 0.0,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """
    Walk one chain from noise, without gradient, and yield the starting states of the steps `step_indices`.

    Args:
        step_indices (`Sequence[int]`):
            Steps, ascending, in `[0, num_inference_steps - 2]`. The transformer is called in each of them.

        The other arguments are those of [`walk_with_gradient`].

    Yields:
        `tuple[int, torch.Tensor, torch.Tensor]`: index of the step, the noisy latents before it and the model's velocity
        there, both float32.

    Raises:
        ValueError: If `step_indices` are out of range or order; when the first state is requested.
    """
    last = num_inference_steps - 2
    if not step_indices or list(step_indices) != sorted({*step_indices} & {*range(last + 1)}):
        raise ValueError(f"`step_indices` must be ascending and in [0, {last}], got {list(step_indices)}.")
    _start_at(scheduler, 0, num_inference_steps, noise.device)
    stepper = _Stepper(transformer, conditioning)
    cache = _open_cache(scheduler, cache_interval, boundary)
    latents = noise
    with use_attention_backend(transformer, rollout_attention_backend):
        for index in range(step_indices[-1] + 1):
            step = _rollout_step(stepper, scheduler, index, latents, cache=cache, must_call=index in step_indices)
            if index in step_indices:
                yield index, latents, step.velocity
            latents = step.next_latents


def _start_at(
    scheduler: UniPCMultistepScheduler, step_index: int, num_inference_steps: int, device: torch.device
) -> None:
    """Set a sampler to a step of its chain, without a history of earlier steps."""
    scheduler.set_timesteps(num_inference_steps, device=device)
    scheduler.set_begin_index(step_index)


def _forget_gradient(scheduler: UniPCMultistepScheduler) -> None:
    """Detach the solver's history from the graph of the last step."""
    outputs = scheduler.model_outputs
    scheduler.model_outputs = [None if output is None else output.detach() for output in outputs]
    scheduler.last_sample = scheduler.last_sample.detach()
