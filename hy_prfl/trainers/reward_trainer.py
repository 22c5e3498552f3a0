"""Trains PAVRM, which predicts the label of a clip from its latents at a random noise level."""

import dataclasses
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from ..compatibility import REWARD_LATENTS, check_same_vae, check_vae
from ..configs.base import check, names_in
from ..configs.reward import RewardTrainingConfig
from ..data.collators import LabeledBatch, LatentBatch, PreferenceBatch
from ..data.dataset import load_latent_dataset, single_value
from ..evaluation.reward_evaluator import GREATER_IS_BETTER, RewardEvaluator
from ..formats.checkpoints import BEST_FOLDER, MODEL_FOLDER, REWARD_RESULTS, best_report
from ..formats.layout import EXPERT_FOLDERS, ExpertName
from ..formats.model_files import merge_adapter, save_pretrained
from ..models.conditioning import Conditioning
from ..models.experts import choose_experts
from ..models.loading import (
    Deferred,
    WeightFiles,
    empty_transformer,
    load_reward_model,
    loaded,
    make_reward_model,
    read_reward_config,
    start_of,
)
from ..models.reward_model import WanRewardModel, reward_training_loss
from ..models.starting_points import StartingPoint, check_starts_adapter, read_starting_point, start_adapter
from ..models.trainable import select_trainable
from ..planning.models import build_reward_model, reward_model_config
from ..runtime.sharding import full_state_dict
from .base import Trainer, as_datasets, check_dataset, check_named
from .resumed_options import OTHER_BEST, REWARD_RULES
from .reward_datasets import RewardDatasets
from .run import Run


logger = get_logger(__name__)

NOISE = 0
TRAINED_FILE = "trained_weights.safetensors"
# Options of a new model; with `reward_model` its own values hold.
MODEL_OPTIONS = ("num_layers", "pooling", "num_query_heads", "query_residual")


