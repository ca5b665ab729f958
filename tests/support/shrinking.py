# SPDX-License-Identifier: Apache-2.0
"""A tiny config for any model type of transformers: every size that has a known name is made small.

What is not a size (activations, norms, kinds of routers) stays as the family has it, so that a tiny
model differs from a real one in nothing but numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 260

#: Names of config fields, as patterns of whole names, to the largest value that they get. The first
#: that fits counts.
_SIZES = [
    (re.compile(pattern), size)
    for pattern, size in {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "(.*_)?vocab_size": VOCABULARY,
        "mamba_dt_rank": 4,
        "(.*_)?(lora_)?rank": 16,
        ".*head_dim|kv_channels": 8,
        "ssm_state_size|mamba_d_state": 8,
        "mamba_(num|n)_heads": 8,
        "(mamba_)?n_groups": 2,
        "(mamba_)?chunk_size": 16,
        "hidden_size_per_layer_input|num_kv_shared_layers": 0,
        "shared_expert.*size": 40,
        ".*(moe|expert).*(intermediate|ffn).*": 24,
        ".*(intermediate|ffn)_.*size|intermediate_size.*": 48,
        ".*hidden_size|.*hidden_dim|d_model|.*embed_dim": 32,
        "(.*_)?(num|n)(_hidden)?_layers?|depth": 4,
        ".*(key_value|kv|key)_heads": 2,
        ".*attention_heads|(.*_)?(num|n)_(.*_)?heads": 4,
        "(num|n|moe_num)(_local|_routed)?_experts": 6,
        "num_experts_per_tok(en)?|moe_topk|moe_k|(moe_)?top_k(_experts)?": 2,
        "n_group|num_expert_group": 2,
        "topk_group": 1,
        "zero_expert_num": 2,
        "first_k_dense_replace|num_dense_layers": 1,
        ".*_layer_period|layer_group_size": 2,
        ".*_layer_offset": 1,
        "(original_)?max_position_embeddings": 128,
        "(.*_)?(sliding_window|window_size)|index_topk": 16,
    }.items()
]

_SMALL_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}

#: What a family's config needs besides: fields that depend on each other, or have no default.
_BESIDES: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 1e4}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", *["sparse"] * 3]}},
    "dots1": {"n_routed_experts": 6, "n_shared_experts": 1},
    "dots3_note_text": {
        "mlp_layer_types": ["dense", *["sparse"] * 3],
        **{f"swa_num_{kind}_heads": 4 for kind in ("attention", "key_value")},
        **{f"swa_{kind}_lora_rank": 16 for kind in ("q", "kv")},
        **{"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [24, 16],
            "rope_parameters": {**_SMALL_ROPE, "mrope_section": [1, 1, 2]},
        }
    },
    "glm4v_moe": {
        "text_config": {
            "head_dim": 16,
            "rope_parameters": {
                **_SMALL_ROPE,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
            },
        }
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_moe": {"num_experts": 6, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen3_omni_moe": {
        "talker_config": {
            "spatial_merge_size": 2,
            "text_config": {"shared_expert_intermediate_size": 40, "moe_intermediate_size": 24},
        },
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": VOCABULARY - 9},
    "qwen4_exp_text": {
        **{"indexer_budget": 16, "indexer_compress_ratio": 4},
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8},
    },
}


def tiny_configs(model_type: str) -> Iterator[Callable[[], PreTrainedConfig]]:
    """Yield what makes a config, simplest first: as the family has it, without gaps, experts switched on."""
    kind, besides = CONFIG_MAPPING[model_type], _BESIDES.get(model_type, {})
    for fill, switch_on in ((False, False), (True, False), (True, True)):
        yield functools.partial(_shrunk, kind, fill, switch_on, besides)


def _shrunk(kind: Any, fill: bool, switch_on: bool, besides: dict[str, Any]) -> PreTrainedConfig:
    default = kind()
    fields: dict[str, Any] = {}
    markers = 0
    for field in dataclasses.fields(kind):
        value = _default(field)
        if field.name in kind.sub_configs:
            part = getattr(default, field.name)
            if isinstance(part, PreTrainedConfig):
                more = besides.get(field.name, {})
                fields[field.name] = _shrunk(type(part), fill, switch_on, more).to_dict()
        elif isinstance(value, bool):
            if switch_on and "moe" in field.name:
                fields[field.name] = True
        elif isinstance(value, int) or (fill and value is None and "int" in str(field.type)):
            size = _size(field.name)
            if size is not None:
                fields[field.name] = size if value is None else min(size, value)
            elif field.name.endswith(("token_id", "token_index")):
                markers += 1
                fields[field.name] = VOCABULARY - markers  # images and the like
    if fields.get("kv_lora_rank"):
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if sections := _with_small_sections(getattr(default, "rope_parameters", None)):
        fields["rope_parameters"] = sections
    fields.update({name: value for name, value in besides.items() if name not in kind.sub_configs})
    return kind(**fields)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _size(name: str) -> int | None:
    return next((size for pattern, size in _SIZES if pattern.fullmatch(name)), None)


def _with_small_sections(rope: Any) -> dict[str, Any] | None:
    """Divide the 4 frequencies of a head of 8 among time, height and width, if they are divided."""
    if not isinstance(rope, dict) or "mrope_section" not in str(rope):
        return None
    changed = copy.deepcopy(rope)
    for part in (changed, *changed.values()):
        if isinstance(part, dict) and "mrope_section" in part:
            part["mrope_section"] = [2, 1, 1]
    return changed
