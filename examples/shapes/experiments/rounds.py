"""
Rounds: climb hard, label what broke, learn it, and climb again from the pretrained generator. How far does it go?

    python -m examples.shapes.experiments.rounds --demo outputs/demo

Starts from the demo of `rollouts.py` and from its reward models, one for each seed. In each round videos of two generators,
of training captions, get the judge's labels: of the one tuned last, and of one tuned on look-ahead rewards; 352 of each, and
1,408 from round 4 on. Round 1 also labels 352 of the pretrained generator. Then a new reward model is trained on all labels
so far, and the pretrained generator is tuned again. From round 2 on there are also ensembles of the reward models of all
rounds. At last the labels of all seeds are pooled: the newest reward model of each seed is trained on, on all of them, and the
three are an ensemble. The judge looks at 144 videos of held-out captions. Writes `results/rounds.json` and a plot of it.
"""

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from examples.shapes.experiments.rollouts import (
    ANCHORED,
    DISAGREEMENT,
    FORESEEN,
    HARD,
    REUSED,
    Arm,
    arm_dir,
    input_stages,
    judge_arm,
    reward_model_dir,
    tuning_stage,
    verdicts_file,
)
from examples.shapes.experiments.runs import ExperimentConfig, mean_and_spread, plot_spread, run_all
from examples.shapes.experiments.sampling import BATCH_SIZE, load_generator, own_videos
from examples.shapes.judge import KINDS, write_json
from examples.shapes.stages import Stage, launch
from examples.shapes.summary import read_json
from hy_prfl.configs.parser import parse_config
from hy_prfl.data.collators import collate_latents
from hy_prfl.data.schema import table_to_rows
from hy_prfl.evaluation.scoring import score_latents
from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.reward_model import WanRewardModel


NUM_LABELS = 352
# One of so many labelled videos is held out of the reward model's training.
HELD_OUT = 8
# How often each of the generator's videos is drawn, a real clip being drawn once.
WEIGHT = "2"
TIMESTEPS = (400, 600, 800)
HARDER = 3.0
ENSEMBLE = [*REUSED, *DISAGREEMENT]


@dataclass(frozen=True)
class Round:
    """
    One round of labels.

    Args:
        climbs (`dict[str, Arm]`):
            How the generators are tuned whose videos get labels.
        reward_models (`tuple[int, ...]`):
            Rounds whose reward models they are tuned on.
        num_updates (`int`):
            Updates of the reward model that learns from these labels.
        arms (`dict[str, Arm]`):
            How the generator is tuned afterwards, on the new reward model, or on an ensemble of those of all rounds.
        num_labels (`int`):
            Labelled videos of each generator.
    """

    climbs: dict[str, Arm]
    reward_models: tuple[int, ...]
    num_updates: int
    arms: dict[str, Arm]
    num_labels: int = NUM_LABELS


