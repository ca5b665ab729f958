# SPDX-License-Identifier: Apache-2.0
"""What the dense experts are when their weights have been rounded to int8: what written ones must compute."""

from __future__ import annotations

from torch import Tensor

from tenp import adapter
from tenp.adapter import Experts, ExpertTensor
from tenp.checkpoint import Checkpoint
from tenp.quantization import rounded
from tenp.refitting import Refitting


class Rounding:
    """Replaces matrices of the dense experts by their rounded ones, after a refit if there is one.

    Rounding goes neuron by neuron, so it may come before the others are removed.

    Args:
        checkpoint: The dense model.
        refit: What comes before.
    """

    def __init__(self, checkpoint: Checkpoint, refit: Refitting | None) -> None:
        model = adapter.empty_model(adapter.load_config(checkpoint.directory))
        self._layers = {experts.layer: experts for experts in adapter.find_experts(model)}
        tensors = adapter.expert_tensors(model, checkpoint.tensors)
        self._dtype = checkpoint.tensors[next(iter(tensors))].dtype
        self._refit = refit

    def __call__(self, part: ExpertTensor, tensor: Tensor) -> Tensor:
        """Return a tensor of the checkpoint as it is after rounding.

        Args:
            part: What it is to the experts.
            tensor: As stored.
        """
        if self._refit is not None:
            tensor = self._refit(part, tensor)
        if part.part.endswith("_bias"):
            return tensor
        if part.expert is not None:
            return rounded(tensor, neurons=1 if part.part == "down" else 0).to(tensor.dtype)
        tensor = tensor.clone()
        for projection, matrices in self._layers[part.layer].projections(part.part, tensor):
            self._round_each(matrices, neurons=1 if projection == "down" else 0)
        return tensor

    def fill(self, experts: Experts) -> None:
        """Round a layer of a loaded dense model in place."""
        if self._refit is not None:
            self._refit.fill(experts)
        gate, up = experts.gate_and_up()
        for matrices in (up,) if gate is None else (gate, up):
            self._round_each(matrices, neurons=0)
        self._round_each(experts.down, neurons=1)

    def _round_each(self, matrices: Tensor, neurons: int) -> None:
        for matrix in matrices:
            matrix.copy_(rounded(matrix.to(self._dtype), neurons))


#: What checks of a written checkpoint apply to the dense experts before they compare.
Change = Refitting | Rounding


def change_of(checkpoint: Checkpoint, refit: Refitting | None, is_int8: bool) -> Change | None:
    """Return what turns the dense experts into those that were written, but for their width."""
    return Rounding(checkpoint, refit) if is_int8 else refit
