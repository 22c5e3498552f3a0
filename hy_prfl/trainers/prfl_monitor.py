"""Watches a PRFL run by measures other than its reward: held-out reward models, distance to the base, latent statistics."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset
from torch import nn

from ..compatibility import check_fits_generator, check_same_vae
from ..configs.base import check
from ..configs.prfl import PRFLTrainingConfig
from ..data.collators import LatentBatch, collate_latents
from ..data.dataset import read_columns, rows_digest, rows_with_latents
from ..data.schema import LABELS, table_to_rows, task_label
from ..evaluation.drift import DRIFT_SIGMAS, BaseSamples
from ..evaluation.latent_statistics import compare_statistics, mean_statistics, measure_latents
from ..evaluation.monitor import Verdict, judge
from ..evaluation.real_rewards import RealRewards
from ..evaluation.sample_evaluator import SampleEvaluator, score_samples
from ..formats.checkpoints import BEST_FOLDER, best_report
from ..models.conditioning import Conditioning
from ..models.experts import Experts
from ..models.loading import Deferred
from ..models.reward_model import WanRewardModel
from .prfl_datasets import PRFLDatasets
from .prfl_reward_models import load_reward_models
from .resumed_options import SCORING_OPTIONS
from .resuming import START_OPTIONS
from .run import Run


logger = get_logger(__name__)

# Options that define the measurements: metrics from before and after a change of one cannot be compared.
OPTIONS = (
    "num_validation_samples", "num_inference_steps", "sampler_flow_shift", "validation_guidance_scale",
    "validation_timesteps", "validation_seed",
)  # fmt: skip
MODELS = ("pretrained_model_name_or_path", *START_OPTIONS, "reward_model", "reward_models", "monitor_reward_models")
# Samples are compared with this many real clips at most.
NUM_REAL_CLIPS = 64


def check_monitor_models(
    config: PRFLTrainingConfig,
    reward_models: Sequence[WanRewardModel | Deferred[WanRewardModel]],
    transformer_configs: Sequence[Mapping[str, Any]],
    *,
    vae_fingerprint: str | None,
) -> None:
    """
    Refuse held-out reward models that cannot score the generator's latents, before they are loaded.

    Args:
        transformer_configs (`Sequence`):
            Configurations of the transformers in training.
        vae_fingerprint (`str`, *optional*):
            Fingerprint of the VAE whose latents the reward model was trained on.

    Raises:
        ValueError: If one does not fit, or the option names more or fewer models than were given.
    """
    names = config.monitor_reward_models
    count = f"{len(reward_models)} names, one for each model that was given"
    check(len(names) == len(reward_models), "monitor_reward_models", names, count)
    for name, reward_model in zip(names, reward_models, strict=True):
        source = f"`monitor_reward_models` '{name}'"
        of = "the reward model"
        check_same_vae(reward_model.config["vae_fingerprint"], vae_fingerprint, source=source, of=of)
        for transformer_config in transformer_configs:
            check_fits_generator(
                reward_model.config, transformer_config, allow_other_base=config.allow_other_base, name=source
            )


class Monitor:
    """
    Measures the samples of every validation, and judges the run by all validations so far.

    The first validation must be of the base. Its samples and metrics are kept, and later ones are compared with them.

    Args:
        config (`PRFLTrainingConfig`):
            Options of the run.
        run (`Run`):
            The run that is watched.
        reward_models (`Sequence[WanRewardModel]`):
            Held-out reward models, or [`~hy_prfl.models.loading.Deferred`] ones, which are loaded now.
        tasks (`Sequence[str]`):
            Tasks of the reward models that are trained on.
        datasets (`PRFLDatasets`):
            Datasets of the run. Real latents come from the validation dataset, or from the clips if it has none.
        experts (`Experts`):
            Experts of the pipeline.
        digest (`str`):
            Digest of the validation dataset's rows.
    """

    def __init__(
        self,
        config: PRFLTrainingConfig,
        run: Run,
        *,
        reward_models: Sequence[WanRewardModel | Deferred[WanRewardModel]],
        tasks: Sequence[str],
        datasets: PRFLDatasets,
        experts: Experts,
        digest: str,
    ) -> None:
        self.config = config
        self.run = run
        # They score without gradient, so no activations are kept.
        self.reward_models, self.in_use = load_reward_models(reward_models, config, run, num_checkpointed=0)
        self.clips, self.labels = find_real_clips(datasets, tasks)
        self.real_statistics = {} if self.clips is None else mean_statistics(measure_clips(self.clips))
        self.real_rewards: RealRewards | None = None
        sigmas = [sigma for sigma in DRIFT_SIGMAS if experts.name_at(1000 * sigma) in experts.trained]
        self.base = BaseSamples(sigmas, seed=config.validation_seed + 2)
        self.series: list[dict[str, float]] = []
        self.best: float | None = None
        models = {name: sorted(run.model_identities.get(name, {}).values()) for name in MODELS}
        options = {name: getattr(config, name) for name in (*OPTIONS, *SCORING_OPTIONS)}
        clips = None if self.clips is None else rows_digest(self.clips)
        self.basis = {"rows": digest, "clips": clips, **models, **options}

    def score_real(self, evaluator: SampleEvaluator) -> None:
        """Score the real clips by the training reward, if there are any. A collective, independent of the generator."""
        if self.clips is not None:
            logits = evaluator.score_clips(self.clips, self.run.accelerator)
            self.real_rewards = RealRewards.of(logits, self.labels)

    def observe(
        self, transformer: nn.Module, batch: LatentBatch, indices: Sequence[int], latents: torch.Tensor
    ) -> list[dict[str, Any]]:
        """Measurements of each sample of a batch, see [`~hy_prfl.evaluation.sample_evaluator.Observer`]."""
        conditioning = Conditioning.of(batch)
        drifts = [(0.0, 0.0)] * len(indices)
        # Both branches do the same number of forwards, so ranks with different rows stay in step.
        if set(indices) <= set(self.base.samples):
            drifts = self.base.distances(transformer, indices, latents, conditioning, row_ids=batch.ids)
        else:
            self.base.add(transformer, indices, latents, conditioning, row_ids=batch.ids)
        scoring = partial(
            score_samples,
            timesteps=self.config.validation_timesteps,
            seed=self.config.validation_seed,
            accelerator=self.run.accelerator,
        )
        logits = [scoring(model, latents, batch, in_use=self.in_use) for model in self.reward_models]
        statistics = measure_latents(latents) if self.real_statistics else [{} for _ in indices]
        return [
            {"drift": drift, "logits": [each[row].tolist() for each in logits], "statistics": statistics[row]}
            for row, drift in enumerate(drifts)
        ]

    def summarize(self, measured: Sequence[dict[str, Any]], *, logits: torch.Tensor) -> dict[str, float]:
        """
        Metrics of all samples.

        `monitor_reward` is the mean of `sigmoid(logit)` over samples, noise levels and held-out reward models,
        `monitor_reward_<n>` the mean of model `n` if there are several, and `monitor_reward_logit` the mean logit.
        `sample_drift` and `velocity_drift` are relative distances to the base. For `latents_...` see
        [`~hy_prfl.evaluation.latent_statistics.compare_statistics`], for the comparison of the samples' `logits` with
        those of real clips [`~hy_prfl.evaluation.real_rewards.RealRewards.compare`].
        """
        metrics = {} if self.real_rewards is None else self.real_rewards.compare(logits)
        if self.reward_models:
            held_out = torch.tensor([row["logits"] for row in measured])  # rows, models, timesteps
            rewards = held_out.sigmoid()
            for column, timestep in enumerate(self.config.validation_timesteps):
                metrics[f"monitor_reward/t{timestep}"] = float(rewards[:, :, column].mean())
            metrics["monitor_reward"] = float(rewards.mean())
            metrics["monitor_reward_logit"] = float(held_out.mean())
            if len(self.reward_models) > 1:
                for number in range(len(self.reward_models)):
                    metrics[f"monitor_reward_{number + 1}"] = float(rewards[:, number].mean())
        sample_drift, velocity_drift = np.mean([row["drift"] for row in measured], axis=0).tolist()
        metrics |= {"sample_drift": sample_drift, "velocity_drift": velocity_drift}
        if self.real_statistics:
            samples = mean_statistics(row["statistics"] for row in measured)
            metrics |= compare_statistics(samples, self.real_statistics)
        return metrics

    def judge(self, metrics: Mapping[str, float], *, step: int) -> dict[str, float]:
        """Add the metrics of a validation, judge the run, and return `reward_gap` and `verdict`."""
        more = {"reward_gap": metrics["reward"] - metrics["monitor_reward"]} if self.reward_models else {}
        entry = {name: value for name, value in {"step": step, **metrics, **more}.items() if "/" not in name}
        self.series = [*(each for each in self.series if each["step"] != step), entry]
        verdict = self.verdict
        log = logger.info if verdict.level == "healthy" else logger.warning
        log("The monitor finds the run %s at step %d: %s.", verdict.level, step, verdict.reason)
        return {**more, "verdict": float(verdict.number)}

    @property
    def verdict(self) -> Verdict:
        """The verdict on the run, by all validations so far."""
        return judge(self.series)

    @property
    def has_base(self) -> bool:
        """Whether the base has been evaluated."""
        return bool(self.series)

    @property
    def reason_to_stop(self) -> str | None:
        """The reason to stop, if the run is hacked and `on_hacking` is `stop`."""
        if self.config.on_hacking != "stop" or not self.has_base:
            return None
        verdict = self.verdict
        return verdict.reason if verdict.level == "hacked" else None

    @property
    def keeps_best(self) -> bool:
        """Whether the model with the best held-out reward is kept."""
        return bool(self.reward_models) and self.config.on_hacking in ("stop", "keep_best")

    def is_best(self, metrics: Mapping[str, float]) -> bool:
        """
        Whether the last validation has the best held-out reward so far; if so, remember it.

        The base is never the best, and neither is a hacked run.
        """
        if not self.keeps_best or len(self.series) == 1 or self.verdict.level == "hacked":
            return False
        value = metrics["monitor_reward"]
        if value <= max(self.series[0]["monitor_reward"], -1.0 if self.best is None else self.best):
            return False
        self.best = value
        return True

    def state(self) -> dict[str, Any]:
        """State for the JSON of a checkpoint."""
        real = None if self.real_rewards is None else asdict(self.real_rewards)
        return {"monitor": {"basis": self.basis, "series": self.series, "best": self.best, "real": real}}

    def fits(self, state: Mapping[str, Any]) -> bool:
        """
        Whether a checkpoint's monitor measured the same as this one. What an older version did not note counts as the same.
        """
        before = state.get("monitor")
        return before is not None and {**self.basis, **before["basis"]} == self.basis

    def has_real(self, state: Mapping[str, Any]) -> bool:
        """Whether a checkpoint has the rewards of this monitor's real clips. If there are no clips, there is no need."""
        # Checkpoints of older versions have none.
        return self.clips is None or (self.fits(state) and state["monitor"].get("real") is not None)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned. If it is of other measurements, the monitor starts over with a base of its own."""
        if self.fits(state):
            self.series, self.best = state["monitor"]["series"], state["monitor"]["best"]
            if not self.has_real(state):
                logger.info("The checkpoint has no rewards of real clips: they have been scored now.")
            elif self.clips is not None:
                self.real_rewards = RealRewards(**state["monitor"]["real"])
            return
        logger.warning(
            "The monitor starts over with the base: the checkpoint has no monitor, or its measurements were different. A model "
            "that was the best before stays in '%s' until a validation is better than this base.",
            BEST_FOLDER,
        )

    def forget_lost_best(self, output_dir: Path, global_step: int) -> None:
        """Forget the best value if its model is no longer in `output_dir/best`."""
        kept = best_report(output_dir)
        is_kept = kept is not None and kept["global_step"] <= global_step and kept.get("monitor_reward") == self.best
        if self.best is not None and not is_kept:
            logger.warning(
                "The checkpoint's best held-out reward, %.4f, belongs to a model that is no longer in %s: the next "
                "validation that is better than the base saves a new one.",
                self.best, output_dir / BEST_FOLDER,
            )  # fmt: skip
            self.best = None

    def save(self, directory: Path) -> None:
        """Write the base's samples of this replica."""
        is_first = self.run.accelerator.process_index % self.config.context_parallel_degree == 0
        if is_first and self.base.samples:
            self.base.save(directory / f"monitor-{self.run.replica}.safetensors")

    def load(self, directory: Path, state: Mapping[str, Any]) -> None:
        """Read the base's samples, unless this monitor measures its own."""
        if self.fits(state):
            self.base.load(sorted(directory.glob("monitor-*.safetensors")))


