# SPDX-License-Identifier: Apache-2.0
"""What vLLM calls for the experts of a pruned layer.

vLLM routes, runs shared experts, and adds up what the processes return; this does the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from tenp.errors import CheckpointError, Unsupported
from tenp.serving.experts import ServedExperts


class TenpMoEMethod(FusedMoEMethodBase):
    """The `quant_method` of a `RoutedExperts` layer whose experts have different widths."""

    def __init__(self, moe: Any, widths: list[int]) -> None:
        """Take the layer's configuration and the widths of its experts."""
        super().__init__(moe)
        self.widths = widths

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register the packed parameters.

        Raises:
            Unsupported: The layer asks for something that `expert_gemm` does not compute.
            CheckpointError: config.json gives another number of widths.
        """
        _refuse_what_is_not_computed(layer)
        total = layer.global_num_experts
        if total != len(self.widths):
            raise CheckpointError(
                f"quantization_config must give {total} widths for {layer.layer_name}, got {len(self.widths)}"
            )
        # Expert ids stay those of all experts: one that another process has is empty here.
        placed = layer.expert_map
        here = [True] * total if placed is None else (placed >= 0).tolist()
        self.experts = ServedExperts(
            layer.layer_name,
            self.widths,
            [expert if is_here else None for expert, is_here in enumerate(here)],
            rank=layer.moe_config.tp_rank,
            shares=layer.moe_config.tp_size,
            activation=layer.activation.value.removesuffix("_no_mul"),
            gated=layer.moe_config.is_act_and_mul,
        )
        self.experts.create_parameters(layer, hidden_size, params_dtype)
        # With random weights nothing comes from the checkpoint.
        self._has_checkpoint = get_current_vllm_config().load_config.load_format != "dummy"

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that all weights came; they were packed as they did."""
        if self._has_checkpoint:
            self.experts.require_loaded()

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        """Leave the sizes alone."""
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """There is none: the weights are floating-point numbers."""
        return None

    def apply(
        self,
        layer: nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *shared_experts: Any,
        **more: Any,
    ) -> Tensor:
        """Return the routed output `[T, H]` of this process. Shared experts are vLLM's own affair."""
        return self.experts.run(layer, x, topk_ids, topk_weights)


def _refuse_what_is_not_computed(layer: Any) -> None:
    config = layer.moe_config
    reason = None
    if config.has_bias:
        reason = "biases"
    elif getattr(config, "swiglu_limit", None) is not None:
        reason = "a clamped activation"
    elif getattr(layer, "apply_router_weight_on_input", False):
        reason = "gates that multiply the experts' input"
    if reason is not None:
        raise Unsupported(
            f"{layer.layer_name} must have experts without biases, clamps and input gates to be served pruned, "
            f"got {reason}; serve the unpruned model or a padded export (tenp export --padded)"
        )