ROUNDS = (
    Round(
        {
            "look_ahead_1": Arm([*REUSED, *FORESEEN], scale=HARD),
            "round_0": Arm(REUSED, num_steps=160, scale=HARD),
        },
        (0,),
        800,
        {"round_1": Arm(REUSED, num_steps=160, scale=HARD)},
    ),
    Round(
        {
            "look_ahead_2": Arm([*REUSED, *FORESEEN], num_steps=160, scale=HARD),
            "round_1": Arm(REUSED, num_steps=160, scale=HARD),
        },
        (1,),
        1000,
        {
            "round_2": Arm(REUSED, num_steps=160, scale=HARD),
            "round_2_ensemble": Arm(ENSEMBLE, num_steps=160, scale=HARD, ensemble=True),
            "round_2_ensemble_harder": Arm(ENSEMBLE, num_steps=160, scale=HARDER, ensemble=True),
        },
    ),
    Round(
        {
            "look_ahead_3": Arm([*ENSEMBLE, *FORESEEN], num_steps=160, scale=HARDER),
            "round_2_ensemble_harder": Arm(ENSEMBLE, num_steps=160, scale=HARDER),
        },
        (2, 1),
        1200,
        {
            "round_3": Arm(REUSED, num_steps=160, scale=HARD),
            "round_3_ensemble": Arm(ENSEMBLE, num_steps=160, scale=HARD, ensemble=True),
            "round_3_ensemble_harder": Arm(ENSEMBLE, num_steps=160, scale=HARDER, ensemble=True),
            "round_3_curated": Arm(ENSEMBLE, clips="good", num_steps=160, scale=HARD, ensemble=True),
            "round_3_curated_harder": Arm(ENSEMBLE, clips="good", num_steps=160, scale=HARDER, ensemble=True),
        },
    ),
    # Four times the labels at once.
    Round(
        {
            "look_ahead_4": Arm([*ENSEMBLE, *FORESEEN], num_steps=160, scale=HARDER),
            "round_3_ensemble_harder": Arm(ENSEMBLE, num_steps=160, scale=HARDER),
        },
        (3, 2, 1),
        1400,
        {
            "round_4": Arm(REUSED, num_steps=160, scale=HARD),
            "round_4_ensemble_harder": Arm(ENSEMBLE, num_steps=160, scale=HARDER, ensemble=True),
        },
        num_labels=4 * NUM_LABELS,
    ),
    Round(
        {
            "look_ahead_5": Arm([*ENSEMBLE, *FORESEEN], num_steps=160, scale=HARDER),
            "round_4_ensemble_harder": Arm(ENSEMBLE, num_steps=160, scale=HARDER),
        },
        (4, 3, 2, 1),
        1600,
        {
            "round_5": Arm(REUSED, num_steps=160, scale=HARD),
            "round_5_ensemble_harder": Arm(ENSEMBLE, num_steps=160, scale=HARDER, ensemble=True),
            "round_5_anchored": Arm([*ENSEMBLE, *ANCHORED], num_steps=160, scale=HARDER, ensemble=True),
            "round_5_curated": Arm(ENSEMBLE, clips="good", num_steps=160, scale=HARD, ensemble=True),
        },
        num_labels=4 * NUM_LABELS,
    ),
)
# After the last round, on reward models that learn from the labels of all seeds' rounds; an ensemble of all seeds'.
POOLED_ARMS = {
    "pooled_ensemble": Arm(ENSEMBLE, num_steps=160, scale=HARDER, ensemble=True),
    "pooled_anchored": Arm([*ENSEMBLE, *ANCHORED], num_steps=160, scale=HARDER, ensemble=True),
    "pooled_curated": Arm([*ENSEMBLE, *ANCHORED], clips="good", num_steps=160, scale=HARD, ensemble=True),
}
# The same, on an ensemble of the seed's own: the pooled one and those of all its rounds.
ALL_ARMS = {
    "all_anchored": Arm([*ENSEMBLE, "--anchor_scale", "2"], num_steps=160, scale=HARDER, ensemble=True),
    "all_curated": Arm([*ENSEMBLE, *ANCHORED], clips="good", num_steps=160, scale=HARD, ensemble=True),
}
NUM_POOLED_UPDATES = 2000


@dataclass(kw_only=True)
class RoundsConfig(ExperimentConfig):
    """What to run."""

    demo: str = field(default="outputs/demo", metadata={"help": "Folder of a demo."})
    output_dir: str = field(default="outputs/experiments/rollouts", metadata={"help": "Folder of `rollouts.py`."})


def reward_model_after(root: Path, number: int, seed: int) -> Path:
    """Reward model after so many rounds."""
    if number == 0:
        return reward_model_dir(root, seed) / "best"
    return root / "rounds" / f"reward_{number}_{seed}" / "best"


