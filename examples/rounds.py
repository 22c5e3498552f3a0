r"""
Rounds of PRFL: climb hard, label what broke, learn from it, climb again from the base. With public commands only.

    python -m examples.rounds --output_dir outputs/rounds --accelerate_config accelerate_configs/ddp.yaml \
        --preprocess_recipe examples/preprocess/wan2.1_t2v_480p.yaml \
        --train_reward_recipe examples/reward/wan2.1_t2v_1.3b_480p_bce.yaml \
        --train_prfl_recipe examples/prfl/wan2.1_t2v_1.3b_480p_lora.yaml \
        --generate_recipe examples/generate/wan2.1_t2v_1.3b_480p_lora.yaml \
        --train_prfl_options train_dataset=data/train reward_at=foreseen max_train_steps=1000 \
        --train_dataset data/labelled --validation_dataset data/held_out --prompts prompts.txt --num_videos 400

Round 0 trains a reward model and tunes the generator on it, unless they are given. Each later round

1. makes videos with the generator that was tuned last,
2. takes their labels: from a judge, a command, or else from people: it stops and says what to run,
3. encodes them; the videos of some prompts are held out,
4. trains a reward model on all labels so far, of the start and of every round,
5. compares it on the held-out videos with the one before,
6. tunes the base again on the new reward model, or on those of the last rounds together.

Labels from people need two starts of a round: the same command again goes on where it was, as it does after a kill. All
of a round is in `rounds/<number>/`; `rounds.html` and `rounds.json` have the figures. The small world, where a judge has
the labels, after `make demo`:

    OMP_NUM_THREADS=1 python -m examples.rounds --recipes examples/shapes --output_dir outputs/rounds --num_rounds 2 \
        --accelerate_config accelerate_configs/cpu.yaml --reward_model outputs/demo/reward/best \
        --train_dataset outputs/demo/latents/labelled --validation_dataset outputs/demo/latents/held_out \
        --prompts outputs/demo/clips/labelled/manifest.json --evaluation_prompts outputs/demo/prompts.json \
        --num_videos 352 --train_prfl_options reward_at=foreseen \
        --judge "python -m examples.shapes.annotate --manifest {manifest} --output {output}"
"""

import hashlib
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.rounds_page import evaluation_folder, write_page
from examples.stages import Stage, StageError, launch
from hy_prfl.configs.base import Config, check, check_seed
from hy_prfl.configs.generate import GenerateConfig
from hy_prfl.configs.inputs import check_files, check_sources
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.preprocess import PreprocessConfig
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.data.dataset import load_latent_dataset, read_columns, short_names
from hy_prfl.data.listed_files import ListedFiles
from hy_prfl.data.manifest import read_labels
from hy_prfl.data.prompts import FIELDS
from hy_prfl.data.records import read_records, read_text
from hy_prfl.data.schema import LABELS, task_label
from hy_prfl.formats.checkpoints import MODEL_FOLDER
from hy_prfl.formats.layout import EXPERT_FOLDERS, LORA_FILES
from hy_prfl.runtime.atomic_writes import write_text
from hy_prfl.scripts.running import run


# What this program says itself, and recipes and options of a command must not.
OWN = {
    "generate": {"prompts", "output_dir", "lora_path", "transformer_path", "lora_2_path", "transformer_2_path"},
    "preprocess": {"manifest", "output_dir", "overwrite"},
    "train_reward": {
        "train_dataset",
        "train_dataset_weights",
        "validation_dataset",
        "reward_model",
        "output_dir",
        "seed",
        "resume_from_checkpoint",
    },
    "train_prfl": {
        "reward_model",
        "reward_models",
        "reward_weights",
        "reward_disagreement",
        "output_dir",
        "seed",
        "resume_from_checkpoint",
    },
}
CONFIGS: dict[str, type[Any]] = {
    "generate": GenerateConfig,
    "preprocess": PreprocessConfig,
    "train_reward": RewardTrainingConfig,
    "train_prfl": PRFLTrainingConfig,
}
LABEL_FILES = ("labels.json", "labels.jsonl", "labels.csv")
# A short text about a video that a judge may give besides labels, such as how it failed.
KIND = "kind"
OPTIONS_HELP = "Options of `{}` on top of its recipe, such as {}. A value with blanks is several values."


