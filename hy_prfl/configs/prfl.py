"""Options of `train_prfl`."""

import math
from dataclasses import dataclass, field
from typing import Literal

from .base import Quantization, TrainingConfig, check, check_seed, check_timesteps, place_of


FORESEEN_LEVELS = [0.2, 0.6]
# The losses of each update of a step, by `update_schedule`.
UPDATES: dict[str, list[tuple[str, ...]]] = {
    "alternate": [("flow",), ("reward",)],
    "joint": [("flow", "reward")],
    "reward": [("reward",)],
    "flow_matching": [("flow",)],
}


@dataclass(kw_only=True)
class PRFLTrainingConfig(TrainingConfig):
    """
    Options of process reward feedback learning. A step is one update of each kind in the schedule.

    > Parameters of the experts
    > Parameters of the reward update
    > Parameters of the prompts
    > Parameters of the validation
    > Parameters of the monitor
    """

    # Parameters of the experts
    expert: Literal["high_noise", "low_noise", "both"] | None = field(
        default=None,
        metadata={
            "help": "Which transformer of a pipeline with two (Wan2.2 A14B) trains: high_noise is its `transformer`, "
            "low_noise its `transformer_2`. Leave it out for pipelines with one."
        },
    )
    transformer_2_path: str | None = field(
        default=None, metadata={"help": "As transformer_path, for the low-noise expert of a pipeline of two."}
    )
    lora_2_path: str | None = field(
        default=None,
        metadata={
            "help": "As lora_path, for the low-noise expert of a pipeline of two. Give a folder with a LoRA for each expert "
            "to both options. The LoRA of an expert that does not train is merged."
        },
    )
    shard_frozen_expert: bool = field(
        default=False,
        metadata={
            "help": "Shard the weights of the expert that does not train over all processes instead of a copy on each."
        },
    )
    frozen_expert_quantization: Quantization | None = field(
        default=None, metadata={"help": "Hold the expert that does not train in 8 or 4 bits, as base_quantization."}
    )

    # Parameters of the reward update
    reward_model: str | None = field(
        default=None,
        metadata={
            "help": "Reward model: a folder written by train_reward, or a Hub id. Either this or reward_models must be given."
        },
    )
    reward_models: list[str] | None = field(
        default=None,
        metadata={
            "help": "Several reward models instead of reward_model; their logits are combined. The other options of the "
            "reward model apply to each. On the command line it replaces the reward_model of a recipe.",
            "instead_of": "reward_model",
        },
    )
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weights of reward_models: factors in the mean, exponents in the product; 1 if left out."},
    )
    reward_combination: Literal["mean", "min", "product"] = field(
        default="mean",
        metadata={
            "help": "How reward_models are combined: mean or min of their logits; product of their sigmoids, for models of "
            "different tasks. See losses.py."
        },
    )
    reward_disagreement: float = field(
        default=0.0,
        metadata={"help": "Standard deviations of the logits over reward_models that are subtracted from their mean."},
    )
    allow_other_base: bool = field(
        default=False, metadata={"help": "Accept a reward model made from a transformer of another size."}
    )
    shard_reward_model: bool = field(
        default=False,
        metadata={"help": "Shard the reward model's weights over all processes instead of a copy on each."},
    )
    offload_reward_model: bool = field(
        default=False,
        metadata={"help": "Keep the reward model in host memory, and copy it to the device only while it scores."},
    )
    reward_model_quantization: Quantization | None = field(
        default=None, metadata={"help": "Hold the reward model's blocks in 8 or 4 bits, as base_quantization."}
    )
    prompt_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Dataset of prompts for the reward updates, which needs no latents; train_dataset if left out."
        },
    )
    update_schedule: Literal["alternate", "joint", "reward", "flow_matching"] = field(
        default="alternate",
        metadata={
            "help": "alternate: a flow-matching update, then a reward update (the paper). joint: one update on both "
            "gradients. reward, flow_matching: only that kind."
        },
    )
    reward_loss: Literal["logit", "sigmoid", "logsigmoid"] = field(
        default="logsigmoid",
        metadata={
            "help": "logit: the paper's form. sigmoid: upstream's. logsigmoid: -log sigmoid(logit), see losses.py."
        },
    )
    reward_scale: float = field(default=1.0, metadata={"help": "Weight of the reward loss."})
    reward_target: float = field(default=2.0, metadata={"help": "Target of the hinge, for reward_loss sigmoid."})
    anchor_scale: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the anchor in the reward updates: the squared distance between the velocities of generator and "
            "base, divided by the squared norm of the base's. The base is the transformer with its LoRA off. Takes one "
            "more forward pass for each gradient step."
        },
    )
    divide_by_step_width: bool = field(
        default=True,
        metadata={
            "help": "Divide the reward's gradient by the width in sigma of the step that it passes through, relative to the "
            "mean width. Without it, as in the paper, the last steps of a chain, which are wider, weigh many times as "
            "much as the first."
        },
    )
    num_inference_steps: int = field(default=40, metadata={"help": "Steps of the sampler's whole chain."})
    step_range: list[int] | None = field(
        default=None,
        metadata={
            "help": "First and last step that may take gradient. If left out, all steps of the expert in training, "
            "except the last step of the chain."
        },
    )
    num_gradient_steps: int = field(
        default=1,
        metadata={
            "help": "Steps of one chain that take gradient, each with its own backward pass; an update uses their mean. "
            "More reward gradients for one rollout."
        },
    )
    num_chained_steps: int = field(
        default=1,
        metadata={
            "help": "Consecutive steps that the reward's gradient passes through, each checkpointed as a whole: this takes "
            "the time of all of these steps, but the memory of one."
        },
    )
    stop_input_gradient: bool = field(
        default=False,
        metadata={
            "help": "From one chained step to the next, let the gradient pass through the solver but not through the "
            "generator's input (DRTune)."
        },
    )
    reward_at: Literal["next", "foreseen"] = field(
        default="next",
        metadata={
            "help": "What is scored. next: the latents that a step leads to (the paper). foreseen: the clean latents that the "
            "step predicts, noised again to a level in foreseen_levels; no additional forward pass."
        },
    )
    foreseen_levels: list[float] = field(
        default_factory=lambda: list(FORESEEN_LEVELS),
        metadata={
            "help": "For reward_at foreseen: lowest and highest sigma of the new noise; never above that of the next step."
        },
    )
    rollout_interval: int = field(
        default=1,
        metadata={
            "help": "Reward updates for each new rollout. Above 1, rollouts are kept in host memory, and each update takes "
            "one step with gradient from a random state of a random one."
        },
    )
    rollout_buffer_size: int = field(
        default=1, metadata={"help": "Rollouts that are kept, if `rollout_interval` is above 1."}
    )
    rollout_states: int | None = field(
        default=None, metadata={"help": "States that are kept of a rollout, chosen at random; all if left out."}
    )
    rollout_cache_interval: int = field(
        default=1,
        metadata={
            "help": "Steps of the rollout for each forward pass of the generator. Above 1 the velocity of the steps in between "
            "is extrapolated from the last two that were computed (TaylorSeer)."
        },
    )
    max_rollout_staleness: float | None = field(
        default=None,
        metadata={
            "help": "Relative change of the generator's velocity at stored states above which all of them are dropped "
            "for a new rollout. Costs a synchronisation of the ranks in each update."
        },
    )
    rerun_gradient_step: bool = field(
        default=False,
        metadata={
            "help": "Take the step without gradient first, and again with gradient when the reward's gradient is known: one "
            "more forward pass, but the memory of the generator's step and of the reward model never adds up."
        },
    )
    reward_gradient_checkpointing_blocks: int | None = field(
        default=None,
        metadata={"help": "How many of the reward model's blocks use activation checkpointing; all if left out."},
    )
    rollout_attention_backend: str | None = field(
        default=None,
        metadata={
            "help": "Attention kernel of the rollout, which takes no gradient, so forward-only kernels are possible "
            "(_flash_3, sage, ...); attention_backend if left out."
        },
    )
    sampler_flow_shift: float | None = field(
        default=None, metadata={"help": "Shift of the sampler's timesteps; the pipeline's own if left out."}
    )

    # Parameters of the prompts
    prompt_dropout: float = field(default=0.1, metadata={"help": "Share of prompts replaced by the empty one."})
    long_prompt_probability: float = field(
        default=0.7, metadata={"help": "Probability of the long caption, where a row has one."}
    )

    # Parameters of the validation
    num_validation_samples: int = field(default=8, metadata={"help": "Rows of validation_dataset to sample."})
    validation_timesteps: list[int] = field(
        default_factory=lambda: [201, 400, 600, 800, 1000],
        metadata={"help": "Noise levels, 1000 * sigma, at which the samples are scored."},
    )
    validation_guidance_scale: float = field(default=1.0, metadata={"help": "Guidance of the samples; 1 is none."})
    validation_videos: bool = field(default=False, metadata={"help": "Decode the samples to mp4 files."})
    vae_tiling: Literal["auto", "on", "off"] = field(
        default="auto",
        metadata={
            "help": "Let the VAE work in tiles, which changes the result slightly: auto does so if a pass would not fit into "
            "free memory."
        },
    )
    validation_fps: int = field(default=16, metadata={"help": "Frame rate of the validation videos."})
    validation_seed: int = field(default=0, metadata={"help": "Seed of the samples."})

    # Parameters of the monitor
    monitor_reward_models: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Held-out reward models that score the validation samples and nothing else: folders or Hub ids. With "
            "them, or with on_hacking, a monitor judges whether the run still improves videos or only its own reward."
        },
    )
    on_hacking: Literal["warn", "stop", "keep_best"] | None = field(
        default=None,
        metadata={
            "help": "What the monitor's verdict `hacked` does. warn: it is logged, as without this option. stop: the run ends "
            "after a checkpoint. keep_best: output_dir/best gets the weights with the best held-out reward, as with stop."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("validation_seed", self.validation_seed)
        shift = self.sampler_flow_shift
        check(shift is None or shift > 0, "sampler_flow_shift", shift, "greater than 0, or left out")
        check(self.reward_scale > 0, "reward_scale", self.reward_scale, "greater than 0")
        self._check_reward_models()
        anchor = self.anchor_scale
        check(0 <= anchor < math.inf, "anchor_scale", anchor, "at least 0")
        has_base = self.lora_rank is not None
        requirement = "0 without `lora_rank`: only an adapter can be turned off to see what the base would do"
        check(has_base or anchor == 0, "anchor_scale", anchor, requirement)
        for name in ("prompt_dropout", "long_prompt_probability"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        for name in ("num_validation_samples", "validation_fps"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(self.num_inference_steps >= 2, "num_inference_steps", self.num_inference_steps, "at least 2")
        check_timesteps("validation_timesteps", self.validation_timesteps)
        guidance = self.validation_guidance_scale
        check(guidance >= 1, "validation_guidance_scale", guidance, "at least 1, which is no guidance")
        last = self.num_inference_steps - 2
        bounds = self.step_range
        if bounds is not None:
            ordered = len(bounds) == 2 and 0 <= bounds[0] <= bounds[1] <= last
            check(ordered, "step_range", bounds, f"two step indices, first <= last, within [0, {last}]")
        self._check_chains(last)
        first = self.num_chained_steps - 1
        indices = bounds[1] - max(bounds[0], first) + 1 if bounds is not None else last - first + 1
        requirement = f"in [1, {indices}], the steps that may take gradient"
        check(1 <= self.num_gradient_steps <= indices, "num_gradient_steps", self.num_gradient_steps, requirement)
        states = self.rollout_states
        requirement = f"in [1, {indices}], the states that gradient steps may start from, or left out"
        check(states is None or 1 <= states <= indices, "rollout_states", states, requirement)
        self._check_memory_options()
        self._check_monitor()

    @property
    def num_backwards(self) -> dict[str, int]:
        """Backward passes of each loss in an update."""
        num_flow = self.gradient_accumulation_steps
        return {"flow": num_flow, "reward": num_flow * self.num_gradient_steps * self.num_chained_steps}

    @property
    def backwards_per_update(self) -> int:
        """Backward passes of the update that has most of them."""
        return max(sum(self.num_backwards[loss] for loss in losses) for losses in UPDATES[self.update_schedule])

    @property
    def uses_monitor(self) -> bool:
        """Whether a monitor judges the validations."""
        return bool(self.monitor_reward_models) or self.on_hacking is not None

    def _check_monitor(self) -> None:
        models, action = self.monitor_reward_models, self.on_hacking
        for name, value in (("monitor_reward_models", models), ("on_hacking", action)):
            requirement = "left out without `validation_dataset`, whose samples the monitor measures"
            check(self.validation_dataset is not None or not value, name, value, requirement)
        trained_on = self.reward_sources
        is_held_out = len({place_of(name) for name in (*trained_on, *models)}) == len(trained_on) + len(models)
        requirement = f"all different, and none of those that are trained on, {trained_on}"
        check(is_held_out, "monitor_reward_models", models, requirement)
        requirement = "warn or stop without `monitor_reward_models`, by which the best is chosen"
        check(action != "keep_best" or bool(models), "on_hacking", action, requirement)

    @property
    def reward_sources(self) -> list[str]:
        """The reward models, one or more."""
        return [self.reward_model] if self.reward_model is not None else list(self.reward_models or [])

    def _check_reward_models(self) -> None:
        several, weights, k = self.reward_models, self.reward_weights, self.reward_disagreement
        is_one = (self.reward_model is None) != (several is None)
        check(is_one, "reward_model", self.reward_model, "given, or else `reward_models`, and not both")
        if several is None:
            for name, default in (
                ("reward_weights", None),
                ("reward_combination", "mean"),
                ("reward_disagreement", 0),
            ):
                value = getattr(self, name)
                check(value == default, name, value, "left out without `reward_models`")
            return
        are_different = 0 < len(several) == len({place_of(name) for name in several})
        check(are_different, "reward_models", several, "different models, at least one")
        if weights is not None:
            requirement = f"one number above 0 for each of {len(several)} `reward_models`"
            fits = len(weights) == len(several) and all(0 < weight < math.inf for weight in weights)
            check(fits, "reward_weights", weights, requirement)
            check(
                self.reward_combination != "min", "reward_weights", weights, "left out with `reward_combination` min"
            )
        check(0 <= k < math.inf, "reward_disagreement", k, "at least 0")
        is_mean = self.reward_combination == "mean"
        check(is_mean or k == 0, "reward_disagreement", k, f"0 with `reward_combination` {self.reward_combination}")
        check(len(several) > 1 or k == 0, "reward_disagreement", k, "0 with one model in `reward_models`")

    def _check_chains(self, last: int) -> None:
        chained, bounds = self.num_chained_steps, self.step_range
        most = (last if bounds is None else bounds[1]) + 1
        check(
            1 <= chained <= most,
            "num_chained_steps",
            chained,
            f"in [1, {most}], the steps up to the last of the range",
        )
        check(
            chained > 1 or not self.stop_input_gradient,
            "stop_input_gradient", self.stop_input_gradient, "false unless `num_chained_steps` is above 1",
        )  # fmt: skip
        check(
            chained == 1 or not (self.lora_rank and self.lora_dropout),
            "num_chained_steps", chained, f"1 with `lora_dropout` {self.lora_dropout}: a step that is run again would drop others",
        )  # fmt: skip
        levels = self.foreseen_levels
        ordered = len(levels) == 2 and 0 < levels[0] <= levels[1] < 1
        check(ordered, "foreseen_levels", levels, "two sigmas in (0, 1), the lower first")
        is_used = self.reward_at == "foreseen" or levels == FORESEEN_LEVELS
        check(is_used, "foreseen_levels", levels, "left out unless `reward_at` is foreseen")
        check(self.rollout_interval >= 1, "rollout_interval", self.rollout_interval, "at least 1")
        check(self.rollout_buffer_size >= 1, "rollout_buffer_size", self.rollout_buffer_size, "at least 1")
        if self.rollout_interval == 1:
            for name, default in (
                ("rollout_buffer_size", 1),
                ("rollout_states", None),
                ("max_rollout_staleness", None),
            ):
                value = getattr(self, name)
                check(value == default, name, value, "left out unless `rollout_interval` is above 1")
        interval, name = self.rollout_cache_interval, "rollout_cache_interval"
        most = self.num_inference_steps
        check(1 <= interval <= most, name, interval, f"in [1, {most}], the steps of the chain")
        keeps_all = self.rollout_interval > 1 and self.rollout_states is None
        requirement = "1 without `rollout_states`: the velocity is computed at each stored state, and all are stored"
        check(interval == 1 or not keeps_all, name, interval, requirement)
        staleness = self.max_rollout_staleness
        check(staleness is None or staleness > 0, "max_rollout_staleness", staleness, "greater than 0, or left out")

    def _check_memory_options(self) -> None:
        blocks, name = self.reward_gradient_checkpointing_blocks, "reward_gradient_checkpointing_blocks"
        check(blocks is None or blocks >= 1, name, blocks, "at least 1, or left out")
        check(self.gradient_checkpointing or not blocks, name, blocks, "left out without `gradient_checkpointing`")
        check(
            not (self.rerun_gradient_step and self.lora_rank and self.lora_dropout),
            "rerun_gradient_step", self.rerun_gradient_step,
            f"false with `lora_dropout` {self.lora_dropout}: the second pass would drop other elements",
        )  # fmt: skip
        for name in ("shard_reward_model", "shard_frozen_expert", "offload_reward_model"):
            check(not (self.compile and getattr(self, name)), "compile", self.compile, f"false with `{name}`")
        check(
            not (self.offload_reward_model and self.shard_reward_model),
            "offload_reward_model", self.offload_reward_model, "false with `shard_reward_model`",
        )  # fmt: skip
        one_trains = self.expert in ("high_noise", "low_noise")
        check(
            one_trains or not self.shard_frozen_expert,
            "shard_frozen_expert", self.shard_frozen_expert, "false unless `expert` is high_noise or low_noise",
        )  # fmt: skip
        kind = self.frozen_expert_quantization
        requirement = "left out unless `expert` is high_noise or low_noise"
        check(one_trains or kind is None, "frozen_expert_quantization", kind, requirement)
        for name, others in (
            ("frozen_expert_quantization", ("shard_frozen_expert",)),
            ("reward_model_quantization", ("shard_reward_model", "offload_reward_model")),
        ):
            for other in others:
                both = getattr(self, name) is not None and getattr(self, other)
                check(not both, name, getattr(self, name), f"left out with `{other}`")
        if self.update_schedule == "flow_matching":
            for name, unused in (
                ("num_gradient_steps", self.num_gradient_steps == 1),
                ("rerun_gradient_step", not self.rerun_gradient_step),
                ("rollout_attention_backend", self.rollout_attention_backend is None),
                ("num_chained_steps", self.num_chained_steps == 1),
                ("rollout_interval", self.rollout_interval == 1),
                ("rollout_cache_interval", self.rollout_cache_interval == 1),
                ("reward_at", self.reward_at == "next"),
                ("anchor_scale", self.anchor_scale == 0),
            ):
                check(
                    unused,
                    name,
                    getattr(self, name),
                    "left out with the schedule 'flow_matching', which has no rollouts",
                )