def reward_models_of(root: Path, arm: Arm, number: int, seed: int) -> list[Path]:
    """What an arm after a round is tuned on: the newest reward model, or those of all rounds."""
    rounds = range(number, 0, -1) if arm.ensemble else [number]
    return [reward_model_after(root, each, seed) for each in rounds]


def labelled_generators(number: int) -> list[str | None]:
    """Generators whose videos get labels in a round; `None` is the pretrained one."""
    return [*([None] if number == 1 else []), *ROUNDS[number - 1].climbs]


def num_labels_after(number: int) -> int:
    """Labels of videos in so many rounds."""
    return sum(ROUNDS[each - 1].num_labels * len(labelled_generators(each)) for each in range(1, number + 1))


def videos_dirs(root: Path, number: int, seed: int) -> list[Path]:
    """Labelled videos of a round, a folder for each generator."""
    names = [name or "pretrained" for name in labelled_generators(number)]
    return [root / "rounds" / f"videos_{number}_{name}_{seed}" for name in names]


def pooled_reward_model(root: Path, seed: int) -> Path:
    """Reward model on the labels of all seeds."""
    return root / "rounds" / f"reward_pooled_{seed}" / "best"


def reward_stage(root: Path, demo: Path, number: int, seed: int) -> Stage:
    """Train a reward model on the videos of all rounds so far beside the real clips."""
    folders = [folder for each in range(1, number + 1) for folder in videos_dirs(root, each, seed)]
    output_dir = reward_model_after(root, number, seed).parent
    return training_stage(root, demo, folders, output_dir, seed, ROUNDS[number - 1].num_updates)


def pooled_reward_stage(root: Path, demo: Path, seeds: Sequence[int], seed: int) -> Stage:
    """Train the newest reward model on, on the videos of all rounds of all seeds beside the real clips."""
    last = len(ROUNDS)
    folders = [folder for number in range(1, last + 1) for each in seeds for folder in videos_dirs(root, number, each)]
    output_dir, start = pooled_reward_model(root, seed).parent, reward_model_after(root, last, seed)
    return training_stage(root, demo, folders, output_dir, seed, NUM_POOLED_UPDATES, start=start)


def training_stage(
    root: Path,
    demo: Path,
    folders: Sequence[Path],
    output_dir: Path,
    seed: int,
    num_updates: int,
    *,
    start: Path | None = None,
) -> Stage:
    """Train a reward model, a new one or that of `start`, on real clips and on the videos in `folders`."""
    steps = str(num_updates)
    options = [
        *(() if start is None else ("--reward_model", str(start))),
        *("--train_dataset", str(demo / "latents" / "labelled"), *(str(folder / "train") for folder in folders)),
        *("--train_dataset_weights", "1", *(WEIGHT for _ in folders)),
        *("--validation_dataset", *(str(folder / "held_out") for folder in folders)),
        *("--output_dir", str(output_dir), "--seed", str(seed), "--max_train_steps", steps),
        *("--validation_steps", steps, "--checkpointing_steps", steps),
    ]
    name = f"round_{output_dir.name}"
    return Stage(name, name, [launch("train_reward", options)], [str(output_dir.relative_to(root))])


def make_videos(root: Path, demo: Path, number: int, seed: int) -> None:
    """Labelled videos of the generators of a round."""
    torch.set_num_threads(1)
    labelled = load_from_disk(str(demo / "latents" / "labelled"))
    # Each generator of a run has seeds of its own.
    before = sum(len(labelled_generators(each)) for each in range(1, number))
    folders = videos_dirs(root, number, seed)
    for place, (name, folder) in enumerate(zip(labelled_generators(number), folders, strict=True), before + 1):
        if (folder / "held_out").is_dir():
            continue
        first_seed = 1_000_000 * place + 100_000 * seed
        pipeline = load_generator(None if name is None else arm_dir(root, name, seed))
        prefix = f"round-{number}-{place}-{seed}"
        num_labels = ROUNDS[number - 1].num_labels
        num_held_out = num_labels // HELD_OUT
        videos = own_videos(pipeline, labelled, range(first_seed, first_seed + num_labels), prefix)
        videos.select(range(num_held_out, num_labels)).save_to_disk(str(folder / "train"))
        videos.select(range(num_held_out)).save_to_disk(str(folder / "held_out"))


