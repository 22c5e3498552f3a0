"""
Several candidates of a video, scored by a reward model while they are still noisy.

Works on the stock diffusers Wan pipelines: they are called for one video, and between their steps the batch of
candidates grows, shrinks, or is guided by the gradient of the reward.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from diffusers.utils.torch_utils import randn_tensor

from ..compatibility import check_fits_generator
from ..configs.base import check
from ..configs.keep import check_keep
from ..flow_matching import row_noise
from ..models.conditioning import Conditioning
from ..models.reward_model import WanRewardModel
from .candidate_results import Candidate, Candidates
from .candidate_scorer import CandidateScorer
from .candidate_settings import CandidateSettings


# Arguments of the pipelines that are set here.
RESERVED = (
    "generator",
    "latents",
    "num_videos_per_prompt",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "output_type",
    "return_dict",
)


def sample_candidates(
    pipeline: WanPipeline | WanImageToVideoPipeline,
    reward_model: WanRewardModel,
    seeds: Sequence[int],
    settings: CandidateSettings | None = None,
    *,
    output_type: str = "np",
    **inputs: Any,
) -> Candidates:
    """
    Sample one video from several seeds, drop candidates with low rewards, and decode the best one.

    The pipeline may have classifier-free guidance, LoRAs, two experts, offloaded weights and any scheduler whose steps
    work on each clip alone. Its text encoder and image encoders run once. Dropping candidates does not change the others.
    A step cache (`enable_cache`) is refused, as it treats a batch as one clip.

    Args:
        reward_model (`WanRewardModel`):
            On the device of the pipeline, or on another one; then each decision moves it there and back.
        seeds (`Sequence[int]`):
            A seed for each candidate; its noise is that of `generator=torch.Generator().manual_seed(seed)`.
        settings (`CandidateSettings`, *optional*):
            How they are chosen; plain best-of-N if left out.
        output_type (`str`, defaults to `"np"`):
            The pipeline's: `"np"`, `"pil"`, `"pt"` or `"latent"`.
        inputs:
            Arguments of the pipeline for one video: `prompt`, `image`, `height`, `num_inference_steps`, ...

    Raises:
        ValueError: If settings, inputs and reward model do not fit each other or the pipeline.

    Example:
        ```python
        keep = parse_keep("6:4,12:2,20:1")
        result = sample_candidates(pipeline, reward_model, range(8), CandidateSettings(keep=keep), prompt="A cat waves.")
        write_video("cat.mp4", result.frames, fps=16)
        ```
    """
    settings = CandidateSettings() if settings is None else settings
    search = _Search(pipeline, reward_model, list(seeds), settings, inputs)
    with search.installed():
        frames = pipeline(
            **inputs,
            generator=torch.Generator().manual_seed(search.candidates[0].seed),
            callback_on_step_end=search.decide,
            callback_on_step_end_tensor_inputs=["latents"],
            output_type=output_type,
        ).frames[0]
    return Candidates(
        frames=frames,
        candidates=search.candidates,
        num_forwards=search.num_forwards,
        num_reward_forwards=search.scorer.num_forwards,
        num_reward_backwards=search.scorer.num_backwards,
    )


class _Search:
    """One call of a pipeline with several candidates. `alive` has the numbers of those in the batch."""

    def __init__(
        self,
        pipeline: WanPipeline | WanImageToVideoPipeline,
        reward_model: WanRewardModel,
        seeds: list[int],
        settings: CandidateSettings,
        inputs: dict[str, Any],
    ) -> None:
        check(len(seeds) > 0 and len(set(seeds)) == len(seeds), "seeds", seeds, "one or more, all different")
        for name in RESERVED:
            check(name not in inputs, name, inputs.get(name), "left out, it is set for the candidates")
        check(not isinstance(inputs.get("prompt"), list), "prompt", inputs.get("prompt"), "one text, not a list")
        self.transformers = [each for each in (pipeline.transformer, pipeline.transformer_2) if each is not None]
        caching = [type(each).__name__ for each in self.transformers if getattr(each, "is_cache_enabled", False)]
        check(not caching, "step cache", caching, "off: it treats a batch as one clip")
        check_fits_generator(reward_model.config, self.transformers[0].config, allow_other_base=True)
        self.pipeline, self.settings = pipeline, settings
        self.scorer = CandidateScorer(reward_model, settings.batch_size)
        self.decisions = {decision.step: decision.num_kept for decision in settings.keep}
        self.candidates = [Candidate(seed) for seed in seeds]
        self.alive = list(range(len(seeds)))
        # The pipeline's condition, a row for each candidate in the batch.
        self.condition: torch.Tensor | None = None
        self.clean: torch.Tensor | None = None
        self.step_index = 0
        self.num_forwards = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Context in which the search wraps methods of this pipeline, its scheduler and its transformers."""
        pipeline, scheduler = self.pipeline, self.pipeline.scheduler
        with ExitStack() as stack:
            prepare = partial(self.prepare_latents, pipeline.prepare_latents)
            stack.enter_context(_replaced(pipeline, "prepare_latents", prepare))
            stack.enter_context(_replaced(scheduler, "step", partial(self.take_step, scheduler.step)))
            for transformer in self.transformers:
                forward = partial(self.forward, transformer.forward)
                stack.enter_context(_replaced(transformer, "forward", forward))
            yield

    def prepare_latents(self, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own latents and condition of one video, with a row for each candidate."""
        num_steps = len(self.pipeline.scheduler.timesteps)
        resample = self.settings.resample
        check_keep(
            self.settings.keep,
            num_candidates=len(self.candidates),
            num_inference_steps=num_steps,
            resample=resample,
        )
        prepared = prepare(*args, **kwargs)
        latents = prepared if isinstance(prepared, torch.Tensor) else prepared[0]
        noises = [latents]
        for candidate in self.candidates[1:]:
            generator = torch.Generator().manual_seed(candidate.seed)
            noises.append(randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype))
        noise = torch.cat(noises)
        if isinstance(prepared, torch.Tensor):
            return noise
        # The pipeline keeps this tensor to the end and concatenates it to the latents, so it has to shrink with them.
        self.condition = prepared[1]
        self.resize_condition(len(noise))
        return noise, self.condition, *prepared[2:]

    def forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A transformer's forward, in batches; text and image are one row for all candidates."""
        hidden_states, timestep = kwargs.pop("hidden_states"), kwargs.pop("timestep")
        text, image = kwargs.pop("encoder_hidden_states"), kwargs.pop("encoder_hidden_states_image", None)
        if self.scorer.conditioning is None:
            # The first forward of a chain is that with the prompt; the one without follows.
            condition = None if self.condition is None else self.condition[:1]
            self.scorer.conditioning = Conditioning(text, image, condition)
        size = self.settings.batch_size
        outputs = []
        for noisy, times in zip(hidden_states.split(size), timestep.split(size), strict=True):
            given = Conditioning(text, image).expand(len(noisy))
            outputs.append(
                forward(
                    *args,
                    hidden_states=noisy,
                    timestep=times,
                    encoder_hidden_states=given.prompt_embeds,
                    encoder_hidden_states_image=given.image_embeds,
                    **kwargs,
                )[0]
            )
        self.num_forwards += len(hidden_states)
        return (torch.cat(outputs),)

    def take_step(
        self,
        step: Callable[..., Any],
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        """The scheduler's step along the velocity, to which guided steps add the reward's gradient."""
        guidance, number = self.settings.guidance, self.step_index + 1
        if guidance is not None and guidance.first_step <= number <= guidance.last_step:
            model_output = self.scorer.guide(model_output, timestep, sample, guidance.scale)
        if self.settings.resample and number in self.decisions:
            sigma = self.pipeline.scheduler.sigmas[self.step_index].to(sample)
            self.clean = sample - sigma * model_output.to(sample.dtype)
        self.step_index += 1
        return step(model_output, timestep, sample, **kwargs)

    def decide(
        self, pipeline: WanPipeline | WanImageToVideoPipeline, index: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        """The callback after a step: score the candidates, and drop the worst."""
        latents, step, num_steps = tensors["latents"], index + 1, len(pipeline.scheduler.timesteps)
        if step == num_steps:
            return {"latents": self.choose(latents, step)}
        num_kept = self.decisions.get(step)
        if num_kept is None and not self.settings.score_every_step:
            return {}
        scores = self.checked(self.scorer.score(latents, pipeline.scheduler.timesteps[step]))
        for number, score in zip(self.alive, scores, strict=True):
            self.candidates[number].logits[step] = score
        if num_kept is None:
            return {}
        kept = self.drop(scores, num_kept, step)
        latents = self.select(latents, kept)
        if self.settings.resample:
            latents = self.copy(latents, kept, step)
        return {"latents": latents}

    def checked(self, logits: torch.Tensor) -> list[float]:
        values: list[float] = logits.float().cpu().tolist()
        for number, value in zip(self.alive, values, strict=True):
            if not torch.isfinite(torch.tensor(value)):
                raise ValueError(f"The score of the candidate with seed {self.candidates[number].seed} is {value}.")
        return values

    def choose(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """Keep only the best of the finished candidates."""
        if len(self.alive) == 1 and not self.settings.score_every_step:
            return latents
        scores = self.checked(self.scorer.score_clean(latents, self.settings.final_timesteps))
        for number, score in zip(self.alive, scores, strict=True):
            self.candidates[number].final_logit = score
        return self.select(latents, self.drop(scores, 1, step))

    def drop(self, scores: Sequence[float], num_kept: int, step: int) -> list[int]:
        """Drop all but the best candidates; returns their rows, in the order of the batch."""
        ranked = sorted(range(len(scores)), key=lambda row: -scores[row])
        for row in ranked[num_kept:]:
            self.candidates[self.alive[row]].dropped_after = step
        kept = sorted(ranked[:num_kept])
        self.alive = [self.alive[row] for row in kept]
        return kept

    def select(self, latents: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Keep these rows of every tensor that has a row for each candidate."""
        select_state(self.pipeline.scheduler, rows, num_rows=len(latents))
        if self.clean is not None:
            self.clean = self.clean[list(rows)]
        self.resize_condition(len(rows))
        return latents[list(rows)]

    def resize_condition(self, num_rows: int) -> None:
        """Give the condition another number of rows, in place: the pipeline holds this very tensor. All are the same."""
        if self.condition is not None:
            self.condition.data = self.condition.data[:1].expand(num_rows, -1, -1, -1, -1)

    def copy(self, latents: torch.Tensor, kept: Sequence[int], step: int) -> torch.Tensor:
        """
        Add a re-noised copy of each candidate.

        The clean latents that the last step predicts give the noise in the latents, and part of it is replaced:
        `(1 - sigma) clean + sigma (sqrt(1 - a^2) noise + a new)`. The solver restarts, because its history
        belongs to other latents.
        """
        assert self.clean is not None
        sigma = self.pipeline.scheduler.sigmas[self.step_index].to(latents)
        share, parents = self.settings.renoise, list(self.alive)
        signal = (1 - sigma) * self.clean
        news = []
        for parent in parents:
            name = f"{self.candidates[parent].seed}/{parent}/{step}"
            news.append(row_noise(name, latents.shape[1:], seed=0).to(latents))
        old = latents - signal
        copies = signal + (1 - share**2) ** 0.5 * old + sigma * share * torch.stack(news)
        for parent in parents:
            seed = self.candidates[parent].seed
            self.alive.append(len(self.candidates))
            self.candidates.append(Candidate(seed, copied_from=parent, copied_after=step))
        self.clean = None
        restart(self.pipeline.scheduler, self.step_index, latents.device)
        self.resize_condition(len(self.alive))
        return torch.cat([latents, copies])


def select_state(scheduler: Any, rows: Sequence[int], *, num_rows: int) -> None:
    """
    Keep rows of a scheduler's history of a batch: earlier samples and model outputs.

    Args:
        rows (`Sequence[int]`):
            Rows of the batch to keep.
        num_rows (`int`):
            Rows that the batch had.
    """

    def select(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim == 5 and len(value) == num_rows:
            return value[list(rows)]
        if isinstance(value, list):
            return [select(each) for each in value]
        return value

    for name, value in vars(scheduler).items():
        setattr(scheduler, name, select(value))


def restart(scheduler: Any, step_index: int, device: torch.device) -> None:
    """Restart a scheduler at a step: it keeps its noise levels and loses its history."""
    scheduler.set_timesteps(scheduler.num_inference_steps, device=device)
    scheduler._step_index = step_index


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Shadow a method on one object."""
    own = vars(owner)
    had, before = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if had:
            own[name] = before
        else:
            del own[name]
