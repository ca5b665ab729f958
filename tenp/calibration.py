# SPDX-License-Identifier: Apache-2.0
"""One pass of the model over the calibration samples, adding up every statistic on the way.

The model runs as it is, with its own router; only its experts are stood in for, which sees the true
inputs, choices and gates of every MoE layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tenp import moments, ops
from tenp.adapter import Experts, experts_replaced, find_experts
from tenp.errors import DataError, InvalidArgument
from tenp.samples import Samples
from tenp.source import Source
from tenp.statistics import ALL_STATISTICS, Domain, LayerStatistics, Statistics

Progress = Callable[[str, int], None]


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    samples: Sequence[Samples],
    source: Source,
    settings: dict[str, Any] | None = None,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
    second_moments: bool = False,
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
        second_moments: Also add up C = sum g^2 m m^T of every expert, in two folds of the samples.

    Returns:
        Float64 sums on the CPU; the same call gives the same bits.
    """
    layers = find_experts(model)
    samples, statistics = begin(layers, samples, source, settings, second_moments)
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
    return finish(statistics)


def begin(
    layers: Sequence[Experts],
    samples: Sequence[Samples],
    source: Source,
    settings: dict[str, Any] | None = None,
    second_moments: bool = False,
    cross_moments: bool = False,
) -> tuple[Sequence[Samples], Statistics]:
    """Return the samples as they are to be run, and the statistics of no token to add to.

    Args:
        layers: The routed experts of the model.
        samples: One entry per domain.
        source: The checkpoint.
        settings: Recorded in the statistics.
        second_moments: As in `collect`.
        cross_moments: Also those with what the dense model computes.
    """
    if second_moments:
        moments.check_memory(layers, len(samples), cross=cross_moments)
        samples = moments.halves(samples)
    domains = [Domain(s.domain, len(s.ids), s.tokens(), (s.digest(),)) for s in samples]
    shapes = {experts.layer: (experts.num_experts, experts.width) for experts in layers}
    hidden = layers[0].down.shape[1]
    statistics = Statistics.zeros(source, domains, shapes, settings or {}, hidden=hidden)
    for experts in layers if second_moments else []:
        statistics.layers[experts.layer].update(moments.empty(experts, len(domains), cross_moments))
    return samples, statistics


def finish(statistics: Statistics) -> Statistics:
    """Return statistics of `begin`, with all batches added, on the CPU and as they are kept.

    Raises:
        DataError: They hold no numbers.
    """
    for tensors in statistics.layers.values():
        tensors.update({name: tensor.cpu() for name, tensor in tensors.items()})
    require_finite(statistics)
    has_halves = any("second_moment" in tensors for tensors in statistics.layers.values())
    return moments.join_halves(statistics) if has_halves else statistics


def require_finite(statistics: Statistics) -> None:
    """Refuse statistics that hold no numbers, because the model's activations overflowed.

    Raises:
        DataError: A sum is infinite or not a number.
    """
    for layer, tensors in statistics.layers.items():
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise DataError(
                    f"{name} of layer {layer} must be finite, got inf or nan: the model overflows in "
                    f"{statistics.settings.get('dtype', 'its dtype')} or its weights are damaged; calibrate in float32"
                )