def make_auc(root: Path, number: int, seed: int) -> None:
    """How well the reward models before and after a round tell the held-out videos of this round apart."""
    models = {"before": reward_model_after(root, number - 1, seed), "after": reward_model_after(root, number, seed)}
    write_auc(auc_file(root, number, seed), held_out_videos(root, number, seed), models)


def make_pooled_auc(root: Path, seed: int) -> None:
    """The same for the reward models after the last round, of the labels of one seed and of all."""
    number = len(ROUNDS)
    models = {"before": reward_model_after(root, number, seed), "after": pooled_reward_model(root, seed)}
    write_auc(pooled_auc_file(root, seed), held_out_videos(root, number, seed), models)


@torch.no_grad()
def write_auc(path: Path, held_out: Dataset, models: Mapping[str, Path]) -> None:
    """AUC of reward models on videos, and the share of these that is good."""
    torch.set_num_threads(1)
    if path.is_file():
        return
    good = labels_in(held_out)
    found = {"good": sum(good) / len(good)}
    for name, folder in models.items():
        model = WanRewardModel.from_pretrained(folder).eval()
        found[name] = float(roc_auc_score(good, scores_of(model, held_out)))
    write_json(path, found)


def held_out_videos(root: Path, number: int, seed: int) -> Dataset:
    """Labelled videos of a round that no reward model learned from."""
    return concatenate_datasets(
        [load_from_disk(str(folder / "held_out")) for folder in videos_dirs(root, number, seed)]
    )


def auc_file(root: Path, number: int, seed: int) -> Path:
    return root / "rounds" / f"auc_{number}_{seed}.json"


def pooled_auc_file(root: Path, seed: int) -> Path:
    return root / "rounds" / f"auc_pooled_{seed}.json"


def labels_in(videos: Dataset) -> list[bool]:
    """Whether each video is good in motion and body."""
    return [bool(row["physics_quality"] and row["human_quality"]) for row in videos]


def scores_of(model: WanRewardModel, videos: Dataset) -> list[float]:
    """Mean logit of each video over `TIMESTEPS`."""
    scores: list[float] = []
    for start in range(0, len(videos), BATCH_SIZE):
        rows = table_to_rows(videos.with_format("arrow")[start : start + BATCH_SIZE])
        batch = collate_latents(rows).to(torch.device("cpu"), torch.float32)
        assert batch.latents is not None
        logits = score_latents(
            model, batch.latents, Conditioning.of(batch), list(TIMESTEPS), row_ids=batch.ids, seed=0
        )
        scores += logits.mean(dim=1).tolist()
    return scores


def tune_and_judge(root: Path, name: str, arm: Arm, seed: int, reward_models: Sequence[Path]) -> None:
    """Tune the generator as an arm says, and let the judge look at its videos."""
    run_all([tuning_stage(root, name, arm, seed, reward_models)], root, 1)
    if not verdicts_file(root, name, seed).is_file():
        judge_arm(root, name, seed)


def run_seed(config: RoundsConfig, seed: int) -> None:
    """All rounds of one seed."""
    root, demo = Path(config.output_dir), Path(config.demo)
    for number, each in enumerate(ROUNDS, 1):
        for name, arm in each.climbs.items():
            models = [reward_model_after(root, one, seed) for one in each.reward_models]
            tune_and_judge(root, name, arm, seed, models)
        make_videos(root, demo, number, seed)
        run_all([reward_stage(root, demo, number, seed)], root, 1)
        make_auc(root, number, seed)
        for name, arm in each.arms.items():
            tune_and_judge(root, name, arm, seed, reward_models_of(root, arm, number, seed))


