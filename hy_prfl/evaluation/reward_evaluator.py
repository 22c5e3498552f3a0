"""How well a reward model tells good clips from poor ones, at fixed noise levels and, as in the paper, at random ones."""

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, roc_auc_score
from torch import nn
from tqdm import tqdm

from ..data.collators import LatentBatch, collate_latents
from ..data.dataset import latent_shapes
from ..data.sampler import shard_batches
from ..data.schema import table_to_rows
from ..flow_matching import NUM_TRAIN_TIMESTEPS, row_noise, row_timesteps
from ..models.conditioning import Conditioning
from ..models.reward_model import score_noised
from ..runtime.distributed import gather_records


logger = logging.getLogger(__name__)

GREATER_IS_BETTER = {
    "accuracy": True,
    "precision": True,
    "recall": True,
    "f1": True,
    "auc": True,
    "pair_accuracy": True,
    "loss": False,
}


class RewardEvaluator:
    """
    Scores the rows of a dataset at fixed timesteps with fixed noise and returns a dictionary of metrics.

    With labels the metrics are accuracy, precision, recall and F1 at logit 0, AUC, and the binary cross-entropy as `loss`.
    With pairs they are `pair_accuracy` (a tie counts half), AUC of chosen against rejected, and the Bradley-Terry `loss`;
    both clips of a pair get the same noise and the same timesteps.

    | name | value |
    |---|---|
    | `<metric>/t<timestep>` | at one fixed timestep |
    | `<metric>` | mean over the fixed timesteps |
    | `<metric>/random_t<low>_<high>` | at a timestep of (low, high] drawn for each clip; the paper has five such ranges |
    | `<metric>/random` | mean over these ranges |
    | `<part>/<metric>...` | all of these for each of `parts`; a part of one class has no AUC |

    Args:
        dataset (`Dataset`):
            Latent dataset.
        items (list of `int` or of pairs of `int`):
            Rows to score, or (chosen, rejected) pairs of rows.
        labels (`Sequence[int]`, *optional*):
            Label of each item, if items are rows.
        timesteps (`Sequence[int]`):
            Noise levels, `1000 * sigma`, in (0, 1000].
        num_random_timesteps (`int`, defaults to 0):
            Number of ranges of equal width, from each of which a timestep is drawn for each clip, see
            [`~hy_prfl.flow_matching.row_timesteps`]. The draws are the same at every evaluation.
        seed (`int`):
            Seed of the noise and of these draws, see [`~hy_prfl.flow_matching.row_noise`].
        parts (`Mapping[str, Sequence[int]]`, *optional*):
            Positions in `items` that also get metrics of their own, by name.
        dtype (`torch.dtype`, defaults to `torch.float32`):
            Type of the embeddings that the reward model gets.
        num_replicas, replica (`int`, defaults to 1 and 0):
            Number of data-parallel replicas and the one that this process belongs to.
    """

    def __init__(
        self,
        dataset: Dataset,
        items: Sequence[int] | Sequence[tuple[int, int]],
        labels: Sequence[int] | None,
        *,
        timesteps: Sequence[int],
        num_random_timesteps: int = 0,
        seed: int,
        batch_size: int,
        parts: Mapping[str, Sequence[int]] | None = None,
        dtype: torch.dtype = torch.float32,
        num_replicas: int = 1,
        replica: int = 0,
    ) -> None:
        self.dataset = dataset
        self.dtype = dtype
        self.num_replicas = num_replicas
        self.replica = replica
        self.labels = labels
        self.parts = dict(parts or {})
        self.timesteps = list(timesteps)
        self.num_random_timesteps = num_random_timesteps
        self.seed = seed
        self.batch_size = batch_size
        self.items = list(items)
        pairs = [item for item in items if isinstance(item, tuple)]
        self.rows = [item for item in items if not isinstance(item, tuple)]
        self.noise_rows = self.rows
        if pairs:
            chosen, rejected = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            self.rows, self.noise_rows = chosen + rejected, chosen + chosen
        self.shapes = latent_shapes(dataset)

    @torch.no_grad()
    def __call__(self, reward_model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Evaluate; every rank scores its share and gets the same result. A collective."""
        records: list[tuple[int, list[float]]] = []
        batches = shard_batches(
            [self.shapes[row] for row in self.rows],
            batch_size=self.batch_size,
            num_replicas=self.num_replicas,
            replica=self.replica,
        )
        for positions in tqdm(batches, desc="Evaluating", disable=not accelerator.is_main_process, leave=False):
            logits = self._score(reward_model, positions, accelerator)
            records.extend(zip(positions, logits, strict=True))
        logits_by_position = dict(gather_records(records))
        logits_array = np.array([logits_by_position[position] for position in range(len(self.rows))])
        metrics = self._all_metrics(logits_array, range(len(self.items)))
        for name, items in self.parts.items():
            metrics |= {f"{name}/{metric}": value for metric, value in self._all_metrics(logits_array, items).items()}
        return metrics

    def _all_metrics(self, logits: np.ndarray, items: Sequence[int]) -> dict[str, float]:
        """Metrics of some items at each level, and their means; logits have shape `(num_rows, num_levels)`."""
        fixed = [f"t{timestep}" for timestep in self.timesteps]
        bounds = [
            NUM_TRAIN_TIMESTEPS * index // self.num_random_timesteps for index in range(self.num_random_timesteps)
        ]
        random = [f"random_t{low}_{high}" for low, high in pairwise([*bounds, NUM_TRAIN_TIMESTEPS])]
        levels = [self._metrics(column, items) for column in logits.T]
        metrics = {
            f"{name}/{level}": value
            for level, found in zip([*fixed, *random], levels, strict=True)
            for name, value in found.items()
        }
        for mean_of, ending in ((levels[: len(fixed)], ""), (levels[len(fixed) :], "/random")):
            for name in GREATER_IS_BETTER:
                values = [found[name] for found in mean_of if name in found]
                if values:
                    metrics[f"{name}{ending}"] = float(np.mean(values))
        return metrics

    def _score(self, reward_model: nn.Module, positions: list[int], accelerator: Accelerator) -> list[list[float]]:
        rows = [table_to_rows(self.dataset[self.rows[position]])[0] for position in positions]
        noise_ids = self.dataset.select_columns(["id"]).with_format(None)
        ids = [noise_ids[self.noise_rows[position]]["id"] for position in positions]
        noise = torch.stack(
            [row_noise(each, row["latents_shape"], seed=self.seed) for each, row in zip(ids, rows, strict=True)]
        ).to(accelerator.device)
        drawn = [row_timesteps(each, self.num_random_timesteps, seed=self.seed) for each in ids]
        fixed = torch.tensor(self.timesteps, dtype=torch.float32).expand(len(rows), -1)
        timesteps = torch.cat([fixed, torch.stack(drawn)], dim=1).to(accelerator.device)
        clips: LatentBatch = collate_latents(rows).to(accelerator.device, self.dtype)
        assert clips.latents is not None
        columns = []
        for column in timesteps.T:
            with accelerator.autocast():
                logits = score_noised(
                    reward_model,
                    latents=clips.latents,
                    noise=noise,
                    sigmas=column / NUM_TRAIN_TIMESTEPS,
                    conditioning=Conditioning.of(clips),
                )
            columns.append(logits.float().cpu())
        return torch.stack(columns, dim=1).tolist()

    def _metrics(self, logits: np.ndarray, items: Sequence[int]) -> dict[str, float]:
        if self.labels is None:
            chosen, rejected = np.split(logits, 2)
            return pair_metrics(chosen[items], rejected[items])
        return classification_metrics(logits[items], np.asarray(self.labels)[items])


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """
    Accuracy, precision, recall and F1 of `logit > 0`, binary cross-entropy, and AUC if both classes occur.

    Args:
        logits, labels (`np.ndarray` of shape `(num_clips,)`):
            Scores, and labels in {0, 1}.
    """
    predicted = (logits > 0).astype(int)
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted, average="binary", zero_division=0.0)
    metrics: dict[str, Any] = {
        "accuracy": accuracy_score(labels, predicted),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "loss": np.logaddexp(0, -logits)[labels == 1].sum() + np.logaddexp(0, logits)[labels == 0].sum(),
    }
    metrics["loss"] /= len(labels)
    if len(np.unique(labels)) == 2:
        metrics["auc"] = roc_auc_score(labels, logits)
    return {name: float(value) for name, value in metrics.items()}


def pair_metrics(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """
    Share of pairs in the right order (a tie counts half), AUC of chosen against rejected, Bradley-Terry loss.

    Args:
        chosen, rejected (`np.ndarray` of shape `(num_pairs,)`):
            Logits of the two clips of each pair.
    """
    margin = chosen - rejected
    labels = np.concatenate([np.ones_like(chosen), np.zeros_like(rejected)])
    return {
        "pair_accuracy": float(np.mean((margin > 0) + 0.5 * (margin == 0))),
        "auc": float(roc_auc_score(labels, np.concatenate([chosen, rejected]))),
        "loss": float(np.logaddexp(0, -margin).mean()),
    }
