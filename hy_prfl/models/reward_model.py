"""PAVRM, the process-aware video reward model: the first blocks of a Wan transformer, a pooling and a head."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, WanTransformer3DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.transformers.transformer_wan import (
    WanRotaryPosEmbed,
    WanTimeTextImageEmbedding,
    WanTransformerBlock,
)
from huggingface_hub import metadata_load, metadata_save
from torch import nn
from transformers.utils import ModelOutput

from ..flow_matching import add_noise, sigmas_to_timesteps
from ..formats.weight_files import check_finite
from ..losses import binary_reward_loss, bradley_terry_loss
from ..runtime.context_parallel import TokenGather
from .conditioning import Conditioning
from .reward_head import PoolingType, RewardHead, build_pooling


# Configuration entries that a reward model takes from the transformer it is made from.
BACKBONE_CONFIG = (
    "patch_size",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "text_dim",
    "freq_dim",
    "ffn_dim",
    "cross_attn_norm",
    "qk_norm",
    "eps",
    "image_dim",
    "added_kv_proj_dim",
    "rope_max_seq_len",
    "pos_embed_seq_len",
)


@dataclass
class WanRewardModelOutput(ModelOutput):
    """
    Output of [`WanRewardModel`].

    It is transformers' `ModelOutput`: under autocast, Accelerate builds a new output object from a mapping, and that
    fails with diffusers' `BaseOutput`.

    Args:
        logits (`torch.Tensor` of shape `(batch_size,)`):
            Unbounded scores in float32; `logits.sigmoid()` is the reward in (0, 1).
        features (`torch.Tensor` of shape `(batch_size, num_tokens, dim)`, *optional*):
            Tokens after the last block, before pooling. Only with `output_features`, because Accelerate would copy
            them to float32.
    """

    logits: torch.Tensor
    features: torch.Tensor | None = None


class WanRewardModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin):
    r"""
    Scores *noisy latents* at any timestep. The score is the logit of the probability that the clean clip is good
    (paper, equations 4 to 6).

    Embeddings and blocks have the same names as in [`~diffusers.WanTransformer3DModel`]. `norm_out` and `proj_out` are
    dropped.

    Args:
        num_layers (`int`, defaults to 8):
            Number of transformer blocks that are kept.
        base_num_layers (`int`, *optional*):
            Number of blocks of the transformer that this model was made from. It differs between 14B and 1.3B.
        pooling (`"query"`, `"mean"` or `"max"`, defaults to `"query"`):
            How the tokens become one vector.
        num_query_heads (`int`, defaults to 8):
            Heads of the query attention.
        query_residual (`bool`, defaults to `True`):
            Add the query to the pooled vector.
        head_dims (`tuple[int, int]`, defaults to `(1024, 512)`):
            Hidden widths of the head.
        task (`str`, defaults to `"motion_quality"`):
            Name of the label that the logit predicts.
        vae_fingerprint (`str`, *optional*):
            Identity of the VAE whose latents it was trained on. Latents of another VAE are an error.

    The other arguments are those of `WanTransformer3DModel`.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["patch_embedding", "condition_embedder", "norm", "head"]
    _no_split_modules = ["WanTransformerBlock"]
    _keep_in_fp32_modules = ["rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3", "head"]
    _repeated_blocks = ["WanTransformerBlock"]
    _cp_plan = {
        "rope": {
            0: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True),
            1: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True),
        },
        "blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)},
        "token_gather": ContextParallelOutput(gather_dim=1, expected_dims=3),
        "token_timesteps": {0: ContextParallelInput(split_dim=1, expected_dims=2, split_output=True)},
    }

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 8,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        base_num_layers: int | None = None,
        pooling: PoolingType = "query",
        num_query_heads: int = 8,
        query_residual: bool = True,
        head_dims: tuple[int, int] = (1024, 512),
        task: str = "motion_quality",
        vae_fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"`num_layers` must be at least 1, got {num_layers}.")
        inner_dim = num_attention_heads * attention_head_dim

        # 1. Patch & position embedding
        self.rope = WanRotaryPosEmbed(attention_head_dim, patch_size, rope_max_seq_len)
        self.patch_embedding = nn.Conv3d(in_channels, inner_dim, kernel_size=patch_size, stride=patch_size)

        # 2. Condition embeddings
        self.condition_embedder = WanTimeTextImageEmbedding(
            dim=inner_dim,
            time_freq_dim=freq_dim,
            time_proj_dim=inner_dim * 6,
            text_embed_dim=text_dim,
            image_embed_dim=image_dim,
            pos_embed_seq_len=pos_embed_seq_len,
        )

        # A hook point for timesteps per token: under context parallelism each rank takes those of its own tokens.
        self.token_timesteps = nn.Identity()

        # 3. Transformer blocks
        self.blocks = nn.ModuleList(
            [
                WanTransformerBlock(
                    inner_dim, ffn_dim, num_attention_heads, qk_norm, cross_attn_norm, eps, added_kv_proj_dim
                )
                for _ in range(num_layers)
            ]
        )

        # 4. Pooling & head, on all tokens
        self.token_gather = TokenGather()
        self.reset_head()

        self.gradient_checkpointing = False

    def reset_head(self) -> None:
        """Replace pooling and head by new ones with random weights."""
        config = self.config
        dim = config.num_attention_heads * config.attention_head_dim
        self.pooler = build_pooling(
            config.pooling, dim, num_heads=config.num_query_heads, residual=config.query_residual
        )
        self.head = RewardHead(dim, hidden_dims=(config.head_dims[0], config.head_dims[1]))

    @classmethod
    def from_transformer(
        cls, transformer: WanTransformer3DModel, num_layers: int = 8, **kwargs: Any
    ) -> "WanRewardModel":
        """
        Make a reward model from the first blocks of a generator. Weights are copied; pooling and head are new.

        Args:
            transformer (`WanTransformer3DModel`):
                The generator.
            num_layers (`int`, defaults to 8):
                Number of blocks to keep.
            kwargs:
                Any other argument of the constructor (`pooling`, `task`, `vae_fingerprint`, ...).

        Raises:
            ValueError: If the transformer has fewer than `num_layers` blocks.
        """
        if num_layers > transformer.config.num_layers:
            raise ValueError(
                f"`num_layers` is {num_layers}, but the transformer has only {transformer.config.num_layers} blocks."
            )
        backbone = {name: transformer.config[name] for name in BACKBONE_CONFIG}
        model = cls(**backbone, num_layers=num_layers, base_num_layers=transformer.config.num_layers, **kwargs)
        model.patch_embedding.load_state_dict(transformer.patch_embedding.state_dict())
        model.condition_embedder.load_state_dict(transformer.condition_embedder.state_dict())
        for block, source in zip(model.blocks, transformer.blocks[:num_layers], strict=True):
            block.load_state_dict(source.state_dict())
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> Any:
        """
        Load a reward model from a folder or the Hub. The arguments are those of `ModelMixin.from_pretrained`.

        Raises:
            ValueError: If the folder holds another kind of model, or a weight is missing, left over or not finite.
                diffusers would only warn about the weights, and the model would score with an untrained head.
        """
        cls.load_own_config(pretrained_model_name_or_path, **_config_options(kwargs))
        return_loading_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[problem]:
                keys = ", ".join(str(key) for key in list(info[problem])[:5])
                raise ValueError(f"{pretrained_model_name_or_path}: {len(info[problem])} {problem}, such as {keys}.")
        # Rewards can be finite although a weight is NaN: attention can hide it.
        check_finite(model.named_parameters(), source=str(pretrained_model_name_or_path))
        return (model, info) if return_loading_info else model

    def _upload_folder(self, working_dir: str | Path, repo_id: str, **kwargs: Any) -> Any:
        # diffusers uploads through this method, with `library_name: diffusers` in the card. The Hub would then show
        # code that loads the repository as a pipeline, which it is not.
        card = Path(working_dir) / "README.md"
        data = (metadata_load(card) or {}) if card.is_file() else {}
        if data.get("library_name") == "diffusers":
            metadata_save(card, {**data, "library_name": "hy-prfl"})
        return super()._upload_folder(working_dir, repo_id, **kwargs)

    @classmethod
    def load_own_config(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> dict[str, Any]:
        """
        Load the configuration of a reward model, as `load_config` does.

        Raises:
            ValueError: If it is the configuration of another kind of model.
        """
        config = cls.load_config(pretrained_model_name_or_path, **kwargs)
        if config.get("_class_name") != cls.__name__:
            raise ValueError(
                f"{pretrained_model_name_or_path}: expected a {cls.__name__}, found a {config.get('_class_name')}."
            )
        return config

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        output_features: bool = False,
        return_dict: bool = True,
    ) -> WanRewardModelOutput | tuple[torch.Tensor, ...]:
        """
        Score noisy latents.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
                Noisy latents. For image-to-video models, the 20 channels of the condition follow those of the latents.
            timestep (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_tokens)`):
                Noise level of each sample, or of each of its tokens, `1000 * sigma`, in [0, 1000].
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, text_dim)`):
                Prompt embeddings, padded with zeros.
            encoder_hidden_states_image (`torch.Tensor`, *optional*):
                Image embeddings `(batch_size, num_image_tokens, image_dim)` of image-to-video models.
            output_features (`bool`, defaults to `False`):
                Also return the tokens after the last block.
            return_dict (`bool`, defaults to `True`):
                Return a [`WanRewardModelOutput`] instead of a tuple.

        Raises:
            ValueError: If the latents have a wrong shape, there is not one timestep per sample or token, or image
                embeddings are missing or are given to a model that takes none.
        """
        self._check_inputs(hidden_states, timestep, encoder_hidden_states_image)

        # 1. Patch & position embedding
        rotary_emb = self.rope(hidden_states)
        hidden_states = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()

        # 2. Condition embeddings
        timestep = self.token_timesteps(timestep) if timestep.ndim == 2 else timestep
        num_timesteps = timestep.shape[1] if timestep.ndim == 2 else None
        _, timestep_proj, encoder_hidden_states, encoder_hidden_states_image = self.condition_embedder(
            timestep.flatten(), encoder_hidden_states, encoder_hidden_states_image, timestep_seq_len=num_timesteps
        )
        timestep_proj = timestep_proj.unflatten(-1, (6, -1))
        if encoder_hidden_states_image is not None:
            encoder_hidden_states = torch.cat([encoder_hidden_states_image, encoder_hidden_states], dim=1)

        # 3. Transformer blocks
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    block, hidden_states, encoder_hidden_states, timestep_proj, rotary_emb
                )
            else:
                hidden_states = block(hidden_states, encoder_hidden_states, timestep_proj, rotary_emb)

        # 4. Pooling & head, on all tokens
        hidden_states = self.token_gather(hidden_states)
        logits = self.score_tokens(hidden_states)

        output = WanRewardModelOutput(logits=logits, features=hidden_states if output_features else None)
        return output if return_dict else output.to_tuple()

    def score_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `(batch_size,)`, float32, of all tokens after the last block, `(batch_size, num_tokens, dim)`."""
        pooled = self.pooler(tokens)
        # Without autocast: it would save nothing on one vector per clip, and would round logits and gradients.
        with torch.autocast(pooled.device.type, enabled=False):
            return self.head(pooled.to(self.head.linear_1.weight.dtype)).float()

    def _check_inputs(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None,
    ) -> None:
        if hidden_states.ndim != 5 or hidden_states.shape[1] != self.config.in_channels:
            raise ValueError(
                f"`hidden_states` must be (batch_size, {self.config.in_channels}, num_frames, height, width), "
                f"got {tuple(hidden_states.shape)}."
            )
        num_tokens = hidden_states[0, 0].numel() // math.prod(self.config.patch_size)
        if timestep.shape not in (hidden_states.shape[:1], (hidden_states.shape[0], num_tokens)):
            raise ValueError(
                f"`timestep` must hold one value per sample, {tuple(hidden_states.shape[:1])}, or per token, "
                f"got {tuple(timestep.shape)}."
            )
        if (encoder_hidden_states_image is None) != (self.config.image_dim is None):
            wanted = "no image embeddings" if self.config.image_dim is None else "`encoder_hidden_states_image`"
            raise ValueError(f"This reward model has `image_dim` {self.config.image_dim}: it takes {wanted}.")
        patch_size = self.config.patch_size
        if any(size % patch for size, patch in zip(hidden_states.shape[2:], patch_size, strict=True)):
            raise ValueError(
                f"The latents' size {tuple(hidden_states.shape[2:])} must be a multiple of the patch size "
                f"{tuple(patch_size)}: a token has {math.prod(patch_size)} latent pixels."
            )

    def freeze_embeddings(self) -> None:
        """Freeze patch, text, time and image embeddings. Blocks, pooling and head are trained (paper, section 4.2)."""
        self.patch_embedding.requires_grad_(False)
        self.condition_embedder.requires_grad_(False)


def score_noised(
    reward_model: nn.Module,
    *,
    latents: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    conditioning: Conditioning,
) -> torch.Tensor:
    """
    Add noise to clean latents and score them. PAVRM is trained, evaluated and used in this way.

    Args:
        latents, noise (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            Clean normalised latents and standard normal noise.
        sigmas (`torch.Tensor` of shape `(batch_size,)`):
            Noise levels in [0, 1].
        conditioning (`Conditioning`):
            Prompts and, for image-to-video models, images. The model's inputs are cast to the type of the prompt
            embeddings.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: logits, float32.
    """
    noisy, timesteps = add_noise(latents, noise, sigmas), sigmas_to_timesteps(sigmas).to(latents.device)
    return reward_model(**conditioning.model_inputs(noisy, timesteps)).logits


def reward_training_loss(
    reward_model: nn.Module,
    *,
    latents: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    conditioning: Conditioning,
    labels: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Loss of the reward model's own training: on clips with labels, or on pairs of clips.

    Args:
        latents (`torch.Tensor` of shape `(num_clips, num_channels, num_frames, height, width)`):
            Clean normalised latents. Of pairs the chosen clips, followed by the rejected ones.
        noise (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            Standard normal noise for each label or pair. Both clips of a pair get the same.
        sigmas (`torch.Tensor` of shape `(batch_size,)`):
            Noise level in [0, 1] for each label or pair.
        conditioning (`Conditioning`):
            Prompts and, for image-to-video models, images of all clips.
        labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            1 for a good clip, 0 for a poor one. None for pairs: then there are `2 * batch_size` clips.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the loss, a scalar, and without gradient the margin of each logit or pair
        `(batch_size,)`, which is positive if it is right.
    """
    score = partial(score_noised, reward_model, latents=latents, conditioning=conditioning)
    if labels is not None:
        logits = score(noise=noise, sigmas=sigmas)
        return binary_reward_loss(logits, labels), (logits * (2 * labels - 1)).detach()
    # One call for both, so that DDP and ZeRO see one forward per backward.
    chosen_logits, rejected_logits = score(noise=noise.repeat(2, 1, 1, 1, 1), sigmas=sigmas.repeat(2)).chunk(2)
    return bradley_terry_loss(chosen_logits, rejected_logits), (chosen_logits - rejected_logits).detach()


def _config_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The options of `from_pretrained` that say where the files are."""
    names = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
    return {name: kwargs[name] for name in names if name in kwargs}