class RewardTrainer(Trainer):
    """
    Trains a [`WanRewardModel`] with binary cross-entropy on labels or with Bradley-Terry on pairs.

    Embeddings stay frozen; blocks train with `learning_rate`, pooling and head with `head_learning_rate`. The result is
    `output_dir/reward_model`; the model with the best validation is `output_dir/best`.

    Args:
        config (`RewardTrainingConfig`):
            Options of the run. Its paths only name the given model and datasets in messages and in the run's record.
        reward_model (`WanRewardModel`):
            The model to train, in float32, or a [`~hy_prfl.models.loading.Deferred`] one, which is loaded after all
            checks.
        train_dataset (`Dataset` or `Sequence[Dataset]`):
            A latent dataset with labels or pairs for the task, or several; `config.train_dataset` names them.
        validation_dataset (`Dataset` or `Sequence[Dataset]`, *optional*):
            One or several to evaluate on; `config.validation_dataset` names them.
        run (`Run`, *optional*):
            Result of [`set_up_run`]; set up here if left out.

    Raises:
        ValueError: If options, model and datasets do not fit together.

    Example:
        ```python
        transformer = WanTransformer3DModel.from_pretrained(pipeline, subfolder="transformer")
        trainer = RewardTrainer(
            RewardTrainingConfig(output_dir="out", pretrained_model_name_or_path=pipeline, train_dataset="my rows"),
            reward_model=WanRewardModel.from_transformer(transformer),
            train_dataset=load_from_disk("rows").filter(lambda row: row["source"] != "a film"),
        )
        trainer.train()
        ```
    """

    config: RewardTrainingConfig
    results = REWARD_RESULTS

    def __init__(
        self,
        config: RewardTrainingConfig,
        *,
        reward_model: WanRewardModel | Deferred[WanRewardModel],
        train_dataset: Dataset | Sequence[Dataset],
        validation_dataset: Dataset | Sequence[Dataset] | None = None,
        run: Run | None = None,
    ) -> None:
        run = self.set_up_run(config) if run is None else run
        check_named(config, train_dataset=train_dataset, validation_dataset=validation_dataset)
        self.datasets = RewardDatasets(
            config,
            as_datasets(train_dataset),
            as_datasets(validation_dataset),
            num_replicas=run.num_replicas,
            replica=run.replica,
        )
        fingerprint, owner = reward_model.config["vae_fingerprint"], "the pipeline"
        for source, dataset in self.datasets.by_source().items():
            if not fingerprint:
                fingerprint, owner = single_value(dataset, "vae_fingerprint", source), source
            check_vae(dataset, source, fingerprint, of=owner)
            check_dataset(run, dataset, source, reward_model.config)
        model = loaded(reward_model)
        model.register_to_config(task=config.task, vae_fingerprint=fingerprint)
        select_trainable(model, config, dtype=run.trained_dtype)
        start_adapter(model, start_of(reward_model))
        run.set_up_blocks(model, num_checkpointed=config.gradient_checkpointing_blocks)
        super().__init__(
            config,
            run=run,
            model=model,
            parameter_groups=_parameter_groups(config, model),
            datasets=self.datasets.by_source(),
            batches_per_epoch=self.datasets.batches_per_epoch,
        )
        self.batches: Iterator[LabeledBatch | PreferenceBatch] = iter(())
        self.evaluator = self._build_evaluator()
        self.best_metric: float | None = None
        self.best_metric_name = config.metric_for_best_model

    @classmethod
    def set_up_run(cls, config: RewardTrainingConfig) -> Run:
        """Set up the run of these options. No model is loaded yet."""
        run = Run(config, trainer=cls.__name__, backwards_per_update=config.gradient_accumulation_steps)
        run.check_kernel("attention_backend", trains=True, dtype=run.trained_dtype)
        return run

    @classmethod
    def from_config(cls, config: RewardTrainingConfig) -> "RewardTrainer":
        """Build the trainer with the model and datasets that the options name."""
        run = cls.set_up_run(config)
        fingerprint = run.pipeline_vae_fingerprint()
        datasets: dict[str, list[Dataset]] = {}
        for option in ("train_dataset", "validation_dataset"):
            sources = names_in(getattr(config, option))
            datasets[option] = [load_latent_dataset(source) for source in sources]
            for source, dataset in zip(sources, datasets[option], strict=True):
                check_vae(dataset, source, fingerprint)
        return cls(config, reward_model=_deferred_model(config, run, fingerprint), **datasets, run=run)

    def train_step(self) -> dict[str, torch.Tensor]:
        """One update on `gradient_accumulation_steps` micro-batches."""
        losses, margins = [], []
        for micro_step in range(self.config.gradient_accumulation_steps):
            batch = next(self.batches).to(self.accelerator.device, self.weight_dtype)
            with self.accelerator.accumulate(self.wrapped):
                loss, margin = self.compute_loss(batch, micro_step)
                self.updates.backward(loss, batch.ids)
                self.updates.step(self.global_step)
            losses.append(loss.detach())
            margins.append(margin)
        if self.average is not None:
            self.average.step()
        return {
            "loss": torch.stack(losses).mean(),
            "accuracy": (torch.cat(margins) > 0).float().mean(),
            "grad_norm": self.updates.grad_norm,
        }

    def compute_loss(
        self, batch: LabeledBatch | PreferenceBatch, micro_step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of one micro-batch, and the margin of each logit or pair, which is positive if it is right."""
        if isinstance(batch, PreferenceBatch):
            clips, labels = LatentBatch.concatenate([batch.chosen, batch.rejected]), None
            noise, sigmas = self.draw_noise(NOISE, micro_step, batch.chosen)
        else:
            clips, labels = batch.clips, batch.labels
            noise, sigmas = self.draw_noise(NOISE, micro_step, clips)
        assert clips.latents is not None
        return reward_training_loss(
            self.wrapped,
            latents=clips.latents,
            noise=noise,
            sigmas=sigmas,
            conditioning=Conditioning.of(clips),
            labels=labels,
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Evaluate, with the averaged weights if there are any, and keep the model if it is the best so far."""
        assert self.evaluator is not None
        self.unwrapped.eval()
        with self.averaged_weights():
            metrics = self.evaluator(self.wrapped, self.accelerator)
            self._keep_if_best(metrics)
        self.unwrapped.train()
        return metrics

    def _keep_if_best(self, metrics: dict[str, float]) -> None:
        name = self.config.metric_for_best_model
        assert name is not None
        sign = 1 if GREATER_IS_BETTER[name] else -1
        value = metrics[name]
        if self.best_metric is None or sign * value > sign * self.best_metric:
            self.best_metric, self.best_metric_name = value, name
            self._save_best(metrics)

    def start_streams(self) -> None:
        """Open the training batches at the position of `global_step`."""
        self.batches = self.datasets.batches(self.global_step * self.config.gradient_accumulation_steps)
        self.unwrapped.train()

    def save_model(self, directory: Path) -> None:
        """Write `directory/reward_model`, or with LoRA only the trained weights. A collective."""
        if self.config.lora_rank is None:
            self._write_reward_model(directory / MODEL_FOLDER)
            return
        state_dict = full_state_dict(self.accelerator, self.unwrapped, trainable_only=True)
        if self.accelerator.is_main_process:
            save_file(state_dict, directory / TRAINED_FILE)

    def save_result(self, directory: Path) -> None:
        """Write the full `directory/reward_model`, with its LoRA merged, and averaged if an average is kept."""
        with self.averaged_weights():
            self._write_reward_model(directory / MODEL_FOLDER)

    def read_model(self, directory: Path) -> Mapping[str, torch.Tensor]:
        """Read what `save_model` wrote, by the names of the trained parameters."""
        if self.config.lora_rank is None:
            return WeightFiles(directory, subfolder=MODEL_FOLDER)
        return load_file(directory / TRAINED_FILE)

    def state(self) -> dict[str, Any]:
        """Add the best value so far, and the name of its metric."""
        return {**super().state(), "best_metric": self.best_metric, "best_metric_name": self.best_metric_name}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        super().load_state(state)
        # Older checkpoints do not name the metric.
        self.best_metric, self.best_metric_name = state["best_metric"], state.get("best_metric_name", "metric")

    def forget_outdated(self, changed: Collection[str]) -> None:
        """Forget the best value if it was measured differently, or if its model is no longer in `output_dir/best`."""
        # Without validation the best model stays.
        if self.best_metric is None or self.config.validation_dataset is None:
            return
        kept = best_report(self.output_dir) or {"global_step": math.inf}
        value = kept.get(str(self.config.metric_for_best_model))
        is_kept = kept["global_step"] <= self.global_step and value == self.best_metric
        outdated = sorted(name for name in changed if REWARD_RULES[name].note == OTHER_BEST.note)
        if is_kept and not outdated:
            return
        reason = (
            f"was measured with another {' and '.join(outdated)}"
            if outdated
            else "belongs to a model that is no longer there"
        )
        logger.warning(
            "The checkpoint's best %s, %.4f, %s: the next validation replaces %s.",
            self.best_metric_name, self.best_metric, reason, self.output_dir / BEST_FOLDER,
        )  # fmt: skip
        self.best_metric = None

    def _build_evaluator(self) -> RewardEvaluator | None:
        config, validation = self.config, self.datasets.validation
        if validation is None:
            return None
        return RewardEvaluator(
            validation.dataset,
            validation.items,
            validation.labels,
            parts=self.datasets.validation_parts(),
            timesteps=config.validation_timesteps,
            num_random_timesteps=config.validation_random_timesteps,
            seed=config.validation_seed,
            batch_size=config.train_batch_size,
            num_replicas=self.run.num_replicas,
            replica=self.run.replica,
            dtype=self.weight_dtype,
        )

    def _save_best(self, metrics: dict[str, float]) -> None:
        """Write the model and its metrics to `output_dir/best`. A collective."""
        report = {"global_step": self.global_step, **metrics}
        self._write_reward_model(self.output_dir / BEST_FOLDER, extra={"metrics.json": json.dumps(report, indent=2)})
        logger.info("Best %s so far: %.4f.", self.config.metric_for_best_model, self.best_metric)

    def _write_reward_model(self, folder: Path, **kwargs: Any) -> None:
        state_dict = full_state_dict(self.accelerator, self.unwrapped)
        if self.accelerator.is_main_process:
            if self.config.lora_rank is not None:
                state_dict = merge_adapter(self.unwrapped, state_dict)
            save_pretrained(self.unwrapped, state_dict, folder, **kwargs)


def _deferred_model(config: RewardTrainingConfig, run: Run, vae_fingerprint: str) -> Deferred[WanRewardModel]:
    """The reward model to start from, or a new one from the pipeline's transformer."""
    if config.reward_model is not None:
        reward_config = read_reward_config(config.reward_model, option="reward_model")
        source = config.pretrained_model_name_or_path
        check_same_vae(vae_fingerprint, reward_config["vae_fingerprint"], source=source, of=REWARD_LATENTS)
        _check_same_model(config, reward_config)
        if reward_config["task"] != config.task:
            logger.warning(
                "%s was trained for '%s'; it goes on with labels for '%s'.",
                config.reward_model, reward_config["task"], config.task,
            )  # fmt: skip
        load = partial(
            load_reward_model,
            config.reward_model,
            dtype=run.trained_dtype,
            shard=run.shard,
            quantizer=run.quantizer("base_quantization"),
            keep_in_fp32=False,
        )
        return Deferred({**reward_config, "vae_fingerprint": vae_fingerprint}, load)
    path, revision = config.pretrained_model_name_or_path, config.revision
    (trained,) = choose_experts(run.pipeline, config.expert).trained
    subfolder = EXPERT_FOLDERS[trained]
    base = empty_transformer(path, subfolder=subfolder, revision=revision)
    start = _read_start(config, base, trained)
    make = partial(
        make_reward_model,
        path,
        num_layers=config.num_layers,
        revision=revision,
        variant=config.variant,
        dtype=run.trained_dtype,
        subfolder=subfolder,
        shard=run.shard,
        quantizer=run.quantizer("base_quantization"),
        pooling=config.pooling,
        num_query_heads=config.num_query_heads,
        query_residual=config.query_residual,
        task=config.task,
        vae_fingerprint=vae_fingerprint,
        start=start,
    )
    return Deferred({**base.config, "vae_fingerprint": vae_fingerprint}, make, start)


def _check_same_model(config: RewardTrainingConfig, reward_config: Mapping[str, Any]) -> None:
    """Refuse options that contradict the reward model to start from; a default never does."""
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if option.name in MODEL_OPTIONS and value not in (option.default, reward_config[option.name]):
            requirement = f"left out, or {reward_config[option.name]!r} as in the reward model '{config.reward_model}'"
            check(False, option.name, value, requirement)


def _read_start(config: RewardTrainingConfig, base: WanTransformer3DModel, expert: ExpertName) -> StartingPoint:
    """The weights that replace the pipeline's transformer, as the options say; refuses what does not fit."""
    if config.transformer_path is None and config.lora_path is None:
        return StartingPoint()
    start = read_starting_point(config.transformer_path, config.lora_path, config.lora_start, base=base, expert=expert)
    check_starts_adapter(build_reward_model(reward_model_config(base.config, config), config), start)
    return start


def _parameter_groups(config: RewardTrainingConfig, model: WanRewardModel) -> list[dict[str, Any]]:
    head = [*model.pooler.parameters(), *model.head.parameters()]
    groups = [{"params": head, "lr": config.head_learning_rate}]
    blocks = [parameter for parameter in model.blocks.parameters() if parameter.requires_grad]
    if blocks:
        groups.insert(0, {"params": blocks, "lr": config.learning_rate})
    return groups
