# SPDX-License-Identifier: Apache-2.0
"""The routed experts of one layer as one process of an inference server holds them.

A server makes a layer's parameters, hands over the checkpoint's tensors one by one, and then calls
the layer with hidden states, expert ids and gates. It knows one width for all experts, so tenp owns
these parameters: packed (docs/architecture.md, "Packed layout"), and filled by a loader of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenp.errors import CheckpointError, Unsupported
from tenp.ops.expert_gemm import expert_gemm
from tenp.ops.expert_layout import neuron_offsets

#: Activations that servers name as `expert_gemm` does.
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")

#: How servers name an expert's gate, down and up matrix. Without a gate, w1 is the up matrix.
_GATED_SHARDS = frozenset({"w1", "w2", "w3"})


class ServedExperts:
    """Owns the weights of one layer: makes the parameters, fills them, and runs them.

    With tensor parallelism each process has its share of every expert's own neurons, and their
    outputs add up to the layer's. With expert parallelism it has whole experts.

    Args:
        name: The layer, for messages.
        widths: The width of every expert of the layer, W_e.
        slots: The expert behind each of the ids that `run` will get; None for one that another
            process has.
        rank: Which share of the neurons this process has.
        shares: Into how many shares the neurons are cut.
        activation: As in `expert_gemm`.
        gated: Whether the experts have a gate matrix.

    Raises:
        Unsupported: `expert_gemm` does not know the activation.
        CheckpointError: `slots` names an expert that has no width.
    """

    def __init__(
        self,
        name: str,
        widths: Sequence[int],
        slots: Sequence[int | None],
        *,
        rank: int = 0,
        shares: int = 1,
        activation: str = "silu",
        gated: bool = True,
    ) -> None:
        if activation not in _ACTIVATIONS:
            raise Unsupported(
                f"{name} must have one of the activations {', '.join(_ACTIVATIONS)}, got {activation}; "
                "serve a padded export instead (tenp export --padded)"
            )
        here = [expert for expert in slots if expert is not None]
        if here and max(here) >= len(widths):
            raise CheckpointError(
                f"quantization_config must give {max(here) + 1} widths for {name}, got {len(widths)}"
            )
        self._name = name
        self._widths = list(widths)
        self._slots = {expert: slot for slot, expert in enumerate(slots) if expert is not None}
        self._shares = [
            _share(0 if expert is None else widths[expert], rank, shares) for expert in slots
        ]
        own = [len(share) for share in self._shares]
        self._offsets = neuron_offsets(own)
        self._own_widths = own
        self._activation = activation
        self._gated = gated
        self._loaded: set[tuple[int, str]] = set()

    def create_parameters(self, layer: nn.Module, hidden_size: int, dtype: torch.dtype) -> None:
        """Register the parameters under the names that the servers' loaders look for.

        `w13_weight` `[2R, H]` (`[R, H]` without a gate) and `w2_weight` `[R, H]`, zero until they
        are loaded, on the default device.

        Args:
            layer: Gets the parameters, and the tables of widths and offsets as buffers.
            hidden_size: H.
            dtype: Of the weights.
        """
        rows = self._offsets[-1]
        for name, count in (("w13_weight", 2 * rows if self._gated else rows), ("w2_weight", rows)):
            zeros = torch.zeros(count, hidden_size, dtype=dtype)
            parameter = nn.Parameter(zeros, requires_grad=False)
            parameter.weight_loader = self.load  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)
        for name, table in (("neuron_widths", self._own_widths), ("neuron_offsets", self._offsets)):
            layer.register_buffer(name, torch.tensor(table, dtype=torch.int32), persistent=False)

    def load(
        self,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Take this process's part of one matrix; the servers' loaders call this by these names.

        Args:
            param: `w13_weight` or `w2_weight` of the layer.
            loaded_weight: `[W_e, H]`, or `[H, W_e]` for a down projection.
            weight_name: The checkpoint's name, for messages.
            shard_id: `w1` (gate, or up without a gate), `w2` (down) or `w3` (up).
            expert_id: The expert among all of the layer.
            return_success: Whether to return something.

        Returns:
            Whether the expert is here, if `return_success`.

        Raises:
            CheckpointError: The matrix has another shape than config.json says.
        """
        slot = self._slots.get(expert_id)
        if slot is not None:
            matrix = loaded_weight.t() if shard_id == "w2" else loaded_weight
            wanted = (self._widths[expert_id], param.shape[1])
            if tuple(matrix.shape) != wanted:
                raise CheckpointError(
                    f"{weight_name}, {shard_id} of expert {expert_id}, must have {wanted[0]} neurons of size "
                    f"{wanted[1]}, as config.json says, got {list(matrix.shape)}"
                )
            share = self._shares[slot]
            begin = self._offsets[slot] + (self._offsets[-1] if shard_id == "w3" else 0)
            param.data[begin : begin + len(share)].copy_(matrix[share.start : share.stop])
            self._loaded.add((expert_id, shard_id))
        return slot is not None if return_success else None

    def require_loaded(self) -> None:
        """Check that every matrix has come: a server may skip names that it does not know.

        Raises:
            CheckpointError: One has not.
        """
        shards = _GATED_SHARDS if self._gated else _GATED_SHARDS - {"w3"}
        wanted = {(expert, shard) for expert in self._slots for shard in shards}
        if missing := sorted(wanted - self._loaded):
            expert, shard = missing[0]
            raise CheckpointError(
                f"{self._name} must get {len(wanted)} matrices from the checkpoint, but {len(missing)} did not come, "
                f"the first is {shard} of expert {expert}; this server does not know how this family's pruned "
                "experts are named: serve a padded export instead (tenp export --padded)"
            )

    def run(self, layer: Any, hidden: Tensor, expert_ids: Tensor, gates: Tensor) -> Tensor:
        """Return this process's part of the gate-weighted sum of each token's experts.

        One op, without a look at the values: `torch.compile` and CUDA graphs go through it.

        Args:
            layer: That got the parameters.
            hidden: `[T, H]`.
            expert_ids: `[T, k]`, integer. Indices into `slots`; others name no expert.
            gates: `[T, k]`.

        Returns:
            `[T, H]`.
        """
        return expert_gemm(
            hidden,
            expert_ids,
            gates,
            layer.w13_weight,
            layer.w2_weight,
            layer.neuron_widths,
            layer.neuron_offsets,
            activation=self._activation,
            gated=self._gated,
            max_width=max(self._own_widths, default=0),
        )


def _share(width: int, rank: int, shares: int) -> range:
    """The neurons of an expert that one of several processes has; their numbers differ by one at most."""
    return range(width * rank // shares, width * (rank + 1) // shares)
