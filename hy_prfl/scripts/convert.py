r"""
Converts checkpoints between the formats of diffusers, Wan, ComfyUI, kohya and upstream.

    hy-prfl convert --transformer weights/Wan2.1-T2V-14B --output_dir outputs/transformer
    hy-prfl convert --transformer outputs/prfl/transformer --output_format native --output_dir outputs/native
    hy-prfl convert --transformer weights/Wan2.2-T2V-A14B-Diffusers --merge_lora outputs/prfl --output_dir outputs/merged
    hy-prfl convert --lora outputs/prfl --output_format comfyui --output_dir outputs/comfyui
    hy-prfl convert --reward_transformer checkpoint-100 --mlp mlp_step_100.ckpt \
        --query_attention query_attention_step_100.ckpt --output_dir outputs/reward_model
    hy-prfl convert --reward_model outputs/reward/best --output_format upstream --output_dir outputs/upstream

`hy-prfl convert_recipe` converts upstream's YAML files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..configs.convert import ConvertConfig
from ..configs.inputs import check_files, check_paths
from ..configs.outputs import check_output_folders
from ..configs.parser import parse_config
from .running import run


if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


def main(argv: Sequence[str] | None = None) -> None:
    """Convert one generator, LoRA or reward model."""
    try:
        config = parse_config(ConvertConfig, argv, description=__doc__)
    except ValueError as error:
        if "is not a field" not in str(error):
            raise
        raise ValueError(f"{error} For YAML files of HY-Video-PRFL use `hy-prfl convert_recipe`.") from error
    check_paths(config, "transformer", "lora", "reward_model", "reward_transformer")
    for path in config.merge_lora or []:
        if not Path(path).exists():
            raise FileNotFoundError(f"`merge_lora`: there is no file or folder '{path}'.")
    check_files(config, "transformer_config", "mlp", "query_attention")
    check_output_folders(config, "output_dir")

    # Imported here and below, so that a misspelt option is reported before torch is loaded.
    from ..formats.weight_files import check_output_dir

    check_output_dir(config.output_dir)
    if config.transformer is not None and config.merge_lora is not None:
        print(merge_into_generator(config, config.transformer, config.merge_lora))
    elif config.transformer is not None:
        print(convert_generator(config, config.transformer))
    elif config.lora is not None:
        print(convert_lora(config, config.lora))
    else:
        print(convert_reward(config))


def convert_generator(config: ConvertConfig, path: str) -> str:
    """Read a generator in any format and write it in another."""
    from ..models.conversion import read_transformer

    transformer = read_transformer(path, config.transformer_config)
    write_generator(config, transformer, config.output_dir)
    return f"Generator with {transformer.config.num_layers} blocks, {config.output_format}: {config.output_dir}"


def write_generator(config: ConvertConfig, transformer: "WanTransformer3DModel", output_dir: str) -> None:
    """Write a generator in the format of `output_format`."""
    from ..models.conversion import save_converted, save_native

    if config.output_format == "native":
        shard_size = config.max_shard_size
        save_native(transformer, output_dir, max_shard_size=shard_size, text_len=config.text_len or 512)
    else:
        save_converted(transformer, output_dir, max_shard_size=config.max_shard_size)


def merge_into_generator(config: ConvertConfig, path: str, loras: Sequence[str]) -> str:
    """Read a generator, or those of a pipeline, merge LoRAs into them, and write those that have changed."""
    from ..formats.layout import EXPERT_FOLDERS, NATIVE_EXPERT_FOLDERS
    from ..formats.weight_files import new_folder
    from ..models.conversion import assign_loras, find_transformers, merge_loras, read_transformer

    scales = config.merge_lora_scale or [1.0]
    transformers = find_transformers(path)
    assigned = assign_loras(loras, scales if len(scales) == len(loras) else scales * len(loras), transformers)
    folders = NATIVE_EXPERT_FOLDERS if config.output_format == "native" else EXPERT_FOLDERS
    # In Wan's format, a single transformer is in the root of its repository.
    is_part = len(transformers) > 1 or (folders is EXPERT_FOLDERS and transformers["high_noise"] != Path(path))
    merged = []
    # `output_dir` appears when all transformers are written.
    with new_folder(config.output_dir) as folder:
        if not is_part:
            folder.rmdir()
        for expert, adapters in assigned.items():
            transformer = read_transformer(transformers[expert], config.transformer_config)
            merge_loras(transformer, adapters, source=", ".join(loras))
            write_generator(config, transformer, str(folder / folders[expert] if is_part else folder))
            merged.append(f"{len(adapters)} into {transformers[expert]}")
    left = [str(each) for expert, each in transformers.items() if expert not in assigned]
    untouched = f" There is no LoRA for {', '.join(left)}, so it is not written." if left else ""
    return f"LoRAs merged: {', '.join(merged)}; {config.output_format}: {config.output_dir}.{untouched}"


def convert_lora(config: ConvertConfig, path: str) -> str:
    """Read a LoRA, or one for each expert, in any format and write it in another."""
    from ..formats.lora import read_adapters
    from ..formats.lora_writing import save_adapters, upstream_use

    assert config.output_format != "native"
    adapters = read_adapters(path)
    files = save_adapters(adapters, config.output_dir, config.output_format)
    num_layers = " and of ".join(str(len(adapter.layers)) for adapter in adapters)
    num_differences = sum(len(adapter.differences) for adapter in adapters)
    differences = f" and {num_differences} differences of weights" if num_differences else ""
    use = f"\n{upstream_use(adapters[0])}" if config.output_format == "upstream" else ""
    return (
        f"LoRA of {num_layers} layers{differences}, {adapters[0].format} to {config.output_format}: "
        f"{', '.join(f'{config.output_dir}/{name}' for name in files)}{use}"
    )


def convert_reward(config: ConvertConfig) -> str:
    """Convert upstream's reward model to this package's format, or the reverse."""
    from ..models.conversion import convert_reward_model, read_diffusers, save_converted, save_reward_parts
    from ..models.reward_model import WanRewardModel

    if config.reward_model is not None:
        reward_model = read_diffusers(WanRewardModel, config.reward_model)
        save_reward_parts(reward_model, config.output_dir)
        lost = [f"{name}={reward_model.config[name]}" for name in ("task", "vae_fingerprint", "num_query_heads")]
        return f"Reward model in upstream's three parts, which do not store {', '.join(lost)}: {config.output_dir}"
    assert config.reward_transformer is not None
    assert config.mlp is not None
    assert config.query_attention is not None
    reward_model = convert_reward_model(
        config.reward_transformer,
        config.mlp,
        config.query_attention,
        num_query_heads=config.num_query_heads,
        query_residual=config.query_residual,
        task=config.task,
    )
    save_converted(reward_model, config.output_dir)
    num_layers, base_num_layers = reward_model.config.num_layers, reward_model.config.base_num_layers
    return f"Reward model with {num_layers} of {base_num_layers} blocks: {config.output_dir}"


if __name__ == "__main__":
    run(main)
