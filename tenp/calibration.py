# SPDX-License-Identifier: Apache-2.0
"""One pass of the model over the calibration samples, adding up every statistic on the way.

The model runs as it is, with its own router; only its experts are stood in for, which sees the true
inputs, choices and gates of every MoE layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tenp import ops
from tenp.adapter import Experts, experts_replaced, find_experts
from tenp.errors import InvalidArgument
from tenp.samples import Samples
from tenp.source import Source
from tenp.statistics import Domain, LayerStatistics, Statistics

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
        statistics.layers[experts.layer]["down_norm"].copy_(_column_norms(experts.down))
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
        if hidden.shape[0] != self.attended.shape[0]:
            raise InvalidArgument(
                f"{experts.name} must see every token of the batch, {self.attended.shape[0]}, got {hidden.shape[0]}"
            )
        # Padding follows the attended tokens and is never attended to, so it needs no experts at all.
        index = torch.where(self.attended[:, None], top_k_index, -1)
        routing = ops.route(index, experts.num_experts)
        offsets = routing.offsets.tolist()
        slots = routing.slots[: offsets[-1]].long()
        tokens = slots // top_k_index.shape[1]
        inputs = hidden[tokens]
        activations = hidden.new_empty(len(slots), experts.width)
        outputs = hidden.new_empty(len(slots), experts.down.shape[1])
        for expert in range(experts.num_experts):
            rows = slice(offsets[expert], offsets[expert + 1])
            if rows.start < rows.stop:
                activations[rows] = experts.activations(expert, inputs[rows])
                torch.mm(activations[rows], experts.down[expert].t(), out=outputs[rows])
        gates = top_k_weights.flatten()[slots].float()
        self._add(experts, hidden, activations, outputs, tokens.int(), gates, routing.offsets)
        if (down_bias := experts.biases()[2]) is not None:
            outputs = outputs + torch.repeat_interleave(down_bias, routing.offsets.diff(), dim=0)
        return _combine(outputs, routing.rows, top_k_weights)

    def _add(
        self,
        experts: Experts,
        hidden: Tensor,  # [T, H]
        activations: Tensor,  # [S, I]
        outputs: Tensor,  # [S, H]
        tokens: Tensor,  # [S]
        gates: Tensor,  # [S]
        offsets: Tensor,  # [E + 1]
    ) -> None:
        def sums(*names: str) -> LayerStatistics:
            layer = self._statistics.layers[experts.layer]
            return {name: layer[name][self.domain] for name in names}

        ops.accumulate_activation_stats(
            outputs,
            gates,
            offsets,
            **sums("counts", "gate_sum", "norm_sum", "gated_norm_sum", "norm_max"),
        )
        ops.accumulate_direction_change(
            hidden, outputs, tokens, gates, offsets, **sums("direction_change")
        )
        ops.accumulate_neuron_contribution(
            activations,
            outputs,
            experts.down,
            gates,
            offsets,
            **sums("projection", "magnitude", "energy", "peak"),
        )


def _combine(outputs: Tensor, rows: Tensor, gates: Tensor) -> Tensor:
    """Return sum_j g_tj y of slot j, `[T, H]`, in slot order and float32; a slot of row -1 adds nothing."""
    out = torch.zeros(rows.shape[0], outputs.shape[1], dtype=torch.float32, device=outputs.device)
    for slot in range(rows.shape[1]):
        routed = torch.nonzero(rows[:, slot] >= 0).flatten()
        weighted = outputs[rows[routed, slot].long()].float() * gates[routed, slot, None].float()
        out.index_add_(0, routed, weighted)
    return out.to(outputs.dtype)


def _column_norms(down: Tensor) -> Tensor:
    """|w_k| of every neuron, `[E, I]` float64; expert by expert, because a float64 copy of all is large."""
    return torch.stack([matrix.double().norm(dim=0) for matrix in down])
