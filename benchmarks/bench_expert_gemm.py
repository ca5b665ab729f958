# SPDX-License-Identifier: Apache-2.0
"""The variable-width expert forward against transformers' experts, and against what the machine can do.

transformers has one width per layer, so its experts run at full width only. tenp also runs at half the
width, at a TENP profile with as many neurons (a quarter of the experts whole, the rest narrowed), and with
full and half width in 8 bits. All have the same threads and the same routing, which takes another set of experts with every call, so that
no cache holds the weights. "read" reads as many bytes as the active experts have, "multiply-add" does
their arithmetic in registers, both in the same rounds.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ceilings import Ceilings
from harness import compare, save
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from tenp import ops
from tenp.quantization import quantize

#: Axes. Of the real models' 128 and 64 experts, as many as --memory has room for.
SHAPES = {
    "qwen3-30b": {"hidden": 2048, "width": 768, "experts": 128, "top_k": 8},
    "deepseek-v2-lite": {"hidden": 2048, "width": 1408, "experts": 64, "top_k": 6},
}
TOKENS = (1, 4, 16, 64, 512, 2048)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")

#: batched_mm copies the weights of every routed row; beyond this many rows that is gigabytes.
MAX_BATCHED_ROWS = 64

#: Of the routed experts' neurons, what the narrow profiles keep.
KEPT = 0.5


def profiles(width: int, experts: int) -> dict[str, list[int]]:
    """Return the width of every expert for each profile; the last two have equally many neurons."""
    whole = experts // 4
    narrow = experts - whole
    total = int(KEPT * width) * experts - whole * width
    least = total // narrow // 16 * 16
    wider = (total - narrow * least) // 16
    mixed = [width] * whole + [least + 16] * wider + [least] * (narrow - wider)
    # Spread over the layer as by a router that does not know the widths.
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(1)).tolist()
    return {
        "full": [width] * experts,
        "uniform": [int(KEPT * width)] * experts,
        "tenp": [mixed[place] for place in order],
    }


def pack_experts(module: nn.Module, widths: list[int]) -> dict[str, Tensor]:
    """Return what `expert_gemm` takes for the first `W_e` neurons of every expert of a module."""
    gate, up = module.gate_up_proj.chunk(2, dim=1)
    narrowed = [
        [matrix[expert, :width] for expert, width in enumerate(widths)] for matrix in (gate, up)
    ]
    down = [module.down_proj[expert, :, :width] for expert, width in enumerate(widths)]
    gate_up, packed_down = ops.pack(*narrowed, down, widths)
    return {
        "gate_up": gate_up,
        "down": packed_down,
        "widths": torch.tensor(widths, dtype=torch.int32),
        "neuron_offsets": torch.tensor(ops.neuron_offsets(widths), dtype=torch.int32),
    }


class Layer:
    """One layer's experts in both forms."""

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
            nn.init.uniform_(parameter, -0.03, 0.03)
        self.hidden, self.width, self.dtype = hidden, width, dtype
        self.top_k, self.experts = top_k, experts

    def packed(self, widths: list[int]) -> dict[str, Tensor]:
        """Return what `expert_gemm` takes for the first `W_e` neurons of every expert."""
        return pack_experts(self.stock, widths)

    def quantized(self, packed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the same with int8 weights."""
        gate_up, gate_up_scale = quantize(packed["gate_up"], neurons=0)
        down, down_scale = quantize(packed["down"], neurons=0)
        return {
            **packed,
            "gate_up": gate_up,
            "down": down,
            "gate_up_scale": gate_up_scale,
            "down_scale": down_scale,
        }

    def routings(self, tokens: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return (hidden states, expert ids, gates) of calls that take every expert equally often."""
        generator = torch.Generator().manual_seed(tokens)
        calls = max(1, -(-self.experts // (tokens * self.top_k)))
        slots = calls * tokens * self.top_k
        orders = [
            torch.randperm(self.experts, generator=generator)
            for _ in range(-(-slots // self.experts))
        ]
        ids = torch.cat(orders)[:slots].view(calls, tokens, self.top_k)
        hidden = torch.randn(calls, tokens, self.hidden, generator=generator).to(self.dtype)
        gates = torch.rand(calls, tokens, self.top_k, generator=generator)
        return list(zip(hidden, ids, gates / gates.sum(2, keepdim=True), strict=True))

    def work(self, tokens: int, call: tuple[Tensor, Tensor, Tensor]) -> tuple[int, float]:
        """Return the bytes of the experts that one call takes at full width, and its FLOPs."""
        neurons = call[1].unique().numel() * self.width
        num_bytes = 3 * self.hidden * neurons * self.dtype.itemsize
        return num_bytes, 6.0 * tokens * self.top_k * self.hidden * self.width


def experts_that_fit(sizes: dict[str, int], itemsize: int, memory: int) -> int:
    """Return how many experts there is memory for, once at full width twice and twice at half of it."""
    one = 3 * sizes["hidden"] * sizes["width"] * (itemsize * (2 + 2 * KEPT) + 1 + KEPT)
    return min(sizes["experts"], int(memory / one) // 8 * 8)


def main() -> None:
    """Run all cases, write them, and print what the goals look at."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON lines")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=10, help="for each case, about")
    parser.add_argument("--memory", type=float, default=4, help="GB for the weights of a layer")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    arguments = parser.parse_args()
    torch.set_num_threads(ops.num_threads())
    ceilings = Ceilings()
    records = []
    for shape, dtype_name in itertools.product(arguments.shapes, arguments.dtypes):
        sizes, dtype = SHAPES[shape], DTYPES[dtype_name]
        experts = experts_that_fit(sizes, dtype.itemsize, int(arguments.memory * 1e9))
        layer = Layer(**{**sizes, "experts": experts}, dtype=dtype)
        packed = {
            name: layer.packed(widths)
            for name, widths in profiles(layer.width, layer.experts).items()
        }
        packed["int8 full"] = layer.quantized(packed["full"])
        packed["int8 uniform"] = layer.quantized(packed["uniform"])
        for tokens in arguments.tokens:
            case = {
                "op": "expert_gemm",
                "shape": shape,
                "experts": experts,
                "dtype": dtype_name,
                "tokens": tokens,
            }
            providers = providers_of(layer, packed, tokens, ceilings)
            records += compare(
                case,
                providers,
                "tenp full",
                rounds=arguments.rounds,
                warmup=1,
                seconds_at_most=arguments.seconds,
            )
    if arguments.out:
        save(arguments.out, records)
    print_goals(records)


def providers_of(
    layer: Layer, packed: dict[str, dict[str, Tensor]], tokens: int, ceilings: Ceilings
) -> dict[str, Callable[[], Any]]:
    """Return what is compared at one number of tokens, after a check of the results."""
    calls = layer.routings(tokens)

    def stock(implementation: str, hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        layer.stock.config._experts_implementation_internal = implementation
        return layer.stock(hidden, ids, gates.to(hidden.dtype))

    def ours(profile: str, hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return ops.expert_gemm(hidden, ids, gates, **packed[profile])

    expected = stock("eager", *calls[0]).float()
    error = (ours("full", *calls[0]).float() - expected).norm() / expected.norm()
    # transformers rounds to the dtype after every step, tenp once per projection.
    assert error < (1e-5 if layer.dtype == torch.float32 else 1e-2), (layer.dtype, tokens, error)

    def all_of(run: Callable[..., Any], name: str) -> Callable[[], Any]:
        return lambda: [run(name, *call) for call in calls]

    providers = {f"tenp {profile}": all_of(ours, profile) for profile in packed}
    for name in IMPLEMENTATIONS:
        if name != "batched_mm" or tokens * layer.top_k <= MAX_BATCHED_ROWS:
            providers[f"transformers {name}"] = all_of(stock, name)
    work = [layer.work(tokens, call) for call in calls]
    num_bytes, flops = (sum(part) for part in zip(*work, strict=True))
    providers["read"] = lambda: ceilings.read(num_bytes)
    providers["multiply-add"] = lambda: ceilings.multiply_add(flops)
    if ceilings.has_tiles and layer.dtype == torch.bfloat16:
        providers["tile multiply-add"] = lambda: ceilings.tile_multiply_add(flops)
    return providers


def print_goals(records: list[dict[str, Any]]) -> None:
    """Print the ratios that goals are stated in, one line a case."""
    print(
        "\nshape             dtype     tokens  of read  of FMA  of tiles  best stock  eager  grouped  half  tenp/uniform  int8 best stock"
    )
    key = ("shape", "dtype", "tokens")
    for case, group in itertools.groupby(records, key=lambda record: [record[k] for k in key]):
        print("{:<18}{:<10}{:>6}".format(*case) + "".join(_figures(list(group))))


def _figures(group: list[dict[str, Any]]) -> Iterator[str]:
    ratio = {record["provider"]: record["ratio"] for record in group}
    stock = [time for name, time in ratio.items() if name.startswith("transformers")]
    figures = (
        (ratio["read"], 9, ".0%"),
        (ratio["multiply-add"], 8, ".0%"),
        (ratio.get("tile multiply-add"), 10, ".0%"),
        (min(stock), 12, ".2f"),
        (ratio["transformers eager"], 7, ".2f"),
        (ratio["transformers grouped_mm"], 9, ".2f"),
        (ratio["tenp uniform"], 6, ".2f"),
        (ratio["tenp tenp"] / ratio["tenp uniform"], 14, ".2f"),
        (min(stock) / ratio["tenp int8 full"], 17, ".2f"),
    )
    for figure, width, form in figures:
        yield f"{'-' if figure is None else format(figure, form):>{width}}"


if __name__ == "__main__":
    main()
