# SPDX-License-Identifier: Apache-2.0
"""Registers tenp with SGLang, so that it serves pruned checkpoints.

SGLang finds `register` by its entry point group `sglang.srt.plugins` and calls it in its processes.
It has no function for registering a quantization method, so the method is added to its tables.
Written for SGLang 0.5.23; docs/serving.md says what of it was run.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers import quantization
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase, QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.runtime_context import get_exec, get_server_args
from torch import Tensor

from tenp.errors import CheckpointError, Unsupported
from tenp.serving.config import ServedConfig, decoder_layer
from tenp.serving.experts import ServedExperts


def register() -> None:
    """Make the quantization method `tenp` known to SGLang; the second call does nothing."""
    quantization.QUANTIZATION_METHODS["tenp"] = TenpSglangConfig
    quantization.CPU_QUANTIZATION_METHODS["tenp"] = TenpSglangConfig


class TenpSglangConfig(ServedConfig, QuantizationConfig):
    """Gives the pruned layers tenp's experts, and all else what an unquantized model has."""

    def get_scaled_act_names(self) -> list[str]:
        """No activation is scaled."""
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return what computes a layer; None leaves it to SGLang."""
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        index = decoder_layer(prefix)
        if isinstance(layer, FusedMoE) and index in self.widths:
            return TenpMoEMethod(self.widths[index])
        return None


class TenpMoEMethod(FusedMoEMethodBase):
    """The `quant_method` of a `FusedMoE` layer whose experts have different widths."""

    def __init__(self, widths: list[int]) -> None:
        """Args: widths: those of the layer's experts."""
        self.widths = widths

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        with_bias: bool = False,
        **extra: Any,
    ) -> None:
        """Register the packed parameters.

        Raises:
            Unsupported: The layer asks for something that `expert_gemm` does not compute.
            CheckpointError: config.json gives another number of widths.
        """
        config = layer.moe_runner_config
        _refuse_what_is_not_computed(layer, config, with_bias)
        if layer.num_experts != len(self.widths):
            raise CheckpointError(
                f"quantization_config must give {layer.num_experts} widths for {layer.layer_name}, "
                f"got {len(self.widths)}"
            )
        # SGLang hands over the ids of this process's experts, and -1 for the others.
        first = layer.moe_ep_rank * num_experts
        self.experts = ServedExperts(
            layer.layer_name,
            self.widths,
            range(first, first + num_experts),
            rank=layer.moe_tp_rank,
            shares=layer.moe_tp_size,
            activation=config.activation,
            gated=config.is_gated,
        )
        self.experts.create_parameters(layer, hidden_size, params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all weights came; they were packed as they did."""
        # With random weights nothing comes from the checkpoint.
        if get_server_args().load_format != "dummy":
            self.experts.require_loaded()

    def create_moe_runner(self, layer: Any, moe_runner_config: Any) -> None:
        """None is needed: `apply` is one op."""
        self.moe_runner_config = moe_runner_config

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        """Return the routed output `[T, H]` of this process."""
        gates, expert_ids, _ = dispatch_output.topk_output
        gates = _scaled(gates, self.moe_runner_config.routed_scaling_factor)
        out = self.experts.run(layer, dispatch_output.hidden_states, expert_ids, gates)
        return StandardCombineInput(hidden_states=out)


def _scaled(gates: Tensor, factor: float | None) -> Tensor:
    """On GPUs SGLang leaves the factor of the routed output to the kernel, on CPUs to the model."""
    return gates if factor is None or not gates.is_cuda else gates * factor


def _refuse_what_is_not_computed(layer: Any, config: Any, with_bias: bool) -> None:
    reason = None
    if with_bias:
        reason = "biases"
    elif config.activation not in ("silu", "relu2"):
        reason = f"the activation {config.activation}"
    elif any(
        getattr(config, name, None) is not None
        for name in ("gemm1_alpha", "gemm1_clamp_limit", "swiglu_limit")
    ):
        reason = "a clamped activation"
    elif config.apply_router_weight_on_input:
        reason = "gates that multiply the experts' input"
    elif config.no_combine:
        reason = "outputs that are not added up"
    elif config.num_fused_shared_experts:
        reason = "shared experts among the routed ones (--disable-shared-experts-fusion)"
    elif get_exec().moe.enable_eplb:
        reason = "experts that move between processes (--enable-eplb)"
    if reason is not None:
        raise Unsupported(
            f"{layer.layer_name} must have plain SwiGLU or squared-ReLU experts to be served pruned, got {reason}"
        )
