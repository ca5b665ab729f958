# SPDX-License-Identifier: Apache-2.0
"""The module that takes the place of a family's experts when their widths differ."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenp import devices
from tenp.adapter import Experts
from tenp.ops.expert_gemm import expert_gemm
from tenp.ops.expert_layout import neuron_offsets


class TenpExperts(nn.Module):
    """Routed experts of different widths, with the call of transformers' experts modules.

    The weights are packed neuron by neuron (docs/architecture.md, "Packed layout"): R rows in all,
    each expert padded to a multiple of 16 rows with zeros, which contribute exactly nothing.

    Attributes:
        gate_up_proj: `[2R, H]`, all gate rows and then all up rows; without a gate there is
            `up_proj` `[R, H]` instead, as in the families' own modules.
        down_proj: `[R, H]`, row k is column k of the down projection.
        gate_up_proj_bias: `[2R]` (`up_proj_bias` `[R]`), only in families with biases.
        down_proj_bias: `[E, H]`, only in families with biases.
        gate_up_proj_scale: `[2R]` (`up_proj_scale` `[R]`), only when the weights are int8: what their
            rows are multiplied by.
        down_proj_scale: `[R]`, the same.
        widths: The width of every expert, 0 or more.
    """

    def __init__(self, family: Experts, widths: Sequence[int], is_int8: bool = False) -> None:
        """Make room for the weights, on the device and in the dtype of the family's own module.

        Args:
            family: The experts that this module replaces.
            widths: Their new widths.
            is_int8: Whether the weights are int8 with a scale per row.
        """
        super().__init__()
        self.widths = list(widths)
        self.num_experts = len(self.widths)
        self.has_gate = family.has_gate
        self._offsets = neuron_offsets(self.widths)
        rows = self._offsets[-1]
        joined = 2 * rows if self.has_gate else rows
        _, up = family.gate_and_up()

        def empty(*shape: int, dtype: torch.dtype = up.dtype) -> nn.Parameter:
            return nn.Parameter(
                up.new_empty(shape, dtype=dtype), requires_grad=dtype.is_floating_point
            )

        stored = torch.int8 if is_int8 else up.dtype
        self._up_name = "gate_up_proj" if self.has_gate else "up_proj"
        self.register_parameter(self._up_name, empty(joined, up.shape[2], dtype=stored))
        self.register_parameter(f"{self._up_name}_scale", empty(joined) if is_int8 else None)
        self.register_parameter(f"{self._up_name}_bias", empty(joined) if family.has_bias else None)
        self.down_shape = torch.Size((rows, family.down.shape[1]))
        self.down_proj = empty(*self.down_shape, dtype=stored)
        self.down_proj_scale = empty(rows) if is_int8 else None
        self.down_proj_bias = (
            empty(self.num_experts, family.down.shape[1]) if family.has_bias else None
        )
        self._family = _without_weights(family)
        self._kernel = self._family.kernel_activation
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the gate-weighted sum of each token's experts.

        Args:
            hidden_states: `[T, H]`.
            top_k_index: `[T, k]`, integer. An index that names no expert adds nothing.
            top_k_weights: `[T, k]`. The weights that multiply the experts' outputs.

        Returns:
            `[T, H]` in the dtype of `hidden_states`.
        """
        if self._kernel is None or not self._kernel_serves(hidden_states, top_k_weights):
            return self._forward_in_torch(hidden_states, top_k_index, top_k_weights)
        activation, limit, alpha = self._kernel
        widths, offsets = self._tables_on(hidden_states.device)
        return expert_gemm(
            hidden_states,
            top_k_index,
            top_k_weights,
            self._up_weight,
            self.down_proj,
            widths,
            offsets,
            gate_up_bias=self._up_bias,
            down_bias=self.down_proj_bias,
            gate_up_scale=self._up_scale,
            down_scale=self.down_proj_scale,
            activation=activation,
            gated=self.has_gate,
            limit=limit,
            alpha=alpha,
            max_width=max(self.widths),
        )

    def _kernel_serves(self, hidden: Tensor, gates: Tensor) -> bool:
        """Not every build has kernels for a GPU; with int8 weights there is one for the CPU, and none for gradients."""
        if hidden.is_cuda and not devices.has_cuda():
            return False
        if self.down_proj_scale is None:
            return True
        tensors = (hidden, gates, self.down_proj_scale)
        differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return hidden.device.type == "cpu" and not differentiated

    def _forward_in_torch(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The same in torch, expert by expert: for what no kernel knows."""
        out = torch.zeros(
            hidden.shape[0], self.down_proj.shape[1], dtype=torch.float32, device=hidden.device
        )
        for expert, width in enumerate(self.widths):
            token, slot = torch.where(index == expert)
            if len(token) == 0:
                continue
            up_row = self._offsets[expert]
            gate, up = None, self._project(hidden[token], self._up_begin() + up_row, width)
            if self.has_gate:
                gate = self._project(hidden[token], up_row, width)
            rows = slice(up_row, up_row + width)
            down = _weights(self.down_proj, self.down_proj_scale, rows)
            contribution = self._family.apply_gate(gate, up) @ down
            if self.down_proj_bias is not None:
                contribution = contribution + self.down_proj_bias[expert]
            out = out.index_add(0, token, contribution.float() * weights[token, slot, None].float())
        return out.to(hidden.dtype)

    def _project(self, hidden: Tensor, begin: int, width: int) -> Tensor:
        rows = slice(begin, begin + width)
        bias = self._up_bias
        weight = _weights(self._up_weight, self._up_scale, rows)
        return F.linear(hidden, weight, None if bias is None else bias[rows])

    @property
    def _up_weight(self) -> Tensor:
        return getattr(self, self._up_name)

    @property
    def _up_bias(self) -> Tensor | None:
        return getattr(self, f"{self._up_name}_bias")

    @property
    def _up_scale(self) -> Tensor | None:
        return getattr(self, f"{self._up_name}_scale")

    def _up_begin(self) -> int:
        return self._offsets[-1] if self.has_gate else 0

    def _tables_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # Not buffers: a buffer that is in no checkpoint is lost when a model is loaded through meta.
        if device not in self._tables:
            self._tables[device] = (
                torch.tensor(self.widths, dtype=torch.int32, device=device),
                torch.tensor(self._offsets, dtype=torch.int32, device=device),
            )
        return self._tables[device]

    def extra_repr(self) -> str:
        """Show what widths there are."""
        return f"num_experts={self.num_experts}, widths={min(self.widths)}..{max(self.widths)}"


def _weights(stored: Tensor, scale: Tensor | None, rows: slice) -> Tensor:
    """Rows of a matrix as floating-point numbers."""
    return stored[rows] if scale is None else stored[rows] * scale[rows, None]


def _without_weights(family: Experts) -> Experts:
    """Keep what the family's gate needs (activation, limits, flags) and let its weights go."""
    shell = copy.copy(family.module)
    shell._parameters = {}
    return Experts(family.layer, family.name, shell)
