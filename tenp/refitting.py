# SPDX-License-Identifier: Apache-2.0
"""Carries out a plan's repair: the refitted down projections, layer by layer, for whoever writes them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from tenp import adapter, repair
from tenp.adapter import Experts, ExpertTensor
from tenp.checkpoint import Checkpoint
from tenp.errors import PlanError
from tenp.layerwise import expert_reader
from tenp.plan import Plan
from tenp.reading import Reader
from tenp.statistics import Statistics


def require_statistics(plan: Plan, statistics: Statistics | None) -> None:
    """Check that a plan that computes new weights comes with the statistics it was made from.

    Raises:
        PlanError: It does not.
    """
    if statistics is None or statistics.digest() != plan.statistics:
        raise PlanError(
            f"a plan that changes weights must be applied with its statistics, {plan.statistics[:12]}, got "
            f"{'none' if statistics is None else statistics.digest()[:12]}; "
            "give the file of tenp calibrate with --statistics"
        )


def read_experts(
    checkpoint: Checkpoint,
    experts: Experts,
    tensors: dict[str, ExpertTensor],
    dtype: torch.dtype,
) -> Experts:
    """Return a layer's experts with their weights, which an empty model has not.

    Args:
        checkpoint: Where the weights are.
        experts: The layer in a model of the checkpoint, on any device.
        tensors: What the checkpoint's tensors are to the experts.
        dtype: To convert to.
    """
    reader = Reader(checkpoint)
    read = expert_reader(experts, tensors, reader, dtype)
    apart = [read(expert) for expert in range(experts.num_experts)]
    reader.close()
    return experts.with_parameters(
        {name: torch.cat([one[name] for one in apart]) for name in apart[0]}
    )


def reader_of_layers(checkpoint: Checkpoint) -> Callable[[int], Experts]:
    """Return a function from a decoder layer's index to its experts with their stored weights."""
    model = adapter.empty_model(adapter.load_config(checkpoint.directory))
    layers = {experts.layer: experts for experts in adapter.find_experts(model)}
    tensors = adapter.expert_tensors(model, checkpoint.tensors)

    def read(layer: int) -> Experts:
        name = next(name for name, part in tensors.items() if part.layer == layer)
        dtype = checkpoint.tensors[name].dtype
        return read_experts(checkpoint, layers[layer], tensors, dtype)

    return read


class Refitting:
    """Replaces the down projections of kept neurons (and down biases) by the refitted ones.

    One layer at a time is in memory. Any thread may call.

    Args:
        checkpoint: The dense model.
        plan: With repair.
        statistics: The ones that the plan was made from.

    Raises:
        PlanError: They are others.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, statistics: Statistics | None) -> None:
        require_statistics(plan, statistics)
        assert plan.repair is not None and statistics is not None
        model = adapter.empty_model(adapter.load_config(checkpoint.directory))
        self._layers = {experts.layer: experts for experts in adapter.find_experts(model)}
        self._tensors = adapter.expert_tensors(model, checkpoint.tensors)
        self._checkpoint, self._plan, self._statistics = checkpoint, plan, statistics
        self._repair = plan.repair
        self._lock = threading.Lock()
        self._layer: int | None = None
        self._columns: list[tuple[Tensor, Tensor | None]] = []

    def __call__(self, part: ExpertTensor, tensor: Tensor) -> Tensor:
        """Return a tensor of the checkpoint with the refitted numbers where neurons are kept.

        Args:
            part: What it is to the experts.
            tensor: As stored; of unkept neurons it stays as it is.
        """
        if not part.part.startswith("down") or tensor.is_meta:
            return tensor
        refitted = tensor.clone()
        experts = self._layers[part.layer]
        is_bias = part.part.endswith("_bias")
        if part.expert is not None:
            self._fill(part.layer, part.expert, refitted, is_bias)
        else:
            for _, view in experts.projections(part.part, refitted):
                for expert, matrix in enumerate(view):
                    self._fill(part.layer, expert, matrix, is_bias)
        return refitted

    def fill(self, experts: Experts) -> None:
        """Refit a layer of a loaded dense model in place; what is not kept stays as it is."""
        bias = experts.biases()[2]
        for expert in range(experts.num_experts):
            self._fill(experts.layer, expert, experts.down[expert], False)
            if bias is not None:
                self._fill(experts.layer, expert, bias[expert], True)

    def _fill(self, layer: int, expert: int, target: Tensor, is_bias: bool) -> None:
        with self._lock:
            if self._layer != layer:
                self._columns = self._compute(layer)
                self._layer = layer
            columns, bias = self._columns[expert]
        if is_bias:
            assert bias is not None
            target.copy_(bias)
        else:
            target[:, self._plan.keep[layer][expert].to(target.device)] = columns.to(target)

    def _compute(self, layer: int) -> list[tuple[Tensor, Tensor | None]]:
        empty = self._layers[layer]
        names = [name for name, part in self._tensors.items() if part.layer == layer]
        dtype = self._checkpoint.tensors[names[0]].dtype
        experts = read_experts(self._checkpoint, empty, self._tensors, dtype)
        moments = repair.layer_moments(self._statistics, layer, self._repair.weights)
        keep = moments.with_bias(self._plan.keep[layer])
        bias = experts.biases()[2]
        return [
            repair.refitted_down(
                experts.down[expert],
                None if bias is None else bias[expert],
                moments.folds[:, expert].sum(dim=0),
                keep[expert],
                self._repair.ridges[layer][expert],
                moments.target(expert),
            )
            for expert in range(experts.num_experts)
        ]
