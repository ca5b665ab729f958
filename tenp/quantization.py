# SPDX-License-Identifier: Apache-2.0
"""Weights in 8 bits: a neuron's row is whole numbers from -127 to 127 times one scale.

A neuron is a row of the gate, of the up and of the transposed down projection, and each has its
scale. So pruning and quantizing do not touch each other: the neurons that stay keep their numbers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from tenp.errors import CheckpointError

_LARGEST = 127


def scale_name(weight: str) -> str:
    """Return the name under which a checkpoint stores the scales of a matrix.

    Beside a matrix with rows of neurons they are `[W, 1]`, beside one with columns of neurons `[1, W]`:
    the product of the two tensors is the weights.
    """
    return weight.removesuffix("weight") + "scale"


def quantize(weight: Tensor, neurons: int) -> tuple[Tensor, Tensor]:
    """Return int8 numbers q and one scale s per neuron, with |w - s q| <= s / 2.

    s = max |w| / 127, rounded up to the dtype of the weights, and q = w / s, rounded to the nearest.

    Args:
        weight: `[W, H]` or `[H, W]`, floating point, any device, meta too.
        neurons: The axis of the neurons, 0 or 1.

    Returns:
        q in the shape of `weight`, int8, contiguous; s `[W]` in its dtype.
    """
    values = weight.float()
    largest = values.abs().amax(dim=1 - neurons) / _LARGEST
    scale = largest.to(weight.dtype)
    integers = torch.int32 if weight.dtype == torch.float32 else torch.int16
    # Of positive numbers, the next one up has the next pattern of bits.
    next_up = (scale.view(integers) + 1).view(weight.dtype)
    scale = torch.where(scale.float() < largest, next_up, scale)
    steps = scale.float().unsqueeze(1 - neurons)
    q = torch.where(steps > 0, values / steps, 0.0).round()
    return q.clamp(-_LARGEST, _LARGEST).to(torch.int8).contiguous(), scale


def dequantize(q: Tensor, scale: Tensor, neurons: int) -> Tensor:
    """Return s q in float32.

    Args:
        q: `[W, H]` or `[H, W]`, int8.
        scale: `[W]`.
        neurons: The axis of the neurons, 0 or 1.
    """
    return q.float() * scale.float().unsqueeze(1 - neurons)


def rounded(weight: Tensor, neurons: int) -> Tensor:
    """Return what `quantize` makes of weights, as weights in float32."""
    return dequantize(*quantize(weight, neurons), neurons)


class Int8:
    """Quantizes the matrices of a checkpoint and adds up by how much they change. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._squares = 0.0
        self._error_squares = 0.0
        self._largest_step = 0.0

    def __call__(self, weight: Tensor, neurons: int) -> tuple[Tensor, Tensor]:
        """Quantize as `quantize` does.

        Raises:
            CheckpointError: A weight is infinite, not a number, or further than half a step off.
        """
        q, scale = quantize(weight, neurons)
        if weight.is_meta or weight.numel() == 0:
            return q, scale
        error = (dequantize(q, scale, neurons) - weight.float()).abs()
        steps = (error / scale.float().clamp(min=1e-45).unsqueeze(1 - neurons)).max().item()
        # Half a step, and the rounding of a quotient of at most 127 in float32.
        if not steps <= 0.5 + 2e-5:
            raise CheckpointError(
                f"int8 weights must be within half a step of the weights, got {steps:.3g} steps; "
                "a weight is infinite or not a number"
            )
        with self._lock:
            self._squares += weight.double().square().sum().item()
            self._error_squares += error.double().square().sum().item()
            self._largest_step = max(self._largest_step, steps)
        return q, scale

    def error(self) -> Mapping[str, float] | None:
        """Return the error of all weights, relative (root mean square), and the largest in steps; None of none."""
        if not self._squares:
            return None
        return {
            "relative_error": math.sqrt(self._error_squares / self._squares),
            "largest_error_in_steps": self._largest_step,
        }
