# SPDX-License-Identifier: Apache-2.0
"""Find the routed experts of a model, show their weights in one orientation, stand in for them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tenp.errors import Unsupported

_CALIBRATION = "tenp_calibration"

#: What `tenp.ops` calls the activations that need no parameter.
_PLAIN_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}

ExpertsFunction = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Experts:
    """The routed experts of one decoder layer, with weights in one orientation for all families.

    Attributes:
        layer: Decoder layer index.
        name: Path of the module in the model.
        module: The module of the model's own class.
    """

    layer: int
    name: str
    module: Any  # an nn.Module whose attributes its flags describe

    @property
    def has_gate(self) -> bool:
        """Whether a neuron has a gate row beside its up row."""
        return bool(getattr(self.module, "has_gate", True))

    @property
    def has_bias(self) -> bool:
        """Whether the projections have biases."""
        return bool(getattr(self.module, "has_bias", False))

    @property
    def down(self) -> Tensor:
        """`[E, H, I]`, a view of the down projections."""
        return self._oriented(self.module.down_proj)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.down.shape[0]

    @property
    def width(self) -> int:
        """I, the full width."""
        return self.down.shape[2]

    @property
    def neuron_parameters(self) -> int:
        """Parameters of one neuron: its rows, its column and its biases."""
        rows = 2 if self.has_gate else 1
        return rows * (self._up.shape[-1] + self.has_bias) + self.down.shape[1]

    def gate_and_up(self) -> tuple[Tensor | None, Tensor]:
        """Return views `[E, I, H]` of the gate projections (None without a gate) and the up projections."""
        return self._split(self._up, dim=1)

    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the biases of gate `[E, I]`, up `[E, I]` and down `[E, H]`, None where there are none."""
        if not self.has_bias:
            return None, None, None
        joined = self.module.gate_up_proj_bias if self.has_gate else self.module.up_proj_bias
        return *self._split(joined, dim=1), self.module.down_proj_bias

    def activations(self, expert: int, hidden: Tensor) -> Tensor:
        """Return m `[n, I]` of one expert for hidden states `[n, H]`, in the model's own arithmetic."""
        bias = None
        if self.has_bias:
            bias = (self.module.gate_up_proj_bias if self.has_gate else self.module.up_proj_bias)[
                expert
            ]
        projected = F.linear(hidden, self._up[expert], bias)
        return (
            self.module._apply_gate(projected) if self.has_gate else self.module.act_fn(projected)
        )

    def apply_gate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """Return m `[n, W]` for projections `[n, W]` of any width, by the family's own gate."""
        if gate is None:
            return self.module.act_fn(up)
        if self._is_concatenated:
            return self.module._apply_gate(torch.cat([gate, up], dim=-1))
        return self.module._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))

    @cached_property
    def kernel_activation(self) -> tuple[str, float, float] | None:
        """(activation, limit, alpha) with which `tenp.ops` computes this family's gate, if any does.

        Families differ by overridden methods, not by names one could trust, so the gate is asked:
        it is evaluated on a grid and compared with every activation that the kernels know.
        """
        grid = torch.linspace(-12.0, 12.0, 49, device="cpu")
        gate, up = (axis.flatten() for axis in torch.meshgrid(grid, grid, indexing="ij"))
        with torch.no_grad():
            asked = self.apply_gate(gate if self.has_gate else None, up)
        for name, function in _PLAIN_ACTIVATIONS.items():
            expected = function(gate) * up if self.has_gate else function(up)
            if torch.allclose(asked, expected, atol=1e-5):
                return name, 0.0, 0.0
        limit, alpha = (getattr(self.module, field, None) for field in ("limit", "alpha"))
        if self.has_gate and limit is not None and alpha is not None:
            glu = gate.clamp(max=limit)
            expected = (up.clamp(-limit, limit) + 1) * glu * torch.sigmoid(alpha * glu)
            if torch.allclose(asked, expected, atol=1e-5):
                return "swiglu_oai", float(limit), float(alpha)
        return None

    def projections(self, parameter: str, fused: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (`gate`, `up` or `down`, view) of a tensor of all experts, one view per projection.

        Args:
            parameter: Its name in the module, for example `gate_up_proj` or `down_proj_bias`.
            fused: The tensor in the family's own layout.

        Yields:
            Views `[E, I, H]` of gate and up, `[E, H, I]` of down; of biases `[E, I]` and `[E, H]`.
        """
        oriented = fused if parameter.endswith("_bias") else self._oriented(fused)
        if parameter.startswith("down"):
            yield "down", oriented
            return
        gate, up = self._split(oriented, dim=1)
        if gate is not None:
            yield "gate", gate
        yield "up", up

    def select_neurons(self, parameter: str, fused: Tensor, keep: Tensor) -> Tensor:
        """Return a tensor of all experts with some neurons only, in the family's own layout.

        Args:
            parameter: Its name in the module.
            fused: The tensor.
            keep: `[E, I]`, bool, equally many per expert.
        """
        if parameter == "down_proj_bias":
            return fused
        is_down, is_bias = parameter.startswith("down"), parameter.endswith("_bias")
        if not is_down and self.has_gate:
            keep = (
                torch.cat([keep, keep], 1)
                if self._is_concatenated
                else keep.repeat_interleave(2, 1)
            )
        # One expert's matrix counts neurons in the rows of up and the columns of down, or transposed.
        axis = 0 if is_bias else int(is_down != self._is_transposed)
        index = [torch.nonzero(row).flatten().to(fused.device) for row in keep]
        return torch.stack(
            [matrix.index_select(axis, at) for matrix, at in zip(fused, index, strict=True)]
        )

    def fuse(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters of one expert alone, `[1, ...]` in the family's own layout.

        Args:
            parts: `gate` `[W, H]` (if there is one), `up` `[W, H]`, `down` `[H, W]` of any width, and
                their biases as `gate_bias` `[W]`, `up_bias` `[W]`, `down_bias` `[H]`.
        """
        fused = {}
        for suffix in ("", "_bias"):
            if f"up{suffix}" not in parts:
                continue
            up, down = parts[f"up{suffix}"], parts[f"down{suffix}"]
            if self.has_gate:
                pair = [parts[f"gate{suffix}"], up]
                up = (
                    torch.cat(pair)
                    if self._is_concatenated
                    else torch.stack(pair, dim=1).flatten(0, 1)
                )
            if not suffix and self._is_transposed:
                up, down = up.t().contiguous(), down.t().contiguous()
            fused[f"{'gate_up' if self.has_gate else 'up'}_proj{suffix}"] = up[None]
            fused[f"down_proj{suffix}"] = down[None]
        return fused

    def with_parameters(self, parameters: Mapping[str, Tensor]) -> Experts:
        """Return experts that share all but the weights with these: their gate, limits and flags.

        Args:
            parameters: By name in the module, of any number of experts and any width.
        """
        shell = copy.copy(self.module)
        shell._parameters = dict(parameters)
        return Experts(self.layer, self.name, shell)

    @property
    def _is_transposed(self) -> bool:
        return bool(getattr(self.module, "is_transposed", False))

    @property
    def _is_concatenated(self) -> bool:
        return bool(getattr(self.module, "is_concatenated", True))

    @property
    def _up(self) -> Tensor:
        """`[E, 2I, H]` with a gate, in the family's order of rows, else `[E, I, H]`."""
        return self._oriented(self.module.gate_up_proj if self.has_gate else self.module.up_proj)

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2) if self._is_transposed else weight

    def _split(self, joined: Tensor, dim: int) -> tuple[Tensor | None, Tensor]:
        if not self.has_gate:
            return None, joined
        if self._is_concatenated:
            gate, up = joined.chunk(2, dim=dim)
        else:
            gate, up = joined.unflatten(dim, (-1, 2)).unbind(dim + 1)
        return gate, up