def train_pooled(config: RoundsConfig, seed: int) -> None:
    """The reward model of one seed on the labels of all."""
    root, demo = Path(config.output_dir), Path(config.demo)
    run_all([pooled_reward_stage(root, demo, config.seeds, seed)], root, 1)
    make_pooled_auc(root, seed)


def climb_pooled(config: RoundsConfig, seed: int) -> None:
    """Tune the generator of one seed on the pooled reward models, and on its own together with those of its rounds."""
    root = Path(config.output_dir)
    for name, arm in POOLED_ARMS.items():
        tune_and_judge(root, name, arm, seed, [pooled_reward_model(root, each) for each in config.seeds])
    for name, arm in ALL_ARMS.items():
        models = [pooled_reward_model(root, seed), *reward_models_of(root, arm, len(ROUNDS), seed)]
        tune_and_judge(root, name, arm, seed, models)


def summarize(root: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Verdicts after each round, and what the reward models see of the videos of each round."""
    names = {name: number for number, each in enumerate(ROUNDS) for name in each.climbs}
    names |= {name: number for number, each in enumerate(ROUNDS, 1) for name in each.arms}
    names |= dict.fromkeys([*POOLED_ARMS, *ALL_ARMS], len(ROUNDS))
    arms: dict[str, Any] = {}
    for name, number in names.items():
        verdicts = [read_json(verdicts_file(root, name, seed)) for seed in seeds]
        arms[name] = {kind: mean_and_spread([each[kind] for each in verdicts]) for kind in KINDS}
        arms[name]["num_labels"] = num_labels_after(number) * (len(seeds) if name in {*POOLED_ARMS, *ALL_ARMS} else 1)

    def aucs(files: Sequence[Path]) -> dict[str, Any]:
        found = [read_json(file) for file in files]
        return {name: mean_and_spread([each[name] for each in found]) for name in found[0]}

    return {
        "seeds": list(seeds),
        "arms": arms,
        "rounds": [aucs([auc_file(root, number, seed) for seed in seeds]) for number in range(1, len(ROUNDS) + 1)],
        "pooled": aucs([pooled_auc_file(root, seed) for seed in seeds]),
    }


def plot(results: Mapping[str, Any], path: Path) -> None:
    """The judge after each round, and the reward models' AUC on the videos of each round."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    verdicts, aucs = figure.subplots(1, 2)
    numbers = range(len(results["rounds"]) + 1)
    for kind in ("good", "beyond", "frozen", "vanishing", "jittering"):
        plot_spread(verdicts, numbers, [results["arms"][f"round_{number}"][kind] for number in numbers], kind)
    verdicts.set(title="One reward model, by the judge", xlabel="rounds of labels", ylim=(0, 1.02), xticks=numbers)
    for name in ("before", "after"):
        label = f"reward model {name} the round"
        plot_spread(aucs, list(numbers)[1:], [each[name] for each in results["rounds"]], label)
    aucs.set(title="Held-out videos of the round", xlabel="round", ylabel="AUC", ylim=(0.45, 1.02))
    aucs.set_xticks(list(numbers)[1:])
    for axes in (verdicts, aucs):
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Software": None}, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(RoundsConfig, argv, description=__doc__)
    root, results_dir = Path(config.output_dir), Path(config.results_dir)
    run_all(input_stages(root, Path(config.demo), config.seeds), root, config.num_parallel)
    with ProcessPoolExecutor(config.num_parallel, multiprocessing.get_context("spawn")) as pool:
        for step in (run_seed, train_pooled, climb_pooled):
            list(pool.map(partial(step, config), config.seeds))
    results = summarize(root, config.seeds)
    write_json(results_dir / "rounds.json", results)
    plot(results, results_dir / "rounds.png")
    print(f"{results_dir / 'rounds.json'}: {len(ROUNDS)} rounds")


if __name__ == "__main__":
    main()
