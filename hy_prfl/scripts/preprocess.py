r"""
Encodes clips into a latent dataset.

    accelerate launch -m hy_prfl.scripts.preprocess --config examples/preprocess/wan2.1_t2v_480p.yaml
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..configs.clips import FILE_IDENTITIES
from ..configs.inputs import check_files, check_paths, check_sources
from ..configs.outputs import check_output_folders
from ..configs.parser import parse_config
from ..configs.preprocess import PreprocessConfig
from .running import run


if TYPE_CHECKING:
    from ..data.preprocessing import ClipSettings


# Options that the rows of the dataset do not depend on.
NOT_REQUESTED = ("output_dir", "manifest", "upstream_meta", "shard_size", "batch_size", "num_workers", "overwrite")


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(PreprocessConfig, argv, description="Encode clips, or import upstream's, into a dataset.")
    check_files(config, "manifest", "null_prompt_path")
    check_paths(config, "upstream_meta")
    check_sources(config, "pretrained_model_name_or_path")
    check_output_folders(config, "output_dir")

    # Imported here, so that a misspelt option is reported before torch is loaded.
    import torch

    from ..data.encoding import LatentEncoder, local_encoder_files
    from ..data.finished import REPORT_FILE, is_complete, request_digest
    from ..data.manifest import ManifestRow, read_manifest
    from ..data.preprocessing import ClipEncoder
    from ..data.shared_hashing import hash_files
    from ..data.store import RowEncoder, build_dataset
    from ..data.upstream import UpstreamImporter, read_upstream
    from ..formats.pipeline_info import PipelineInfo
    from ..runtime.distributed import process_state
    from ..runtime.messages import set_up_logging

    set_up_logging()
    # 1. Fast checks: settings, rows, output folder
    settings = build_settings(config)
    info = PipelineInfo.read(config.pretrained_model_name_or_path, config.revision)
    settings.check_pipeline(is_image_to_video=info.is_image_to_video)
    rows: Sequence[ManifestRow]
    if config.manifest is not None:
        rows = read_manifest(config.manifest, require_video=not config.prompts_only)
    elif config.upstream_meta is not None:
        rows = read_upstream(config.upstream_meta, config.upstream_root)
    output_dir = Path(config.output_dir).resolve()
    request = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_REQUESTED}
    files = local_encoder_files(config.pretrained_model_name_or_path)
    if config.null_prompt_path is not None:
        files.append(Path(config.null_prompt_path))
    state = process_state()
    state.print(f"Changed files are detected by {FILE_IDENTITIES[config.file_identity]} (`file_identity`).")
    hashes = None
    if config.file_identity == "content":
        hashes = hash_files([*files, *(path for row in rows for path in row.files)])
    digest = request_digest(rows, request, files, hashes)
    # A finished dataset may be checked again with another `file_identity`.
    stored = {name: value for name, value in request.items() if name != "file_identity"}
    paths = ("pretrained_model_name_or_path", "upstream_root", "null_prompt_path")
    stored |= {
        name: str(Path(stored[name]).resolve()) for name in paths if stored[name] and Path(stored[name]).exists()
    }
    if is_complete(output_dir, digest, stored, rows, overwrite=config.overwrite):
        state.print(f"'{output_dir}' is complete, nothing to do.")
        return

    # 2. Encoders
    encoder = LatentEncoder.from_pretrained(
        info,
        variant=config.variant,
        dtype=getattr(torch, config.text_encoder_dtype),
        device=state.device,
        max_sequence_length=config.max_sequence_length,
        vae_tiling=config.vae_tiling,
    )
    clips: RowEncoder = ClipEncoder(encoder, settings, hashes)
    if config.upstream_meta is not None:
        clips = UpstreamImporter(encoder, config.fps, config.tensor_dtype, config.null_prompt_path, hashes)

    # 3. Rows
    summary = build_dataset(
        rows,
        clips,
        output_dir,
        digest=digest,
        settings=stored,
        tensor_dtype=config.tensor_dtype,
        shard_size=config.shard_size,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        overwrite=config.overwrite,
    )
    if summary is not None:
        dropped = f", dropped {summary.num_dropped}" if summary.num_dropped else ""
        print(
            f"'{output_dir}': clips {summary.num_rows}, encoded now {summary.num_encoded}, bad {summary.num_bad}{dropped}."
        )
        if summary.num_bad:
            print(f"Bad clips are left out; the reasons are in '{output_dir / REPORT_FILE}'.")
        elif (output_dir / REPORT_FILE).stat().st_size:
            print(f"Remarks on clips are in '{output_dir / REPORT_FILE}'.")


def build_settings(config: PreprocessConfig) -> "ClipSettings":
    from ..data.preprocessing import ClipSettings
    from ..data.video import parse_size

    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(ClipSettings)}
    options["buckets"] = tuple(parse_size(size) for size in config.buckets)
    options["min_num_frames"] = config.num_frames if config.min_num_frames is None else config.min_num_frames
    return ClipSettings(**options)


if __name__ == "__main__":
    run(main)
