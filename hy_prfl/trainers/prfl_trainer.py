"""Process reward feedback learning: the generator climbs a latent reward, held by a flow-matching loss."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.logging import get_logger
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from ..configs.base import check
from ..configs.prfl import PRFLTrainingConfig
from ..data.collators import LatentBatch
from ..data.dataset import check_vae
from ..evaluation.sample_evaluator import SampleEvaluator
from ..flow_matching import add_noise, sample_noise, sigmas_to_timesteps, velocity_target
from ..formats.checkpoints import (
    AVERAGE_FOLDER,
    PRFL_RESULTS,
    VALIDATION_FOLDER,
    read_lora,
    save_lora,
    save_pretrained,
)
from ..formats.layout import EXPERT_FOLDERS, LORA_FILES, ExpertName
from ..formats.lora_metadata import lora_metadata
from ..losses import flow_matching_loss, reward_feedback_loss
from ..models.conditioning import Conditioning, num_clean_frames
from ..models.experts import PairWeights, read_experts
from ..models.loading import WeightFiles, load_reward_model, load_scheduler, load_transformer
from ..models.reward_model import WanRewardModel, check_fits_generator, check_latents_fit
from ..models.trainable import select_trainable
from ..rollout import (
    Foresight,
    GradientStep,
    mean_foreseen_gain,
    predict_velocity,
    record_states,
    step_from_state,
    walk_with_gradient,
)
from ..rollout_buffer import Rollout, RolloutBuffer, StoredState, relative_change
from ..runtime.distributed import any_rank
from ..runtime.host_weights import HostWeights
from ..runtime.sharding import full_state_dict, split_frozen
from .averaging import WeightAverage
from .base import Trainer
from .prfl_datasets import PRFLDatasets


logger = get_logger(__name__)

FLOW_NOISE, FLOW_PROMPT, REWARD_NOISE, REWARD_PROMPT, STEP_INDEX, FLOW_EXPERT, STATES, FORESIGHT = range(8)
# Written by each rank into a checkpoint.
ROLLOUTS_FILE = "rollouts-{rank}.safetensors"
# A change of one of these options makes stored rollouts useless.
ROLLOUT_OPTIONS = {
    "pretrained_model_name_or_path", "revision", "variant", "prompt_dataset", "num_inference_steps", "sampler_flow_shift",
    "step_range", "num_chained_steps", "rollout_states",
}  # fmt: skip
# The losses of each update of a step.
UPDATES: dict[str, list[tuple[str, ...]]] = {
    "alternate": [("flow",), ("reward",)],
    "joint": [("flow", "reward")],
    "reward": [("reward",)],
    "flow_matching": [("flow",)],
}


class RewardTerm(NamedTuple):
    """
    What a gradient step stands for, all of it without gradient.

    Args:
        ids (`list[str]`):
            Rows of the prompts.
        loss (`torch.Tensor`, scalar), logits (`torch.Tensor` of shape `(batch_size,)`):
            Of the reward.
        staleness (`torch.Tensor`, scalar, *optional*):
            Relative change of the velocity since the state was stored, if the step starts from one.
    """

    ids: list[str]
    loss: torch.Tensor
    logits: torch.Tensor
    staleness: torch.Tensor | None


class PRFLTrainer(Trainer):
    """
    Fine-tunes a Wan transformer, whole or by LoRA (paper, algorithm 1).

    A step is an update on the flow-matching loss and an update on the reward, or one update on both (`joint`). The
    result is `output_dir/transformer`, or for LoRA `output_dir/pytorch_lora_weights.safetensors`; of the low-noise
    expert of a pipeline of two, `output_dir/transformer_2` or `output_dir/pytorch_lora_weights_2.safetensors`.

    `unwrapped` is what trains, `transformer` the same in its engine's wrapping, and `generator` what walks whole chains:
    the latter, with a frozen expert at its side if there is one.
    """

    config: PRFLTrainingConfig
    results = PRFL_RESULTS

    def __init__(self, config: PRFLTrainingConfig) -> None:
        num_flow = config.gradient_accumulation_steps
        num_reward = num_flow * config.num_gradient_steps * config.num_chained_steps
        self.num_backwards = {"flow": num_flow, "reward": num_reward}
        most = max(sum(self.num_backwards[loss] for loss in losses) for losses in UPDATES[config.update_schedule])
        super().__init__(config, backwards_per_update=most, takes_turns=config.expert == "both")
        self.uses_flow_matching = config.update_schedule != "reward"
        self.uses_reward = config.update_schedule != "flow_matching"
        self.check_kernel("attention_backend", trains=True, dtype=self.generator_dtype)
        self.check_kernel("rollout_attention_backend", trains=False, dtype=self.generator_dtype)
        self.experts = read_experts(config.pretrained_model_name_or_path, config.expert, revision=config.revision)
        # Known while it is loaded from there; a path may be gone when the result is saved.
        self.base_on_hub = not Path(config.pretrained_model_name_or_path).exists()
        self._check_offload()
        self.datasets = PRFLDatasets(config, num_replicas=self.num_replicas, replica=self.replica)
        self._load_models()
        parameters = [parameter for parameter in self.unwrapped.parameters() if parameter.requires_grad]
        self.transformer = self.prepare(self.unwrapped, [{"params": parameters}], self.datasets.batches_per_epoch)
        self.generator = self.transformer
        if self.frozen:
            self.generator = self.experts.join({self.experts.trained[0]: self.transformer, **self.frozen})
        self.average = WeightAverage(self.masters, decay=config.ema_decay) if config.use_ema else None
        self.rollouts = RolloutBuffer(config.rollout_buffer_size) if config.rollout_interval > 1 else None
        self.rollout_age, self.rollouts_are_stale, self.num_reward_batches = 0, False, 0

    def train_step(self) -> dict[str, torch.Tensor]:
        """One flow-matching update, then one reward update, or both losses in one update."""
        metrics: dict[str, torch.Tensor] = {}
        for losses in UPDATES[self.config.update_schedule]:
            divisor = self.begin_update(sum(self.num_backwards[loss] for loss in losses))
            # Undoes two averages: over all backward passes of an update, and over the ranks that share a clip.
            weight = divisor * self.config.context_parallel_degree
            if "flow" in losses:
                metrics |= self.flow_matching_backwards(weight / self.num_backwards["flow"])
            if "reward" in losses:
                # The gradients of chained steps add up.
                num_terms = self.num_backwards["reward"] / self.config.num_chained_steps
                metrics |= self.reward_backwards(weight / num_terms)
        if self.average is not None:
            self.average.step()
        return metrics

    def flow_matching_backwards(self, weight: float) -> dict[str, torch.Tensor]:
        """Backward passes of the flow-matching loss over its micro-batches."""
        losses = []
        for micro_step in range(self.config.gradient_accumulation_steps):
            batch = next(self.flow_batches).to(self.accelerator.device, self.weight_dtype)
            with self.accelerator.accumulate(self.transformer):
                loss = self.compute_flow_matching_loss(batch, micro_step)
                self.updates.backward(weight * loss, batch.ids)
                self.updates.step(self.global_step)
            losses.append(loss.detach())
        return {"flow_loss": torch.stack(losses).mean(), **self.grad_norm_of("flow")}

    def reward_backwards(self, weight: float) -> dict[str, torch.Tensor]:
        """Backward passes of the reward loss over its micro-batches, gradient steps and chained steps."""
        terms: list[RewardTerm] = []
        self.rollouts_due = self.need_rollouts()
        for micro_step in range(self.config.gradient_accumulation_steps):
            surrogates = self.reward_surrogates(micro_step)
            for _ in range(self.config.num_gradient_steps * self.config.num_chained_steps):
                with self.accelerator.accumulate(self.transformer):
                    surrogate, term = next(surrogates)
                    self.updates.backward(weight * surrogate, term.ids, value=term.loss)
                    self.updates.step(self.global_step)
                terms.append(term)
        logits = torch.cat([term.logits for term in terms])
        metrics = {
            "reward_loss": torch.stack([term.loss for term in terms]).mean(),
            "reward": logits.sigmoid().mean(),
            "reward_logit": logits.mean(),
            **self.grad_norm_of("reward"),
        }
        return metrics | self.note_staleness(terms)

    def reward_surrogates(self, micro_step: int) -> Iterator[tuple[torch.Tensor, "RewardTerm"]]:
        """
        For each gradient step of a micro-batch, scalars to differentiate one after the other, and what they stand for.

        The gradients of the scalars in the generator's weights add up to that of the reward loss.
        """
        average = None if self.context_parallel is None else self.context_parallel.mean
        for step, conditioning, ids, staleness in self.gradient_steps(micro_step):
            latents_grad, loss, logits = self.compute_reward_gradient(step, conditioning)
            term = RewardTerm(ids, loss, logits, staleness)
            for surrogate in step.surrogates(latents_grad, average=average):
                yield surrogate, term

    def compute_flow_matching_loss(self, batch: LatentBatch, micro_step: int) -> torch.Tensor:
        """Squared error of the predicted velocity on clean clips, noised at a random level (paper, equation 2)."""
        assert batch.latents is not None
        timestep_range = self.experts.timesteps_of(self.draw_expert(micro_step))
        noise, sigmas = self.draw_noise(FLOW_NOISE, micro_step, batch, timestep_range)
        model_pred = predict_velocity(
            self.transformer,
            add_noise(batch.latents, noise, sigmas),
            sigmas_to_timesteps(sigmas),
            self.choose_prompts(batch, self.generators(FLOW_PROMPT, micro_step, len(batch))),
        )
        num_clean = num_clean_frames(batch.latents, batch.condition)
        target = velocity_target(batch.latents, noise)
        return flow_matching_loss(model_pred[:, :, num_clean:], target[:, :, num_clean:])

    def gradient_steps(
        self, micro_step: int
    ) -> Iterator[tuple[GradientStep, Conditioning, list[str], torch.Tensor | None]]:
        """Steps with gradient, each with its prompts, their rows and the staleness of the state that it starts from."""
        if self.rollouts is None:
            batch, conditioning = self.next_prompts(micro_step)
            for step in self.roll_out(batch.latents_shape, conditioning, micro_step):
                yield step, conditioning, batch.ids, None
            return
        if self.rollouts_due:
            self.rollouts.add(self.record(*self.next_prompts(micro_step), micro_step))
        generator = self.shared_generator(STEP_INDEX, micro_step)
        for draw in range(self.config.num_gradient_steps):
            state = self.rollouts.draw(generator)
            conditioning = state.rollout.conditioning.to(self.accelerator.device, self.weight_dtype)
            step = self.step_from_state(state, conditioning, micro_step, draw)
            yield step, conditioning, list(state.rollout.ids), relative_change(step.velocity, state.velocity)

    def next_prompts(self, micro_step: int) -> tuple[LatentBatch, Conditioning]:
        """The next prompts to roll out."""
        batch = next(self.reward_batches).to(self.accelerator.device, self.weight_dtype)
        self.num_reward_batches += 1
        return batch, self.choose_prompts(batch, self.generators(REWARD_PROMPT, micro_step, len(batch)))

    def roll_out(
        self, latents_shape: Sequence[int], conditioning: Conditioning, micro_step: int
    ) -> Iterator[GradientStep]:
        """The chain of a micro-batch, which goes on from one gradient step to the next as they are asked for."""
        config = self.config
        batch_size = len(conditioning.prompt_embeds)
        noise = sample_noise(latents_shape, self.generators(REWARD_NOISE, micro_step, batch_size))
        return walk_with_gradient(
            self.generator,
            self.scheduler,
            noise=noise.to(self.accelerator.device),
            step_indices=self.draw_step_indices(micro_step),
            num_inference_steps=config.num_inference_steps,
            conditioning=conditioning,
            rerun=config.rerun_gradient_step,
            rollout_attention_backend=config.rollout_attention_backend,
            num_chained_steps=config.num_chained_steps,
            stop_input_gradient=config.stop_input_gradient,
            foresight=self.draw_foresight(noise.shape, micro_step),
        )

    def record(self, batch: LatentBatch, conditioning: Conditioning, micro_step: int) -> Rollout:
        """Walk the chain of a micro-batch, and keep the states that later updates start from."""
        config = self.config
        noise = sample_noise(batch.latents_shape, self.generators(REWARD_NOISE, micro_step, len(batch)))
        states = record_states(
            self.generator,
            self.scheduler,
            noise=noise.to(self.accelerator.device),
            step_indices=self.draw_states(micro_step),
            num_inference_steps=config.num_inference_steps,
            conditioning=conditioning,
            rollout_attention_backend=config.rollout_attention_backend,
        )
        return Rollout.of(states, ids=batch.ids, conditioning=conditioning)

    def step_from_state(
        self, state: StoredState, conditioning: Conditioning, micro_step: int, draw: int
    ) -> GradientStep:
        """The steps with gradient that start from a stored state."""
        return step_from_state(
            self.generator,
            self.scheduler,
            latents=state.latents.to(self.accelerator.device, torch.float32),
            start_index=state.step_index,
            num_inference_steps=self.config.num_inference_steps,
            conditioning=conditioning,
            rerun=self.config.rerun_gradient_step,
            num_chained_steps=self.config.num_chained_steps,
            stop_input_gradient=self.config.stop_input_gradient,
            foresight=self.draw_foresight(state.latents.shape, micro_step, draw),
        )

    def compute_reward_gradient(
        self, step: GradientStep, conditioning: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Score what a step with gradient leads to (paper, equation 9).

        The reward is differentiated with respect to these latents alone, on a leaf of their own: the reward model's
        activations are gone before the generator's backward pass begins, and the reward model never meets the hooks of
        the engine that shards the generator.

        Returns:
            Gradient of the loss in the latents, of their shape, the loss, and the logits `(batch_size,)`; none of them
            with gradient.
        """
        config = self.config
        leaf = step.latents.detach().requires_grad_()
        with self.reward_model_in_use():
            logits = self.score(leaf, step.timesteps, conditioning)
            loss = reward_feedback_loss(
                logits, form=config.reward_loss, scale=config.reward_scale, target=config.reward_target
            )
            (latents_grad,) = torch.autograd.grad(loss, leaf)
        if self.context_parallel is not None:
            latents_grad = self.context_parallel.mean(latents_grad)
        return latents_grad / self.divisor(step.gain), loss.detach(), logits.detach()

    def divisor(self, gain: torch.Tensor) -> torch.Tensor:
        """
        What a gradient in the latents of a step is divided by, one number or one for each sample.

        The mean over the steps of gain / divisor, which is what the gradient in a velocity is scaled by, is the same for
        all forms of the reward: the mean width of the chain's steps, `1 / num_inference_steps`, shared by chained steps.
        So `reward_scale` means the same for all of them.
        """
        config = self.config
        total = config.num_inference_steps * config.num_chained_steps
        if config.divide_by_step_width:
            divisor = total * gain
        elif config.reward_at == "foreseen":
            divisor = torch.full_like(gain, total * self.mean_foreseen_gain)
        else:
            divisor = torch.full_like(gain, config.num_chained_steps)
        return divisor.view(-1, 1, 1, 1, 1)

    def draw_foresight(self, shape: Sequence[int], micro_step: int, draw: int = 0) -> Foresight | None:
        """New noise and its level for each sample, if the reward is taken of what a step foresees."""
        if self.config.reward_at == "next":
            return None
        generators = self.generators(FORESIGHT + draw, micro_step, shape[0])
        uniform = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        noise = sample_noise(shape[1:], generators)
        device = self.accelerator.device
        low, high = self.config.foreseen_levels
        return Foresight(noise.to(device), uniform.to(device), (low, high))

    def need_rollouts(self) -> bool:
        """Whether this update walks new chains; the same on every rank."""
        if self.rollouts is None:
            return True
        if self.rollouts_are_stale:
            self.rollouts.clear()
        is_due = len(self.rollouts) == 0 or self.rollout_age >= self.config.rollout_interval
        self.rollout_age = 1 if is_due else self.rollout_age + 1
        return is_due

    def note_staleness(self, terms: Sequence["RewardTerm"]) -> dict[str, torch.Tensor]:
        """The mean staleness of the states of an update, and whether new ones are needed; empty without a buffer."""
        changes = [term.staleness for term in terms if term.staleness is not None]
        if not changes:
            return {}
        staleness = torch.stack(changes).mean()
        limit = self.config.max_rollout_staleness
        self.rollouts_are_stale = limit is not None and any_rank(self.accelerator, bool(staleness > limit))
        return {"rollout_staleness": staleness}

    def score(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Logits `(batch_size,)` of noisy latents at their timesteps."""
        inputs = conditioning.model_inputs(latents, timesteps)
        with self.accelerator.autocast():
            return self.reward_model(**inputs).logits

    def draw_step_indices(self, micro_step: int) -> list[int]:
        """Steps of a chain that take gradient, any of the range as likely as any other; the same on every rank."""
        first, last = self.step_range
        generator = self.shared_generator(STEP_INDEX, micro_step)
        left = list(range(first, last + 1))
        draws = [
            torch.randint(n, (), generator=generator)
            for n in range(len(left), 0, -1)[: self.config.num_gradient_steps]
        ]
        return sorted(left.pop(int(draw)) for draw in draws)

    def draw_states(self, micro_step: int) -> list[int]:
        """Steps of a chain whose start is stored, so that any end of `step_range` is as likely; the same on every rank."""
        first, last = (index - self.config.num_chained_steps + 1 for index in self.step_range)
        wanted = self.config.rollout_states or last - first + 1
        generator = self.shared_generator(STATES, micro_step)
        order = torch.randperm(last - first + 1, generator=generator)[:wanted]
        return sorted(first + int(index) for index in order)

    def draw_expert(self, micro_step: int) -> ExpertName:
        """The expert of a flow-matching micro-batch, as often as the noise levels are its; the same on every rank."""
        uniform = torch.rand((), generator=self.shared_generator(FLOW_EXPERT, micro_step))
        return self.experts.draw(float(uniform), self.high_noise_probability)

    def choose_prompts(self, batch: LatentBatch, generators: Sequence[torch.Generator]) -> Conditioning:
        """Images of the batch, and for each clip its caption, its long caption or the empty prompt."""
        draws = torch.stack([torch.rand(2, generator=generator) for generator in generators], dim=1)
        is_long = (draws[0] < self.config.long_prompt_probability).to(self.accelerator.device)
        is_null = (draws[1] < self.config.prompt_dropout).to(self.accelerator.device)
        embeds = torch.where(is_long[:, None, None], batch.long_prompt_embeds, batch.prompt_embeds)
        embeds = torch.where(is_null[:, None, None], batch.null_prompt_embeds, embeds)
        return Conditioning.of(batch).with_prompts(embeds)

    def grad_norm_of(self, kind: str) -> dict[str, torch.Tensor]:
        """Norm, before clipping, of the gradient of the update that just ended; empty if none did."""
        if not self.accelerator.sync_gradients:
            return {}
        name = "grad_norm" if self.config.update_schedule == "joint" else f"{kind}_grad_norm"
        return {name: self.updates.grad_norm}

    def start_streams(self) -> None:
        """Open the batches of both kinds at the position of `global_step`."""
        start = self.global_step * self.config.gradient_accumulation_steps
        if self.uses_flow_matching:
            self.flow_batches = self.datasets.clip_batches(start)
        if self.uses_reward:
            self.reward_batches = self.datasets.prompt_batches(
                start if self.rollouts is None else self.num_reward_batches
            )
        self.unwrapped.train()

    def validate(self) -> dict[str, float]:
        """Sample held-out prompts, with the averaged weights if there are any, and score what comes out."""
        assert self.evaluator is not None
        self.unwrapped.eval()
        with self.averaged_weights(), self.reward_model_in_use():
            metrics = self.evaluator(self.generator, self.accelerator, step=self.global_step)
        self.unwrapped.train()
        return metrics

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Put the averaged weights into the model for the time of the context, if an average is kept."""
        return nullcontext() if self.average is None else self.average.in_model()

    def save_average(self, directory: Path) -> None:
        """Write the averaged weights to `directory/ema`, if an average is kept. A collective."""
        if self.average is None:
            return
        if self.accelerator.is_main_process:
            (directory / AVERAGE_FOLDER).mkdir()
        with self.averaged_weights():
            self.save_model(directory / AVERAGE_FOLDER)

    def load_average(self, directory: Path) -> None:
        """Load what `save_average` wrote, each rank its share; without it the average begins with the weights."""
        if self.average is not None and (directory / AVERAGE_FOLDER).is_dir():
            self.average.load(self.read_model(directory / AVERAGE_FOLDER))
        elif self.average is not None:
            self.average.restart()

    def state(self) -> dict[str, Any]:
        """Adds the number of updates in the average."""
        return {
            **super().state(),
            "num_averaged": self.average.num_averaged if self.average else 0,
            "rollout_age": self.rollout_age,
            "rollouts_are_stale": self.rollouts_are_stale,
            "num_reward_batches": self.num_reward_batches,
            "num_rollouts": 0 if self.rollouts is None else len(self.rollouts),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        super().load_state(state)
        if self.average is not None:
            self.average.num_averaged = state["num_averaged"]
        if self.rollouts is not None:
            self.rollout_age = state.get("rollout_age", 0)
            self.rollouts_are_stale = state.get("rollouts_are_stale", False)
            default = state["global_step"] * self.config.gradient_accumulation_steps
            self.num_reward_batches = state.get("num_reward_batches") or default

    def forget_outdated(self, changed: Collection[str]) -> None:
        """Drop rollouts that are of other chains than those that are walked now."""
        if self.rollouts is not None and ROLLOUT_OPTIONS & set(changed):
            self.rollouts.clear()

    def save_own(self, directory: Path) -> None:
        """Write the rollouts that updates start from."""
        if self.rollouts is not None:
            self.rollouts.save(directory / ROLLOUTS_FILE.format(rank=self.accelerator.process_index))

    def load_own(self, directory: Path, state: dict[str, Any]) -> None:
        """
        Read the rollouts that updates start from.

        Those of another number of processes, or of none at all, do not fit: then the next update rolls out.
        """
        if self.rollouts is None:
            return
        before = state["num_processes"], state["num_replicas"], state["train_batch_size"]
        now = self.accelerator.num_processes, self.num_replicas, self.config.train_batch_size
        if before == now and state.get("num_rollouts"):
            self.rollouts.load(directory / ROLLOUTS_FILE.format(rank=self.accelerator.process_index))
        elif state.get("num_rollouts"):
            logger.warning(
                "%s: its rollouts are those of other processes; the next update walks new chains.", directory
            )

    def save_model(self, directory: Path) -> None:
        """Write the weights in training: `directory/transformer`, or the adapter's file, by expert. A collective."""
        is_lora = self.config.lora_rank is not None
        for expert, transformer in self.trained.items():
            state_dict = full_state_dict(self.accelerator, transformer, trainable_only=is_lora)
            if self.accelerator.is_main_process and is_lora:
                save_lora(transformer, state_dict, directory / LORA_FILES[expert], self._lora_metadata(expert))
            elif self.accelerator.is_main_process:
                save_pretrained(transformer, state_dict, directory / EXPERT_FOLDERS[expert])

    def _lora_metadata(self, expert: ExpertName) -> dict[str, str]:
        return lora_metadata(
            base_model=self.config.pretrained_model_name_or_path,
            base_on_hub=self.base_on_hub,
            reward_model=self.config.reward_model,
            step=self.global_step,
            run=self.output_dir.resolve().name,
            config=dataclasses.asdict(self.config),
            expert=expert if self.experts.are_two else None,
        )

    def save_result(self, directory: Path) -> None:
        """Write the trained weights, averaged if an average is kept."""
        with self.averaged_weights():
            self.save_model(directory)

    def read_model(self, directory: Path) -> Mapping[str, torch.Tensor]:
        """What `save_model` wrote, by the names of the parameters in training."""
        weights: dict[ExpertName, Mapping[str, torch.Tensor]] = {
            expert: WeightFiles(directory, subfolder=EXPERT_FOLDERS[expert])
            if self.config.lora_rank is None
            else read_lora(directory / LORA_FILES[expert])
            for expert in self.experts.trained
        }
        return PairWeights(weights) if len(weights) > 1 else weights[self.experts.trained[0]]

    def _load_models(self) -> None:
        config = self.config
        path, revision = config.pretrained_model_name_or_path, config.revision
        reward_config = WanRewardModel.load_own_config(config.reward_model)
        for expert in self.experts.trained:
            subfolder = EXPERT_FOLDERS[expert]
            transformer_config = WanTransformer3DModel.load_config(path, subfolder=subfolder, revision=revision)
            check_fits_generator(reward_config, transformer_config, allow_other_base=config.allow_other_base)
        fingerprint = self.pipeline_vae_fingerprint()
        check_latents_fit(reward_config, vae_fingerprint=fingerprint, source=path)
        for source, dataset in self.datasets.by_source().items():
            check_vae(dataset, source, fingerprint)
            self.check_dataset(dataset, source, reward_config)
        self.scheduler = load_scheduler(path, revision=revision, flow_shift=config.sampler_flow_shift)
        self._divide_noise_levels()
        self.reward_model_in_use: Callable[[], AbstractContextManager[None]] = nullcontext
        self.reward_model = load_reward_model(
            config.reward_model,
            dtype=self.weight_dtype,
            split=partial(split_frozen, device=self.accelerator.device) if config.shard_reward_model else None,
        )
        if config.offload_reward_model:
            self.reward_model_in_use = HostWeights(self.reward_model, self.accelerator.device).on_device
        else:
            self.reward_model.to(self.accelerator.device)
        self.trained = {expert: self._load_transformer(expert) for expert in self.experts.trained}
        self.unwrapped = self.experts.join(self.trained)
        self.frozen = self._load_frozen_expert()
        self.set_up_blocks(self.reward_model, num_recomputed=config.reward_gradient_checkpointing_blocks)
        self.evaluator = self._build_evaluator()

    def _divide_noise_levels(self) -> None:
        """Which steps of a chain, and which share of the noise levels, belong to what trains."""
        config, experts = self.config, self.experts
        self.step_range = (0, 0)
        if self.uses_reward:
            self.scheduler.set_timesteps(config.num_inference_steps)
            self.step_range = experts.gradient_steps(
                self.scheduler.timesteps.tolist(),
                config.step_range,
                config.num_gradient_steps,
                config.num_chained_steps,
            )
            first, last = self.step_range
            low, high = config.foreseen_levels
            self.mean_foreseen_gain = mean_foreseen_gain(self.scheduler.sigmas[first : last + 2], (low, high))
        self.high_noise_probability = self.noise_levels.probability_from(experts.boundary)
        shares = {"high_noise": self.high_noise_probability, "low_noise": 1 - self.high_noise_probability}
        if self.uses_flow_matching and len(experts.trained) == 1:
            share = shares[experts.trained[0]]
            levels = f"such that it draws noise levels of `expert` {config.expert}, more than one in 10,000"
            check(share > 1e-4, "weighting_scheme", f"{config.weighting_scheme} with {share:.2%}", levels)

    def _check_offload(self) -> None:
        """ZeRO-3 hands over to host memory only the gradients of the last backward pass's parameters."""
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None and len(self.experts.trained) > 1:
            place = plugin.deepspeed_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device")
            check(place in (None, "none"), "expert", self.config.expert, "one expert with an offloaded optimizer")

    @property
    def generator_dtype(self) -> torch.dtype:
        """Type to load the generator in: as what trains if all of it does, else, with an adapter, as what does not."""
        return self.trained_dtype if self.config.lora_rank is None else self.weight_dtype

    def _load_transformer(self, expert: ExpertName) -> WanTransformer3DModel:
        config = self.config
        transformer = self._read_expert(expert, dtype=self.generator_dtype, split=self.split)
        select_trainable(transformer, config, dtype=self.trained_dtype)
        self.set_up_blocks(transformer, num_recomputed=config.gradient_checkpointing_blocks)
        return transformer

    def _read_expert(self, expert: ExpertName, **how: Any) -> WanTransformer3DModel:
        """One of the pipeline's transformers, read as [`~hy_prfl.models.loading.load_transformer`] is told."""
        return load_transformer(
            self.config.pretrained_model_name_or_path,
            revision=self.config.revision,
            variant=self.config.variant,
            subfolder=EXPERT_FOLDERS[expert],
            **how,
        )

    def _load_frozen_expert(self) -> dict[ExpertName, WanTransformer3DModel]:
        """The expert that chains need beside the one in training, by its name; empty if they need none."""
        config = self.config
        name = self.experts.frozen(rolls_out=self.uses_reward, samples=self.datasets.validation is not None)
        if name is None:
            return {}
        split = partial(split_frozen, device=self.accelerator.device) if config.shard_frozen_expert else None
        transformer = self._read_expert(name, dtype=self.weight_dtype, split=split, keep_in_fp32=True)
        transformer.requires_grad_(False).eval().to(self.accelerator.device)
        self.set_up_blocks(transformer, num_recomputed=0)
        return {name: transformer}

    def _build_evaluator(self) -> SampleEvaluator | None:
        config = self.config
        validation = self.datasets.validation
        if validation is None:
            return None
        vae = None
        if config.validation_videos:
            vae = AutoencoderKLWan.from_pretrained(
                config.pretrained_model_name_or_path, subfolder="vae", revision=config.revision
            )
            vae.to(self.accelerator.device).requires_grad_(False).eval()
        return SampleEvaluator(
            validation.select(range(min(config.num_validation_samples, len(validation)))),
            reward_model=self.reward_model,
            scheduler=self.scheduler,
            vae=vae,
            output_dir=self.output_dir / VALIDATION_FOLDER,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.validation_guidance_scale,
            timesteps=config.validation_timesteps,
            batch_size=config.train_batch_size,
            fps=config.validation_fps,
            seed=config.validation_seed,
            dtype=self.weight_dtype,
            num_replicas=self.num_replicas,
            replica=self.replica,
            vae_tiling=config.vae_tiling,
        )
