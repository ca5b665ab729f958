# SPDX-License-Identifier: Apache-2.0
"""What scoring hands to planning: one number per expert and per neuron, higher is kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Scores of every MoE layer.

    Attributes:
        experts: Decoder layer index to `[E]`, float64; comparable between layers.
        neurons: Decoder layer index to `[E, I]`, float64; comparable within one expert.
    """

    experts: dict[int, Tensor]
    neurons: dict[int, Tensor]
