"""What `generate` writes about candidates: a file for each video, and from these a table and a calibration."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline

from ..compatibility import REWARD_LATENTS, check_fits_generator, check_same_vae
from ..configs.generate import GenerateConfig
from ..configs.keep import format_keep, parse_keep
from ..data.encoding import vae_fingerprint
from ..data.prompts import VideoPrompt
from ..formats.pipeline_info import PipelineInfo
from ..models.loading import read_reward_config
from ..models.reward_model import WanRewardModel
from ..runtime.atomic_writes import write_text
from .calibration import cheapest, cheapest_schedules, rank_correlations
from .candidate_settings import CandidateSettings, RewardGuidance
from .candidates import sample_candidates
from .generation import pipeline_inputs
from .video_files import VideoSettings


FOLDER, TABLE, CALIBRATION = "candidates", "candidates.csv", "calibration.json"


def candidate_settings(config: GenerateConfig) -> CandidateSettings:
    """The options of `generate` that are about candidates."""
    guidance = None
    if config.reward_guidance is not None and config.reward_guidance_steps is not None:
        first, last = config.reward_guidance_steps
        guidance = RewardGuidance(scale=config.reward_guidance, first_step=first, last_step=last)
    return CandidateSettings(
        keep=parse_keep(config.keep),
        final_timesteps=tuple(config.final_timesteps),
        batch_size=config.candidate_batch_size,
        resample=config.resample,
        renoise=config.renoise,
        guidance=guidance,
        score_every_step=config.calibrate,
    )


def check_reward_model(config: GenerateConfig, info: PipelineInfo) -> None:
    """
    Refuse a reward model that cannot score the pipeline's latents. Reads only configurations and the VAE.

    Raises:
        ValueError: If it does not fit; names the difference.
    """
    path, revision = config.pretrained_model_name_or_path, config.revision
    reward_config = _reward_config(config)
    check_fits_generator(reward_config, info.transformer, allow_other_base=True)
    vae = AutoencoderKLWan.from_pretrained(path, subfolder="vae", revision=revision, variant=config.variant)
    check_same_vae(vae_fingerprint(vae), reward_config["vae_fingerprint"], source=path, of=REWARD_LATENTS)


def _reward_config(config: GenerateConfig) -> dict[str, Any]:
    assert config.reward_model is not None
    return read_reward_config(config.reward_model, option="reward_model", revision=config.reward_model_revision)


def check_seeds(prompts: Sequence[VideoPrompt], num_candidates: int) -> None:
    """Raise a `ValueError` if candidates of two videos of one id would have the same seed."""
    for first in prompts:
        for other in prompts:
            if first.id == other.id and first.seed < other.seed < first.seed + num_candidates:
                raise ValueError(
                    f"prompt '{first.id}': the candidates of seed {first.seed} have the seeds {first.seed} to "
                    f"{first.seed + num_candidates - 1}, and the list asks for {other.seed} too. Seeds of one id must be "
                    "`num_candidates` apart."
                )


@dataclass(frozen=True)
class CandidateSampler:
    """
    Samples each video from several candidates, and writes a record of them; replaces `generate_video`.

    Args:
        reward_model (`WanRewardModel`):
            Chooses among the candidates.
        num_candidates (`int`):
            Candidates of a video; the first has the seed of its prompt.
        settings (`CandidateSettings`):
            How they are chosen.
        output_dir (`Path`):
            Folder of the videos. The record of the candidates is written to `candidates/<name>.json` in it, before the
            video.
    """

    reward_model: WanRewardModel
    num_candidates: int
    settings: CandidateSettings
    output_dir: Path

    def __call__(
        self, pipeline: WanPipeline | WanImageToVideoPipeline, prompt: VideoPrompt, settings: VideoSettings
    ) -> np.ndarray:
        seeds = range(prompt.seed, prompt.seed + self.num_candidates)
        inputs = pipeline_inputs(prompt, settings)
        result = sample_candidates(pipeline, self.reward_model, seeds, self.settings, **inputs)
        path = candidates_file(self.output_dir, prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(result.to_dict(), indent=1))
        frames: np.ndarray = result.frames
        return frames


def candidates_file(output_dir: Path, prompt: VideoPrompt) -> Path:
    """The file with the record of a video's candidates."""
    return output_dir / FOLDER / f"{prompt.name}.json"


