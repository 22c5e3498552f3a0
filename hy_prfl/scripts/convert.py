r"""
Converts checkpoints of upstream's and Wan's own format.

    python -m hy_prfl.scripts.convert --reward_transformer checkpoint-100 --mlp mlp_step_100.ckpt \
        --query_attention query_attention_step_100.ckpt --output_dir outputs/reward_model
    python -m hy_prfl.scripts.convert --transformer weights/Wan2.1-T2V-14B --output_dir outputs/transformer
"""

from collections.abc import Sequence

from ..configs.convert import ConvertConfig
from ..configs.parser import parse_config
from ..models.conversion import check_output_dir, convert_reward_model, convert_transformer, save_converted


def main(argv: Sequence[str] | None = None) -> None:
    """Convert one checkpoint."""
    config = parse_config(ConvertConfig, argv, description=__doc__)
    check_output_dir(config.output_dir)
    if config.transformer is not None:
        transformer = convert_transformer(config.transformer)
        save_converted(transformer, config.output_dir)
        print(f"Generator with {transformer.config.num_layers} blocks: {config.output_dir}")
        return
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
    print(
        f"Reward model with {reward_model.config.num_layers} of {reward_model.config.base_num_layers} blocks: "
        f"{config.output_dir}"
    )


if __name__ == "__main__":
    main()
