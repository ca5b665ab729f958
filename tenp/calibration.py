# SPDX-License-Identifier: Apache-2.0
"""One pass of the model over the calibration samples, adding up every statistic on the way.

The model runs as it is, with its own router; only its experts are stood in for, which sees the true
inputs, choices and gates of every MoE layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tenp import ops
from tenp.adapter import Experts, experts_replaced, find_experts
from tenp.errors import InvalidArgument
from tenp.samples import Samples
from tenp.source import Source
from tenp.statistics import STATISTICS, Domain, LayerStatistics, Statistics

Progress = Callable[[str, int], None]


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    samples: Sequence[Samples],
    source: Source,
    settings: dict[str, Any] | None = None,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> Statistics:
    """Calibrate: return the statistics of all domains.

    Args:
        model: The dense model, in evaluation mode.
        samples: One entry per domain.
        source: The checkpoint that `model` was loaded from.
        settings: Recorded in the statistics.
        batch_tokens: Token positions per forward pass. Memory for one layer grows with it; results
            differ only by rounding.
        progress: Called with (domain, tokens) after every batch.

    Returns:
        Float64 sums on the CPU; the same call gives the same bits.
    """
    layers = find_experts(model)
    domains = [Domain(s.domain, len(s.ids), s.tokens(), (s.digest(),)) for s in samples]
    shapes = {experts.layer: (experts.num_experts, experts.width) for experts in layers}
    statistics = Statistics.zeros(source, domains, shapes, settings or {}, device=model.device)
    for experts in layers:
        statistics.layers[experts.layer]["down_norm"].copy_(column_norms(experts.down))
    collector = _Collector(layers, statistics)
    with experts_replaced(model, collector):
        for row, domain in enumerate(samples):
            collector.domain = row
            for ids, mask in domain.batches(batch_tokens, model.device):
                collector.attended = mask.flatten().bool()
                # Without the head: logits of a whole batch would be the largest tensor of all.
                model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
                if progress is not None:
                    progress(domain.domain, int(mask.sum()))
    for tensors in statistics.layers.values():
        tensors.update({name: tensor.cpu() for name, tensor in tensors.items()})
    return statistics


class _Collector:
    """Computes what the experts compute and adds its statistics to the current domain's."""

    domain: int
    attended: Tensor  # [T], bool

    def __init__(self, layers: Sequence[Experts], statistics: Statistics) -> None:
        self._layers = {experts.module: experts for experts in layers}
        self._statistics = statistics

    def __call__(
        self, module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        experts = self._layers[module]
        routed = route(experts, hidden, top_k_index, top_k_weights, self.attended)
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        sums = domain_sums(self._statistics.layers[experts.layer], self.domain)
        add_experts(experts, routed, sums, out)
        return out.to(hidden.dtype)


@dataclass(frozen=True)
class Routed:
    """The rows that one batch sends to the routed experts of a layer, by expert and then by token."""

    hidden: Tensor  # [T, H], what router and experts receive
    offsets: Tensor  # [E + 1], int32; rows of expert e are offsets[e] to offsets[e + 1]
    tokens: Tensor  # [S], int64
    gates: Tensor  # [S], float32


def route(
    experts: Experts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, attended: Tensor
) -> Routed:
    """Order what the router chose by expert.

    Args:
        experts: Of which layer.
        hidden: `[T, H]`.
        top_k_index: `[T, k]`.
        top_k_weights: `[T, k]`.
        attended: `[T]`, bool. Padding follows the attended tokens and is never attended to, so it
            needs no experts at all.
    """
    if hidden.shape[0] != attended.shape[0]:
        raise InvalidArgument(
            f"{experts.name} must see every token of the batch, {attended.shape[0]}, got {hidden.shape[0]}"
        )
    index = torch.where(attended[:, None], top_k_index, -1)
    routing = ops.route(index, experts.num_experts)
    slots = routing.slots[: int(routing.offsets[-1])].long()
    gates = top_k_weights.flatten()[slots].float()
    return Routed(hidden, routing.offsets, slots // top_k_index.shape[1], gates)


def domain_sums(layer: LayerStatistics, domain: int) -> LayerStatistics:
    """Return views `[E]` and `[E, I]` of one domain's sums; facts of the weights have no domain."""
    return {
        name: tensor[domain]
        for name, tensor in layer.items()
        if STATISTICS[name].merge != "weights"
    }


def add_experts(
    experts: Experts, routed: Routed, sums: LayerStatistics, out: Tensor, first: int = 0
) -> None:
    """Run some experts of a layer on one batch, add their statistics and their part of the output.

    Every expert's sums and every token's output are added up in the order of experts, so experts one
    at a time give the same bits as all at once.

    Args:
        experts: n experts, with their weights.
        routed: The rows of all experts of the layer.
        sums: `[n]` and `[n, I]` of the batch's domain, added to.
        out: `[T, H]`, float32, added to.
        first: Which of the layer's experts is the first of the n.
    """
    bounds = routed.offsets[first : first + experts.num_experts + 1]
    offsets = [int(bound) for bound in (bounds - bounds[0]).tolist()]
    rows = slice(int(bounds[0]), int(bounds[-1]))
    tokens, gates = routed.tokens[rows], routed.gates[rows]
    activations = routed.hidden.new_empty(len(tokens), experts.width)
    outputs = routed.hidden.new_empty(len(tokens), experts.down.shape[1])
    down_bias = experts.biases()[2]
    for expert in range(experts.num_experts):
        mine = slice(offsets[expert], offsets[expert + 1])
        if mine.start == mine.stop:
            continue
        activations[mine] = experts.activations(expert, routed.hidden[tokens[mine]])
        torch.mm(activations[mine], experts.down[expert].t(), out=outputs[mine])
        contribution = outputs[mine] if down_bias is None else outputs[mine] + down_bias[expert]
        out.index_add_(0, tokens[mine], contribution.float() * gates[mine, None])
    _add_statistics(
        experts, sums, routed.hidden, activations, outputs, tokens.int(), gates, bounds - bounds[0]
    )


def _add_statistics(
    experts: Experts,
    sums: LayerStatistics,
    hidden: Tensor,  # [T, H]
    activations: Tensor,  # [S, I]
    outputs: Tensor,  # [S, H]
    tokens: Tensor,  # [S], int32
    gates: Tensor,  # [S]
    offsets: Tensor,  # [E + 1]
) -> None:
    def of(*names: str) -> LayerStatistics:
        return {name: sums[name] for name in names}

    ops.accumulate_activation_stats(
        outputs,
        gates,
        offsets,
        **of("counts", "gate_sum", "norm_sum", "gated_norm_sum", "norm_max"),
    )
    ops.accumulate_direction_change(
        hidden, outputs, tokens, gates, offsets, **of("direction_change")
    )
    ops.accumulate_neuron_contribution(
        activations,
        outputs,
        experts.down,
        gates,
        offsets,
        **of("projection", "magnitude", "energy", "peak"),
    )


def column_norms(down: Tensor) -> Tensor:
    """|w_k| of every neuron, `[E, I]` float64; expert by expert, because a float64 copy of all is large."""
    return torch.stack([matrix.double().norm(dim=0) for matrix in down])
