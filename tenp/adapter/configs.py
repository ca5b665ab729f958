# SPDX-License-Identifier: Apache-2.0
"""Which fields of a config set the shape of the routed experts: asked of empty models, not of a list of families."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tenp.adapter.experts import find_experts
from tenp.adapter.models import empty_model

#: Config attributes that set the width of the routed experts in some family.
_WIDTH_FIELDS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")

#: Config attributes that set how many routed experts' widths the shared expert of a layer has.
_SHARED_FIELDS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")

#: Config attributes that set the number of routed experts, and how many a token gets.
_COUNT_FIELDS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)
_TOP_K_FIELDS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "top_k",
)


def config_of_width(config: PreTrainedConfig, width: int) -> dict[str, Any] | None:
    """Return the config fields that give all routed experts one width, and nothing else another shape.

    Every candidate field is tried on an empty model. In DeepSeek's families, for example, the field of
    the routed experts also sets the shared expert, as so many times that width; there the number of
    times is changed too, if the full width is a multiple of the new one.

    Args:
        config: The unpruned model's.
        width: The new width.

    Returns:
        Fields to change in the (text) config, or None when no such fields were found.
    """
    before = empty_model(config)
    others, full = _other_shapes(before), find_experts(before)[0].width
    # As the file has them: an attribute may be another's alias.
    text = config.get_text_config().to_dict()
    shared: list[dict[str, int]] = [{}] + [
        {field: text[field] * full // width}
        for field in _SHARED_FIELDS
        if isinstance(text.get(field), int) and text[field] * full % width == 0
    ]
    for field, times in itertools.product(_WIDTH_FIELDS, shared):
        if not isinstance(text.get(field), int):
            continue
        fields = {field: width, **times}
        model = _empty_model_with(config, fields)
        if (
            all(experts.width == width for experts in find_experts(model))
            and _other_shapes(model) == others
        ):
            return fields
    return None


def config_of_experts(
    config: PreTrainedConfig, count: int
) -> tuple[dict[str, Any], dict[str, int]] | None:
    """Return the config fields that give every layer fewer experts, and the router weights that shrink.

    Every candidate field is tried on an empty model; what changes its shape besides the experts
    belongs to the router.

    Args:
        config: The unpruned model's.
        count: The new number of experts.

    Returns:
        Fields to change in the (text) config, and the names of weights of the model outside the
        experts to the axis that counts experts; or None when the family has no such field.
    """
    before = empty_model(config)
    others, experts = _other_shapes(before), find_experts(before)
    # As the file has them: an attribute may be another's alias.
    text = config.get_text_config().to_dict()
    for field in _COUNT_FIELDS:
        full = text.get(field)
        if not isinstance(full, int) or any(layer.num_experts != full for layer in experts):
            continue
        fields: dict[str, Any] = {field: count}
        for top_k in _TOP_K_FIELDS:
            chosen = text.get(top_k)
            if isinstance(chosen, int) and chosen > count:
                fields[top_k] = count
        model = _empty_model_with(config, fields)
        if any(layer.num_experts != count for layer in find_experts(model)):
            continue
        axes = {}
        for name, shape in _other_shapes(model).items():
            differs = [
                at
                for at, sizes in enumerate(zip(others[name], shape, strict=True))
                if sizes[0] != sizes[1]
            ]
            if differs and [(others[name][at], shape[at]) for at in differs] != [(full, count)]:
                return None
            if differs:
                axes[name] = differs[0]
        return fields, axes
    return None


def experts_per_token(config: PreTrainedConfig) -> int:
    """Return how many experts the routers choose for a token; 8, the most common, if no known field says."""
    values = (_largest(config, field) for field in _TOP_K_FIELDS)
    return next((value for value in values if value), 8)


def attention_heads(config: PreTrainedConfig) -> int:
    """Return how many heads attention has, in the layer with most."""
    return _largest(config, "num_attention_heads")


def expert_groups(config: PreTrainedConfig) -> int:
    """Return how many groups of equal size the routers divide the experts into; 1 for none."""
    text = config.get_text_config()
    groups = getattr(text, "n_group", None) or 1
    return groups if groups > 1 and (getattr(text, "topk_group", None) or groups) < groups else 1


def _largest(config: PreTrainedConfig, field: str) -> int:
    """Return a number of the (text) config, the largest where layers differ, or 0 if it is not there."""
    text: Any = config.get_text_config()
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    values = (getattr(layer, field, None) for layer in layers)
    return max(value if isinstance(value, int) else 0 for value in values)


def _empty_model_with(config: PreTrainedConfig, fields: Mapping[str, Any]) -> PreTrainedModel:
    """Return the empty model of a config with some fields of its text changed."""
    changed = type(config).from_dict(config.to_dict())
    for name, value in fields.items():
        setattr(changed.get_text_config(), name, value)
    return empty_model(changed)


def _other_shapes(model: PreTrainedModel) -> Mapping[str, torch.Size]:
    """Shapes of all weights but those of the routed experts."""
    routed = tuple(f"{experts.name}." for experts in find_experts(model))
    return {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if not name.startswith(routed)
    }
