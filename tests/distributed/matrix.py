"""
Trains tiny models for a step in every combination of trainer, tuning, kind of model and context parallelism.

    accelerate launch <engine> tests/distributed/matrix.py <folder> <results.json> <kind>,... <degree>,...

All cases run one after the other in one launch, because to start the processes takes longer than to train. The results
are the metrics of each case by its name.
"""

import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.runtime.distributed import leave_processes
from hy_prfl.trainers.prfl_trainer import PRFLTrainer
from hy_prfl.trainers.reward_trainer import RewardTrainer


KINDS = ("t2v", "i2v", "5b", "a14b")
# Trainer and what is special: all weights or an adapter, or the gradient through two steps of a stored chain, watched by a
# monitor and with videos of the validation.
VARIANTS = (("reward", "full"), ("reward", "lora"), ("prfl", "full"), ("prfl", "lora"), ("prfl", "chained"))
# Of some kinds also an adapter held by an anchor, on two reward models, with rollouts that skip steps.
ENSEMBLE_KINDS = ("t2v", "5b")
ENSEMBLE: dict[str, Any] = {
    "reward_disagreement": 0.5,
    "anchor_scale": 20.0,
    "learning_rate": 0.1,
    "num_inference_steps": 7,
    "step_range": [4, 5],
    "rollout_cache_interval": 4,
}
CHAINED: dict[str, Any] = {
    "num_chained_steps": 2,
    "reward_at": "foreseen",
    "rollout_interval": 2,
    "on_hacking": "warn",
    "validation_videos": True,
}
GLOBAL_BATCH_SIZE = 4


def all_cases(kinds: Sequence[str], degrees: Sequence[int]) -> list[tuple[str, str, str, int]]:
    """Trainer, variant, kind and degree of each case."""
    cases = [(*variant, kind, degree) for variant, kind, degree in itertools.product(VARIANTS, kinds, degrees)]
    special = [kind for kind in ENSEMBLE_KINDS if kind in kinds]
    return cases + [("prfl", "ensemble", kind, degree) for kind, degree in itertools.product(special, degrees)]


def case_name(script: str, tuning: str, kind: str, degree: int) -> str:
    """Name of a case in the results."""
    return f"{script} {tuning} {kind} {degree}"


def run_case(folder: Path, output_dir: Path, script: str, tuning: str, kind: str, degree: int) -> dict[str, float]:
    """Train, validate and save once, and return what was logged."""
    num_replicas = int(os.environ.get("WORLD_SIZE", "1")) // degree
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "pretrained_model_name_or_path": str(folder / kind / "pipeline"),
        "train_dataset": str(folder / kind / "data"),
        "train_batch_size": GLOBAL_BATCH_SIZE // num_replicas,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 1,
        "context_parallel_degree": degree,
        "lora_rank": 2 if tuning in ("lora", "ensemble") else None,
        "validation_dataset": str(folder / kind / "data"),
        "report_to": ["none"],
    }
    torch.manual_seed(0)
    if script == "reward":
        expert = "high_noise" if kind == "a14b" else None
        trainer: Any = RewardTrainer.from_config(RewardTrainingConfig(**options, num_layers=2, expert=expert))
    else:
        expert = "both" if kind == "a14b" else None
        reward_model = str(folder / kind / "reward")
        options |= {"reward_model": reward_model, "num_inference_steps": 4, "expert": expert}
        options |= CHAINED if tuning == "chained" else {}
        if tuning == "ensemble":
            options |= {"reward_model": None, "reward_models": [reward_model, f"{reward_model}-2"], **ENSEMBLE}
            options["shard_reward_model"] = num_replicas * degree > 1
        trainer = PRFLTrainer.from_config(PRFLTrainingConfig(**options))
    trainer.train()
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


def main() -> None:
    """Run all cases and write their metrics."""
    folder, results_file = Path(sys.argv[1]), Path(sys.argv[2])
    kinds, degrees = sys.argv[3].split(","), [int(degree) for degree in sys.argv[4].split(",")]
    results = {}
    for script, tuning, kind, degree in all_cases(kinds, degrees):
        name = case_name(script, tuning, kind, degree)
        output_dir = results_file.parent / results_file.stem / name.replace(" ", "-")
        results[name] = run_case(folder, output_dir, script, tuning, kind, degree)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    results_file.write_text(json.dumps(results))
    leave_processes()


if __name__ == "__main__":
    main()