@dataclass(kw_only=True)
class RoundsConfig(Config):
    """
    What to run.

    > Parameters of the run
    > Parameters of the commands
    > Parameters of the start
    > Parameters of the videos and their labels
    > Parameters of the reward model
    """

    # Parameters of the run
    output_dir: str = field(metadata={"help": "Folder for everything; the same one again goes on."})
    num_rounds: int = field(default=2, metadata={"help": "Rounds after round 0; may be raised later."})
    seed: int = field(default=0, metadata={"help": "Seed of the trainings and of the videos."})

    num_videos_on_page: int = field(default=6, metadata={"help": "Prompts whose videos are shown on the page."})

    # Parameters of the commands
    recipes: str | None = field(
        default=None,
        metadata={
            "help": "Folder with generate.yaml, preprocess.yaml, train_reward.yaml and train_prfl.yaml; or else each one by its "
            "own option."
        },
    )
    generate_recipe: str | None = field(default=None, metadata={"help": "Recipe of `generate`."})
    preprocess_recipe: str | None = field(default=None, metadata={"help": "Recipe of `preprocess`."})
    train_reward_recipe: str | None = field(default=None, metadata={"help": "Recipe of `train_reward`."})
    train_prfl_recipe: str | None = field(default=None, metadata={"help": "Recipe of `train_prfl`."})
    generate_options: list[str] = field(
        default_factory=list, metadata={"help": OPTIONS_HELP.format("generate", "num_inference_steps=30")}
    )
    preprocess_options: list[str] = field(
        default_factory=list, metadata={"help": OPTIONS_HELP.format("preprocess", "batch_size=4")}
    )
    train_reward_options: list[str] = field(
        default_factory=list, metadata={"help": OPTIONS_HELP.format("train_reward", "train_batch_size=16")}
    )
    train_prfl_options: list[str] = field(
        default_factory=list,
        metadata={"help": OPTIONS_HELP.format("train_prfl", "reward_at=foreseen 'foreseen_levels=0.2 0.6'")},
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={"help": "File for `accelerate launch`, which starts all of them; one process if left out."},
    )

    # Parameters of the start
    train_dataset: list[str] = field(
        metadata={"help": "Labelled latent datasets, which every reward model learns from."}
    )
    train_dataset_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each, as in `train_reward`; 1 if left out."}
    )
    validation_dataset: list[str] = field(
        metadata={
            "help": "Labelled latent datasets that every reward model is validated on, with the held-out videos."
        }
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "Reward model of round 0; trained on `train_dataset` if left out."}
    )
    generator: str | None = field(
        default=None,
        metadata={"help": "Output folder of a run of `train_prfl`: the generator of round 0; tuned if left out."},
    )

    # Parameters of the videos and their labels
    prompts: str = field(
        metadata={
            "help": "Prompts to make videos of: a file as for `generate`, or a manifest. Ids and seeds are not used."
        }
    )
    num_videos: int = field(
        default=352, metadata={"help": "Videos to label in each round, each with a seed of its own."}
    )
    held_out_share: float = field(
        default=0.2,
        metadata={"help": "Share of prompts, and of videos, for validation only, the same prompts in all rounds."},
    )
    judge: str | None = field(
        default=None,
        metadata={
            "help": "Command that labels videos: reads the manifest {manifest} and writes the file {output}, rows with "
            "`id`, labels and if it likes a `kind`. Without it people label, see `hy-prfl annotate`."
        },
    )
    min_labelled: float = field(
        default=0.9, metadata={"help": "Share of a round's videos that must have a label before it goes on."}
    )
    evaluation_prompts: str | None = field(
        default=None,
        metadata={
            "help": "Prompts as for `generate`, with seeds: the judge's view of the generator before and after."
        },
    )

    # Parameters of the reward model
    warm_start: bool = field(
        default=False, metadata={"help": "Start each reward model from the one before, not from the pipeline."}
    )
    round_weight: float = field(
        default=1.0, metadata={"help": "Weight of the videos of each round, as in `train_reward`."}
    )
    ensemble_rounds: int = field(
        default=1,
        metadata={
            "help": "The generator is tuned on the reward models of so many rounds together, the newest ones. Round 0 counts."
        },
    )
    reward_disagreement: float = field(
        default=0.5,
        metadata={"help": "What several reward models disagree by lowers the reward, as in `train_prfl`."},
    )
    reward_steps: list[int] | None = field(
        default=None,
        metadata={
            "help": "Updates of the reward model in round 0, 1, ...; the last number also holds for later rounds. As the recipe "
            "says if left out, although the labels become more."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("seed", self.seed)
        check(self.num_rounds >= 1, "num_rounds", self.num_rounds, "at least 1")
        check(self.num_videos >= 2, "num_videos", self.num_videos, "at least 2, one of them held out")
        check(0 < self.held_out_share < 1, "held_out_share", self.held_out_share, "in (0, 1)")
        check(0 < self.min_labelled <= 1, "min_labelled", self.min_labelled, "in (0, 1]")
        check(self.round_weight > 0, "round_weight", self.round_weight, "greater than 0")
        check(self.ensemble_rounds >= 1, "ensemble_rounds", self.ensemble_rounds, "at least 1")
        check(self.reward_disagreement >= 0, "reward_disagreement", self.reward_disagreement, "at least 0")
        weights, number = self.train_dataset_weights, len(self.train_dataset)
        fits = weights is None or len(weights) == number
        check(fits, "train_dataset_weights", weights, f"a number for each of the {number} datasets of `train_dataset`")
        steps = self.reward_steps
        check(steps is None or min(steps) >= 1, "reward_steps", steps, "numbers of at least 1, or left out")
        for name in ("{manifest}", "{output}"):
            check(self.judge is None or name in self.judge, "judge", self.judge, f"a command with {name}")
        evaluated = self.evaluation_prompts
        check(evaluated is None or self.judge is not None, "evaluation_prompts", evaluated, "left out without `judge`")
        for command, own in OWN.items():
            name = f"{command}_options"
            for option in getattr(self, name):
                key, equals, _ = option.partition("=")
                check(bool(equals), name, option, "name=value")
                check(key not in own, name, option, f"without {', '.join(sorted(own))}")
            recipe = self.recipe_of(command)
            check(recipe is not None, f"{command}_recipe", None, "given, or `recipes`")
            if recipe is not None and not recipe.is_file():
                raise FileNotFoundError(f"`{command}_recipe`: there is no file '{recipe}'.")

    def recipe_of(self, command: str) -> Path | None:
        """The recipe of a command, if there is one."""
        own = getattr(self, f"{command}_recipe")
        if own is not None:
            return Path(own)
        return None if self.recipes is None else Path(self.recipes) / f"{command}.yaml"

    def options_of(self, command: str) -> list[str]:
        """The recipe of a command and the options on top of it, as words of a command line."""
        words = ["--config", str(self.recipe_of(command))]
        for option in getattr(self, f"{command}_options"):
            key, _, value = option.partition("=")
            words += [f"--{key}", *shlex.split(value)]
        return words


class LabelsMissingError(Exception):
    """Somebody has to label videos before a round can go on."""


class Rounds:
    """
    The stages of all rounds, and what they found.

    Args:
        config (`RoundsConfig`):
            What to run. The recipes and options of all commands are checked here.

    Raises:
        ValueError: If a command would refuse its options, or there are too few prompts.
    """

    def __init__(self, config: RoundsConfig) -> None:
        self.config = config
        self.root = Path(config.output_dir)
        self.prompts = read_captions(Path(config.prompts))
        if len(self.prompts) < 2:
            raise ValueError(f"{config.prompts}: there must be at least two different prompts, one of them held out.")
        self.held_out = held_out_prompts(self.prompts, config.held_out_share)
        reward_options = self._reward_options(1, "-")
        self.reward_config = parse_config(RewardTrainingConfig, reward_options)
        self.prfl_config = parse_config(PRFLTrainingConfig, self._prfl_options(["-"], Path("-")))
        for option in ("lora_path", "lora_2_path", "transformer_path", "transformer_2_path"):
            value = getattr(self.prfl_config, option)
            check(value is None, option, value, "left out of `train_prfl`: each round starts from the pipeline itself")
        action = self.prfl_config.on_hacking
        check(action != "stop", "on_hacking", action, "warn or keep_best in `train_prfl`: each round needs a result")
        parse_config(GenerateConfig, self._generate_options(Path("-"), Path("-"), Path("-")))
        parse_config(PreprocessConfig, self._preprocess_options(Path("-"), "-"))
        self.seconds: dict[str, float] = {}
        self.found: list[dict[str, Any]] = []

    def folder(self, number: int) -> Path:
        return self.root / "rounds" / str(number)

    def generator(self, number: int) -> Path:
        """Output folder of the PRFL run of a round."""
        given = self.config.generator
        return Path(given) if number == 0 and given is not None else self.folder(number) / "prfl"

    def reward_model(self, number: int) -> str:
        """The reward model of a round."""
        given = self.config.reward_model
        return given if number == 0 and given is not None else str(self.folder(number) / "reward" / "best")

    def ensemble(self, number: int) -> list[str]:
        """Reward models that the generator of a round is tuned on, the newest first."""
        oldest = max(0, number - self.config.ensemble_rounds + 1)
        return [self.reward_model(each) for each in range(number, oldest - 1, -1)]

    def run(self) -> None:
        """
        Run what is not complete.

        Raises:
            StageError: If a command fails.
            LabelsMissingError: If people have to label videos first; the message has the command.
            ValueError: If labels do not fit the videos.
        """
        config = self.config
        if config.evaluation_prompts is not None:
            self.found.append({"round": "base", "evaluation": self._evaluate("base", None, [])})
        # Those of rounds whose reward models are given are not among them.
        rewards: list[Stage] = []
        latents: list[Stage] = []
        tuned: list[Stage] = []
        if config.reward_model is None:
            rewards.append(self._run(self._reward_stage(0, [])))
        if config.generator is None:
            tuned.append(self._run(self._prfl_stage(0, rewards)))
        self._note({"round": 0}, 0, tuned)
        for number in range(1, config.num_rounds + 1):
            videos = self._run(self._videos_stage(number, tuned))
            labels = self._labels(number, videos)
            latents.append(self._run(self._latents_stage(number, videos)))
            before = rewards[-1:]
            rewards.append(self._run(self._reward_stage(number, [*latents, *(before if config.warm_start else [])])))
            self._run(self._scores_stage(number, [*before, latents[-1]]))
            tuned = [self._run(self._prfl_stage(number, rewards[-config.ensemble_rounds :]))]
            self._note({"round": number, "labels": labels, **self._reward_figures(number)}, number, tuned)

    def write_results(self) -> Path:
        """Write `rounds.json` and `rounds.html`, of the rounds that are complete; returns the page."""
        results = {"task": self.reward_config.task, "rounds": self.found, "seconds": self.seconds}
        self.root.mkdir(parents=True, exist_ok=True)
        write_text(self.root / "rounds.json", json.dumps(results, indent=1))
        return write_page(self.root, results, self.config, num_videos=self.config.num_videos_on_page)

    def _run(self, stage: Stage) -> Stage:
        """Run a stage, unless it is complete."""
        complete = stage.is_complete(self.root)
        print(f"\n{stage.title}" + (": complete" if complete else ""), flush=True)
        if not complete:
            stage.run(self.root)
        self.seconds[stage.name] = stage.seconds(self.root)
        return stage

    def _stage(
        self,
        name: str,
        title: str,
        commands: list[list[str]],
        outputs: list[Path],
        *,
        after: Sequence[Stage] = (),
        inputs: Sequence[Path] = (),
        results: Sequence[Path] = (),
    ) -> Stage:
        """A stage of this run, which is run again if one that it comes after has been."""
        records = [stage.record(self.root) for stage in after]
        paths, ends = ([str(path.relative_to(self.root)) for path in each] for each in (outputs, results))
        return Stage(name, title, commands, paths, resumes=True, inputs=[*records, *inputs], results=ends)

    def _launch(self, verb: str, options: Sequence[str]) -> list[str]:
        if self.config.accelerate_config is None:
            return [sys.executable, "-m", f"hy_prfl.scripts.{verb}", *options]
        return launch(self.config.accelerate_config, verb, options)

    def _reward_stage(self, number: int, after: Sequence[Stage]) -> Stage:
        folder = self.folder(number) / "reward"
        command = self._launch("train_reward", self._reward_options(number, str(folder)))
        title, results = f"Round {number}: train the reward model", [folder / MODEL_FOLDER]
        return self._stage(f"{number}_reward", title, [command], [folder], after=after, results=results)

    def _reward_options(self, number: int, output_dir: str) -> list[str]:
        config = self.config
        rounds = range(1, number + 1)
        train = [*config.train_dataset, *(str(self._latents(each, held_out=False)) for each in rounds)]
        held_out = [*config.validation_dataset, *(str(self._latents(each, held_out=True)) for each in rounds)]
        weights = [
            *(config.train_dataset_weights or [1.0] * len(config.train_dataset)),
            *[config.round_weight] * number,
        ]
        options = [
            *config.options_of("train_reward"),
            *("--train_dataset", *train, "--train_dataset_weights", *map(str, weights)),
            *("--validation_dataset", *held_out, "--output_dir", output_dir, "--seed", str(config.seed)),
            *("--resume_from_checkpoint", "latest"),
        ]
        if config.reward_steps is not None:
            options += ["--max_train_steps", str(config.reward_steps[min(number, len(config.reward_steps) - 1)])]
        if config.warm_start and number > 0:
            options += ["--reward_model", self.reward_model(number - 1)]
        return options

    def _prfl_stage(self, number: int, after: Sequence[Stage]) -> Stage:
        folder = self.folder(number) / "prfl"
        command = self._launch("train_prfl", self._prfl_options(self.ensemble(number), folder))
        title, results = f"Round {number}: tune the base on it", tuned_files(self.prfl_config, folder)
        return self._stage(f"{number}_prfl", title, [command], [folder], after=after, results=results)

    def _prfl_options(self, reward_models: Sequence[str], output_dir: Path) -> list[str]:
        several = ["--reward_disagreement", str(self.config.reward_disagreement)] if len(reward_models) > 1 else []
        return [
            *self.config.options_of("train_prfl"),
            *("--reward_models" if several else "--reward_model", *reward_models, *several),
            *("--output_dir", str(output_dir), "--seed", str(self.config.seed)),
            *("--resume_from_checkpoint", "latest"),
        ]

    def _videos_stage(self, number: int, after: Sequence[Stage]) -> Stage:
        folder, prompts = self.folder(number), self._write_prompts(number)
        options = self._generate_options(prompts, folder / "videos", self.generator(number - 1))
        stage = self._stage(
            f"{number}_videos",
            f"Round {number}: make videos with the generator of round {number - 1}",
            [self._launch("generate", options)],
            [folder / "videos"],
            after=after,
            inputs=[prompts],
        )
        kept = [path for path in (*self._label_files(number), self._journal(number)) if path.is_file()]
        if kept and self.config.judge is None and not stage.is_complete(self.root):
            raise ValueError(
                f"'{kept[0]}' has labels of videos that would be made again, because a recipe, an option or the generator "
                "has changed. Move it away, or use another `output_dir`."
            )
        return stage

    def _generate_options(self, prompts: Path, output_dir: Path, generator: Path | None) -> list[str]:
        options = [*self.config.options_of("generate"), "--prompts", str(prompts), "--output_dir", str(output_dir)]
        return options if generator is None else [*options, *tuned_options(self.prfl_config, generator)]

    def _write_prompts(self, number: int) -> Path:
        """Write the prompts of a round: the next ones of those to train on, and of those held out."""
        config = self.config
        num_held_out = min(max(1, round(config.held_out_share * config.num_videos)), config.num_videos - 1)
        rows: list[dict[str, Any]] = []
        for held_out, count in ((False, config.num_videos - num_held_out), (True, num_held_out)):
            chosen = [row for row in self.prompts if (row["caption"] in self.held_out) == held_out]
            first = (number - 1) * count
            rows += [chosen[(first + index) % len(chosen)] for index in range(count)]
        first_seed = 10**9 * config.seed + 10**6 * number
        named = [
            {**row, "id": f"round_{number}_{index:05d}", "seed": first_seed + index} for index, row in enumerate(rows)
        ]
        path = self.folder(number) / "prompts.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(named, indent=1))
        return path

    def _label_files(self, number: int) -> list[Path]:
        return [self.folder(number) / name for name in LABEL_FILES]

    def _journal(self, number: int) -> Path:
        """What `annotate` keeps of every answer."""
        return self.folder(number) / f"{LABEL_FILES[0]}.journal.jsonl"

    def _labels(self, number: int, videos: Stage) -> dict[str, Any]:
        """Take the labels of a round, write its two labelled manifests, and count."""
        folder, config = self.folder(number), self.config
        manifest = folder / "videos" / "manifest.json"
        if config.judge is not None:
            output = folder / LABEL_FILES[0]
            self._run(self._judge_stage(f"{number}_labels", f"Round {number}: judge them", manifest, output, videos))
        rows = json.loads(manifest.read_text(encoding="utf-8"))
        found = [path for path in self._label_files(number) if path.is_file()]
        if len(found) > 1:
            raise ValueError(f"'{found[0]}' and '{found[1]}' both have labels of round {number}; keep one.")
        judged = read_verdicts(found[0], [row["id"] for row in rows]) if found else {}
        task = self.reward_config.task
        known = {name: value for name in judged if (value := task_label(judged[name], task)) is not None}
        if len(known) < config.min_labelled * len(rows):
            tasks = ["physics_quality", "human_quality"] if task == "motion_quality" else [task]
            raise LabelsMissingError(
                f"round {number}: {len(known)} of {len(rows)} videos have a label for '{task}', {config.min_labelled:.0%} are "
                f"needed. Label them,\n  hy-prfl annotate --manifest {manifest} --output {folder / LABEL_FILES[0]} --tasks "
                f"{' '.join(tasks)}\nor write {' or '.join(LABEL_FILES)} there, rows with `id` and labels. Then start this "
                "again."
            )
        parts: dict[str, list[dict[str, Any]]] = {"train": [], "held_out": []}
        for row in rows:
            labels = {name: judged.get(row["id"], {}).get(name) for name in LABELS}
            video = os.path.relpath(manifest.parent / row["video"], folder)
            part = "held_out" if row["caption"] in self.held_out else "train"
            parts[part].append({**row, "video": video, **labels})
        for name, part_rows in parts.items():
            write_text(folder / f"{name}.json", json.dumps(part_rows, indent=1))
        kinds = Counter(str(row[KIND]) for row in judged.values() if row.get(KIND))
        return {
            "num_videos": len(rows),
            "num_labelled": len(known),
            "num_good": sum(known.values()),
            **{f"num_{name}": sum(row["id"] in known for row in part_rows) for name, part_rows in parts.items()},
            "kinds": dict(kinds.most_common()),
        }

    def _judge_stage(self, name: str, title: str, manifest: Path, output: Path, after: Stage) -> Stage:
        command = shlex.split(str(self.config.judge))
        command = [word.replace("{manifest}", str(manifest)).replace("{output}", str(output)) for word in command]
        if command[0] == "python":
            command[0] = sys.executable
        return self._stage(name, title, [command], [output], after=[after], inputs=[manifest])

    def _latents(self, number: int, *, held_out: bool) -> Path:
        """A round's latent dataset. Its last folder is its name in metrics."""
        return self.folder(number) / "latents" / f"round_{number}{'_held_out' if held_out else ''}"

    def _latents_stage(self, number: int, videos: Stage) -> Stage:
        manifests = [self.folder(number) / f"{name}.json" for name in ("train", "held_out")]
        outputs = [self._latents(number, held_out=held_out) for held_out in (False, True)]
        commands = [
            self._launch("preprocess", self._preprocess_options(manifest, str(output)))
            for manifest, output in zip(manifests, outputs, strict=True)
        ]
        title = f"Round {number}: encode them"
        return self._stage(f"{number}_latents", title, commands, [], after=[videos], inputs=manifests)

    def _preprocess_options(self, manifest: Path, output_dir: str) -> list[str]:
        options = [*self.config.options_of("preprocess"), "--manifest", str(manifest), "--output_dir", output_dir]
        # Where labels have changed, latents are kept.
        return [*options, "--overwrite", "true"]

    def _scores_stage(self, number: int, after: Sequence[Stage]) -> Stage:
        """Score a round's held-out videos with the reward model before it, as the new one is validated on them."""
        folder, config = self.folder(number) / "scores", self.reward_config
        options = [
            *("--reward_model", self.reward_model(number - 1), "--output", str(folder / "before.csv")),
            *("--dataset", str(self._latents(number, held_out=True)), "--seed", str(config.validation_seed)),
            *("--timesteps", *map(str, config.validation_timesteps), "--batch_size", str(config.train_batch_size)),
        ]
        title = f"Round {number}: the reward model of round {number - 1} on held-out videos"
        return self._stage(f"{number}_scores", title, [self._launch("score", options)], [folder], after=after)

    def _reward_figures(self, number: int) -> dict[str, Any]:
        """How the reward models of a round and before it do on its held-out videos, and the new one on all others."""
        folder = self.folder(number)
        before = json.loads((folder / "scores" / "before.csv.summary.json").read_text(encoding="utf-8"))["metrics"]
        best = json.loads((folder / "reward" / "best" / "metrics.json").read_text(encoding="utf-8"))
        held_out = [str(self._latents(each, held_out=True)) for each in range(1, number + 1)]
        names = short_names([*self.config.validation_dataset, *held_out])
        return {
            "new_videos": {
                "before": {name: before.get(name) for name in ("auc", "accuracy")},
                "after": {name: best.get(f"{names[-1]}/{name}") for name in ("auc", "accuracy")},
            },
            "validation_auc": {name: best.get(f"{name}/auc") for name in names},
            "num_labels": sum(map(self._num_labels, self._train_datasets(number))),
        }

    def _train_datasets(self, number: int) -> list[str]:
        rounds = [str(self._latents(each, held_out=False)) for each in range(1, number + 1)]
        return [*self.config.train_dataset, *rounds]

    def _num_labels(self, dataset: str) -> int:
        rows = read_columns(load_latent_dataset(dataset), LABELS)
        return sum(task_label(row, self.reward_config.task) is not None for row in rows)

    def _evaluate(self, name: str, generator: Path | None, after: Sequence[Stage]) -> dict[str, Any]:
        """The judge's view of a generator, of the base if none is given."""
        folder, prompts = evaluation_folder(self.root, name), Path(str(self.config.evaluation_prompts))
        options = self._generate_options(prompts, folder / "videos", generator)
        of = "Base" if generator is None else f"Round {name}"
        videos = self._run(
            self._stage(
                f"{name}_evaluation_videos",
                f"{of}: make videos to evaluate it",
                [self._launch("generate", options)],
                [folder / "videos"],
                after=after,
                inputs=[prompts],
            )
        )
        manifest, output = folder / "videos" / "manifest.json", folder / LABEL_FILES[0]
        self._run(self._judge_stage(f"{name}_evaluation", f"{of}: judge them", manifest, output, videos))
        rows = json.loads(manifest.read_text(encoding="utf-8"))
        judged = read_verdicts(output, [row["id"] for row in rows])
        known = [value for row in judged.values() if (value := task_label(row, self.reward_config.task)) is not None]
        kinds = Counter(str(row[KIND]) for row in judged.values() if row.get(KIND))
        return {"num_videos": len(known), "num_good": sum(known), "kinds": dict(kinds.most_common())}

    def _note(self, figures: dict[str, Any], number: int, tuned: Sequence[Stage]) -> None:
        """Evaluate the generator of a round, add all its figures, and write the page."""
        generator = self.generator(number)
        metrics = generator / "metrics.jsonl"
        if metrics.is_file():
            lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
            rewards = [line["train/reward"] for line in lines if "train/reward" in line]
            last = rewards[-max(1, len(rewards) // 10) :]
            figures["training_reward"] = sum(last) / len(last) if last else None
        if self.config.evaluation_prompts is not None:
            figures["evaluation"] = self._evaluate(str(number), generator, tuned)
        self.found.append(figures)
        self.write_results()


def read_captions(path: Path) -> list[dict[str, str]]:
    """Different prompts of a list or a manifest: caption, and images if there are any."""
    files, rows = ListedFiles(path), []
    for where, record in read_records(path, FIELDS, lines_of="caption"):
        text = {name: read_text(record, FIELDS[name], where) for name in ("caption", "image", "last_image")}
        if text["caption"] is None:
            raise ValueError(f"{where}: `caption` is missing.")
        images = {name: files.find(text[name]) for name in ("image", "last_image")}
        found = {name: str(image.resolve()) for name, image in images.items() if image is not None}
        rows.append({"caption": text["caption"], **found})
    return [dict(row) for row in dict.fromkeys(tuple(row.items()) for row in rows)]


def held_out_prompts(prompts: Sequence[Mapping[str, str]], share: float) -> set[str]:
    """Captions that are for validation only: the same ones whatever the order of the list."""
    captions = sorted(
        {row["caption"] for row in prompts}, key=lambda caption: hashlib.sha256(caption.encode()).hexdigest()
    )
    return set(captions[: min(max(1, round(share * len(captions))), len(captions) - 1)])


def read_verdicts(path: Path, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """
    Labels of videos by id, and their `kind`.

    Raises:
        ValueError: If a row has no id, or that of none of the videos or of another row.
    """
    fields = {"id": ("id",), **{name: (name,) for name in LABELS}}
    found: dict[str, dict[str, Any]] = {}
    for where, record in read_records(path, fields):
        name = read_text(record, ("id",), where)
        if name not in set(ids):
            raise ValueError(f"{where}: `id` {name!r} is none of the round's videos, such as {ids[0]!r}.")
        if name in found:
            raise ValueError(f"{where}: `id` {name!r} has a row already.")
        found[str(name)] = {**dict.fromkeys(LABELS), **read_labels(record, where), KIND: record.get(KIND)}
    return found


def tuned_files(config: PRFLTrainingConfig, folder: Path) -> list[Path]:
    """The LoRAs or transformers that a run of `train_prfl` writes at its end."""
    names = EXPERT_FOLDERS if config.lora_rank is None else LORA_FILES
    return [folder / name for expert, name in names.items() if (config.expert or "high_noise") in (expert, "both")]


def tuned_options(config: PRFLTrainingConfig, folder: Path) -> list[str]:
    """Options of `generate` for what a run of `train_prfl` has written."""
    options: list[str] = []
    for expert, transformer in EXPERT_FOLDERS.items():
        if (config.expert or "high_noise") in (expert, "both"):
            suffix = "" if expert == "high_noise" else "_2"
            tuned = [f"--transformer{suffix}_path", str(folder / transformer)]
            options += [f"--lora{suffix}_path", str(folder)] if config.lora_rank is not None else tuned
    return options


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(RoundsConfig, argv, description=__doc__)
    check_files(config, "prompts", "evaluation_prompts", "accelerate_config")
    check_sources(config, "train_dataset", "validation_dataset", "reward_model", "generator")
    rounds = Rounds(config)
    try:
        rounds.run()
    except (StageError, LabelsMissingError) as error:
        rounds.write_results()
        sys.exit(f"rounds: {error}")
    print(f"\nfigures  {rounds.root / 'rounds.json'}\npage     {rounds.write_results()}")


if __name__ == "__main__":
    run(main)
