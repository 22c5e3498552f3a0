"""The code on a model card that loads the model. It runs as it is shown."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..formats.layout import EXPERT_FOLDERS, LORA_FILES, ExpertName
from ..formats.pipeline_info import PipelineInfo


ModelKind = Literal["reward", "lora", "transformer"]

# Tokens of one image in Wan's CLIP. For a transformer that takes two images, the number is in its configuration.
NUM_IMAGE_TOKENS = 257
# Defaults of the model class, for sizes that are missing in a configuration.
DEFAULT_SIZES = {"in_channels": 16, "out_channels": 16, "text_dim": 4096}


def usage(
    kind: ModelKind,
    repo_id: str,
    config: Mapping[str, Any],
    model_config: Mapping[str, Any],
    pipeline: PipelineInfo | None,
    experts: Sequence[ExpertName] = ("high_noise",),
) -> str:
    """
    Python code that loads a model and shows how to call it. If the pipeline is unknown, it loads only the model.

    Args:
        repo_id (`str`):
            Repository of the model, `user/name`, or its path.
        config (`Mapping[str, Any]`):
            Options of the run. Its pipeline, revision and variant are used.
        model_config (`Mapping[str, Any]`):
            Configuration of the reward model or the transformer, empty for a LoRA.
        pipeline (`PipelineInfo`, *optional*):
            The pipeline. If it is unknown, diffusers chooses the class.
        experts (`Sequence[str]`, defaults to `("high_noise",)`):
            The experts that the repository has weights for.
    """
    if kind == "reward":
        return _reward_usage(repo_id, model_config)
    class_name = "DiffusionPipeline" if pipeline is None else pipeline.pipeline_class.__name__
    options = {name: config[name] for name in ("revision", "variant") if config.get(name)}
    base = config.get("pretrained_model_name_or_path")
    if not base:
        return _usage_without_pipeline(kind, repo_id, experts)
    arguments = [_quote(str(base)), *(f"{name}={_quote(str(value))}" for name, value in options.items())]
    inputs = ""
    if pipeline is not None and pipeline.is_image_to_video:
        inputs = "image=image, last_image=last_image, " if pipeline.last_image == "required" else "image=image, "
    call = f'# Then, on a GPU: video = pipeline({inputs}prompt="...").frames[0]'
    if kind == "lora":
        loads = []
        for expert in experts:
            into = ", load_into_transformer_2=True" if expert == "low_noise" else ""
            loads.append(f'pipeline.load_lora_weights({_quote(repo_id)}, weight_name="{LORA_FILES[expert]}"{into})')
        load = f"pipeline = {class_name}.from_pretrained({', '.join(arguments)})"
        return "\n".join([f"from diffusers import {class_name}\n", load, *loads, call])
    folders = [EXPERT_FOLDERS[expert] for expert in experts]
    tuned = [
        f'{name} = WanTransformer3DModel.from_pretrained({_quote(repo_id)}, subfolder="{name}")' for name in folders
    ]
    arguments += [f"{name}={name}" for name in folders]
    load = f"pipeline = {class_name}.from_pretrained({', '.join(arguments)})"
    return "\n".join([f"from diffusers import {class_name}, WanTransformer3DModel\n", *tuned, load, call])


def _usage_without_pipeline(kind: ModelKind, repo_id: str, experts: Sequence[ExpertName]) -> str:
    loads, uses = [], []
    for expert in experts:
        name = EXPERT_FOLDERS[expert]
        if kind == "lora":
            lora, into = ("lora_2", ", load_into_transformer_2=True") if expert == "low_noise" else ("lora", "")
            source = f'{_quote(repo_id)}, weight_name="{LORA_FILES[expert]}"'
            loads.append(f"{lora} = WanPipeline.lora_state_dict({source})")
            uses.append(
                f"# Then load it into the pipeline that it was trained on: pipeline.load_lora_weights({lora}{into})"
            )
        else:
            loads.append(f'{name} = WanTransformer3DModel.from_pretrained({_quote(repo_id)}, subfolder="{name}")')
            uses.append(f"# Then pass {name}={name} to `from_pretrained` of the pipeline that it was made from.")
    class_name = "WanPipeline" if kind == "lora" else "WanTransformer3DModel"
    return "\n".join([f"from diffusers import {class_name}\n", *loads, *uses])


def _reward_usage(repo_id: str, config: Mapping[str, Any]) -> str:
    config = DEFAULT_SIZES | dict(config)
    channels, condition_channels = config["out_channels"], config["in_channels"] - config["out_channels"]
    size = "5, 16, 16"
    lines = [
        "import torch",
        "from hy_prfl import WanRewardModel\n",
        f"reward_model = WanRewardModel.from_pretrained({_quote(repo_id)}).eval()\n",
        "# Random numbers of the right shapes: use a clip instead. Latents are (clips, channels, frames, height, width).",
        f"noisy_latents = torch.randn(1, {channels}, {size})",
        "timesteps = torch.tensor([500.0])  # 1000 * sigma of each clip, anywhere in [0, 1000]",
        f"prompt_embeds = torch.randn(1, 512, {config['text_dim']})  # from the text encoder, padded with zeros",
    ]
    inputs = ["noisy_latents", "timesteps", "prompt_embeds"]
    if condition_channels:
        inputs[0] = "torch.cat([noisy_latents, condition], dim=1)"
        lines.append(
            f"condition = torch.randn(1, {condition_channels}, {size})  # mask and latents of the given image"
        )
    if config.get("image_dim") is not None:
        both = config.get("pos_embed_seq_len")
        shape, of = (1, NUM_IMAGE_TOKENS), "the image"
        if both is not None:
            shape, of = (2, both // 2), "the first and the last image"
        lines.append(f"image_embeds = torch.randn{(*shape, config['image_dim'])}  # of {of}, from the image encoder")
        inputs.append("image_embeds")
    call = f"    logits = reward_model({', '.join(inputs)}).logits"
    return "\n".join([*lines, "with torch.no_grad():", call, "reward = logits.sigmoid()  # in (0, 1)"])


def _quote(text: str) -> str:
    """A Python string literal in double quotes. Keeps the backslashes of Windows paths."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
