"""Options of `train_reward`."""

from dataclasses import dataclass, field
from typing import Literal

from .base import TrainingConfig, check, check_seed, check_timesteps, names_in


Task = Literal["motion_quality", "physics_quality", "human_quality", "text_alignment", "blur_quality"]
# Draws of a row in an epoch; the order of an epoch is a list of all draws.
MAX_WEIGHT = 1000
BCE_METRICS = ("accuracy", "precision", "recall", "f1", "auc", "loss")
BT_METRICS = ("pair_accuracy", "auc", "loss")
BestMetric = Literal["accuracy", "precision", "recall", "f1", "auc", "pair_accuracy", "loss"]


@dataclass(kw_only=True)
class RewardTrainingConfig(TrainingConfig):
    """
    Options of the reward model's training. Defaults are the paper's.

    A single name may be given for `train_dataset` and `validation_dataset`; it is kept as a list of one.

    > Parameters of the datasets
    > Parameters of the model
    > Parameters of the loss
    > Parameters of the evaluation
    """

    # Parameters of the datasets
    train_dataset: list[str] = field(  # type: ignore[assignment]  # PRFL takes one
        metadata={
            "help": "Labelled latent datasets written by `preprocess`, one or several: folders or Hub ids. Pairs are made "
            "within each."
        }
    )
    train_dataset_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "How often each row of each training dataset is drawn in an epoch, 1 if left out. 2 is twice; 0.5 is "
            "half of the rows, others in each epoch."
        },
    )
    validation_dataset: list[str] | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Labelled latent datasets for validation; without them there is none. The best model is chosen by all "
            "their rows together; several are also reported each by itself, as validation/<folder>/<metric>."
        },
    )

    # Parameters of the model
    reward_model: str | None = field(
        default=None, metadata={"help": "Reward model to start from, instead of the pipeline's transformer."}
    )
    expert: Literal["high_noise", "low_noise"] | None = field(
        default=None,
        metadata={
            "help": "Which transformer of a pipeline with two (Wan2.2 A14B) gives the blocks, the high-noise or the "
            "low-noise expert; the reward model scores all noise levels. Leave it out for pipelines with one."
        },
    )
    num_layers: int = field(default=8, metadata={"help": "Transformer blocks to keep."})
    pooling: Literal["query", "mean", "max"] = field(default="query", metadata={"help": "How tokens are pooled."})
    num_query_heads: int = field(default=8, metadata={"help": "Heads of the query attention."})
    query_residual: bool = field(default=True, metadata={"help": "Add the query to the pooled vector."})
    freeze_blocks: bool = field(
        default=False, metadata={"help": "Train pooling and head only: a probe of the generator's features."}
    )

    # Parameters of the loss
    task: Task = field(default="motion_quality", metadata={"help": "Label to learn; rows without it are left out."})
    loss: Literal["bce", "bt"] = field(
        default="bce", metadata={"help": "bce: one clip, one label. bt: Bradley-Terry on pairs of clips."}
    )
    allow_unpaired: bool = field(
        default=False, metadata={"help": "bt: compare clips of different prompts if no two clips share one."}
    )
    learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate of the transformer blocks."})
    head_learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of pooling and head."})

    # Parameters of the evaluation
    validation_timesteps: list[int] = field(
        # The middles of the paper's five bins. Not 1000: pure noise, where accuracy is chance, must not influence
        # which model is best.
        default_factory=lambda: [100, 300, 500, 700, 900],
        metadata={"help": "Noise levels, 1000 * sigma, at which the model is evaluated."},
    )
    validation_random_timesteps: int = field(
        default=0,
        metadata={
            "help": "Evaluate also at one random timestep in each of so many ranges of equal width, drawn once for each "
            "clip; 5 is the paper's protocol. Reported as <metric>/random, and <metric>/random_t<low>_<high>."
        },
    )
    validation_seed: int = field(
        default=0, metadata={"help": "Seed of the evaluation's noise, and of its random timesteps."}
    )
    metric_for_best_model: BestMetric | None = field(
        default=None,
        metadata={
            "help": "Metric, averaged over the timesteps, that decides which model is kept in output_dir/best. If left out, "
            "accuracy for bce and pair_accuracy for bt."
        },
    )

    def __post_init__(self) -> None:
        self.train_dataset = names_in(self.train_dataset)
        if self.validation_dataset is not None:
            self.validation_dataset = names_in(self.validation_dataset)
        super().__post_init__()
        for name in ("train_dataset", "validation_dataset"):
            value = getattr(self, name)
            check(value != [], name, value, "a dataset or several")
            check(value is None or len(set(value)) == len(value), name, value, "different datasets")
        weights, number = self.train_dataset_weights, len(self.train_dataset)
        requirement = f"a number in (0, {MAX_WEIGHT}] for each of the {number} datasets of `train_dataset`"
        fits = weights is None or (len(weights) == number and all(0 < weight <= MAX_WEIGHT for weight in weights))
        check(fits, "train_dataset_weights", weights, requirement)
        check_seed("validation_seed", self.validation_seed)
        for name in ("num_layers", "num_query_heads"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        made_new = self.reward_model is None
        check(made_new or self.expert is None, "expert", self.expert, "left out with `reward_model`")
        for name in ("transformer_path", "lora_path"):
            value = getattr(self, name)
            check(made_new or value is None, name, value, "left out with `reward_model`, which has blocks of its own")
        is_probe = self.freeze_blocks
        check(self.lora_rank is None or not is_probe, "lora_rank", self.lora_rank, "left out with `freeze_blocks`")
        check(self.head_learning_rate > 0, "head_learning_rate", self.head_learning_rate, "greater than 0")
        check_timesteps("validation_timesteps", self.validation_timesteps)
        num_ranges = self.validation_random_timesteps
        check(0 <= num_ranges <= 1000, "validation_random_timesteps", num_ranges, "in [0, 1000]")
        is_used = num_ranges == 0 or self.validation_dataset is not None
        check(is_used, "validation_random_timesteps", num_ranges, "left out without `validation_dataset`")
        if self.metric_for_best_model is None:
            self.metric_for_best_model = "accuracy" if self.loss == "bce" else "pair_accuracy"
        known = BCE_METRICS if self.loss == "bce" else BT_METRICS
        name, value = "metric_for_best_model", self.metric_for_best_model
        check(value in known, name, value, f"one of {', '.join(known)} with loss '{self.loss}'")
