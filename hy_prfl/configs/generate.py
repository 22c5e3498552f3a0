"""Options of `generate`."""

from dataclasses import dataclass, field
from typing import Literal

from .base import Config, check


@dataclass(kw_only=True)
class GenerateConfig(Config):
    """
    Options of `generate`: a file of prompts -> mp4 files and a manifest that `preprocess` and `score` read.

    > Parameters of the input and output
    > Parameters of the model
    > Parameters of the sampling
    > Parameters of the video
    > Parameters of memory and speed
    """

    # Parameters of the input and output
    prompts: str = field(
        metadata={
            "help": "Prompts: rows {caption, id, seed, image, last_image} in JSON, JSONL or CSV, of which only caption is "
            "required, or a .txt with one prompt per line. Field names of upstream's temp_prfl_infer_data.json work too."
        }
    )
    output_dir: str = field(metadata={"help": "Folder for <id>_seed_<seed>.mp4 and manifest.json."})
    seed: int = field(default=0, metadata={"help": "Seed of rows without one."})
    num_videos_per_prompt: int = field(
        default=1, metadata={"help": "Videos per row, with the seeds seed, seed + 1, ..."}
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Make videos again that were made with other settings; without it that is an error."},
    )

    # Parameters of the model
    pretrained_model_name_or_path: str = field(
        metadata={"help": "Diffusers Wan pipeline, text- or image-to-video: a local folder or a Hub id."}
    )
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the pipeline."})
    variant: str | None = field(default=None, metadata={"help": "Variant of the pipeline's weight files, e.g. fp16."})
    transformer_path: str | None = field(
        default=None, metadata={"help": "Fully fine-tuned transformer that replaces the pipeline's: folder or Hub id."}
    )
    lora_path: str | None = field(
        default=None, metadata={"help": "LoRA, in any format that `convert` reads: a file, a folder or a Hub id."}
    )
    transformer_2_path: str | None = field(
        default=None,
        metadata={"help": "The same for the low-noise expert of a pipeline with two experts (Wan2.2 A14B)."},
    )
    lora_2_path: str | None = field(
        default=None, metadata={"help": "LoRA of the low-noise expert of a pipeline with two experts."}
    )
    lora_scale: float | None = field(default=None, metadata={"help": "Strength of the LoRAs; 1 if left out."})
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16",
        metadata={"help": "Type of transformer and text encoder. VAE and image encoder always run in float32."},
    )

    # Parameters of the sampling
    num_inference_steps: int = field(default=50, metadata={"help": "Denoising steps."})
    guidance_scale: float = field(default=5.0, metadata={"help": "Classifier-free guidance; 1 turns it off."})
    flow_shift: float | None = field(
        default=None,
        metadata={
            "help": "Shift of the noise schedule; Wan uses 3 for 480P, 5 for 720P. The pipeline's own if left out."
        },
    )
    negative_prompt: str | None = field(
        default=None, metadata={"help": "Text of what the videos should not show.", "may_be_empty": True}
    )
    max_sequence_length: int = field(default=512, metadata={"help": "Text tokens the prompt is padded or cut to."})

    # Parameters of the video
    height: int = field(
        default=480, metadata={"help": "Height, a multiple of 16. Images are resized and centre-cropped."}
    )
    width: int = field(default=832, metadata={"help": "Width, a multiple of 16."})
    num_frames: int = field(default=81, metadata={"help": "Frames, 4k + 1."})
    fps: int = field(default=16, metadata={"help": "Frames per second written into the file; Wan's videos have 16."})
    crf: int = field(
        default=12, metadata={"help": "H.264 quality: 0 is lossless, 12 looks lossless, 23 is common on the web."}
    )

    # Parameters of memory and speed
    vae_tiling: Literal["auto", "on", "off"] = field(
        default="auto",
        metadata={
            "help": "Let the VAE work in tiles, which changes the result slightly: auto does so if a pass would not fit into "
            "free memory."
        },
    )
    cpu_offload: Literal["none", "model", "sequential"] = field(
        default="none",
        metadata={
            "help": "Keep weights in CPU memory: whole models (slower start) or single layers (slow, least memory)."
        },
    )
    step_cache: Literal["none", "first_block", "taylorseer", "sea"] = field(
        default="none",
        metadata={
            "help": "diffusers' step caching, which skips work where steps hardly differ: FirstBlockCache, TaylorSeer, "
            "or SeaCache (text-to-video only). Faster, but not the same video."
        },
    )
    step_cache_threshold: float | None = field(
        default=None,
        metadata={"help": "Tolerance of first_block (0.05 if left out) or sea (0.25); larger is faster and worse."},
    )
    step_cache_interval: int | None = field(
        default=None, metadata={"help": "taylorseer: steps from one full computation to the next (5 if left out)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.crf >= 0, "crf", self.crf, "at least 0")
        for name in ("num_videos_per_prompt", "num_inference_steps", "max_sequence_length", "fps"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(self.crf <= 51, "crf", self.crf, "at most 51")
        for name in ("height", "width"):
            value = getattr(self, name)
            check(value >= 16 and value % 16 == 0, name, value, "a positive multiple of 16")
        check(self.num_frames >= 1 and self.num_frames % 4 == 1, "num_frames", self.num_frames, "4k + 1")
        last = self.seed + self.num_videos_per_prompt - 1
        fits = 0 <= self.seed and last < 10**18
        check(fits, "seed", self.seed, "at least 0, and less than 10^18 for the last video of a row")
        check(self.guidance_scale >= 0, "guidance_scale", self.guidance_scale, "at least 0")
        check(self.flow_shift is None or self.flow_shift > 0, "flow_shift", self.flow_shift, "greater than 0")
        check(
            self.lora_scale is None or self.lora_path is not None or self.lora_2_path is not None,
            "lora_scale",
            self.lora_scale,
            "left out when there is no `lora_path` and no `lora_2_path`",
        )
        check(
            self.step_cache_threshold is None or self.step_cache in ("first_block", "sea"),
            "step_cache_threshold",
            self.step_cache_threshold,
            "left out unless `step_cache` is first_block or sea",
        )
        check(
            self.step_cache_interval is None or self.step_cache == "taylorseer",
            "step_cache_interval",
            self.step_cache_interval,
            "left out unless `step_cache` is taylorseer",
        )
        check(
            self.step_cache_threshold is None or self.step_cache_threshold > 0,
            "step_cache_threshold",
            self.step_cache_threshold,
            "greater than 0",
        )
        check(
            self.step_cache_interval is None or self.step_cache_interval >= 2,
            "step_cache_interval",
            self.step_cache_interval,
            "at least 2",
        )
