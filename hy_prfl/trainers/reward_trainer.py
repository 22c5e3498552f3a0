"""Trains PAVRM: the label of the clean clip, predicted from its latents at a random noise level."""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from safetensors.torch import load_file, save_file

from ..configs.reward import RewardTrainingConfig
from ..data.collators import LabeledBatch, LatentBatch, PreferenceBatch, collate_labeled, collate_preferences
from ..data.dataset import (
    RowDataset,
    check_shared_memory,
    check_vae,
    latent_shapes,
    load_latent_dataset,
    preference_pairs,
    require_latents,
    rows_with_label,
    stream_batches,
)
from ..data.sampler import BucketBatchSampler
from ..evaluation.reward_evaluator import GREATER_IS_BETTER, RewardEvaluator
from ..formats.checkpoints import (
    BEST_FOLDER,
    MODEL_FOLDER,
    REWARD_RESULTS,
    best_report,
    merge_adapter,
    save_pretrained,
)
from ..formats.layout import EXPERT_FOLDERS
from ..losses import binary_reward_loss, bradley_terry_loss
from ..models.experts import read_experts
from ..models.loading import TRANSFORMER_FOLDER, WeightFiles, load_reward_model, make_reward_model
from ..models.reward_model import WanRewardModel, check_latents_fit, score_noised
from ..models.trainable import select_trainable
from ..runtime.sharding import full_state_dict
from .base import Trainer
from .resumed_options import OTHER_BEST, REWARD_RULES


logger = get_logger(__name__)

NOISE = 0
TRAINED_FILE = "trained_weights.safetensors"


