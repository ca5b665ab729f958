# SPDX-License-Identifier: Apache-2.0
"""The variable-width expert forward against transformers' experts on the same routing.

transformers has one width per layer, so its experts always run at full width; tenp also runs at half
width and at a TENP profile (30 % of the experts whole, the rest narrowed to a kept share of 0.6).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from harness import compare, save
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from tenp import ops

#: Axes: shapes of Qwen3-30B-A3B and DeepSeek-V2-Lite with fewer experts, so that they fit caches as
#: badly as the real ones.
SHAPES = {
    "qwen3-30b": {"hidden": 2048, "width": 768, "experts": 32, "top_k": 8},
    "deepseek-v2-lite": {"hidden": 2048, "width": 1408, "experts": 16, "top_k": 6},
}
TOKENS = (1, 4, 16, 64, 512)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")

#: batched_mm copies the weights of every routed row; beyond this many rows that is gigabytes.
MAX_BATCHED_ROWS = 64


def profiles(width: int, experts: int) -> dict[str, list[int]]:
    """Return the width of every expert for each profile."""
    whole = round(0.3 * experts)
    narrow = int(width * (0.6 * experts - whole) / (experts - whole)) // 16 * 16
    return {
        "full": [width] * experts,
        "half": [width // 2] * experts,
        "tenp-0.6": [width] * whole + [narrow] * (experts - whole),
    }


class Layer:
    """One layer's experts in both forms, with weights to rotate through."""

    def __init__(
        self, hidden: int, width: int, experts: int, top_k: int, dtype: torch.dtype
    ) -> None:
        config = Qwen3MoeConfig(
            hidden_size=hidden,
            moe_intermediate_size=width,
            num_experts=experts,
            num_experts_per_tok=top_k,
        )
        self.stock = Qwen3MoeExperts(config).to(dtype).requires_grad_(False)
        for parameter in self.stock.parameters():
            nn.init.normal_(parameter, std=0.02)
        self.width, self.dtype, self.top_k, self.experts = width, dtype, top_k, experts

    def packed(self, widths: list[int]) -> tuple[Tensor, ...]:
        """Return what `expert_gemm` takes for the first `W_e` neurons of every expert."""
        gate, up = self.stock.gate_up_proj.chunk(2, dim=1)
        narrowed = [
            [matrix[expert, :width] for expert, width in enumerate(widths)] for matrix in (gate, up)
        ]
        down = [self.stock.down_proj[expert, :, :width] for expert, width in enumerate(widths)]
        offsets = torch.tensor(ops.neuron_offsets(widths), dtype=torch.int32)
        return *ops.pack(*narrowed, down, widths), torch.tensor(widths, dtype=torch.int32), offsets

    def routing(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states, expert ids and gates."""
        generator = torch.Generator().manual_seed(tokens)
        scores = torch.rand(tokens, self.experts, generator=generator)
        gates, ids = scores.topk(self.top_k)
        hidden = torch.randn(tokens, self.stock.hidden_dim, generator=generator).to(self.dtype)
        return hidden, ids, gates / gates.sum(1, keepdim=True)


def main() -> None:
    """Run all cases and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON lines")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(ops.num_threads())
    records = []
    for shape, sizes in SHAPES.items():
        for dtype_name, dtype in DTYPES.items():
            layer = Layer(**sizes, dtype=dtype)
            packed = {
                name: layer.packed(widths)
                for name, widths in profiles(layer.width, layer.experts).items()
            }
            for tokens in TOKENS:
                records += compare_at(layer, packed, tokens, shape, dtype_name, arguments.rounds)
    if arguments.out:
        save(arguments.out, records)


def compare_at(
    layer: Layer,
    packed: dict[str, tuple[Tensor, ...]],
    tokens: int,
    shape: str,
    dtype: str,
    rounds: int,
) -> list[dict[str, object]]:
    """Check and compare all providers at one number of tokens."""
    hidden, ids, gates = layer.routing(tokens)

    def stock(implementation: str) -> Tensor:
        layer.stock.config._experts_implementation_internal = implementation
        return layer.stock(hidden, ids, gates.to(hidden.dtype))

    providers = {
        f"transformers {name}": lambda n=name: stock(n)
        for name in IMPLEMENTATIONS
        if name != "batched_mm" or tokens * layer.top_k <= MAX_BATCHED_ROWS
    }
    for profile, weights in packed.items():
        providers[f"tenp {profile}"] = lambda w=weights: ops.expert_gemm(hidden, ids, gates, *w)
    expected = stock("eager").float()
    error = (providers["tenp full"]().float() - expected).norm() / expected.norm()
    # transformers rounds to the dtype after every step, tenp once per projection.
    assert error < (1e-5 if dtype == "float32" else 1e-2), (shape, dtype, tokens, error)
    case = {"op": "expert_gemm", "shape": shape, "dtype": dtype, "tokens": tokens}
    return compare(case, providers, "tenp full", rounds=rounds)


if __name__ == "__main__":
    main()
