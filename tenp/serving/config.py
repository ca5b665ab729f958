# SPDX-License-Identifier: Apache-2.0
"""What an inference server reads of a pruned checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tenp.errors import Unsupported
from tenp.runtime.loading import TenpConfig


class ServedConfig:
    """What the quantization configs of servers have in common; comes before theirs among the bases.

    Attributes:
        widths: Decoder layer to the widths of its experts.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Take the `quantization_config` of config.json.

        Raises:
            Unsupported: The weights are int8.
            CheckpointError: The config is not one of this format.
        """
        super().__init__()
        read = TenpConfig(**config)
        if read.is_int8:
            raise Unsupported(
                "experts must have floating-point weights to be served, got int8; "
                "apply the plan again without --weights int8"
            )
        self.widths = read.layer_widths()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ServedConfig:
        """Read the `quantization_config` of config.json."""
        return cls(config)

    def get_name(self) -> str:
        """The method's name."""
        return "tenp"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What `expert_gemm` takes."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The CUDA kernels are for sm_80 and later."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """All is in config.json."""
        return []


def decoder_layer(prefix: str) -> int | None:
    """Return the decoder layer that a module's path names, or None for a layer of a draft model.

    Example:
        >>> decoder_layer("language_model.model.layers.3.mlp.experts")
        3
    """
    parts = prefix.split(".")
    # Multi-token prediction heads count their own layers from 0, and pruning leaves them alone.
    if "mtp" in parts:
        return None
    return next((int(part) for part in parts if part.isdigit()), None)
