"""The measured cases: methods, switches, and the trainer of each."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from examples.benchmark.rgb_refl import Decoded, PixelReward, RGBReFLTrainer
from examples.benchmark.sizes import Clip, Size
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.trainers.prfl_trainer import PRFLTrainer


# Maps the number of steps of the chain, and of steps with gradient, to the last step with gradient.
StepIndices = Callable[[int, int], int]


def anywhere(num_inference_steps: int, num_gradient_steps: int) -> int:
    """
    Mean of the last step with gradient, if `num_gradient_steps` steps are drawn from all steps but the chain's last.

    All forwards take the same time, so an update with this step takes the mean time. One of 40: step 19. Four of 40:
    step 31.
    """
    return num_gradient_steps * num_inference_steps // (num_gradient_steps + 1) - 1


def early(num_inference_steps: int, num_gradient_steps: int) -> int:
    """The same for the first third of the chain: of 40 steps, 0 to 12 may take gradient, and the mean is step 6."""
    return anywhere(num_inference_steps // 3 + 1, num_gradient_steps)


def late(num_inference_steps: int, num_gradient_steps: int) -> int:
    """
    Mean step of the paper's late stage: 27 to 40 of 40, counted from 1. It is rounded down, in RGB ReFL's favour.

    At earlier steps the clean latents that one forward predicts are too far from a video for an image reward. Of 40:
    step 32, counted from 0.
    """
    return (26 * num_inference_steps // 40 + num_inference_steps - 1) // 2


@dataclass(frozen=True)
class Method:
    """
    A training method.

    Args:
        schedule (`str`):
            The trainer's `update_schedule`.
        step (`Callable`):
            Selects the step with gradient.
        decodes (`str`, *optional*):
            Frames that RGB ReFL decodes. If left out, the method is PRFL.
    """

    schedule: str
    step: StepIndices = anywhere
    decodes: Decoded | None = None


PRFL, PRFL_REWARD, FLOW = "PRFL", "PRFL, reward only", "flow matching alone"
PRFL_EARLY = "PRFL, first third of the chain"
RGB_FIRST, RGB_REWARD = "RGB ReFL, first frame", "RGB ReFL, first frame, reward only"
RGB_SAME, RGB_ALL = "RGB ReFL, first frame, PRFL's steps", "RGB ReFL, all frames"
METHODS = {
    PRFL: Method("alternate"),
    PRFL_REWARD: Method("reward"),
    PRFL_EARLY: Method("alternate", early),
    FLOW: Method("flow_matching"),
    RGB_FIRST: Method("alternate", late, "first"),
    RGB_REWARD: Method("reward", late, "first"),
    # Shows the cost of decoding alone: it has as many forwards of the generator as PRFL.
    RGB_SAME: Method("alternate", anywhere, "first"),
    RGB_ALL: Method("alternate", late, "all"),
}
# Methods that are also measured on larger clips.
COMPARED = (PRFL, PRFL_EARLY, FLOW, RGB_FIRST, RGB_ALL)

NO_CHECKPOINTING, FOUR_STEPS, LORA = "no activation checkpointing", "4 gradient steps", "LoRA of rank 16"
REUSED, CACHED = "a rollout for 8 updates", "every second step of the rollout"


@dataclass(frozen=True)
class Switch:
    """
    A change of options.

    Args:
        options (`Mapping`):
            Options of the trainer.
        method (`str`):
            Method whose options are changed.
        only_on (`str`, *optional*):
            Device type that it is for; all if left out.
    """

    options: Mapping[str, Any]
    method: str = PRFL
    only_on: str | None = None


def switches(num_layers: int) -> dict[str, Switch]:
    """The switches for a generator with `num_layers` blocks. Other cases checkpoint the activations of all blocks."""
    kernel, rollout_kernel = "attention_backend", "rollout_attention_backend"
    return {
        NO_CHECKPOINTING: Switch({"gradient_checkpointing": False}),
        "activation checkpointing in half of the blocks": Switch({"gradient_checkpointing_blocks": num_layers // 2}),
        "block inputs in host memory": Switch({"offload_activations": True}),
        "gradient step run twice": Switch({"rerun_gradient_step": True}),
        # On a CPU, offloaded weights would still count as memory.
        "reward model in host memory": Switch({"offload_reward_model": True}, only_on="cuda"),
        FOUR_STEPS: Switch({"num_gradient_steps": 4}, method=PRFL_REWARD),
        LORA: Switch({"lora_rank": 16}),
        # Any step of the stored rollouts may take gradient, so they reach to the end of the chain.
        REUSED: Switch({"rollout_interval": 8, "rollout_buffer_size": 8, "step_range": None}),
        CACHED: Switch({"rollout_cache_interval": 2}),
        "4 chained steps": Switch({"num_chained_steps": 4}),
        "look-ahead": Switch({"reward_at": "foreseen"}),
        "LoRA and anchor": Switch({"lora_rank": 16, "anchor_scale": 1.0}),
        "attention native": Switch({kernel: "native"}),
        "attention _native_math": Switch({kernel: "_native_math"}, only_on="cpu"),
        "rollout attention _native_math": Switch({rollout_kernel: "_native_math"}, only_on="cpu"),
        "attention _native_cudnn": Switch({kernel: "_native_cudnn"}, only_on="cuda"),
        "attention _native_flash": Switch({kernel: "_native_flash"}, only_on="cuda"),
        "attention flash": Switch({kernel: "flash"}, only_on="cuda"),
        "attention _flash_3_hub": Switch({kernel: "_flash_3_hub"}, only_on="cuda"),
        "rollout attention _flash_3": Switch({rollout_kernel: "_flash_3"}, only_on="cuda"),
        "rollout attention sage": Switch({rollout_kernel: "sage"}, only_on="cuda"),
        "compiled blocks": Switch({"compile": True}),
    }


@dataclass(frozen=True)
class Case:
    """
    One measurement.

    Args:
        size_name (`str`), size (`Size`):
            The models.
        clip (`Clip`):
            Clip to train on.
        method (`str`):
            Name in `METHODS`.
        switch (`str`):
            Name in `switches`, or empty.
        num_inference_steps (`int`):
            Steps of the sampler's whole chain.
    """

    size_name: str
    size: Size = field(repr=False)
    clip: Clip
    method: str
    switch: str = ""
    num_inference_steps: int = 40

    @property
    def label(self) -> str:
        """Names of the method and the switch."""
        return f"{self.method}; {self.switch}" if self.switch else self.method

    @property
    def options(self) -> dict[str, Any]:
        """Options of the trainer for this case."""
        method = METHODS[self.method]
        options: dict[str, Any] = {
            "update_schedule": method.schedule,
            "num_inference_steps": self.num_inference_steps,
            "gradient_checkpointing": True,
            **self.size.options,
        }
        if self.switch:
            options |= switches(self.size.transformer["num_layers"])[self.switch].options
        if method.schedule != "flow_matching" and "step_range" not in options:
            num_gradient_steps = options.get("num_gradient_steps", 1)
            last = method.step(self.num_inference_steps, num_gradient_steps)
            options["step_range"] = [last + 1 - num_gradient_steps, last]
        return options

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on, as JSON values."""
        return {
            "size": self.size_name,
            "models": dataclasses.asdict(self.size),
            "clip": str(self.clip),
            "num_tokens": self.clip.num_tokens,
            "method": self.method,
            "switch": self.switch,
            "options": self.options,
        }

    def trainer(self, inputs: Path, output_dir: Path, mixin: type) -> PRFLTrainer:
        """The real trainer with a mixin, whose methods come first, on the inputs of this size and clip."""
        config = PRFLTrainingConfig(
            output_dir=str(output_dir),
            pretrained_model_name_or_path=str(inputs / "pipeline"),
            train_dataset=str(inputs / str(self.clip)),
            reward_model=str(inputs / "reward"),
            report_to=["none"],
            max_train_steps=10**6,
            checkpointing_steps=10**6,
            **self.options,
        )
        decodes = METHODS[self.method].decodes
        if decodes is None:
            return type("Measured", (mixin, PRFLTrainer), {}).from_config(config)
        trainer = type("Measured", (mixin, RGBReFLTrainer), {})
        reward = partial(
            PixelReward,
            image_reward=self.size.image_reward,
            decodes=decodes,
            checkpointing=config.gradient_checkpointing,
        )
        return trainer.from_config(config, build_reward=reward)


def all_cases(
    sizes: Mapping[str, Size], *, device: torch.device, num_inference_steps: int, only: Iterable[str] = ()
) -> list[Case]:
    """
    All cases of these sizes on this device, in the order of the measurements.

    Args:
        only (`Iterable[str]`):
            Names of methods and switches to keep; all if empty.

    Raises:
        ValueError: If an entry of `only` is not the name of a case.
    """
    cases = []
    for name, size in sizes.items():
        clips = [(size.base, list(METHODS)), *((clip, COMPARED) for clip in (*size.longer, *size.larger))]
        cases += [
            Case(name, size, clip, method, "", num_inference_steps) for clip, methods in clips for method in methods
        ]
        for switch, what in switches(size.transformer["num_layers"]).items():
            is_one = not what.options.keys() & size.options.keys()
            if is_one and what.only_on in (None, device.type):
                cases.append(Case(name, size, size.base, what.method, switch, num_inference_steps))
    kept = set(only)
    unknown = kept - {case.label for case in cases} - {case.switch for case in cases}
    if unknown:
        labels = sorted({case.switch or case.method for case in cases})
        raise ValueError(f"`cases` must be of {labels}, got {sorted(unknown)}.")
    return [case for case in cases if not kept or (case.switch or case.method) in kept]
