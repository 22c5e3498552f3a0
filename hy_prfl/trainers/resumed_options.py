"""What a changed option does to a run that resumes from a checkpoint, for every option."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..configs.base import TrainingConfig
from ..configs.prfl import PRFLTrainingConfig
from ..configs.reward import RewardTrainingConfig


class Rule(NamedTuple):
    """
    What happens if an option differs from that of the checkpoint.

    Args:
        kind (`str`):
            `"applied"`: the new value holds from the next update on. `"refused"`: the run does not start, as the
            checkpoint's weights would not fit. `"not compared"`: the option does not affect training.
        note (`str`):
            Added to the message; for `"refused"` the reason.
        note_if_off (`str`, *optional*):
            Added instead of `note` if the option is off, or left out, now.
    """

    kind: Literal["applied", "refused", "not compared"]
    note: str = ""
    note_if_off: str | None = None


APPLIED = Rule("applied")
OTHER_WEIGHTS = Rule("refused", "other weights would be trained")
OTHER_MEANING = Rule("refused", "the saved weights would mean something else")
OTHER_START = Rule("refused", "the run still needs the weights that it started from, which a checkpoint does not hold")
OTHER_CLIPS = Rule("applied", "the epoch continues with other clips, some of them seen already")
OTHER_DATA = Rule("applied", "the epoch continues at the same position, in the order of the new dataset")
FROZEN = Rule("applied", "frozen weights are read from there; trained weights come from the checkpoint")
OTHER_BEST = Rule("applied", "the search for the best model starts over")

BASE_RULES: dict[str, Rule] = {
    "output_dir": APPLIED,
    "pretrained_model_name_or_path": FROZEN,
    "revision": FROZEN,
    "variant": FROZEN,
    "transformer_path": OTHER_START,
    "lora_path": OTHER_START,
    "lora_start": OTHER_START,
    "train_dataset": OTHER_DATA,
    "validation_dataset": APPLIED,
    "seed": Rule("applied", "data, noise and dropout are drawn from it"),
    "dry_run": Rule("not compared"),
    "dry_run_size": Rule("not compared"),
    "lora_rank": OTHER_WEIGHTS,
    "lora_alpha": OTHER_MEANING,
    "lora_dropout": APPLIED,
    "lora_target_modules": OTHER_WEIGHTS,
    "base_quantization": Rule("applied", "the adapter continues on a base that is rounded differently"),
    "train_batch_size": OTHER_CLIPS,
    "gradient_accumulation_steps": OTHER_CLIPS,
    "num_train_epochs": Rule("applied", "the schedule of the learning rate ends with the run"),
    "max_train_steps": Rule("applied", "the schedule of the learning rate ends with the run"),
    "learning_rate": APPLIED,
    "lr_scheduler": Rule("applied", "at the same number of updates"),
    "lr_warmup_steps": Rule("applied", "counted from the first update of the run"),
    "lr_num_cycles": APPLIED,
    "lr_power": APPLIED,
    "adam_beta1": APPLIED,
    "adam_beta2": APPLIED,
    "adam_weight_decay": APPLIED,
    "adam_epsilon": APPLIED,
    "max_grad_norm": APPLIED,
    "use_ema": Rule("applied", "the average begins with the checkpoint's weights", "no average is kept from here on"),
    "ema_decay": APPLIED,
    "max_skipped_updates": Rule("applied", "updates left out before the checkpoint count"),
    "gradient_checkpointing": APPLIED,
    "gradient_checkpointing_blocks": APPLIED,
    "offload_activations": APPLIED,
    "attention_backend": APPLIED,
    "allow_tf32": APPLIED,
    "compile": APPLIED,
    "context_parallel_degree": APPLIED,
    "dataloader_num_workers": APPLIED,
    "weighting_scheme": APPLIED,
    "flow_shift": APPLIED,
    "logit_mean": APPLIED,
    "logit_std": APPLIED,
    "checkpointing_steps": APPLIED,
    "checkpoints_total_limit": Rule("applied", "when the next checkpoint is saved"),
    "delete_checkpoints_first": Rule("applied", "when the next checkpoint is saved"),
    "validation_steps": APPLIED,
    "resume_from_checkpoint": Rule("not compared"),
    "report_to": APPLIED,
    "tracker_project_name": APPLIED,
    "logging_steps": APPLIED,
    "write_report": APPLIED,
    "push_to_hub": APPLIED,
    "hub_model_id": APPLIED,
    "hub_private_repo": APPLIED,
    "hub_push_checkpoints": APPLIED,
}

REWARD_RULES: dict[str, Rule] = {
    **BASE_RULES,
    "train_dataset_weights": Rule("applied", "the epoch continues at the same position, in another order"),
    "validation_dataset": OTHER_BEST._replace(note_if_off="no other model becomes the best"),
    "reward_model": FROZEN._replace(note_if_off="frozen weights are read from the pipeline"),
    "expert": OTHER_MEANING,
    "num_layers": OTHER_WEIGHTS,
    "pooling": OTHER_WEIGHTS,
    "num_query_heads": OTHER_MEANING,
    "query_residual": OTHER_MEANING,
    "freeze_blocks": OTHER_WEIGHTS,
    "task": OTHER_BEST,
    "loss": OTHER_BEST,
    "allow_unpaired": OTHER_BEST,
    "head_learning_rate": APPLIED,
    "validation_timesteps": OTHER_BEST,
    "validation_random_timesteps": APPLIED,
    "validation_seed": OTHER_BEST,
    "metric_for_best_model": OTHER_BEST,
}

PRFL_RULES: dict[str, Rule] = {
    **BASE_RULES,
    "expert": OTHER_WEIGHTS,
    "transformer_2_path": OTHER_START,
    "lora_2_path": OTHER_START,
    "shard_frozen_expert": APPLIED,
    "frozen_expert_quantization": APPLIED,
    "reward_model": APPLIED,
    "reward_models": APPLIED,
    "reward_weights": APPLIED,
    "reward_combination": APPLIED,
    "reward_disagreement": APPLIED,
    "allow_other_base": APPLIED,
    "shard_reward_model": APPLIED,
    "offload_reward_model": APPLIED,
    "reward_model_quantization": APPLIED,
    "prompt_dataset": OTHER_DATA,
    "update_schedule": APPLIED,
    "reward_loss": APPLIED,
    "reward_scale": APPLIED,
    "reward_target": APPLIED,
    "anchor_scale": APPLIED,
    "divide_by_step_width": APPLIED,
    "num_inference_steps": APPLIED,
    "step_range": APPLIED,
    "num_gradient_steps": APPLIED,
    "rerun_gradient_step": APPLIED,
    "num_chained_steps": APPLIED,
    "stop_input_gradient": APPLIED,
    "reward_at": APPLIED,
    "foreseen_levels": APPLIED,
    "rollout_interval": APPLIED,
    "rollout_buffer_size": APPLIED,
    "rollout_states": APPLIED,
    "rollout_cache_interval": APPLIED,
    "max_rollout_staleness": APPLIED,
    "reward_gradient_checkpointing_blocks": APPLIED,
    "rollout_attention_backend": APPLIED,
    "sampler_flow_shift": APPLIED,
    "prompt_dropout": APPLIED,
    "long_prompt_probability": APPLIED,
    "num_validation_samples": APPLIED,
    "validation_timesteps": APPLIED,
    "validation_guidance_scale": APPLIED,
    "validation_videos": APPLIED,
    "validation_fps": APPLIED,
    "vae_tiling": APPLIED,
    "validation_seed": APPLIED,
    "monitor_reward_models": APPLIED,
    "on_hacking": APPLIED,
}

RULES: dict[type[TrainingConfig], dict[str, Rule]] = {
    RewardTrainingConfig: REWARD_RULES,
    PRFLTrainingConfig: PRFL_RULES,
}

# Options of PRFL that have an effect together. Those of the sampler and of the scores: in reward updates and validations.
SAMPLING_OPTIONS = ("num_inference_steps", "sampler_flow_shift", "reward_model", "reward_models")
SCORING_OPTIONS = ("reward_weights", "reward_combination", "reward_disagreement")
REUSE_OPTIONS = ("rollout_buffer_size", "rollout_states", "max_rollout_staleness")
REWARD_UPDATE_OPTIONS = (
    "prompt_dataset", "reward_loss", "reward_scale", "reward_target", "anchor_scale", "divide_by_step_width", "step_range",
    "num_gradient_steps", "num_chained_steps", "stop_input_gradient", "reward_at", "foreseen_levels", "rollout_interval",
    *REUSE_OPTIONS, "rollout_cache_interval", "rerun_gradient_step", "reward_gradient_checkpointing_blocks",
    "rollout_attention_backend",
)  # fmt: skip
VALIDATION_OPTIONS = (
    "num_validation_samples", "validation_timesteps", "validation_guidance_scale", "validation_videos", "validation_fps",
    "vae_tiling", "validation_seed", "monitor_reward_models", "on_hacking",
)  # fmt: skip


class Change(NamedTuple):
    """An option whose value has changed since the checkpoint, and the effect."""

    name: str
    before: Any
    now: Any
    rule: Rule
    ignored: str | None

    def __str__(self) -> str:
        is_off = self.now in (None, False) and self.rule.note_if_off is not None
        note = self.rule.note_if_off if is_off else self.rule.note
        effect = "applied" + (f"; {note}" if note else "")
        if self.ignored is not None:
            effect = f"ignored, {self.ignored}"
        return f"`{self.name}` was {self.before!r} before the checkpoint and is {self.now!r} now: {effect}."


def find_changes(before: Mapping[str, Any], config: TrainingConfig, engine: str) -> list[Change]:
    """
    Options whose values differ from those that a checkpoint was written with.

    Args:
        before (`Mapping[str, Any]`):
            Options of the run that wrote it. An option that its version did not have counts as its default.
        config (`TrainingConfig`):
            Options now.
        engine (`str`):
            `whole`, or `ZeRO-<stage>`.

    Raises:
        ValueError: If an option has changed that must not change; names it and both values.
    """
    rules, ignored = RULES[type(config)], without_effect(config, engine)
    defaults = {each.name: _default(each) for each in dataclasses.fields(config)}
    changes = []
    for name, now in dataclasses.asdict(config).items():
        rule, old = rules[name], before.get(name, defaults[name])
        if name == "lora_alpha":
            # If left out, it equals the rank.
            same = (old or before.get("lora_rank")) == (now or config.lora_rank)
        elif name == "lora_target_modules":
            same = set(old) == set(now)
        else:
            # Older versions took a single dataset.
            same = now in (old, [old])
        if same or rule.kind == "not compared":
            continue
        if rule.kind == "refused" and name not in ignored:
            raise ValueError(f"`{name}` must be {old!r}, as before the checkpoint, got {now!r}: {rule.note}.")
        changes.append(Change(name, old, now, rule, ignored.get(name)))
    unknown = [name for name in before if name not in rules]
    changes += [Change(name, before[name], None, APPLIED, "there is no such option") for name in unknown]
    return changes


def _default(option: dataclasses.Field) -> Any:
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return None if option.default is dataclasses.MISSING else option.default


def without_effect(config: TrainingConfig, engine: str) -> dict[str, str]:
    """Options that have no effect given the others, by name, with the reason."""
    pipeline = config.pretrained_model_name_or_path
    cases: list[tuple[bool, str, tuple[str, ...]]] = [
        (engine != "whole", "DeepSpeed's own `gradient_clipping` rules", ("max_grad_norm",)),
        (config.max_train_steps is not None, "`max_train_steps` is given", ("num_train_epochs",)),
        (config.lr_scheduler == "constant", "`lr_scheduler` is constant", ("lr_warmup_steps",)),
        (
            config.lr_scheduler != "cosine_with_restarts",
            f"`lr_scheduler` is {config.lr_scheduler}",
            ("lr_num_cycles",),
        ),
        (config.lr_scheduler != "polynomial", f"`lr_scheduler` is {config.lr_scheduler}", ("lr_power",)),
        (config.weighting_scheme == "uniform", "`weighting_scheme` is uniform", ("logit_mean", "logit_std")),
        (config.lora_rank is None, "there is no adapter", ("lora_alpha", "lora_dropout", "lora_target_modules")),
        (config.lora_rank is None, "there is no adapter", ("base_quantization",)),
        (
            not config.gradient_checkpointing,
            "`gradient_checkpointing` is off",
            ("gradient_checkpointing_blocks", "offload_activations"),
        ),
        (config.checkpoints_total_limit is None, "all checkpoints are kept", ("delete_checkpoints_first",)),
        (not config.use_ema, "no average is kept", ("ema_decay",)),
        (config.validation_dataset is None, "there is no `validation_dataset`", ("validation_steps",)),
        (Path(pipeline).is_dir(), f"`pretrained_model_name_or_path` is the folder '{pipeline}'", ("revision",)),
        (not set(config.report_to) - {"none"}, "`report_to` names no tracker", ("tracker_project_name",)),
        (
            not config.push_to_hub,
            "`push_to_hub` is off",
            ("hub_model_id", "hub_private_repo", "hub_push_checkpoints"),
        ),
    ]
    if isinstance(config, RewardTrainingConfig):
        from_reward_model = config.reward_model is not None
        cases += [
            (from_reward_model, "`reward_model` has its own", ("num_layers", "pooling", "num_query_heads")),
            (from_reward_model, "`reward_model` has its own", ("query_residual",)),
            (config.pooling != "query", f"`pooling` is {config.pooling}", ("num_query_heads", "query_residual")),
            (config.freeze_blocks, "blocks are frozen", ("learning_rate",)),
            (config.loss == "bce", "`loss` is bce", ("allow_unpaired",)),
            (
                config.validation_dataset is None,
                "there is no `validation_dataset`",
                ("validation_timesteps", "validation_random_timesteps", "validation_seed", "metric_for_best_model"),
            ),
        ]
    elif isinstance(config, PRFLTrainingConfig):
        no_reward, no_validation = config.update_schedule == "flow_matching", config.validation_dataset is None
        is_one, combination = len(config.reward_sources) == 1, config.reward_combination
        cases += [
            (
                config.expert not in ("high_noise", "low_noise"),
                "no expert is frozen",
                ("shard_frozen_expert", "frozen_expert_quantization"),
            ),
            (config.reward_models is None, "there is one `reward_model`", SCORING_OPTIONS),
            (is_one, "there is one reward model", ("reward_disagreement",)),
            # In a product the weight of a single model is still its exponent.
            (is_one and combination != "product", "there is one reward model", ("reward_weights",)),
            (combination == "min", "`reward_combination` is min", ("reward_weights",)),
            (combination != "mean", f"`reward_combination` is {combination}", ("reward_disagreement",)),
            (
                no_reward and no_validation,
                "`update_schedule` is flow_matching, and there is no `validation_dataset`",
                (*SAMPLING_OPTIONS, *SCORING_OPTIONS),
            ),
            (config.lora_rank is None, "there is no adapter", ("anchor_scale",)),
            (config.reward_loss != "sigmoid", f"`reward_loss` is {config.reward_loss}", ("reward_target",)),
            (config.num_chained_steps == 1, "`num_chained_steps` is 1", ("stop_input_gradient",)),
            (config.reward_at == "next", "`reward_at` is next", ("foreseen_levels",)),
            (config.rollout_interval == 1, "`rollout_interval` is 1", REUSE_OPTIONS),
            (
                not config.gradient_checkpointing,
                "`gradient_checkpointing` is off",
                ("reward_gradient_checkpointing_blocks",),
            ),
            (no_reward, "`update_schedule` is flow_matching", REWARD_UPDATE_OPTIONS),
            (
                config.update_schedule == "reward",
                "`update_schedule` is reward",
                ("weighting_scheme", "flow_shift", "logit_mean", "logit_std"),
            ),
            (not config.validation_videos, "`validation_videos` is off", ("validation_fps", "vae_tiling")),
            (no_validation, "there is no `validation_dataset`", VALIDATION_OPTIONS),
        ]
    return {name: reason for is_so, reason, names in cases if is_so for name in names}
