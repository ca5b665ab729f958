# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the families that tenp serves, made from fixed seeds and saved in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tenp.checkpoint import Checkpoint
from tenp.samples import Samples

#: Every byte, and the special tokens.
VOCABULARY = 260

_COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_LATENT_ATTENTION = dict(
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    num_key_value_heads=4,
)
_LINEAR_ATTENTION = dict(
    head_dim=8,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=4,
    num_hidden_layers=4,
)
_QWEN = dict(moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2)
_DEEPSEEK = dict(
    moe_intermediate_size=24, n_routed_experts=6, num_experts_per_tok=2, first_k_dense_replace=1
)
_LOCAL = dict(num_local_experts=6, num_experts_per_tok=2)

#: model_type to what its config needs beside the common fields: 6 experts, 2 a token, in each.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**_QWEN, "head_dim": 8},
    "mixtral": _LOCAL,
    "olmoe": dict(num_experts=6, num_experts_per_tok=2),
    "deepseek_v2": {
        **_DEEPSEEK,
        **_LATENT_ATTENTION,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
    },
    "deepseek_v3": {
        **_DEEPSEEK,
        **_LATENT_ATTENTION,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
    },
    "qwen3_next": {**_QWEN, **_LINEAR_ATTENTION, "shared_expert_intermediate_size": 40},
    "qwen3_5_moe_text": {**_QWEN, **_LINEAR_ATTENTION, "shared_expert_intermediate_size": 40},
    "gpt_oss": {**_LOCAL, "head_dim": 8},
    "glm4_moe": {**_DEEPSEEK, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "head_dim": 8},
    "minimax": {**_LOCAL, "head_dim": 8},
    "minimax_m2": {**_LOCAL, "head_dim": 8},
    "phimoe": _LOCAL,
    "ernie4_5_moe": dict(
        moe_intermediate_size=24,
        moe_num_experts=6,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    "gemma4_text": dict(
        enable_moe_block=True,
        num_experts=6,
        top_k_experts=2,
        moe_intermediate_size=24,
        head_dim=8,
        global_head_dim=8,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
    ),
    "granitemoe": _LOCAL,
}


def make_model(model_type: str = "qwen2_moe", **changes: Any) -> PreTrainedModel:
    """Return a model with random float32 weights, large enough that every expert matters."""
    fields = {**_COMMON, **FAMILIES.get(model_type, {}), **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def save_model(
    directory: Path,
    model_type: str = "qwen2_moe",
    dtype: torch.dtype = torch.float32,
    with_tokenizer: bool = False,
    **changes: Any,
) -> Path:
    """Write a model of `make_model` in several shards and return its directory."""
    make_model(model_type, **changes).to(dtype).save_pretrained(directory, max_shard_size="150KB")
    if with_tokenizer:
        make_tokenizer().save_pretrained(directory)
    return directory


def make_tokenizer(more_tokens: int = 0) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes, and of `more_tokens` words that no model here knows."""
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"Ġword{number}" for number in range(more_tokens)]
    merges: list[tuple[str, str]] = []
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def make_samples(
    domain: str = "text", lengths: tuple[int, ...] = (40, 30, 20, 64, 7), seed: int = 0
) -> Samples:
    """Return samples of random token ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = tuple(torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths)
    return Samples(domain, ids)


def token_ids(tokens: int = 32, seed: int = 1) -> Tensor:
    """Return random token ids `[2, tokens]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (2, tokens), generator=generator)


@torch.no_grad()
def logit_difference(model: PreTrainedModel, reference: PreTrainedModel, ids: Tensor) -> float:
    """Return the largest difference of two models' logits, as a share of the largest logit.

    Args:
        model: The model to check.
        reference: What it should equal.
        ids: `[B, n]` int64 token ids.
    """
    ours = model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
    theirs = reference(input_ids=ids.to(reference.device), use_cache=False).logits.float().cpu()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def stored_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint as its files have them, without the scales of others."""
    files = [load_file(checkpoint.directory / shard) for shard in checkpoint.shards()]
    stored = {name: tensor for file in files for name, tensor in file.items()}
    return {name: stored[name] for name in checkpoint.tensors}
