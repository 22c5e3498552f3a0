"""
Makes videos with two processes, one after the other in one launch, because to start the processes takes longest.

    accelerate launch --config_file accelerate_configs/ddp_cpu.yaml tests/inference/two_processes.py <folder>

The folder has pipelines below `pipelines/`, LoRAs, an image and prompts. `results.json` gets, for each case, how far the
latents are from those of one process, and how much of the weights a process has.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import WanPipeline
from PIL import Image
from torch import nn

from hy_prfl.data.prompts import VideoPrompt
from hy_prfl.inference.generation import generate_videos
from hy_prfl.inference.pipelines import load_pipeline
from hy_prfl.inference.video_files import VideoSettings
from hy_prfl.runtime.context_parallel import ContextParallelGroup
from hy_prfl.runtime.distributed import leave_processes, process_state
from hy_prfl.scripts.generate import main


SIZE = {"height": 32, "width": 64, "num_frames": 5, "num_inference_steps": 3, "max_sequence_length": 16}
BOTH = ("transformer", "text_encoder")


def sample(pipeline: Any, folder: Path) -> torch.Tensor:
    """Latents of a video."""
    images = {} if isinstance(pipeline, WanPipeline) else {"image": Image.open(folder / "first.png")}
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    options = {"prompt": "a red circle", "negative_prompt": "blue", "guidance_scale": 3.0, **SIZE, **images}
    return pipeline(generator=generator, output_type="latent", **options).frames


def own_share(model: nn.Module) -> float:
    """Share of a model's weights that this process has."""
    weights = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in model.parameters()]
    return sum(weight.numel() for weight in weights) / sum(weight.numel() for weight in model.parameters())


def compare(folder: Path, group: ContextParallelGroup, kind: str, **options: Any) -> dict[str, float]:
    """A pipeline on two processes against the same on one."""
    path = str(folder / "pipelines" / kind)
    shards, offload = options.pop("shard_weights", ()), options.pop("offload", None)
    alone = load_pipeline(path, dtype=torch.float32, **options)
    together = load_pipeline(path, dtype=torch.float32, context_parallel=group, shard_weights=shards, **options)
    # What pipelines of diffusers do with a GPU.
    if offload == "model":
        cpu_offload_with_hook(together.transformer, "cpu")
    elif offload == "sequential":
        cpu_offload(together.transformer, "cpu")
    tokens = []
    hook = together.transformer.blocks[1].ffn.register_forward_hook(lambda *call: tokens.append(call[1][0].shape[1]))
    expected, found = sample(alone, folder), sample(together, folder)
    hook.remove()
    return {
        "error": (found - expected).abs().max().item(),
        "scale": expected.abs().max().item(),
        "tokens": tokens[0],
        "transformer": own_share(together.transformer),
        "text_encoder": own_share(together.text_encoder),
    }


# The kernel of torch's flash attention for CUDA, which diffusers calls by name to get the log-sum-exp of a part.
LIBRARY = torch.library.Library("aten", "IMPL")


def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any) -> Any:
    """Attention over `(batch_size, num_heads, num_tokens, head_dim)` and its log-sum-exp, as formulas say."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    none = torch.empty(0)
    return (scores.softmax(-1) @ value, scores.logsumexp(-1), none, none, key.shape[2], key.shape[2], none, none, none)


def run_all(folder: Path) -> None:
    """Run all cases."""
    state = process_state()
    group = ContextParallelGroup(2)
    loras = {"lora_path": [str(folder / "a.safetensors"), str(folder / "b.safetensors")], "lora_weights": [1.0, 0.5]}
    results = {
        "t2v": compare(folder, group, "t2v"),
        "t2v, shards": compare(folder, group, "t2v", shard_weights=BOTH, sample_solver="dpm++", **loras),
        "t2v, model offload": compare(folder, group, "t2v", offload="model"),
        "t2v, sequential offload": compare(folder, group, "t2v", offload="sequential"),
        "i2v": compare(folder, group, "i2v", shard_weights=["transformer"]),
        "a14b": compare(folder, group, "a14b", shard_weights=BOTH, **loras),
        "5b": compare(folder, group, "5b", shard_weights=BOTH),
    }
    # A view with gaps, as the gradient of the first channels of a batch is.
    values = torch.arange(24.0).view(2, 3, 4)
    mean = group.mean(((1 + state.process_index) * values)[:, :2])
    results["mean of a view"] = {"error": (mean - 1.5 * values[:, :2]).abs().max().item()}
    LIBRARY.impl("_scaled_dot_product_flash_attention", flash_attention, "CPU")
    ring = ContextParallelGroup(2, ring_degree=2)
    results["t2v, ring"] = compare(folder, ring, "t2v", attention_backend="_native_flash")
    results["i2v, ring"] = compare(folder, ring, "i2v", attention_backend="_native_flash", shard_weights=BOTH)
    if state.is_main_process:
        (folder / "results.json").write_text(json.dumps(results))

    # A folder for each process shows who writes.
    pipeline = load_pipeline(str(folder / "pipelines" / "t2v"), dtype=torch.float32, context_parallel=group)
    prompts = [VideoPrompt(id=name, caption=f"a {name} circle") for name in ("red", "blue")]
    output_dir = folder / f"rank-{state.process_index}"
    generate_videos(pipeline, prompts, output_dir, VideoSettings(**SIZE), context_parallel=group)

    size = [f"--{name}={value}" for name, value in SIZE.items()]
    common = [f"--prompts={folder / 'prompts.json'}", "--dtype=float32", *size]
    common += [f"--pretrained_model_name_or_path={folder / 'pipelines' / 't2v'}"]
    together = ["--context_parallel_degree=2", "--shard_weights", *BOTH]
    for _ in range(2):
        main([*common, f"--output_dir={folder / 'together'}", *together])
    main([*common, f"--output_dir={folder / 'random'}", "--random_seed"])


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
    leave_processes()
