# SPDX-License-Identifier: Apache-2.0
"""Tell which checkpoint tensor is which part of a model, by transformers' own weight conversions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from tenp.adapter.experts import find_experts
from tenp.checkpoint import TensorEntry
from tenp.errors import Unsupported

#: What pruning calls the tensors of one expert where the Hub format has one for all of them.
_SINGLE = re.compile(r"(.+)\.(\d+)\.(gate|up|down)_proj\.(weight|bias)")


@dataclass(frozen=True)
class ExpertTensor:
    """What a checkpoint tensor is to the routed experts.

    Attributes:
        experts: Path of the experts module.
        layer: Decoder layer index.
        expert: The expert, or None for a tensor that holds all experts of the layer.
        part: `gate`, `up` or `down` of one expert, `gate_bias` and so on of its biases; the
            parameter's own name in a tensor of all.
        is_stock: Whether the family's Hub format has such tensors. If not, it has one for all experts
            of a layer, and this is one of those that pruning makes of it.
        is_transposed: Whether it is stored the other way round than the model has it.
    """

    experts: str
    layer: int
    expert: int | None
    part: str
    is_stock: bool = True
    is_transposed: bool = False

    def turned(self, tensor: Tensor) -> Tensor:
        """Return a stored tensor as the model has it, or one of the model as it is stored."""
        return tensor.transpose(1, 2) if self.is_transposed else tensor


class _Conversions:
    """What transformers does to the tensors of a checkpoint while it loads them into a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.parameters = model.state_dict()
        self._prefix = model.base_model_prefix
        transforms = get_model_conversion_mapping(model)
        self._renamings = [step for step in transforms if isinstance(step, WeightRenaming)]
        self._converters = [step for step in transforms if isinstance(step, WeightConverter)]

    def target(self, name: str) -> tuple[str, str | None]:
        """Return the parameter that a tensor goes to, and the converter's pattern it goes through, if any."""
        return rename_source_key(
            name, self._renamings, self._converters, self._prefix, self.parameters
        )

    def is_transposing(self, pattern: str) -> bool:
        """Whether all that is done to a tensor is to turn it round, where shapes differ."""
        return [type(step) for step in self._converter(pattern).operations] == [Transpose]

    def part(self, parameter: str, pattern: str) -> str:
        """Return `gate`, `up` or `down`; gate comes before up in every converter that concatenates the two."""
        if parameter == "gate_up_proj":
            return ("gate", "up")[self._converter(pattern).source_patterns.index(pattern)]
        return parameter.removesuffix("_proj")

    def _converter(self, pattern: str) -> WeightConverter:
        return next(step for step in self._converters if pattern in step.source_patterns)


def expert_tensors(
    model: PreTrainedModel, stored: Mapping[str, TensorEntry]
) -> dict[str, ExpertTensor]:
    """Tell which checkpoint tensors hold routed experts, by transformers' own weight conversions.

    Args:
        model: The model, on any device.
        stored: All tensors of its checkpoint, or of one pruned from it.

    Raises:
        Unsupported: The experts are stored in an order that transformers changes while loading.
    """
    conversions = _Conversions(model)
    layers = {experts.name: experts for experts in find_experts(model)}
    found: dict[str, ExpertTensor] = {}
    for name, entry in stored.items():
        target, pattern = conversions.target(name)
        single = _SINGLE.fullmatch(target)
        if pattern is None and single is not None and single[1] in layers:
            part = single[3] + ("_bias" if single[4] == "bias" else "")
            layer = layers[single[1]].layer
            found[name] = ExpertTensor(single[1], layer, int(single[2]), part, is_stock=False)
            continue
        module, _, parameter = target.rpartition(".")
        if module not in layers:
            continue
        layer = layers[module].layer
        if pattern is None:
            found[name] = ExpertTensor(module, layer, None, parameter)
            continue
        number = re.search(r"experts\.(\d+)\.", name)
        if number is None and conversions.is_transposing(pattern):
            turned = tuple(conversions.parameters[target].shape) != entry.shape
            found[name] = ExpertTensor(module, layer, None, parameter, is_transposed=turned)
            continue
        if number is None:
            raise Unsupported(
                f"{name} must hold one expert, or all experts as the model does, but transformers rearranges it while "
                "loading; load the model and save it with save_original_format=False first"
            )
        found[name] = ExpertTensor(
            module, layer, int(number[1]), conversions.part(parameter, pattern)
        )
    return found


def model_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Return the name in the model of every checkpoint tensor, by transformers' own conversions."""
    conversions = _Conversions(model)
    return {name: conversions.target(name)[0] for name in names}


def single_names(
    model: PreTrainedModel, stored: str, part: ExpertTensor, projection: str, kind: str, count: int
) -> list[str]:
    """Return the names of the tensors of single experts, made of one that holds all of a layer.

    Args:
        model: The model, on any device.
        stored: The name of that one in the checkpoint. Its path to the layer, which may differ from
            the model's, is kept.
        part: What it is.
        projection: `gate`, `up` or `down`.
        kind: `weight` or `bias`.
        count: Experts in the layer.
    """
    # `save_pretrained` gives all names those of the Hub, so these have to get them now.
    name = f"{part.experts}.0.{projection}_proj.{kind}"
    [renamed] = revert_weight_conversion(model, {name: torch.empty(0)})
    before, _, after = _with_path_of(stored, renamed, part.layer).rpartition(".0.")
    return [f"{before}.{expert}.{after}" for expert in range(count)]


def stock_tensors(
    model: PreTrainedModel, stored: str, part: ExpertTensor, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the experts of a layer as the family's Hub format has them, by transformers' conversions.

    Args:
        model: The model, on any device.
        stored: The checkpoint's name of one of their tensors, whose path to the layer is kept.
        part: What that one is.
        parameters: All experts of the layer, by the parameters' names in the module.
    """
    state = {f"{part.experts}.{name}": tensor for name, tensor in parameters.items()}
    return {
        _with_path_of(stored, name, part.layer): tensor
        for name, tensor in revert_weight_conversion(model, state).items()
    }


def _with_path_of(stored: str, name: str, layer: int) -> str:
    """Give a name in the model the path to the layers that a name in the checkpoint has."""
    number = f".{layer}."
    return stored.partition(number)[0] + number + name.partition(number)[2]
