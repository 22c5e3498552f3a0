"""Reward models with the same blocks, such as probes of one generator: one pass through the blocks serves all."""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import nn

from ..runtime.quantization import dequantized
from .loading import WeightFiles
from .reward_model import BACKBONE_CONFIG, WanRewardModel, WanRewardModelOutput


OWN_PARTS = ("pooler", "head")


class OneBackbone(nn.Module):
    """
    Reward models that share their backbone, see [`share_backbone`], called as one.

    Args:
        models (`Sequence[WanRewardModel]`):
            The models. Blocks and embeddings of the first are called; each scores the tokens with its own head.
    """

    def __init__(self, models: Sequence[WanRewardModel]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, **inputs: torch.Tensor) -> WanRewardModelOutput:
        """Logits `(num_models, batch_size)` for the inputs of a reward model. Their gradients add up at the tokens."""
        first, *others = cast(Iterable[WanRewardModel], self.models)
        output = first(**inputs, output_features=True)
        assert output.features is not None
        logits = [output.logits, *(model.score_tokens(output.features) for model in others)]
        return WanRewardModelOutput(logits=torch.stack(logits))


def share_backbone(model: WanRewardModel, owner: WanRewardModel) -> None:
    """Replace a model's backbone, everything but pooling and head, by the equal backbone of another model."""
    for name, part in owner.named_children():
        if name not in OWN_PARTS:
            setattr(model, name, part)


def own_parts(model: WanRewardModel) -> list[nn.Module]:
    """Pooling and head, which models on one backbone do not share."""
    return [model.get_submodule(name) for name in OWN_PARTS]


def group_by_backbone(models: Sequence[nn.Module]) -> list[list[int]]:
    """Indices of the models in groups that share a backbone, in the order of their first members."""
    groups: dict[int, list[int]] = {}
    for index, model in enumerate(models):
        backbone = model.blocks if isinstance(model, WanRewardModel) else model
        groups.setdefault(id(backbone), []).append(index)
    return list(groups.values())


def group_folders(folders: Sequence[str | None]) -> list[list[int]]:
    """[`group_by_backbone`] for reward models on disk. A folder that is None does not exist; it is a group of its own."""
    groups: list[list[int]] = []
    for index, folder in enumerate(folders):
        same = next((group for group in groups if _are_same_on_disk(folders[group[0]], folder)), None)
        if same is None:
            groups.append([index])
        else:
            same.append(index)
    return groups


def _are_same_on_disk(one: str | None, two: str | None) -> bool:
    if one is None or two is None:
        return False
    fit = fit_together(WanRewardModel.load_own_config(one), WanRewardModel.load_own_config(two))
    return fit and have_same_weights(WeightFiles(one), WeightFiles(two))


def have_same_backbone(model: WanRewardModel, other: WanRewardModel) -> bool:
    """Whether two reward models differ in pooling and head only: the same sizes, and the same weights bit for bit."""
    return fit_together(model.config, other.config) and have_same_weights(
        dict(model.named_parameters()), dict(other.named_parameters())
    )


def fit_together(config: Mapping[str, object], other: Mapping[str, object]) -> bool:
    """Whether reward models of these configurations have backbones of the same sizes."""
    return all(_plain(config[name]) == _plain(other[name]) for name in (*BACKBONE_CONFIG, "num_layers"))


def have_same_weights(weights: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """
    Whether reward models with these weights, by name, have the same backbone.

    It stops at the first weight that differs. If blocks were trained, that is one of the first block.
    """
    names = [name for name in weights if name.partition(".")[0] not in OWN_PARTS]
    return all(_are_equal(weights[name], other[name]) for name in names)


def _are_equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    one, two = dequantized(one), dequantized(two)
    return one.dtype == two.dtype and torch.equal(one, two.to(one.device))


def _plain(value: object) -> object:
    """The value as it is after reading it from disk, where tuples become lists."""
    return list(value) if isinstance(value, tuple) else value
