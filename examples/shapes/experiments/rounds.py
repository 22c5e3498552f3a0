"""
Rounds: climb hard, label what broke, learn it, and climb again from the pretrained generator. How far does it go?

    python -m examples.shapes.experiments.rounds --demo outputs/demo

Starts from a demo (`make demo`) and from the reward models of `rollouts.py`, one for each seed. In each round the generator
is tuned on look-ahead rewards, which break most in few steps; 352 of its videos, of training captions, get the judge's
labels; and the reward model learns on with them beside all older data. After each round the pretrained generator is tuned
with the demo's own recipe on the new reward model, and the judge looks at 144 videos of held-out captions. Writes
`results/rounds.json` and a plot of it.
"""

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from examples.shapes.experiments.rollouts import (
    FORESEEN,
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


NUM_ROUNDS, NUM_LABELS, NUM_HELD_OUT = 2, 352, 52
# Updates of a reward model in a round, and how often each of the generator's videos is drawn, a real clip being drawn once.
NUM_UPDATES, WEIGHT = 300, "2"
TIMESTEPS = (400, 600, 800)
# Ten times the recipe's scale: it is to break what can be broken.
CLIMB = Arm([*REUSED, *FORESEEN, "--reward_scale", "3"])
# After each round; the others after the last one only.
TUNED = Arm(REUSED, num_steps=160)
LAST = {
    "foreseen_160": Arm([*REUSED, *FORESEEN], num_steps=160),
    "curated_160": Arm(REUSED, clips="good", num_steps=160),
}


@dataclass(kw_only=True)
class RoundsConfig(ExperimentConfig):
    """What to run."""

    demo: str = field(default="outputs/demo", metadata={"help": "Folder of a demo."})
    output_dir: str = field(default="outputs/experiments/rollouts", metadata={"help": "Folder of `rollouts.py`."})
    num_rounds: int = field(default=NUM_ROUNDS, metadata={"help": "Rounds of labels."})


def reward_model_after(root: Path, number: int, seed: int) -> Path:
    """Reward model after so many rounds."""
    if number == 0:
        return reward_model_dir(root, seed) / "best"
    return root / "rounds" / f"reward_{number}_{seed}" / "best"


def videos_dir(root: Path, number: int, seed: int) -> Path:
    return root / "rounds" / f"videos_{number}_{seed}"


def climb_name(number: int) -> str:
    return f"climb_{number}"


def tuned_name(number: int) -> str:
    """Without rounds it is an arm of `rollouts.py`, which is not run again."""
    return f"round_{number}" if number else "reused_160"


def climb_stage(root: Path, demo: Path, number: int, seed: int) -> Stage:
    """Tune the pretrained generator hard on the reward model of the round before."""
    return tuning_stage(
        root, demo, climb_name(number), CLIMB, seed, reward_model=reward_model_after(root, number - 1, seed)
    )


def reward_stage(root: Path, demo: Path, number: int, seed: int) -> Stage:
    """The reward model of the round before learns on, with the videos of all rounds beside the real clips."""
    output_dir = reward_model_after(root, number, seed).parent
    rounds = [videos_dir(root, each, seed) for each in range(1, number + 1)]
    options = [
        *("--reward_model", str(reward_model_after(root, number - 1, seed))),
        *("--train_dataset", str(demo / "latents" / "labelled"), *(str(folder / "train") for folder in rounds)),
        *("--train_dataset_weights", "1", *(WEIGHT for _ in rounds)),
        *("--validation_dataset", *(str(folder / "held_out") for folder in rounds)),
        *("--output_dir", str(output_dir), "--seed", str(seed)),
        *("--learning_rate", "5e-4", "--head_learning_rate", "5e-4", "--max_train_steps", str(NUM_UPDATES)),
        *("--validation_steps", str(NUM_UPDATES), "--checkpointing_steps", str(NUM_UPDATES)),
    ]
    name = f"round_reward_{number}_{seed}"
    return Stage(name, name, [launch("train_reward", options)], [str(output_dir.relative_to(root))])


def make_videos(root: Path, demo: Path, number: int, seed: int) -> None:
    """Labelled videos of the generator that has climbed."""
    torch.set_num_threads(1)
    folder = videos_dir(root, number, seed)
    if (folder / "held_out").is_dir():
        return
    labelled = load_from_disk(str(demo / "latents" / "labelled"))
    first_seed = 1_000_000 * number + 100_000 * seed
    prefix = f"round-{number}-{seed}"
    pipeline = load_generator(arm_dir(root, climb_name(number), seed))
    videos = own_videos(pipeline, labelled, range(first_seed, first_seed + NUM_LABELS), prefix)
    videos.select(range(NUM_HELD_OUT, NUM_LABELS)).save_to_disk(str(folder / "train"))
    videos.select(range(NUM_HELD_OUT)).save_to_disk(str(folder / "held_out"))


@torch.no_grad()
def make_auc(root: Path, number: int, seed: int) -> None:
    """How well the reward models before and after a round tell the held-out videos of this round apart."""
    torch.set_num_threads(1)
    path = auc_file(root, number, seed)
    if path.is_file():
        return
    held_out = load_from_disk(str(videos_dir(root, number, seed) / "held_out"))
    good = labels_in(held_out)
    found = {"good": sum(good) / len(good)}
    for name, which in (("before", number - 1), ("after", number)):
        model = WanRewardModel.from_pretrained(reward_model_after(root, which, seed)).eval()
        found[name] = float(roc_auc_score(good, scores_of(model, held_out)))
    write_json(path, found)


def auc_file(root: Path, number: int, seed: int) -> Path:
    return root / "rounds" / f"auc_{number}_{seed}.json"


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


def run_seed(config: RoundsConfig, seed: int) -> None:
    """All rounds of one seed."""
    root, demo = Path(config.output_dir), Path(config.demo)
    for number in range(config.num_rounds + 1):
        if number > 0:
            run_all([climb_stage(root, demo, number, seed)], root, 1)
            make_videos(root, demo, number, seed)
            run_all([reward_stage(root, demo, number, seed)], root, 1)
            make_auc(root, number, seed)
        arms = {tuned_name(number): TUNED}
        if number == config.num_rounds:
            arms |= {f"{tuned_name(number)}_{name}": arm for name, arm in LAST.items()}
        climbed = reward_model_after(root, number, seed)
        for name, arm in arms.items():
            run_all([tuning_stage(root, demo, name, arm, seed, reward_model=climbed)], root, 1)
            if not verdicts_file(root, name, seed).is_file():
                judge_arm(root, name, seed)


def summarize(root: Path, num_rounds: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Verdicts after each round, and what the reward models see of the videos of each round."""
    names = {tuned_name(number): number for number in range(num_rounds + 1)}
    names |= {f"{tuned_name(num_rounds)}_{name}": num_rounds for name in LAST}
    arms: dict[str, Any] = {}
    for name, number in names.items():
        verdicts = [read_json(verdicts_file(root, name, seed)) for seed in seeds]
        arms[name] = {kind: mean_and_spread([each[kind] for each in verdicts]) for kind in KINDS}
        arms[name]["num_labels"] = number * NUM_LABELS
    rounds = []
    for number in range(1, num_rounds + 1):
        found = [read_json(auc_file(root, number, seed)) for seed in seeds]
        rounds.append({name: mean_and_spread([each[name] for each in found]) for name in found[0]})
    return {"seeds": list(seeds), "arms": arms, "rounds": rounds}


def plot(results: Mapping[str, Any], path: Path) -> None:
    """The judge after each round, and the reward models' AUC on the videos of each round."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    verdicts, aucs = figure.subplots(1, 2)
    numbers = range(len(results["rounds"]) + 1)
    for kind in ("good", "beyond", "frozen", "vanishing", "jittering"):
        plot_spread(verdicts, numbers, [results["arms"][tuned_name(number)][kind] for number in numbers], kind)
    verdicts.set(title="Tuned for 160 steps, by the judge", xlabel="rounds of labels", ylim=(0, 1.02), xticks=numbers)
    for name in ("before", "after"):
        label = f"reward model {name} the round"
        plot_spread(aucs, list(numbers)[1:], [each[name] for each in results["rounds"]], label)
    aucs.set(title="Held-out videos of the round's climb", xlabel="round", ylabel="AUC", ylim=(0.45, 1.02))
    aucs.set_xticks(list(numbers)[1:])
    for axes in (verdicts, aucs):
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Software": None}, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(RoundsConfig, argv, description=__doc__)
    root, results_dir = Path(config.output_dir), Path(config.results_dir)
    run_all(input_stages(root, Path(config.demo), config.seeds), root, config.num_parallel)
    with ProcessPoolExecutor(config.num_parallel, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(run_seed, config), config.seeds))
    results = summarize(root, config.num_rounds, config.seeds)
    write_json(results_dir / "rounds.json", results)
    plot(results, results_dir / "rounds.png")
    print(f"{results_dir / 'rounds.json'}: {config.num_rounds} rounds")


if __name__ == "__main__":
    main()