class _Collector:
    """Computes what the experts compute and adds its statistics to the current domain's."""

    domain: int
    attended: Tensor  # [T], bool

    def __init__(self, layers: Sequence[Experts], statistics: Statistics) -> None:
        self._layers = {experts.module: experts for experts in layers}
        self._statistics = statistics
        self._seen: set[int] = set()

    def __call__(
        self,
        module: nn.Module,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        experts = self._layers[module]
        layer = self._statistics.layers[experts.layer]
        if experts.layer not in self._seen:
            # Only now are the weights surely here: layers may be on several devices or offloaded.
            self._seen.add(experts.layer)
            layer.update({name: tensor.to(hidden.device) for name, tensor in layer.items()})
            note_weights(experts, layer)
        attended = self.attended.to(hidden.device)
        routed = route(experts, hidden, top_k_index, top_k_weights, attended)
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        add_experts(experts, routed, domain_sums(layer, self.domain), out)
        return out.to(hidden.dtype)


@dataclass(frozen=True)
class Routed:
    """What one batch sends to the routed experts of a layer."""

    hidden: Tensor  # [T, H], what router and experts receive; may be kept on another device
    routing: ops.Routing  # of all experts of the layer
    gates: Tensor  # [T, k], float32, 0 where a slot names no expert

    @property
    def hidden_here(self) -> Tensor:
        """`[T, H]`, on the device that computes."""
        return self.hidden.to(self.gates.device)

    @cached_property
    def begins(self) -> list[int]:
        """E + 1 numbers: the rows of expert e are `begins[e]` to `begins[e + 1]`.

        To read them from a device waits for it, so that is done once.
        """
        begins: list[int] = self.routing.offsets.tolist()
        return begins

    def of_expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the tokens of an expert's rows, `[s]` int64, and their gates, `[s]` float32."""
        slots = self.routing.slots[self.begins[expert] : self.begins[expert + 1]].long()
        return slots // self.gates.shape[1], self.gates.flatten()[slots]

    @cached_property
    def row_slots(self) -> Tensor:
        """`[S]`, int64: which of the flattened `[T, k]` slots every row is."""
        return self.routing.slots[: self.begins[-1]].long()

    @property
    def row_tokens(self) -> Tensor:
        """`[S]`, int64."""
        return self.row_slots // self.gates.shape[1]

    @property
    def row_gates(self) -> Tensor:
        """`[S]`, float32."""
        return self.gates.flatten()[self.row_slots]


def route(
    experts: Experts,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    attended: Tensor,
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
    return Routed(hidden, routing, torch.where(routing.rows >= 0, top_k_weights.float(), 0.0))


def note_weights(experts: Experts, layer: LayerStatistics, first: int = 0) -> None:
    """Keep the facts of the weights of some experts.

    Args:
        experts: n experts, with their weights.
        layer: The statistics of their layer, written to.
        first: Which of the layer's experts is the first of the n.
    """
    mine = slice(first, first + experts.num_experts)
    layer["down_norm"][mine].copy_(column_norms(experts.down))
    if "down_gram" in layer:
        layer["down_gram"][mine].copy_(moments.down_gram(experts))


def domain_sums(layer: LayerStatistics, domain: int) -> LayerStatistics:
    """Return views `[E]`, `[E, I]`, ... of one domain's sums; facts of the weights have no domain."""
    return {
        name: tensor[domain]
        for name, tensor in layer.items()
        if ALL_STATISTICS[name].merge != "weights"
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
    offsets, slots, rows = routed.routing
    if experts.num_experts < len(offsets) - 1:
        last = first + experts.num_experts
        begin, end = routed.begins[first], routed.begins[last]
        offsets = offsets[first : last + 1] - begin
        slots, rows = slots[begin:end], rows - begin
    hidden = routed.hidden_here
    activations = _activations(experts, hidden, offsets, slots, rows.shape[1])
    per_batch = {n: total for n, total in sums.items() if not ALL_STATISTICS[n].has_folds}
    ops.expert_statistics(
        hidden,
        activations,
        experts.down,
        offsets,
        slots,
        rows,
        routed.gates,
        down_bias=experts.biases()[2],
        out=out,
        **per_batch,
    )
    if "second_moment" in sums:
        ops.accumulate_second_moment(
            activations,
            routed.gates.flatten()[slots.long().clamp(min=0)],
            offsets,
            second_moment=sums["second_moment"],
            has_bias=moments.variables(experts) > experts.width,
        )


def _activations(
    experts: Experts, hidden: Tensor, offsets: Tensor, slots: Tensor, experts_per_token: int
) -> Tensor:
    """Return m `[S, I]`: by the kernel, or for what it does not know expert by expert in torch."""
    gate, up = experts.gate_and_up()
    if experts.kernel_activation is not None and up.stride(-1) == 1:
        activation, limit, alpha = experts.kernel_activation
        gate_bias, up_bias, _ = experts.biases()
        return ops.expert_activations(
            hidden,
            offsets,
            slots,
            gate,
            up,
            experts_per_token,
            gate_bias=gate_bias,
            up_bias=up_bias,
            activation=activation,
            limit=limit,
            alpha=alpha,
        )
    activations = hidden.new_empty(len(slots), experts.width)
    for expert, (begin, end) in enumerate(pairwise(offsets.tolist())):
        tokens = slots[begin:end] // experts_per_token
        activations[begin:end] = experts.activations(expert, hidden[tokens])
    return activations


def run_expert(one: Experts, routed: Routed, out: Tensor, expert: int) -> None:
    """Add the output of one expert for one batch, and measure nothing.

    Args:
        one: The expert alone, of any width.
        routed: The rows of all experts of the layer.
        out: `[T, H]`, float32, added to.
        expert: Which of the layer's experts it is.
    """
    tokens, gates = routed.of_expert(expert)
    outputs = one.activations(0, routed.hidden_here[tokens]) @ one.down[0].t()
    if (down_bias := one.biases()[2]) is not None:
        outputs = outputs + down_bias[0]
    out.index_add_(0, tokens, outputs.float() * gates[:, None])


def add_cross_moments(
    one: Experts, routed: Routed, dense: Routed, sums: LayerStatistics, expert: int
) -> None:
    """Add how the neurons of one expert relate to those of the dense model, for one batch.

    Args:
        one: The expert alone.
        routed: The rows of the model that is measured.
        dense: Of the dense model on the same tokens; only what the experts receive is used.
        sums: `[1, ...]` of the batch's domain, added to.
        expert: Which of the layer's experts it is.
    """
    tokens, gates = routed.of_expert(expert)
    mine = one.activations(0, routed.hidden_here[tokens])
    theirs = one.activations(0, dense.hidden_here[tokens])
    moments.add_cross_moment(one, sums, theirs, mine, gates)


def column_norms(down: Tensor) -> Tensor:
    """|w_k| of every neuron, `[E, I]` float64; expert by expert, because a float64 copy of all is large.

    Not by torch's norm, which goes down the columns: on the CPU that takes three times as long.
    """
    return torch.stack([matrix.double().square().sum(dim=0).sqrt() for matrix in down])
