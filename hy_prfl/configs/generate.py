"""Options of `generate`."""

from dataclasses import dataclass, field
from typing import Literal

from .base import Config, check
from .keep import check_keep, parse_keep


# Negative prompts by name. `wan` is `sample_neg_prompt` of Wan's `wan/configs/shared_config.py`.
NEGATIVE_PROMPTS = {
    "wan": "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，"
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
}


# Attention kernels that return the log-sum-exp, which diffusers' ring attention needs. torch's own choice does not.
RING_BACKENDS = (
    "_native_cudnn",
    "_native_flash",
    "flash",
    "flash_hub",
    "flash_varlen_hub",
    "_flash_3_hub",
    "_flash_3_varlen_hub",
    "sage",
    "sage_hub",
)


@dataclass(kw_only=True)
class GenerateConfig(Config):
    """
    Options of `generate`: a file of prompts -> mp4 files and a manifest that `preprocess` and `score` read.

    > Parameters of the input and output
    > Parameters of the model
    > Parameters of the sampling
    > Parameters of candidates and reward guidance
    > Parameters of the video
    > Parameters of memory and speed
    """

    # Parameters of the input and output
    prompts: str = field(
        metadata={
            "help": "Prompts: rows {caption, id, seed, image, last_image} in JSON, JSONL or CSV; only caption is required. Or "
            "a .txt with one prompt per line. Field names of upstream's temp_prfl_infer_data.json work too."
        }
    )
    output_dir: str = field(metadata={"help": "Folder for <id>_seed_<seed>.mp4 and manifest.json."})
    seed: int | None = field(default=None, metadata={"help": "Seed of rows without their own; 0 if left out."})
    random_seed: bool = field(
        default=False,
        metadata={
            "help": "Draw the seed at random, once for an output_dir. It is recorded in generate.yaml, and the same command "
            "uses it again."
        },
    )
    num_videos_per_prompt: int = field(
        default=1, metadata={"help": "Videos for each row, with seeds seed, seed + 1, ..."}
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Replace videos that were made with other settings; without it such videos are an error."},
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
    lora_path: list[str] | None = field(
        default=None,
        metadata={
            "help": "One or several LoRAs, in any format that `convert` reads: files, folders or Hub ids. Their updates "
            "are summed."
        },
    )
    lora_weights: list[float] | None = field(
        default=None, metadata={"help": "Strength of each LoRA of lora_path, in the same order."}
    )
    transformer_2_path: str | None = field(
        default=None,
        metadata={"help": "Like transformer_path, for the low-noise expert of a pipeline with two (Wan2.2 A14B)."},
    )
    lora_2_path: list[str] | None = field(
        default=None, metadata={"help": "Like lora_path, for the low-noise expert of a pipeline with two."}
    )
    lora_2_weights: list[float] | None = field(
        default=None, metadata={"help": "Strength of each LoRA of lora_2_path, in the same order."}
    )
    lora_scale: float | None = field(
        default=None,
        metadata={"help": "One strength for all LoRAs, instead of lora_weights and lora_2_weights. 1 by default."},
    )
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16",
        metadata={"help": "Type of transformer and text encoder. VAE and image encoder always run in float32."},
    )

    # Parameters of the sampling
    sample_solver: Literal["unipc", "dpm++", "euler"] | None = field(
        default=None,
        metadata={
            "help": "UniPC, DPM-Solver++ (multistep) or Euler, with the same shift. If left out, the pipeline's own "
            "scheduler, which is UniPC for Wan."
        },
    )
    num_inference_steps: int = field(default=50, metadata={"help": "Denoising steps."})
    guidance_scale: float = field(default=5.0, metadata={"help": "Classifier-free guidance; 1 turns it off."})
    flow_shift: float | None = field(
        default=None,
        metadata={
            "help": "Shift of the noise schedule; Wan uses 3 for 480P, 5 for 720P. The pipeline's own if left out."
        },
    )
    negative_prompt: str | None = field(
        default=None,
        metadata={
            "help": "What the videos should not show. `wan` stands for the Chinese text in Wan's own code.",
            "may_be_empty": True,
        },
    )
    max_sequence_length: int = field(
        default=512, metadata={"help": "Number of tokens that the prompt is padded or cut to."}
    )

    # Parameters of candidates and reward guidance
    reward_model: str | None = field(
        default=None,
        metadata={
            "help": "Reward model that selects among candidates, or guides: a folder of train_reward, or a Hub id."
        },
    )
    reward_model_revision: str | None = field(default=None, metadata={"help": "Hub revision of the reward model."})
    reward_dtype: Literal["bfloat16", "float16", "float32"] | None = field(
        default=None, metadata={"help": "Type of the reward model; dtype if left out."}
    )
    num_candidates: int = field(
        default=1,
        metadata={"help": "Samples of each video, with seeds seed, seed + 1, ... The reward model selects one."},
    )
    keep: str | None = field(
        default=None,
        metadata={
            "help": "How many candidates continue after which step: 6:4,12:2,20:1 keeps 4 after step 6, and so on. If left "
            "out, all of them continue to the end."
        },
    )
    candidate_batch_size: int = field(
        default=1,
        metadata={
            "help": "Candidates in one batch. With 1, each candidate is bit for bit the plain sample of its seed."
        },
    )
    final_timesteps: list[int] = field(
        default_factory=lambda: [400, 600, 800],
        metadata={"help": "Noise levels, 1000 * sigma, at which candidates are scored at the end."},
    )
    resample: bool = field(
        default=False,
        metadata={"help": "Each kept candidate continues twice: unchanged, and with a part of its noise replaced."},
    )
    renoise: float = field(
        default=0.5, metadata={"help": "For resample: standard deviation of the new noise, in (0, 1]."}
    )
    reward_guidance: float | None = field(
        default=None,
        metadata={
            "help": "Add the reward's gradient to the velocity, with this norm relative to the velocity's. No guidance if left out."
        },
    )
    reward_guidance_steps: list[int] | None = field(
        default=None, metadata={"help": "First and last guided step, counted from 1. Required with reward_guidance."}
    )
    calibrate: bool = field(
        default=False,
        metadata={
            "help": "Sample all candidates to the end, score them after every step, and write the cheapest keep to "
            "calibration.json."
        },
    )
    calibrate_share: float = field(
        default=0.95, metadata={"help": "Share of best-of-N's gain in reward that this keep must reach, in (0, 1]."}
    )

    # Parameters of the video
    height: int = field(default=480, metadata={"help": "Height, a multiple of 16."})
    width: int = field(default=832, metadata={"help": "Width, a multiple of 16."})
    image_fit: Literal["crop", "area"] = field(
        default="crop",
        metadata={
            "help": "crop: images are resized and centre-cropped to height x width. area: each video has the aspect ratio "
            "of its image, and at most height * width pixels, as in Wan's own code."
        },
    )
    num_frames: int = field(default=81, metadata={"help": "Frames, 4k + 1."})
    fps: int = field(default=16, metadata={"help": "Frames per second written into the file; Wan's videos have 16."})
    crf: int = field(
        default=12, metadata={"help": "H.264 quality: 0 is lossless, 12 looks lossless, 23 is common on the web."}
    )

    # Parameters of memory and speed
    context_parallel_degree: int = field(
        default=1,
        metadata={
            "help": "Processes that make one video together, each with a share of its tokens. The number of processes and "
            "the number of tokens must be multiples of it; the number of attention heads must be a multiple of it divided "
            "by ring_degree (Ulysses)."
        },
    )
    ring_degree: int = field(
        default=1,
        metadata={
            "help": "The factor of context_parallel_degree that uses ring attention, which does not divide the heads. Needs "
            "an attention_backend that supports it."
        },
    )
    shard_weights: list[Literal["transformer", "text_encoder"]] | None = field(
        default=None,
        metadata={
            "help": "Models whose weights are sharded over the processes of a video, block by block (FSDP2). Needs a "
            "context_parallel_degree above 1."
        },
    )
    text_encoder_on_cpu: bool = field(
        default=False,
        metadata={"help": "Encode prompts on the CPU: slow, but saves GPU memory (11 GB in bfloat16)."},
    )
    attention_backend: str | None = field(
        default=None,
        metadata={
            "help": "Attention kernel of the transformers, by diffusers' name: native, _native_cudnn, flash, _flash_3_hub, "
            "sage, ... If left out, torch chooses."
        },
    )
    vae_tiling: Literal["auto", "on", "off"] = field(
        default="auto",
        metadata={
            "help": "Run the VAE in tiles, which changes the result slightly. auto does this only if a pass would not fit "
            "into free memory."
        },
    )
    cpu_offload: Literal["none", "model", "sequential"] = field(
        default="none",
        metadata={
            "help": "Keep weights in CPU memory and move them to the GPU by model (slower start) or by layer (slow, least memory)."
        },
    )
    step_cache: Literal["none", "first_block", "taylorseer", "sea"] = field(
        default="none",
        metadata={
            "help": "diffusers' step caching, which skips computations where steps hardly differ: FirstBlockCache, "
            "TaylorSeer, or SeaCache (text-to-video only). Faster, but the video changes."
        },
    )
    step_cache_threshold: float | None = field(
        default=None,
        metadata={"help": "Tolerance of first_block (0.05 if left out) or sea (0.25); larger is faster and worse."},
    )
    step_cache_interval: int | None = field(
        default=None, metadata={"help": "For taylorseer: steps between full computations (5 if left out)."}
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
        seed = 0 if self.seed is None else self.seed
        fits = 0 <= seed and seed + self.num_videos_per_prompt - 1 < 10**18
        check(fits, "seed", self.seed, "at least 0, and less than 10^18 for the last video of a row")
        check(not (self.random_seed and self.seed is not None), "seed", self.seed, "left out with `random_seed`")
        check(self.guidance_scale >= 0, "guidance_scale", self.guidance_scale, "at least 0")
        check(
            self.negative_prompt is None or self.guidance_scale > 1,
            "negative_prompt", self.negative_prompt, f"left out without guidance (`guidance_scale` {self.guidance_scale:g})",
        )  # fmt: skip
        check(self.flow_shift is None or self.flow_shift > 0, "flow_shift", self.flow_shift, "greater than 0")
        self._check_candidates()
        check(
            self.lora_scale is None or self.lora_path is not None or self.lora_2_path is not None,
            "lora_scale",
            self.lora_scale,
            "left out when there is no `lora_path` and no `lora_2_path`",
        )
        for paths_name, weights_name in (("lora_path", "lora_weights"), ("lora_2_path", "lora_2_weights")):
            paths, weights = getattr(self, paths_name), getattr(self, weights_name)
            check(
                weights is None or self.lora_scale is None,
                "lora_scale",
                self.lora_scale,
                f"left out with `{weights_name}`",
            )
            num_paths = 0 if paths is None else len(paths)
            fits = weights is None or len(weights) == num_paths
            check(fits, weights_name, weights, f"a number for each of the {num_paths} LoRAs of `{paths_name}`")
        self._check_parallelism()
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

    def _check_parallelism(self) -> None:
        """Check the options about several processes and about the place of the weights against each other."""
        degree, sharded = self.context_parallel_degree, self.shard_weights
        check(degree >= 1, "context_parallel_degree", degree, "at least 1")
        ring, kernel = self.ring_degree, self.attention_backend
        fits = ring >= 1 and degree % ring == 0
        check(fits, "ring_degree", ring, f"a divisor of `context_parallel_degree`, {degree}")
        fits = ring == 1 or kernel in RING_BACKENDS
        check(fits, "attention_backend", kernel, f"with `ring_degree` one of {', '.join(RING_BACKENDS)}")
        # Each process would skip other steps, because a cache decides by the tokens of its process; the others would hang.
        fits = degree == 1 or self.step_cache == "none"
        check(fits, "step_cache", self.step_cache, "none with `context_parallel_degree` above 1")
        check(sharded is None or degree > 1, "shard_weights", sharded, "left out with `context_parallel_degree` 1")
        fits = sharded is None or self.cpu_offload == "none"
        check(fits, "cpu_offload", self.cpu_offload, "none with `shard_weights`")
        on_cpu = self.text_encoder_on_cpu
        fits = not (on_cpu and sharded is not None and "text_encoder" in sharded)
        check(fits, "shard_weights", sharded, "without text_encoder if `text_encoder_on_cpu` is set")
        fits = not on_cpu or self.cpu_offload == "none"
        check(
            fits,
            "text_encoder_on_cpu",
            on_cpu,
            f"left out with `cpu_offload` {self.cpu_offload}, which moves the text encoder to the GPU",
        )

    @property
    def uses_reward(self) -> bool:
        """Whether an option needs a reward model."""
        return self.num_candidates > 1 or self.reward_guidance is not None

    def _check_candidates(self) -> None:
        for name in ("num_candidates", "candidate_batch_size"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        given = self.reward_model is not None
        check(given or not self.uses_reward, "reward_model", None, "given with `num_candidates` or `reward_guidance`")
        check(
            self.uses_reward or not given,
            "reward_model",
            self.reward_model,
            "left out without `num_candidates` above 1 and without `reward_guidance`",
        )
        for name in ("reward_model_revision", "reward_dtype"):
            check(given or getattr(self, name) is None, name, getattr(self, name), "left out without `reward_model`")
        several = self.num_candidates > 1
        for name in ("keep", "resample", "calibrate"):
            value = getattr(self, name)
            check(several or not value, name, value, "left out with `num_candidates` 1")
        number = self.num_videos_per_prompt
        check(not several or number == 1, "num_videos_per_prompt", number, "1 with several candidates of each video")
        check(not self.uses_reward or self.step_cache == "none", "step_cache", self.step_cache, "none with candidates")
        degree = self.context_parallel_degree
        check(
            degree == 1 or not given,
            "context_parallel_degree",
            degree,
            "1 with a `reward_model`, which needs all tokens of a video",
        )
        check(
            not (self.resample and self.keep is None),
            "resample",
            self.resample,
            "false without `keep`, whose steps it needs",
        )
        for name in ("keep", "resample", "reward_guidance"):
            value = getattr(self, name)
            check(not (self.calibrate and value), name, value, "left out with `calibrate`")
        check_keep(
            parse_keep(self.keep),
            num_candidates=self.num_candidates,
            num_inference_steps=self.num_inference_steps,
            resample=self.resample,
        )
        check(0 < self.renoise <= 1, "renoise", self.renoise, "in (0, 1]")
        check(0 < self.calibrate_share <= 1, "calibrate_share", self.calibrate_share, "in (0, 1]")
        num_steps = self.num_inference_steps
        check(not self.calibrate or num_steps >= 2, "num_inference_steps", num_steps, "at least 2 with `calibrate`")
        check(len(self.final_timesteps) > 0, "final_timesteps", self.final_timesteps, "not empty")
        for timestep in self.final_timesteps:
            check(0 < timestep <= 1000, "final_timesteps", timestep, "in (0, 1000]")
        scale, steps = self.reward_guidance, self.reward_guidance_steps
        check(scale is None or scale > 0, "reward_guidance", scale, "greater than 0, or left out")
        check(
            (scale is None) == (steps is None),
            "reward_guidance_steps",
            steps,
            "given with `reward_guidance`, and only then",
        )
        last = self.num_inference_steps
        is_range = steps is None or (len(steps) == 2 and 1 <= steps[0] <= steps[1] <= last)
        check(is_range, "reward_guidance_steps", steps, f"a first and a last step in [1, {last}]")
