# SPDX-License-Identifier: Apache-2.0
"""What calibration costs beside the forward pass: of one layer of routed experts, and of a whole model.

Calibration is the forward pass with all first-order statistics. "plain" is the forward pass alone, through
the same kernels; the others run transformers' own experts. The whole models are random, of the shapes of
Qwen3-30B-A3B and Qwen1.5-MoE-A2.7B with fewer layers and experts, and run two batches without their head;
what calibration does once, such as norms of weights, is in its time.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_expert_gemm import DTYPES, SHAPES, Layer, pack_experts
from bench_generate import SHAPES as QWEN2_SHAPES
from bench_generate import random_model
from harness import compare, save
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen3MoeConfig

from tenp import calibration, ops
from tenp.adapter import Experts, experts_replaced, find_experts
from tenp.samples import Samples
from tenp.source import Source
from tenp.statistics import Domain, Statistics

IMPLEMENTATIONS = ("eager", "grouped_mm")
ROWS_PER_EXPERT = 512
LAYER_EXPERTS = 8
SAMPLES, SAMPLE_TOKENS, BATCH_TOKENS = 4, 512, 1024
VOCABULARY = 1024
MODELS = {
    "qwen3-30b": Qwen3MoeConfig(
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=16,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
    ),
    "qwen1.5-moe": Qwen2MoeConfig(
        **{**QWEN2_SHAPES, "num_experts": 16, "vocab_size": VOCABULARY}, num_hidden_layers=2
    ),
}
_SOURCE = Source("", "", 1, 1, 1, 1)


def of_layer(shape: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Return what is compared for one layer, every expert with the same number of rows."""
    layer = Layer(**{**SHAPES[shape], "experts": LAYER_EXPERTS}, dtype=dtype)
    tokens = ROWS_PER_EXPERT * LAYER_EXPERTS // layer.top_k
    [(hidden, ids, gates)] = layer.routings(tokens)
    packed = layer.packed([layer.width] * LAYER_EXPERTS)
    experts = Experts(0, "experts", layer.stock)
    statistics = Statistics.zeros(
        _SOURCE,
        [Domain("text", 1, tokens, ("",))],
        {0: (LAYER_EXPERTS, layer.width)},
        {},
        hidden=layer.hidden,
    )
    sums = calibration.domain_sums(statistics.layers[0], 0)

    def calibrate() -> None:
        attended = torch.ones(tokens, dtype=torch.bool)
        routed = calibration.route(experts, hidden, ids, gates, attended)
        calibration.add_experts(experts, routed, sums, torch.zeros(hidden.shape))

    def stock(name: str) -> Tensor:
        layer.stock.config._experts_implementation_internal = name
        return layer.stock(hidden, ids, gates.to(hidden.dtype))

    return {
        "plain": lambda: ops.expert_gemm(hidden, ids, gates, **packed),
        "calibration": calibrate,
        **{f"transformers {name}": lambda name=name: stock(name) for name in IMPLEMENTATIONS},
    }


def of_model(shape: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Return what is compared for a whole model."""
    model = random_model(MODELS[shape], dtype).eval()
    model.base_model.rotary_emb = type(model.base_model.rotary_emb)(model.config)
    samples = Samples("text", tuple(torch.randint(VOCABULARY, (SAMPLES, SAMPLE_TOKENS))))
    packed = {
        experts.module: pack_experts(experts.module, [experts.width] * experts.num_experts)
        for experts in find_experts(model)
    }

    def kernels(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return ops.expert_gemm(hidden, index, weights, **packed[module])

    def forward() -> Tensor:
        batches = samples.batches(BATCH_TOKENS)
        return torch.cat(
            [
                model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
                for ids, mask in batches
            ]
        )

    def plain() -> Tensor:
        with experts_replaced(model, kernels):
            return forward()

    def stock(name: str) -> Tensor:
        model.set_experts_implementation(name)
        return forward()

    error = (plain() - stock("eager")).float().norm() / plain().float().norm()
    assert error < (1e-4 if dtype == torch.float32 else 3e-2), (shape, dtype, error)
    return {
        "plain": plain,
        "calibration": lambda: calibration.collect(
            model, [samples], _SOURCE, batch_tokens=BATCH_TOKENS
        ),
        **{f"transformers {name}": lambda name=name: stock(name) for name in IMPLEMENTATIONS},
    }


PROVIDERS = {"layer": (SHAPES, of_layer), "model": (MODELS, of_model)}


@torch.no_grad()
def main() -> None:
    """Run all cases and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON lines")
    parser.add_argument("--of", default="layer", choices=PROVIDERS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=12, help="for each case, about")
    arguments = parser.parse_args()
    torch.set_num_threads(ops.num_threads())
    records = []
    shapes, providers_of = PROVIDERS[arguments.of]
    for shape, dtype in itertools.product(shapes, arguments.dtypes):
        records += compare(
            {"op": "calibration", "of": arguments.of, "shape": shape, "dtype": dtype},
            providers_of(shape, DTYPES[dtype]),
            "plain",
            arguments.rounds,
            warmup=1,
            seconds_at_most=arguments.seconds,
        )
    if arguments.out:
        save(arguments.out, records)


if __name__ == "__main__":
    main()
