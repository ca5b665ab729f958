# SPDX-License-Identifier: Apache-2.0
"""Layers of published models with random weights, for gpu_suite.py, and what is called on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerShape:
    """The routed experts of one layer of a published model."""

    name: str
    hidden_size: int
    width: int
    num_experts: int
    experts_per_token: int


LAYERS = (
    LayerShape("Qwen3-30B-A3B", 2048, 768, 128, 8),
    LayerShape("DeepSeek-V2-Lite", 2048, 1408, 64, 6),
)
TINY = LayerShape("tiny", 64, 48, 8, 2)


@dataclass
class Layer:
    """Random weights of one layer, and what calls its ops."""

    shape: LayerShape
    widths: list[int]
    device: str
    seed: int = 0

    def __post_init__(self) -> None:
        import torch

        from tenp import ops

        generator = torch.Generator(self.device).manual_seed(self.seed)

        def normal(*size: int) -> Any:
            values = torch.randn(*size, generator=generator, device=self.device)
            return values.to(torch.bfloat16)

        offsets = ops.neuron_offsets(self.widths)
        self.gate_up = normal(2 * offsets[-1], self.shape.hidden_size) / 45
        self.down = normal(offsets[-1], self.shape.hidden_size) / 28
        self.offsets = torch.tensor(offsets, dtype=torch.int32, device=self.device)
        self.width_tensor = torch.tensor(self.widths, dtype=torch.int32, device=self.device)
        self.normal = normal
        self.generator = generator

    def tokens(self, count: int) -> tuple[Any, Any, Any]:
        """x, expert ids (uniform, no duplicates) and gates."""
        import torch

        shape = (count, self.shape.num_experts)
        scores = torch.rand(shape, generator=self.generator, device=self.device)
        gates, ids = scores.topk(self.shape.experts_per_token)
        return self.normal(count, self.shape.hidden_size), ids.int(), gates / gates.sum(1)[:, None]

    def forward(self, hidden: Any, ids: Any, gates: Any) -> Any:
        """The op under test."""
        from tenp import ops

        return ops.expert_gemm(
            hidden,
            ids,
            gates,
            self.gate_up,
            self.down,
            self.width_tensor,
            self.offsets,
            max_width=max(self.widths),
        )

    def loop(self, hidden: Any, ids: Any, gates: Any) -> Any:
        """The same by torch, expert by expert."""
        import torch
        from torch.nn.functional import silu

        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        packed_rows = len(self.down)
        first = 0
        for expert, width in enumerate(self.widths):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            x = hidden[token]
            gate = self.gate_up[first : first + width]
            up = self.gate_up[packed_rows + first : packed_rows + first + width]
            y = (silu(x @ gate.T) * (x @ up.T)) @ self.down[first : first + width]
            out.index_add_(0, token, y.float() * gates[token, slot, None])
            first += (width + 15) // 16 * 16
        return out.to(hidden.dtype)

    def flops(self, ids: Any) -> float:
        """Floating-point operations of these rows, padding not counted."""
        rows = ids.flatten().bincount(minlength=len(self.widths)).tolist()
        each = 6 * self.shape.hidden_size
        return float(sum(each * r * w for r, w in zip(rows, self.widths, strict=True)))

    def active_bytes(self, ids: Any) -> float:
        """Bytes of the weights that these rows need."""
        each = 3 * self.shape.hidden_size * 2
        return float(sum(each * self.widths[expert] for expert in ids.unique().tolist()))


def ragged_widths(shape: LayerShape, kept: float) -> list[int]:
    """Widths that differ by expert, multiples of 16, `kept` of the full width in the mean."""
    if kept == 1:
        return [shape.width] * shape.num_experts
    spread = 0.5 * kept
    widths = []
    for expert in range(shape.num_experts):
        share = kept + spread * (
            2 * (expert * 37 % shape.num_experts) / (shape.num_experts - 1) - 1
        )
        widths.append(min(shape.width, max(16, round(shape.width * share / 16) * 16)))
    return widths


class Calibration:
    """What calibration does with one batch: both halves of its pass, and the second moments."""

    def __init__(self, layer: Layer, count: int) -> None:
        """Make a batch of `count` tokens, and full-width weights as checkpoints have them."""
        import torch

        from tenp import ops

        shape, device = layer.shape, layer.device
        experts, width, size = shape.num_experts, shape.width, shape.hidden_size
        self.per_token = shape.experts_per_token
        self.hidden, ids, gates = layer.tokens(count)
        self.routing = ops.route(ids, experts)
        self.gates = gates.float()
        self.row_gates = self.gates.flatten()[self.routing.slots.long()]
        self.gate, self.up = (layer.normal(experts, 2 * width, size) / 45).chunk(2, dim=1)
        self.down = layer.normal(experts, size, width) / 28

        def zeros(*shape: int, dtype: Any = torch.float64) -> Any:
            return torch.zeros(shape, dtype=dtype, device=device)

        by_expert = ("gate_sum", "normalized_gate_sum", "norm_sum", "gated_norm_sum", "norm_max")
        by_neuron = ("projection", "magnitude", "energy", "peak")
        self.sums = {
            "out": zeros(count, size, dtype=torch.float32),
            "counts": zeros(experts, dtype=torch.int64),
            "input_energy": zeros(experts, size),
            **{name: zeros(experts) for name in (*by_expert, "direction_change")},
            **{name: zeros(experts, width) for name in by_neuron},
        }
        self.second_moment = zeros(experts, width * (width + 1) // 2)
        self.activations()

    def activations(self) -> None:
        """m of every row."""
        from tenp import ops

        self.m = ops.expert_activations(
            self.hidden, *self.routing[:2], self.gate, self.up, self.per_token
        )

    def statistics(self) -> None:
        """The layer's output and its sums."""
        from tenp import ops

        ops.expert_statistics(
            self.hidden, self.m, self.down, *self.routing, self.gates, **self.sums
        )

    def moments(self) -> None:
        """The second moments of m."""
        from tenp import ops

        ops.accumulate_second_moment(
            self.m, self.row_gates, self.routing.offsets, second_moment=self.second_moment
        )

    def alone(self) -> None:
        """The sums of the statistics by the ops that have outputs already."""
        import torch

        from tenp import ops

        rows, sums = self.routing, self.sums
        y = torch.randn(len(self.m), self.hidden.shape[1], device=self.m.device).to(self.m.dtype)
        kept = (y, self.row_gates, rows.offsets)
        tokens = rows.slots // self.per_token
        names = ("counts", "gate_sum", "norm_sum", "gated_norm_sum", "norm_max")
        ops.accumulate_activation_stats(*kept, **{name: sums[name] for name in names})
        change = sums["direction_change"]
        ops.accumulate_direction_change(self.hidden, y, tokens, *kept[1:], direction_change=change)
        names = ("projection", "magnitude", "energy", "peak")
        ops.accumulate_neuron_contribution(
            self.m, y, self.down, *kept[1:], **{name: sums[name] for name in names}
        )

    def calls(self) -> dict[str, Callable[[], None]]:
        """The three by the names of their ops."""
        return {
            "expert_activations": self.activations,
            "expert_statistics": self.statistics,
            "accumulate_second_moment": self.moments,
        }

    def bits(self) -> list[Any]:
        """All results of one batch, from zero."""
        sums = [*self.sums.values(), self.second_moment]
        for each in sums:
            each.zero_()
        for call in self.calls().values():
            call()
        return [each.clone() for each in sums]


def run_tiny(device: str) -> None:
    """Every kernel once, on layers small enough for compute-sanitizer."""
    import torch

    from tenp import ops

    for kept, counts in ((1.0, (70,)), (0.5, (1, 5, 90))):
        layer = Layer(TINY, ragged_widths(TINY, kept), device)
        for count in counts:
            hidden, ids, gates = layer.tokens(count)
            layer.forward(hidden, ids, gates)
    batch = Calibration(layer, 40)
    batch.bits()
    batch.alone()
    ops.tile_table(
        ops.route(ids, TINY.num_experts).offsets, layer.width_tensor, 64, 128, rows=ids.numel()
    )
    ops.route(torch.zeros(3000, 2, dtype=torch.int32, device=device), TINY.num_experts)
    if device == "cuda":
        torch.cuda.synchronize()