def find_experts(model: nn.Module) -> list[Experts]:
    """Return the routed experts of a model, shallow to deep.

    Raises:
        Unsupported: It has none of the kind that tenp knows; the message says what was looked for.
    """
    found = [
        Experts(_layer_index(name), name, module)
        for name, module in model.named_modules()
        if hasattr(module, "_apply_gate")
        and hasattr(module, "is_transposed")
        and isinstance(getattr(module, "down_proj", None), nn.Parameter)
    ]
    kind = type(model).__name__
    if not found:
        raise Unsupported(f"{kind} must have routed experts to prune, got {_what_it_has(model)}")
    names: dict[int, str] = {}
    for experts in found:
        if getattr(experts.module, "has_post_expert_norm", False):
            raise Unsupported(
                f"{kind}: {experts.name} normalises each expert's output, which pruning would change"
            )
        if experts.layer in names:
            raise Unsupported(
                f"{kind} must have one set of routed experts in a layer, got {names[experts.layer]} and {experts.name}"
            )
        names[experts.layer] = experts.name
    return sorted(found, key=lambda experts: experts.layer)


def _what_it_has(model: nn.Module) -> str:
    """Say of a model without the experts that tenp knows what it has in their place."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch."):
            continue
        matrices = {
            key for key, tensor in module.named_parameters(recurse=False) if tensor.ndim == 3
        }
        if not matrices and not name.endswith(".experts"):
            continue
        what = f"{name} ({type(module).__name__})"
        call = list(inspect.signature(module.forward).parameters)
        if len(call) != 3:
            return (
                f"{what}, whose call is ({', '.join(call)}) and not "
                "(hidden_states, top_k_index, top_k_weights)"
            )
        if "down_proj" not in matrices:
            return f"{what} without a 3-D down_proj for all of them"
        with_up = {len(getattr(module, key)) for key in matrices}
        if len(with_up) != 1:
            return f"{what}, of which some have no weights: its parameters are of {sorted(with_up)} experts"
        return f"{what}, which is without transformers' @use_experts_implementation and cannot be stood in for"
    return (
        "a dense model: looked for modules with a 3-D down_proj and transformers' "
        "@use_experts_implementation"
    )


def _layer_index(name: str) -> int:
    """The first number in a path like `model.layers.3.mlp.experts`."""
    return next(int(part) for part in name.split(".") if part.isdigit())


@contextmanager
def experts_replaced(model: PreTrainedModel, function: ExpertsFunction) -> Iterator[None]:
    """Let `function(module, hidden, top_k_index, top_k_weights)` stand in for all routed experts."""
    before = model.get_experts_implementation()
    ALL_EXPERTS_FUNCTIONS[_CALIBRATION] = function
    try:
        model.set_experts_implementation(_CALIBRATION)
        yield
    finally:
        model.set_experts_implementation(before)
        del ALL_EXPERTS_FUNCTIONS[_CALIBRATION]  # or it would keep what the function refers to