class RewardTrainer(Trainer):
    """
    Trains a [`WanRewardModel`] with binary cross-entropy on labels or with Bradley-Terry on pairs.

    Embeddings stay frozen; blocks train with `learning_rate`, pooling and head with `head_learning_rate`. The result is
    `output_dir/reward_model`, and the model with the best validation `output_dir/best`.
    """

    config: RewardTrainingConfig
    results = REWARD_RESULTS

    def __init__(self, config: RewardTrainingConfig) -> None:
        super().__init__(config, backwards_per_update=config.gradient_accumulation_steps)
        self.check_kernel("attention_backend", trains=True, dtype=self.trained_dtype)
        self.best_metric: float | None = None
        self.best_metric_name = config.metric_for_best_model
        self.subfolder = self._find_transformer()
        self.vae_fingerprint = self.pipeline_vae_fingerprint()
        self.dataset, self.items, _ = self._open(config.train_dataset)
        self.rows = RowDataset(self.dataset, self.items)
        self.collate: Callable[[list[Any]], LabeledBatch | PreferenceBatch] = collate_preferences
        if config.loss == "bce":
            self.collate = partial(collate_labeled, task=config.task)
        self.sampler = partial(
            BucketBatchSampler,
            self._buckets(),
            batch_size=config.train_batch_size,
            seed=config.seed,
            num_replicas=self.num_replicas,
            replica=self.replica,
        )
        check_shared_memory(self.rows, self.collate, self.sampler(), num_workers=config.dataloader_num_workers)
        self.evaluator = self._build_evaluator()
        self.unwrapped = self._load_reward_model()
        self.check_dataset(self.dataset, config.train_dataset, self.unwrapped.config)
        if self.evaluator is not None and config.validation_dataset is not None:
            self.check_dataset(self.evaluator.dataset, config.validation_dataset, self.unwrapped.config)
        self.reward_model = self.prepare(self.unwrapped, self._parameter_groups(), self.sampler().batches_per_epoch)

    def train_step(self) -> dict[str, torch.Tensor]:
        """One update on `gradient_accumulation_steps` micro-batches."""
        losses, margins = [], []
        for micro_step in range(self.config.gradient_accumulation_steps):
            batch = next(self.batches).to(self.accelerator.device, self.weight_dtype)
            with self.accelerator.accumulate(self.reward_model):
                loss, margin = self.compute_loss(batch, micro_step)
                self.updates.backward(loss, batch.ids)
                self.updates.step(self.global_step)
            losses.append(loss.detach())
            margins.append(margin)
        return {
            "loss": torch.stack(losses).mean(),
            "accuracy": (torch.cat(margins) > 0).float().mean(),
            "grad_norm": self.updates.grad_norm,
        }

    def compute_loss(
        self, batch: LabeledBatch | PreferenceBatch, micro_step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of one micro-batch, and by how much each logit, or pair, is on the right side (>0)."""
        clips = batch.chosen if isinstance(batch, PreferenceBatch) else batch.clips
        noise, sigmas = self.draw_noise(NOISE, micro_step, clips)
        if isinstance(batch, PreferenceBatch):
            # One forward for both, so that DDP and ZeRO see one call a backward; same noise, same sigma.
            both = LatentBatch.concatenate([batch.chosen, batch.rejected])
            chosen_logits, rejected_logits = self.score(both, noise.repeat(2, 1, 1, 1, 1), sigmas.repeat(2)).chunk(2)
            loss = bradley_terry_loss(chosen_logits, rejected_logits)
            return loss, (chosen_logits - rejected_logits).detach()
        logits = self.score(clips, noise, sigmas)
        return binary_reward_loss(logits, batch.labels), (logits * (2 * batch.labels - 1)).detach()

    def score(self, clips: LatentBatch, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """Logits `(batch_size,)` of the noised clips."""
        assert clips.latents is not None
        return score_noised(
            self.reward_model,
            latents=clips.latents,
            noise=noise,
            sigmas=sigmas,
            encoder_hidden_states=clips.prompt_embeds,
            condition=clips.condition,
            encoder_hidden_states_image=clips.image_embeds,
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Evaluate at the fixed timesteps and keep the model if it is the best so far."""
        assert self.evaluator is not None
        self.unwrapped.eval()
        metrics = self.evaluator(self.reward_model, self.accelerator)
        self.unwrapped.train()
        name = self.config.metric_for_best_model
        assert name is not None
        sign = 1 if GREATER_IS_BETTER[name] else -1
        value = metrics[name]
        if self.best_metric is None or sign * value > sign * self.best_metric:
            self.best_metric, self.best_metric_name = value, name
            self._save_best(metrics)
        return metrics

    def start_streams(self) -> None:
        """Open the training batches at the position of `global_step`."""
        self.batches: Iterator[LabeledBatch | PreferenceBatch] = stream_batches(
            self.rows,
            self.collate,
            self.sampler(start=self.global_step * self.config.gradient_accumulation_steps),
            num_workers=self.config.dataloader_num_workers,
        )
        self.unwrapped.train()

    def save_model(self, directory: Path) -> None:
        """Write `directory/reward_model`, or of a run with LoRA what trains. A collective."""
        if self.config.lora_rank is None:
            self._write_reward_model(directory / MODEL_FOLDER)
            return
        state_dict = full_state_dict(self.accelerator, self.unwrapped, trainable_only=True)
        if self.accelerator.is_main_process:
            save_file(state_dict, directory / TRAINED_FILE)

    def save_result(self, directory: Path) -> None:
        """Write `directory/reward_model`, whole, also after LoRA."""
        self._write_reward_model(directory / MODEL_FOLDER)

    def read_model(self, directory: Path) -> Mapping[str, torch.Tensor]:
        """What `save_model` wrote, by the names of the parameters in training."""
        if self.config.lora_rank is None:
            return WeightFiles(directory, subfolder=MODEL_FOLDER)
        return load_file(directory / TRAINED_FILE)

    def state(self) -> dict[str, Any]:
        """Adds the best metric so far, and which it is."""
        return {**super().state(), "best_metric": self.best_metric, "best_metric_name": self.best_metric_name}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        super().load_state(state)
        # Older checkpoints do not tell which metric it is.
        self.best_metric, self.best_metric_name = state["best_metric"], state.get("best_metric_name", "metric")

    def forget_outdated(self, changed: Collection[str]) -> None:
        """Forget the best metric if it was another measure, or of a model that is not in `output_dir/best` any more."""
        # Without validation the best model stays what it is.
        if self.best_metric is None or self.config.validation_dataset is None:
            return
        kept = best_report(self.output_dir) or {"global_step": math.inf}
        value = kept.get(str(self.config.metric_for_best_model))
        is_kept = kept["global_step"] <= self.global_step and value == self.best_metric
        outdated = sorted(name for name in changed if REWARD_RULES[name].note == OTHER_BEST.note)
        if is_kept and not outdated:
            return
        reason = (
            f"measured with another {' and '.join(outdated)}" if outdated else "of a model that is not there any more"
        )
        logger.warning(
            "The best %s of the checkpoint, %.4f, is %s: the next validation writes %s anew.",
            self.best_metric_name, self.best_metric, reason, self.output_dir / BEST_FOLDER,
        )  # fmt: skip
        self.best_metric = None

    def _open(self, path: str) -> tuple[Dataset, list[Any], list[int] | None]:
        """The dataset, its items (rows with a label, or pairs) and the labels of rows."""
        config = self.config
        dataset = load_latent_dataset(path)
        require_latents(dataset, path)
        check_vae(dataset, path, self.vae_fingerprint)
        if config.loss == "bt":
            pairs = preference_pairs(
                dataset, config.task, path, allow_unpaired=config.allow_unpaired, seed=config.seed
            )
            return dataset, pairs, None
        rows, labels = rows_with_label(dataset, config.task, path)
        return dataset, rows, labels

    def _build_evaluator(self) -> RewardEvaluator | None:
        config = self.config
        if config.validation_dataset is None:
            return None
        dataset, items, labels = self._open(config.validation_dataset)
        if labels is not None and len(set(labels)) < 2 and config.metric_for_best_model == "auc":
            raise ValueError(
                f"`metric_for_best_model` is 'auc', but all labels of {config.validation_dataset} for "
                f"'{config.task}' are {labels[0]}."
            )
        return RewardEvaluator(
            dataset,
            items,
            labels,
            timesteps=config.validation_timesteps,
            seed=config.validation_seed,
            batch_size=config.train_batch_size,
            num_replicas=self.num_replicas,
            replica=self.replica,
            dtype=self.weight_dtype,
        )

    def _find_transformer(self) -> str:
        """Folder of the transformer whose blocks the reward model is made of."""
        config = self.config
        if config.reward_model is not None:
            return TRANSFORMER_FOLDER
        expert = config.expert
        (trained,) = read_experts(config.pretrained_model_name_or_path, expert, revision=config.revision).trained
        return EXPERT_FOLDERS[trained]

    def _load_reward_model(self) -> WanRewardModel:
        config, quantizer = self.config, self.quantizer("base_quantization")
        if config.reward_model is not None:
            reward_config = WanRewardModel.load_own_config(config.reward_model)
            check_latents_fit(reward_config, vae_fingerprint=self.vae_fingerprint, source=config.train_dataset)
            model = load_reward_model(
                config.reward_model,
                dtype=self.trained_dtype,
                split=self.split,
                quantizer=quantizer,
                keep_in_fp32=False,
            )
            model.register_to_config(task=config.task, vae_fingerprint=self.vae_fingerprint)
        else:
            model = make_reward_model(
                config.pretrained_model_name_or_path,
                num_layers=config.num_layers,
                revision=config.revision,
                variant=config.variant,
                dtype=self.trained_dtype,
                subfolder=self.subfolder,
                split=self.split,
                quantizer=quantizer,
                pooling=config.pooling,
                num_query_heads=config.num_query_heads,
                query_residual=config.query_residual,
                task=config.task,
                vae_fingerprint=self.vae_fingerprint,
            )
        select_trainable(model, config, dtype=self.trained_dtype)
        self.set_up_blocks(model, num_recomputed=config.gradient_checkpointing_blocks)
        return model

    def _parameter_groups(self) -> list[dict[str, Any]]:
        head = [*self.unwrapped.pooler.parameters(), *self.unwrapped.head.parameters()]
        groups = [{"params": head, "lr": self.config.head_learning_rate}]
        blocks = [parameter for parameter in self.unwrapped.blocks.parameters() if parameter.requires_grad]
        if blocks:
            groups.insert(0, {"params": blocks, "lr": self.config.learning_rate})
        return groups

    def _buckets(self) -> list[tuple[int, ...]]:
        shapes = latent_shapes(self.dataset)
        return [shapes[item[0] if isinstance(item, tuple) else item] for item in self.items]

    def _save_best(self, metrics: dict[str, float]) -> None:
        """Write `output_dir/best`, with what made it the best. A collective."""
        report = {"global_step": self.global_step, **metrics}
        self._write_reward_model(self.output_dir / BEST_FOLDER, extra={"metrics.json": json.dumps(report, indent=2)})
        logger.info("Best %s so far: %.4f.", self.config.metric_for_best_model, self.best_metric)

    def _write_reward_model(self, folder: Path, **kwargs: Any) -> None:
        state_dict = full_state_dict(self.accelerator, self.unwrapped)
        if self.accelerator.is_main_process:
            if self.config.lora_rank is not None:
                state_dict = merge_adapter(self.unwrapped, state_dict)
            save_pretrained(self.unwrapped, state_dict, folder, **kwargs)
