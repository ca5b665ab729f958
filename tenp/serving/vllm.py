# SPDX-License-Identifier: Apache-2.0
"""Registers tenp with vLLM, so that `LLM("pruned")` and `vllm serve pruned` work.

vLLM finds `register` by its entry point group `vllm.general_plugins` and calls it in every process.
A checkpoint whose `quant_method` is `tenp` is then handed to `TenpVllmConfig`. Nothing of vLLM is
replaced. Written for vLLM 0.32 and tested with 0.32.0; with a version that lacks what is imported
here, vLLM logs that and refuses pruned checkpoints as of an unknown method.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from tenp.serving.config import ServedConfig, decoder_layer


def register() -> None:
    """Make the quantization method `tenp` known to vLLM; the second call does nothing."""
    if "tenp" not in QUANTIZATION_METHODS:
        register_quantization_config("tenp")(TenpVllmConfig)


class TenpVllmConfig(ServedConfig, QuantizationConfig):
    """Gives the pruned layers tenp's experts, and all else what an unquantized model has."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return what computes a layer; None leaves it to vLLM."""
        # Here, so that a process without a pruned model does not load vLLM's layers for this.
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            from tenp.serving.vllm_experts import TenpMoEMethod

            index = decoder_layer(prefix)
            if index in self.widths:
                return TenpMoEMethod(layer.moe_config, self.widths[index])
        return None
