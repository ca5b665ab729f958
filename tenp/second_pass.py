# SPDX-License-Identifier: Apache-2.0
"""An optional second pass with gradients: what the loss feels of every neuron and every layer.

It serves criteria of other papers (HEAPr, EASY-EP) and budgets pooled over layers.

With d = dL/dz, the gradient at what the routed experts of a layer add up to, the gradient at one
expert's output is g d and at its neuron k g <w_k, d>; so one backward pass to the activations is
enough, and no weight needs a gradient. L is the summed loss of the next tokens of the text.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tenp.adapter import Experts, experts_replaced, find_experts
from tenp.calibration import Progress, Routed, route
from tenp.errors import InvalidArgument
from tenp.samples import Samples
from tenp.statistics import LayerStatistics, Statistics


def collect(
    model: PreTrainedModel,
    samples: Sequence[Samples],
    statistics: Statistics,
    batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> None:
    """Add the statistics of the second pass to those of the first, in place.

    These are `activation_energy`, `gradient_energy`, `output_sensitivity`, and `residual_change`
    where the layers have the residual stream to see: as the input of the norm before the experts.

    Args:
        model: The dense model, in evaluation mode, in float32 or bfloat16.
        samples: Those that the statistics were taken of, one entry per domain.
        statistics: As many domains, in the same order.
        batch_tokens: Token positions per pass; the activations of all layers are kept for it.
        progress: Called with (domain, tokens) after every batch.

    Raises:
        InvalidArgument: The domains are others.

    Note:
        A forward and a backward pass to the activations, with the whole model in memory.
    """
    names = [domain.name for domain in statistics.domains]
    if [domain.domain for domain in samples] != names:
        raise InvalidArgument(
            f"gradients: samples must be of the domains {names}, got {[s.domain for s in samples]}"
        )
    for layer in statistics.layers.values():
        for name in ("activation_energy", "gradient_energy"):
            layer[name] = torch.zeros_like(layer["energy"])
        layer["output_sensitivity"] = torch.zeros(len(names), dtype=torch.float64)
        layer["residual_change"] = torch.zeros_like(layer["gate_sum"])
    residual = _ResidualStream(model)
    collector = _Collector(find_experts(model), statistics, residual)
    embeddings: Any = model.get_input_embeddings()
    # The first tensor that needs a gradient; everything computed from it then has one.
    hook = embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
    try:
        with experts_replaced(model, collector), torch.enable_grad():
            for row, domain in enumerate(samples):
                collector.domain = row
                for ids, mask in domain.batches(batch_tokens, model.device):
                    collector.attended = mask.flatten().bool()
                    predicted = mask[:, 1:].bool()
                    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                    targets = ids[:, 1:][predicted]
                    loss = F.cross_entropy(
                        logits[:, :-1][predicted].float(), targets, reduction="sum"
                    )
                    with _deterministic():
                        loss.backward()
                    if progress is not None:
                        progress(domain.domain, int(mask.sum()))
    finally:
        hook.remove()
        residual.remove()
    if not residual.was_seen:
        for layer in statistics.layers.values():
            del layer["residual_change"]


@contextmanager
def _deterministic() -> Iterator[None]:
    """Make gradients the same in every run: on a GPU those of attention are not by default."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    # What torch then asks of everyone who multiplies matrices by cuBLAS.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


class _ResidualStream:
    """Keeps what the norm before the experts gets: the residual stream h."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.was_seen = False
        self._inputs: dict[str, Tensor] = {}
        self._hooks = []
        for experts in find_experts(model):
            layer = self._layer_of(experts)
            for name, child in model.get_submodule(layer).named_children():
                if "norm" in name:
                    self._hooks.append(child.register_forward_pre_hook(self._keep(layer)))

    def before(self, experts: Experts, shape: torch.Size) -> Tensor | None:
        """Return h `[T, H]` of the call that is under way, None if it cannot be seen."""
        # Layers call their norms in order, so the last one called is the one before the experts.
        kept = self._inputs.get(self._layer_of(experts))
        if kept is None or kept.numel() != shape.numel():
            return None
        self.was_seen = True
        return kept.view(shape)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, layer: str) -> Any:
        return lambda module, args: self._inputs.update({layer: args[0].detach()})

    @staticmethod
    def _layer_of(experts: Experts) -> str:
        before, number, _ = experts.name.partition(f".{experts.layer}.")
        return before + number.rstrip(".")


class _Collector:
    """Computes what the experts compute, and adds up when the gradient comes back."""

    domain: int
    attended: Tensor  # [T], bool

    def __init__(
        self,
        layers: Sequence[Experts],
        statistics: Statistics,
        residual: _ResidualStream,
    ) -> None:
        self._layers = {experts.module: experts for experts in layers}
        self._statistics = statistics
        self._residual = residual

    def __call__(
        self,
        module: nn.Module,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        experts = self._layers[module]
        attended = self.attended.to(hidden.device)
        with torch.no_grad():
            routed = route(experts, hidden, top_k_index, top_k_weights, attended)
        # Again with gradients; the order of the rows is known now.
        gates = top_k_weights.flatten()[routed.row_slots].float()
        down_bias = experts.biases()[2]
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        activations, norms = [], []
        for expert, (begin, end) in enumerate(pairwise(routed.begins)):
            tokens = routed.row_tokens[begin:end]
            m = experts.activations(expert, hidden[tokens])
            y = F.linear(m, experts.down[expert])
            norms.append(y.detach().double().norm(dim=1))
            if down_bias is not None:
                y = y + down_bias[expert]
            out = out.index_add(0, tokens, y.float() * gates[begin:end, None])
            activations.append(m.detach())
        sums = self._statistics.layers[experts.layer]
        domain = self.domain
        if (before := self._residual.before(experts, hidden.shape)) is not None:
            _add_residual_change(routed, before, out.detach(), norms, sums, domain)
        out.register_hook(
            lambda gradient: _add(experts, routed, activations, gradient, sums, domain)
        )
        return out.to(hidden.dtype)


def _add_residual_change(
    routed: Routed,
    before: Tensor,  # [T, H], h
    added: Tensor,  # [T, H], z
    norms: Sequence[Tensor],
    sums: LayerStatistics,
    domain: int,
) -> None:
    h, z = before.double(), added.double()
    change = (1 - F.cosine_similarity(h, h + z, dim=1)).clamp(min=0)
    for expert, (begin, end) in enumerate(pairwise(routed.begins)):
        weight = routed.row_gates[begin:end].double() * norms[expert]
        sums["residual_change"][domain, expert] += (
            weight @ change[routed.row_tokens[begin:end]]
        ).cpu()


@torch.no_grad()
def _add(
    experts: Experts,
    routed: Routed,
    activations: Sequence[Tensor],
    gradient: Tensor,  # [T, H], dL/dz
    sums: LayerStatistics,
    domain: int,
) -> None:
    for expert, (begin, end) in enumerate(pairwise(routed.begins)):
        rows = slice(begin, end)
        upstream = gradient[routed.row_tokens[rows]] * routed.row_gates[rows, None]
        neurons = upstream.to(experts.down.dtype) @ experts.down[expert]
        energies = (
            activations[expert].double().square().sum(0),
            neurons.double().square().sum(0),
        )
        for name, energy in zip(("activation_energy", "gradient_energy"), energies, strict=True):
            sums[name][domain, expert] += energy.to(sums[name].device)
    sums["output_sensitivity"][domain] += gradient.double().square().sum().cpu()
