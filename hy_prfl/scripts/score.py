r"""
Scores videos, or the rows of a latent dataset, with a reward model.

    accelerate launch -m hy_prfl.scripts.score --reward_model outputs/reward/best --output outputs/scores.csv \
        --manifest outputs/videos/manifest.json --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers

Run the same command again to continue after a stop.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..configs.clips import FILE_IDENTITIES
from ..configs.inputs import check_files, check_sources
from ..configs.outputs import check_output_files
from ..configs.parser import parse_config
from ..configs.score import ScoreConfig
from .running import run


def main(argv: Sequence[str] | None = None) -> None:
    """Score the clips that are not scored yet."""
    config = parse_config(ScoreConfig, argv, description=__doc__)
    check_files(config, "manifest")
    check_sources(config, "reward_model", "dataset", "pretrained_model_name_or_path")
    check_output_files(config, "output")

    # Imported here, so that a misspelt option is reported before torch is loaded.
    import torch

    from ..data.dataset import load_latent_dataset
    from ..data.encoding import LatentEncoder
    from ..data.finished import request_digest
    from ..data.manifest import read_manifest
    from ..data.preprocessing import ClipSettings
    from ..data.shared_hashing import hash_files
    from ..data.video import parse_size
    from ..evaluation.score_table import is_scored, summary_path
    from ..evaluation.scoring import score_dataset, score_manifest
    from ..models.loading import load_reward_model, read_reward_config
    from ..runtime.distributed import process_state
    from ..runtime.messages import set_up_logging
    from ..runtime.provenance import path_identity, save_config

    set_up_logging()
    state = process_state()
    # Identify models and datasets by their files, not by their paths.
    request = {**dataclasses.asdict(config), "output": None, "overwrite": None}
    for name in ("reward_model", "dataset", "pretrained_model_name_or_path"):
        request[name] = None if request[name] is None else path_identity(request[name])
    if config.manifest is None:
        dataset = load_latent_dataset(str(config.dataset))
    else:
        rows = read_manifest(config.manifest)
        state.print(f"Changed files are detected by {FILE_IDENTITIES[config.file_identity]} (`file_identity`).")
        hashes = None
        if config.file_identity == "content":
            hashes = hash_files(path for row in rows for path in row.files)
        request["manifest"] = request_digest(rows, {}, hashes=hashes)
    if not is_scored(config.output, request, overwrite=config.overwrite):
        read_reward_config(config.reward_model, option="reward_model", revision=config.reward_model_revision)
        reward_model = load_reward_model(
            config.reward_model, revision=config.reward_model_revision, dtype=getattr(torch, config.dtype)
        ).to(state.device)
        options: dict[str, Any] = {
            "num_noise_samples": config.num_noise_samples,
            "seed": config.seed,
            "request": request,
        }
        if config.manifest is None:
            options["batch_size"] = config.batch_size
            score_dataset(reward_model, dataset, config.output, config.timesteps, **options)
        else:
            encoder = LatentEncoder.from_pretrained(
                str(config.pretrained_model_name_or_path),
                revision=config.revision,
                variant=config.variant,
                dtype=getattr(torch, config.text_encoder_dtype),
                device=state.device,
                max_sequence_length=config.max_sequence_length,
                vae_tiling=config.vae_tiling,
            )
            options["clip_settings"] = ClipSettings(
                fps=config.fps,
                num_frames=config.num_frames,
                min_num_frames=config.min_num_frames or config.num_frames,
                buckets=tuple(parse_size(size) for size in config.buckets),
                resolution=config.resolution,
                max_aspect_ratio=config.max_aspect_ratio,
                hdr=config.hdr,
                max_frame_duration=config.max_frame_duration,
                clock_jumps=config.clock_jumps,
            )
            score_manifest(reward_model, encoder, rows, config.output, config.timesteps, **options)
    if state.is_main_process:
        save_config(config, Path(f"{config.output}.yaml"))
        summary = json.loads(summary_path(config.output).read_text(encoding="utf-8"))
        print(f"{summary['num_scored']} of {summary['num_clips']} clips scored: {config.output}")
        for name, value in (summary["rewards"] | summary["metrics"]).items():
            print(f"  {name}: {value:.4f}")


if __name__ == "__main__":
    run(main)
