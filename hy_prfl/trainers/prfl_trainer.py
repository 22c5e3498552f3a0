"""Process reward feedback learning: the generator is trained on a latent reward and on a flow-matching loss."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from diffusers import AutoencoderKLWan

from ..configs.prfl import UPDATES, PRFLTrainingConfig
from ..data.collators import LatentBatch
from ..flow_matching import add_noise, sample_noise, sigmas_to_timesteps, velocity_target
from ..formats.checkpoints import BEST_FOLDER, PRFL_RESULTS, read_state
from ..formats.layout import ExpertName
from ..losses import flow_matching_loss
from ..models.conditioning import Conditioning, num_clean_frames
from ..models.experts import choose_experts
from ..models.loading import load_scheduler
from ..models.trainable import adapters_off
from ..rollout.buffer import Rollout, StoredState, relative_change
from ..rollout.chain import record_states, step_from_state, walk_with_gradient
from ..rollout.gradient_steps import Foresight, GradientStep
from ..rollout.reward_feedback import RewardFeedback, RewardGradient
from ..rollout.sampling import predict_velocity
from .base import Trainer, check_named
from .prfl_datasets import PRFLDatasets
from .prfl_draws import choose_prompts, draw_foresight, draw_states, draw_step_indices
from .prfl_inputs import (
    AnyRewardModel,
    AnyTransformer,
    by_expert,
    check_offload,
    check_reward_models,
    check_sharding,
    find_high_noise_probability,
    find_mean_foreseen_gain,
    find_step_range,
    generator_dtype,
    load_frozen,
    load_trained,
    open_datasets,
    open_models,
)
from .prfl_monitor import Monitor, check_monitor_models
from .prfl_results import adapter_metadata, read_transformers, save_best, save_transformer
from .prfl_reward_models import load_reward_models, name_models
from .prfl_rollouts import ReusedRollouts
from .prfl_validation import build_evaluator
from .run import Run


logger = get_logger(__name__)

# The random streams. The last one must stay the last: each draw of foresight has a stream of its own, `FORESIGHT + draw`.
FLOW_NOISE, FLOW_PROMPT, REWARD_NOISE, REWARD_PROMPT, STEP_INDEX, FLOW_EXPERT, STATES, FORESIGHT = range(8)


class RewardTerm(NamedTuple):
    """
    The reward of a gradient step, for metrics and messages.

    Args:
        ids (`list[str]`):
            Rows of the prompts.
        feedback (`RewardGradient`):
            Loss and logits.
        staleness (`torch.Tensor`, scalar, *optional*):
            Relative change of the velocity since the state was stored, if the step starts from one.
    """

    ids: list[str]
    feedback: RewardGradient
    staleness: torch.Tensor | None


def gradient_options(config: PRFLTrainingConfig) -> dict[str, Any]:
    """Options of the steps with gradient, as arguments of a walk."""
    return {
        "num_chained_steps": config.num_chained_steps,
        "stop_input_gradient": config.stop_input_gradient,
        "rerun": config.rerun_gradient_step,
        # A single step starts where the rollout is in any case.
        "offload": config.offload_activations and config.num_chained_steps > 1,
    }


class PRFLTrainer(Trainer):
    """
    Fine-tunes a Wan transformer, whole or by LoRA (paper, algorithm 1).

    A step is an update on the flow-matching loss and an update on the reward, or one update on both (`joint`). The
    result is `output_dir/transformer`, or with LoRA `output_dir/pytorch_lora_weights.safetensors`; for the low-noise
    expert of a pipeline of two, `output_dir/transformer_2` or `output_dir/pytorch_lora_weights_2.safetensors`.

    `unwrapped` is the trained model, `wrapped` the same model prepared by its engine, and `generator` the model of whole
    chains: `wrapped`, together with the frozen expert if there is one.

    Args:
        config (`PRFLTrainingConfig`):
            Options of the run. Its paths only name the given models and datasets in messages and in the run's record;
            the pipeline's sampler and the boundary of its experts are read from `pretrained_model_name_or_path`.
        transformer (`WanTransformer3DModel`):
            The generator to train, in float32, or with LoRA in the type of the launch's mixed precision. For a pipeline
            of two experts, those in training by their names, `high_noise` and `low_noise`. Each model may be a
            [`~hy_prfl.models.loading.Deferred`] one, which is loaded after all checks.
        reward_model (`WanRewardModel`):
            The reward model, in the type of the launch's mixed precision, or a list with one for each of
            `reward_models`.
        train_dataset (`Dataset`):
            A latent dataset of clips; their prompts are used if there is no `prompt_dataset`.
        monitor_reward_models (`Sequence[WanRewardModel]`, *optional*):
            Held-out reward models of the monitor; the option of the same name names them.
        prompt_dataset, validation_dataset (`Dataset`, *optional*):
            Prompts of the reward updates, and held-out prompts to sample; the option of the same name names them.
        frozen_expert (`WanTransformer3DModel`, *optional*):
            The expert that does not train, where chains walk through it.
        vae (`AutoencoderKLWan`, *optional*):
            Decodes the samples of a validation; without it they are scored only.
        run (`Run`, *optional*):
            Result of [`set_up_run`]; set up here if left out.

    Raises:
        ValueError: If options, models and datasets do not fit together.
    """

    config: PRFLTrainingConfig
    results = PRFL_RESULTS

    def __init__(
        self,
        config: PRFLTrainingConfig,
        *,
        transformer: AnyTransformer | Mapping[ExpertName, AnyTransformer],
        reward_model: AnyRewardModel | Sequence[AnyRewardModel],
        monitor_reward_models: Sequence[AnyRewardModel] = (),
        train_dataset: Dataset,
        prompt_dataset: Dataset | None = None,
        validation_dataset: Dataset | None = None,
        frozen_expert: AnyTransformer | None = None,
        vae: AutoencoderKLWan | None = None,
        run: Run | None = None,
    ) -> None:
        run = self.set_up_run(config) if run is None else run
        check_named(config, prompt_dataset=prompt_dataset, validation_dataset=validation_dataset)
        path, revision = config.pretrained_model_name_or_path, config.revision
        self.num_backwards = config.num_backwards
        self.uses_flow_matching = config.update_schedule != "reward"
        self.uses_reward = config.update_schedule != "flow_matching"
        self.experts = choose_experts(run.pipeline, config.expert)
        # Found out now: a local path may be gone when the result is saved.
        self.base_on_hub = not Path(path).exists()
        self.datasets = PRFLDatasets(
            config,
            clips=train_dataset,
            prompts=prompt_dataset,
            validation=validation_dataset,
            num_replicas=run.num_replicas,
            replica=run.replica,
        )
        given = by_expert(
            self.experts,
            transformer,
            frozen_expert,
            rolls_out=self.uses_reward,
            samples=validation_dataset is not None,
        )
        given_reward_models = list(reward_model) if isinstance(reward_model, Sequence) else [reward_model]
        generator_configs = [given[expert].config for expert in self.experts.trained]
        check_reward_models(
            config, run, [each.config for each in given_reward_models], generator_configs, self.datasets.by_source()
        )
        check_monitor_models(
            config,
            monitor_reward_models,
            generator_configs,
            vae_fingerprint=given_reward_models[0].config["vae_fingerprint"],
        )
        self.scheduler = load_scheduler(path, revision=revision, flow_shift=config.sampler_flow_shift)
        self.step_range = find_step_range(config, self.experts, self.scheduler)
        self.high_noise_probability = find_high_noise_probability(config, self.experts)
        reward_models, in_use = load_reward_models(
            given_reward_models, config, run, num_checkpointed=config.reward_gradient_checkpointing_blocks
        )
        tasks = [each.config["task"] for each in given_reward_models]
        self.reward = RewardFeedback(
            config,
            reward_models,
            names=name_models(tasks),
            autocast=run.accelerator.autocast,
            context_parallel=run.context_parallel,
            mean_foreseen_gain=find_mean_foreseen_gain(config, self.scheduler, self.step_range),
            in_use=in_use,
        )
        trained = {expert: load_trained(given[expert], config, run) for expert in self.experts.trained}
        self.frozen = {expert: load_frozen(each, run) for expert, each in given.items() if expert not in trained}
        model = self.experts.join(trained)
        super().__init__(
            config,
            run=run,
            model=model,
            parameter_groups=[{"params": [each for each in model.parameters() if each.requires_grad]}],
            datasets=self.datasets.by_source(),
            batches_per_epoch=self.datasets.batches_per_epoch,
        )
        self.generator = self.wrapped
        if self.frozen:
            self.generator = self.experts.join({self.experts.trained[0]: self.wrapped, **self.frozen})
        # The model that the anchor compares with.
        self.as_base = partial(adapters_off, self.unwrapped) if config.anchor_scale > 0 else None
        self.rollouts = ReusedRollouts(config, run) if config.rollout_interval > 1 else None
        self.evaluator = build_evaluator(
            config, run, self.datasets.validation, reward=self.reward, scheduler=self.scheduler, vae=vae
        )
        self.monitor: Monitor | None = None
        if config.uses_monitor:
            self.monitor = Monitor(
                config,
                run,
                reward_models=monitor_reward_models,
                tasks=tasks,
                datasets=self.datasets,
                experts=self.experts,
                digest=self.dataset_digests[str(config.validation_dataset)],
            )
            if self.monitor.keeps_best:
                self.results = (*PRFL_RESULTS, BEST_FOLDER)
        self.flow_batches: Iterator[LatentBatch] = iter(())
        self.reward_batches: Iterator[LatentBatch] = iter(())

    @classmethod
    def set_up_run(cls, config: PRFLTrainingConfig) -> Run:
        """Set up the run of these options. No model is loaded yet."""
        run = Run(
            config,
            trainer=cls.__name__,
            backwards_per_update=config.backwards_per_update,
            takes_turns=config.expert == "both",
        )
        dtype = generator_dtype(config, run)
        run.check_kernel("attention_backend", trains=True, dtype=dtype)
        run.check_kernel("rollout_attention_backend", trains=False, dtype=dtype)
        if config.expert == "both":
            check_offload(run)
        check_sharding(config)
        return run

    @classmethod
    def from_config(cls, config: PRFLTrainingConfig, **kwargs: Any) -> "PRFLTrainer":
        """Build the trainer with the models and datasets that the options name; `kwargs` are those of a subclass."""
        run = cls.set_up_run(config)
        return cls(config, **open_datasets(config), **open_models(config, run), run=run, **kwargs)

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
            with self.accelerator.accumulate(self.wrapped):
                loss = self.compute_flow_matching_loss(batch, micro_step)
                self.updates.backward(weight * loss, batch.ids)
                self.updates.step(self.global_step)
            losses.append(loss.detach())
        return {"flow_loss": torch.stack(losses).mean(), **self.grad_norm_of("flow")}

    def reward_backwards(self, weight: float) -> dict[str, torch.Tensor]:
        """Backward passes of the reward loss over its micro-batches, gradient steps and chained steps."""
        terms: list[RewardTerm] = []
        if self.rollouts is not None:
            self.rollouts.begin_update()
        for micro_step in range(self.config.gradient_accumulation_steps):
            surrogates = self.reward_surrogates(micro_step)
            for _ in range(self.config.num_gradient_steps * self.config.num_chained_steps):
                with self.accelerator.accumulate(self.wrapped):
                    surrogate, term = next(surrogates)
                    self.updates.backward(weight * surrogate, term.ids, value=term.feedback.loss)
                    self.updates.step(self.global_step)
                terms.append(term)
        metrics = self.reward.metrics([term.feedback for term in terms]) | self.grad_norm_of("reward")
        if self.rollouts is not None:
            metrics |= self.rollouts.end_update([term.staleness for term in terms if term.staleness is not None])
        return metrics

    def reward_surrogates(self, micro_step: int) -> Iterator[tuple[torch.Tensor, RewardTerm]]:
        """
        For each gradient step of a micro-batch, scalars to differentiate one after the other, and their reward.

        The gradients of the scalars in the generator's weights add up to that of the reward loss.
        """
        average = None if self.context_parallel is None else self.context_parallel.mean
        for step, conditioning, ids, staleness in self.gradient_steps(micro_step):
            feedback = self.reward.differentiate(step, conditioning)
            term = RewardTerm(ids, feedback, staleness)
            gradients = {"latents_grad": feedback.latents_grad, "velocity_grad": feedback.velocity_grad}
            for surrogate in step.surrogates(**gradients, average=average):
                yield surrogate, term

    def compute_flow_matching_loss(self, batch: LatentBatch, micro_step: int) -> torch.Tensor:
        """Squared error of the predicted velocity on clean clips, noised at a random level (paper, equation 2)."""
        assert batch.latents is not None
        timestep_range = self.experts.timesteps_of(self.draw_expert(micro_step))
        noise, sigmas = self.draw_noise(FLOW_NOISE, micro_step, batch, timestep_range)
        model_pred = predict_velocity(
            self.wrapped,
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
        """Steps with gradient, each with its prompts, the ids of their rows, and the staleness of its stored state."""
        if self.rollouts is None:
            batch, conditioning = self.next_prompts(micro_step)
            for step in self.roll_out(batch.latents_shape, conditioning, micro_step):
                yield step, conditioning, batch.ids, None
            return
        if self.rollouts.is_due:
            self.rollouts.buffer.add(self.record(*self.next_prompts(micro_step), micro_step))
        generator = self.shared_generator(STEP_INDEX, micro_step)
        for draw in range(self.config.num_gradient_steps):
            state = self.rollouts.buffer.draw(generator)
            conditioning = state.rollout.conditioning.to(self.accelerator.device, self.weight_dtype)
            step = self.step_from_state(state, conditioning, micro_step, draw)
            yield step, conditioning, list(state.rollout.ids), relative_change(step.velocity, state.velocity)

    def next_prompts(self, micro_step: int) -> tuple[LatentBatch, Conditioning]:
        """The next prompts to roll out."""
        batch = next(self.reward_batches).to(self.accelerator.device, self.weight_dtype)
        if self.rollouts is not None:
            self.rollouts.num_batches += 1
        return batch, self.choose_prompts(batch, self.generators(REWARD_PROMPT, micro_step, len(batch)))

    def roll_out(
        self, latents_shape: Sequence[int], conditioning: Conditioning, micro_step: int
    ) -> Iterator[GradientStep]:
        """Walk the chain of a micro-batch from one gradient step to the next, as they are requested."""
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
            rollout_attention_backend=config.rollout_attention_backend,
            cache_interval=config.rollout_cache_interval,
            boundary=self.experts.boundary,
            foresight=self.draw_foresight(noise.shape, micro_step),
            as_base=self.as_base,
            **gradient_options(config),
        )

    def record(self, batch: LatentBatch, conditioning: Conditioning, micro_step: int) -> Rollout:
        """Walk the chain of a micro-batch, and store the states that later updates start from."""
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
            cache_interval=config.rollout_cache_interval,
            boundary=self.experts.boundary,
        )
        return Rollout.of(states, ids=batch.ids, conditioning=conditioning)

    def step_from_state(
        self, state: StoredState, conditioning: Conditioning, micro_step: int, draw: int
    ) -> GradientStep:
        """Take the steps with gradient from a stored state."""
        return step_from_state(
            self.generator,
            self.scheduler,
            latents=state.latents.to(self.accelerator.device, torch.float32),
            start_index=state.step_index,
            num_inference_steps=self.config.num_inference_steps,
            conditioning=conditioning,
            foresight=self.draw_foresight(state.latents.shape, micro_step, draw),
            as_base=self.as_base,
            **gradient_options(self.config),
        )

    def draw_foresight(self, shape: Sequence[int], micro_step: int, draw: int = 0) -> Foresight | None:
        """New noise and its level for each sample, if the reward is taken of the predicted clean latents."""
        if self.config.reward_at == "next":
            return None
        generators = self.generators(FORESIGHT + draw, micro_step, shape[0])
        return draw_foresight(generators, shape[1:], self.config.foreseen_levels, self.accelerator.device)

    def draw_step_indices(self, micro_step: int) -> list[int]:
        """Steps of a chain that take gradient, uniform over the range; the same on every rank."""
        generator = self.shared_generator(STEP_INDEX, micro_step)
        return draw_step_indices(generator, self.step_range, self.config.num_gradient_steps)

    def draw_states(self, micro_step: int) -> list[int]:
        """
        Steps of a chain whose starting states are stored, the same on every rank.

        The gradient steps that begin at them end in `step_range`, at each of its steps with the same probability.
        """
        first, last = (index - self.config.num_chained_steps + 1 for index in self.step_range)
        generator = self.shared_generator(STATES, micro_step)
        return draw_states(generator, (first, last), self.config.rollout_states)

    def draw_expert(self, micro_step: int) -> ExpertName:
        """The expert of a flow-matching micro-batch, drawn by its share of the noise levels; the same on every rank."""
        uniform = torch.rand((), generator=self.shared_generator(FLOW_EXPERT, micro_step))
        return self.experts.draw(float(uniform), self.high_noise_probability)

    def choose_prompts(self, batch: LatentBatch, generators: Sequence[torch.Generator]) -> Conditioning:
        """Images of the batch, and for each clip its caption, its long caption or the empty prompt."""
        config = self.config
        return choose_prompts(
            batch,
            generators,
            long_probability=config.long_prompt_probability,
            null_probability=config.prompt_dropout,
        )

    def grad_norm_of(self, kind: str) -> dict[str, torch.Tensor]:
        """Gradient norm before clipping of the update that has just ended; empty if none has."""
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
                start if self.rollouts is None else self.rollouts.num_batches
            )
        self.unwrapped.train()

    def validate(self) -> dict[str, float]:
        """
        Sample held-out prompts, with the averaged weights if there are any, and score the samples.

        A monitor adds its metrics and its verdict, and the model is saved if it is the best so far.
        """
        assert self.evaluator is not None
        self.unwrapped.eval()
        with self.averaged_weights():
            metrics = self.evaluator(self.generator, self.accelerator, step=self.global_step, observer=self.monitor)
            if self.monitor is not None:
                metrics |= self.monitor.judge(metrics, step=self.global_step)
                self.stop_reason = self.monitor.reason_to_stop
                if self.monitor.is_best(metrics):
                    self.save_best(metrics)
        self.unwrapped.train()
        return metrics

    def measure_start(self) -> dict[str, float]:
        """With a monitor, score the real clips and validate the base, unless the checkpoint has the results."""
        if self.monitor is None:
            return {}
        assert self.evaluator is not None
        state = read_state(self.run.checkpoint) if self.run.checkpoint else {}
        if not self.monitor.has_real(state):
            self.monitor.score_real(self.evaluator)
        return {} if self.monitor.fits(state) else self.validate()

    def validation_notes(self) -> dict[str, str]:
        """The monitor's verdict in words."""
        if self.monitor is None:
            return {}
        return {"verdict": self.monitor.verdict.level, "verdict_reason": self.monitor.verdict.reason}

    def state(self) -> dict[str, Any]:
        """Add the position in the reused rollouts, and the state of the monitor."""
        rollouts = {} if self.rollouts is None else self.rollouts.state()
        return {**super().state(), **rollouts, **({} if self.monitor is None else self.monitor.state())}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        super().load_state(state)
        if self.rollouts is not None:
            self.rollouts.load_state(state)
        if self.monitor is not None:
            self.monitor.load_state(state)
            self.stop_reason = self.monitor.reason_to_stop

    def forget_outdated(self, changed: Collection[str]) -> None:
        """Drop rollouts of chains that have changed, and the record of a best model that is gone."""
        if self.rollouts is not None:
            self.rollouts.forget_outdated(changed)
        if self.monitor is not None:
            self.monitor.forget_lost_best(self.output_dir, self.global_step)

    def save_own(self, directory: Path) -> None:
        """Write the rollouts that updates start from, and the monitor's samples of the base."""
        if self.rollouts is not None:
            self.rollouts.save(directory)
        if self.monitor is not None:
            self.monitor.save(directory)

    def load_own(self, directory: Path, state: dict[str, Any]) -> None:
        """Read the rollouts that updates start from, if they fit this run, and the monitor's samples."""
        if self.rollouts is not None:
            self.rollouts.load(directory, state)
        if self.monitor is not None:
            self.monitor.load(directory, state)

    def save_best(self, metrics: dict[str, float]) -> None:
        """Write the current weights and their metrics to `output_dir/best`. A collective."""
        report = {"global_step": self.global_step, **metrics}
        save_best(self.accelerator, self.output_dir / BEST_FOLDER, self.save_model, report)

    def save_model(self, directory: Path) -> None:
        """Write the trained weights of each expert: `directory/transformer`, or the adapter's file. A collective."""
        for expert, transformer in self.experts.parts(self.unwrapped).items():
            metadata = adapter_metadata(
                self.config,
                step=self.global_step,
                run=self.output_dir.resolve().name,
                base_on_hub=self.base_on_hub,
                expert=expert if self.experts.are_two else None,
            )
            save_transformer(self.accelerator, transformer, directory, expert, self.config, metadata)

    def read_model(self, directory: Path) -> Mapping[str, torch.Tensor]:
        """Read what `save_model` wrote, by the names of the trained parameters."""
        return read_transformers(directory, self.experts.trained, self.config)