def read_candidates(output_dir: Path, prompts: Sequence[VideoPrompt]) -> list[dict[str, Any]]:
    """
    Read the record of each video's candidates.

    Raises:
        FileNotFoundError: If a video has no record.
    """
    found = []
    for prompt in prompts:
        path = candidates_file(output_dir, prompt)
        if not path.is_file():
            raise FileNotFoundError(
                f"'{path}' is missing. Delete '{prompt.name}.mp4' too, so that the video is made again."
            )
        found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def write_table(output_dir: Path, prompts: Sequence[VideoPrompt]) -> None:
    """
    Write `candidates.csv`, a row for each candidate of each video.

    | column | meaning |
    |---|---|
    | `video`, `caption` | the video that it was a candidate for |
    | `candidate`, `seed` | its number, and the seed of its noise |
    | `copied_from`, `copied_after` | for a re-noised copy, of which candidate and after which step |
    | `dropped_after` | step after which it was dropped; empty for the winner |
    | `chosen` | 1 for the winner, else 0 |
    | `logit_step<k>` | its reward after step `k`, as logit, where it was scored |
    | `final_logit` | mean logit of the finished video, where it was scored |
    """
    records = read_candidates(output_dir, prompts)
    steps = sorted({int(step) for record in records for each in record["candidates"] for step in each["logits"]})
    rows = []
    for prompt, record in zip(prompts, records, strict=True):
        for number, each in enumerate(record["candidates"]):
            row = {"video": prompt.name, "caption": prompt.caption, "candidate": number, "seed": each["seed"]}
            row |= {name: each[name] for name in ("copied_from", "copied_after", "dropped_after")}
            row["chosen"] = int(each["dropped_after"] is None)
            row |= {f"logit_step{step}": each["logits"].get(str(step)) for step in steps}
            rows.append({**row, "final_logit": each["final_logit"]})
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(output_dir / TABLE, text.getvalue())


def write_calibration(
    output_dir: Path, prompts: Sequence[VideoPrompt], config: GenerateConfig, info: PipelineInfo
) -> dict[str, Any]:
    """
    Write `calibration.json`: how well each step's reward predicts the final one, and the cheapest `keep`.

    Returns:
        Its content: `keep`, `cost` and `share` of the cheapest schedule that keeps `calibrate_share` of best-of-N's gain,
        `rank_correlations` by step, and `schedules`, the Pareto front by cost and gain.
    """
    records = read_candidates(output_dir, prompts)
    steps = range(1, config.num_inference_steps)
    logits = np.array(
        [[[each["logits"][str(step)] for step in steps] for each in record["candidates"]] for record in records]
    )
    final = np.array([[each["final_logit"] for each in record["candidates"]] for record in records])
    front = cheapest_schedules(
        logits,
        final,
        num_inference_steps=config.num_inference_steps,
        reward_cost=reward_cost(config, info),
        num_final_timesteps=len(config.final_timesteps),
    )
    best = cheapest(front, config.calibrate_share)
    correlations = rank_correlations(logits, final)
    found = {
        "num_videos": len(records),
        "num_candidates": config.num_candidates,
        "keep": format_keep(best.keep) or None,
        **{name: round(getattr(best, name), 4) for name in ("cost", "share")},
        "rank_correlations": {step: round(float(value), 4) for step, value in zip(steps, correlations, strict=True)},
        "schedules": [{**dataclasses.asdict(each), "keep": format_keep(each.keep) or None} for each in front],
    }
    write_text(output_dir / CALIBRATION, json.dumps(found, indent=1))
    return found


def reward_cost(config: GenerateConfig, info: PipelineInfo) -> float:
    """Cost of a forward of the reward model in steps of the generator, estimated from their blocks."""
    reward_config = _reward_config(config)
    forwards = 2 if config.guidance_scale > 1 else 1
    return _block_cost(reward_config) / _block_cost(info.transformer) / forwards


def _block_cost(config: Mapping[str, Any]) -> float:
    """Approximate number of weights of the blocks, which the cost of their matrix products is proportional to."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return float(config["num_layers"] * width * (8 * width + 2 * config["ffn_dim"]))
