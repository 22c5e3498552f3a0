"""A reward model for candidates: scores of noisy and of finished latents, and the gradient that guides them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..flow_matching import NUM_TRAIN_TIMESTEPS, row_noise
from ..models.conditioning import Conditioning
from ..models.reward_model import WanRewardModel, score_noised


class CandidateJudge:
    """
    A reward model for the candidates of one video, which share prompt and images.

    Args:
        reward_model (`WanRewardModel`):
            On the device of the latents, or on another one; then each call moves it there and back.
        batch_size (`int`):
            Candidates that it takes at once.

    Attributes:
        prompt_embeds, image_embeds (`torch.Tensor`, *optional*):
            Embeddings of the generator, one row. To be set before the first call, `image_embeds` if there are any.
        condition (`torch.Tensor`, *optional*):
            Condition of the generator, the same row for each candidate.
        num_forwards, num_backwards (`int`):
            Passes so far; a batch counts once for each candidate.
    """

    def __init__(self, reward_model: WanRewardModel, batch_size: int) -> None:
        self.reward_model, self.batch_size = reward_model, batch_size
        self.prompt_embeds: torch.Tensor | None = None
        self.image_embeds: torch.Tensor | None = None
        self.condition: torch.Tensor | None = None
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
        assert self.prompt_embeds is not None
        count = len(latents)
        times = timestep.to(latents.device).expand(count)
        return self.reward_model(**self._conditioning(count).model_inputs(latents, times)).logits

    def _conditioning(self, count: int) -> Conditioning:
        """Conditioning of the reward model for `count` candidates."""
        assert self.prompt_embeds is not None
        dtype, images, condition = self.reward_model.dtype, self.image_embeds, self.condition
        given = Conditioning(
            self.prompt_embeds.to(dtype).expand(count, -1, -1),
            None if images is None else images.to(dtype).repeat(count, 1, 1),
            None if condition is None else condition[:1].expand(count, -1, -1, -1, -1),
        )
        return given.taken_by(self.reward_model.config)

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
        assert self.prompt_embeds is not None
        total = torch.zeros(len(latents), device=latents.device)
        noise = row_noise("candidates", latents.shape[1:], seed=0).to(latents)
        with self._on(latents.device):
            for timestep in timesteps:
                batches = []
                for clean in latents.split(self.batch_size):
                    count = len(clean)
                    logits = score_noised(
                        self.reward_model,
                        latents=clean,
                        noise=noise.expand_as(clean),
                        sigmas=torch.full((count,), timestep / NUM_TRAIN_TIMESTEPS, device=clean.device),
                        conditioning=self._conditioning(count),
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