def find_real_clips(datasets: PRFLDatasets, tasks: Sequence[str]) -> tuple[Dataset | None, list[int | None]]:
    """
    Rows with latents, of the validation dataset or else of the training clips, and the label of each, or None.

    There are labels if the reward models that are trained on have one task, and the rows are of the validation dataset:
    a reward model may have been trained on the training clips.

    Returns:
        Up to `NUM_REAL_CLIPS` rows spread evenly over those with latents, and their labels; None if neither has latents.
    """
    for dataset in (datasets.validation, datasets.clips):
        if dataset is None:
            continue
        rows = rows_with_latents(dataset)
        if rows:
            places = {round(place) for place in np.linspace(0, len(rows) - 1, NUM_REAL_CLIPS)}
            clips = dataset.select([rows[place] for place in sorted(places)])
            has_labels = dataset is datasets.validation and len(set(tasks)) == 1
            labels = [task_label(row, tasks[0]) for row in read_columns(clips, LABELS)]
            return clips, labels if has_labels else [None] * len(labels)
    logger.warning("Neither validation nor training rows have latents: the samples are not compared with real clips.")
    return None, []


def measure_clips(clips: Dataset) -> Iterator[dict[str, list[float]]]:
    """Statistics of each clip of a dataset whose rows have latents."""
    for place in range(len(clips)):
        latents = collate_latents(table_to_rows(clips[place])).latents
        assert latents is not None
        yield from measure_latents(latents)
