"""A reward model for candidates: scores of noisy and of finished latents, and the gradient that guides them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..flow_matching import NUM_TRAIN_TIMESTEPS, row_noise
from ..models.conditioning import Conditioning
from ..models.reward_model import WanRewardModel, score_noised


class CandidateScorer:
    """
    A reward model for the candidates of one video, which share prompt and images.

    Args:
        reward_model (`WanRewardModel`):
            On the device of the latents, or on another one; then each call moves it there and back.
        batch_size (`int`):
            Candidates that it takes at once.

    Attributes:
        conditioning (`Conditioning`, *optional*):
            Conditioning of the generator, of one clip. To be set before the first call.
        num_forwards, num_backwards (`int`):
            Passes so far; a batch counts once for each candidate.
    """

    def __init__(self, reward_model: WanRewardModel, batch_size: int) -> None:
        self.reward_model, self.batch_size = reward_model, batch_size
        self.conditioning: Conditioning | None = None
        self.num_forwards = self.num_backwards = 0

    def guide(
        self, velocity: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Velocities with the reward's gradient added, see [`RewardGuidance`]."""
        gradients = []
        with self._on(latents.device), torch.enable_grad():
            for noisy in latents.split(self.batch_size):
                leaf = noisy.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self._logits(leaf, timestep).sum(), leaf)
                gradients.append(gradient)
        self.num_forwards += len(latents)
        self.num_backwards += len(latents)
        gradient = torch.cat(gradients).float()
        lengths = [each.float().flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1) for each in (velocity, gradient)]
        # A gradient of zero has no direction.
        direction = torch.where(lengths[1] > 0, gradient / lengths[1], 0.0)
        return (velocity.float() - scale * lengths[0] * direction).to(velocity.dtype)

    def _logits(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Logits of one batch of noisy latents."""
        times = timestep.to(latents.device).expand(len(latents))
        return self.reward_model(**self._conditioning(latents).model_inputs(latents, times)).logits

    def _conditioning(self, latents: torch.Tensor) -> Conditioning:
        """Conditioning of the reward model for a batch of latents."""
        assert self.conditioning is not None
        taken = self.conditioning.taken_by(self.reward_model.config)
        return taken.to(latents.device, self.reward_model.dtype).expand(len(latents))

    @torch.no_grad()
    def score(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Logits of noisy latents of any number of candidates."""
        with self._on(latents.device):
            batches = [self._logits(noisy, timestep) for noisy in latents.split(self.batch_size)]
        self.num_forwards += len(latents)
        return torch.cat(batches)

    @torch.no_grad()
    def score_clean(self, latents: torch.Tensor, timesteps: Sequence[float]) -> torch.Tensor:
        """Mean logit of finished latents at these noise levels, all of them with the same noise."""
        total = torch.zeros(len(latents), device=latents.device)
        noise = row_noise("candidates", latents.shape[1:], seed=0).to(latents)
        with self._on(latents.device):
            for timestep in timesteps:
                batches = []
                for clean in latents.split(self.batch_size):
                    logits = score_noised(
                        self.reward_model,
                        latents=clean,
                        noise=noise.expand_as(clean),
                        sigmas=torch.full((len(clean),), timestep / NUM_TRAIN_TIMESTEPS, device=clean.device),
                        conditioning=self._conditioning(clean),
                    )
                    batches.append(logits)
                total += torch.cat(batches)
        self.num_forwards += len(latents) * len(timesteps)
        return total / len(timesteps)

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        """Context with the reward model on this device; afterwards it goes back to its own."""
        home = self.reward_model.device
        if home == device:
            yield
            return
        self.reward_model.to(device)
        try:
            yield
        finally:
            self.reward_model.to(home)
