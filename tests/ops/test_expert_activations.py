# SPDX-License-Identifier: Apache-2.0
"""expert_activations against the reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from support.op_cases import (
    FLOAT_DTYPES,
    STATISTICS_CASES,
    BatchInputs,
    StatisticsCase,
    make_batch,
)
from support.tolerance import activations_tolerance, assert_close
from tenp.errors import InvalidArgument
from tenp.ops import expert_activations, reference


def activations_of(inputs: BatchInputs, device: torch.device, **options: Any) -> Tensor:
    return expert_activations(**inputs.to(device).activations_arguments(), **options).cpu()


def assert_matches_the_reference(
    inputs: BatchInputs, actual: Tensor, activation: str = "silu", **limits: float
) -> None:
    used = int(inputs.offsets[-1])
    expected = reference.expert_activations(
        **inputs.activations_arguments(), activation=activation, **limits
    )
    tolerance = activations_tolerance(inputs, activation, **limits)
    assert_close("m", actual[:used], expected[:used], tolerance[:used])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("case", STATISTICS_CASES)
def test_activations_are_those_of_the_reference(
    case: StatisticsCase, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make_batch(replace(case, dtype=dtype))
    assert_matches_the_reference(inputs, activations_of(inputs, device))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai"])
def test_every_activation(activation: str, gated: bool, bias: bool, device: torch.device) -> None:
    if activation == "swiglu_oai" and not gated:
        pytest.skip("needs a gate")
    limits = {"limit": 1.0, "alpha": 1.702} if activation == "swiglu_oai" else {}
    inputs = make_batch(StatisticsCase(width=33), gated, bias)
    actual = activations_of(inputs, device, activation=activation, **limits)
    assert_matches_the_reference(inputs, actual, activation, **limits)


@pytest.mark.parametrize("layout", ["concatenated", "interleaved", "padded"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_gate_and_up_may_be_views_of_one_tensor(
    layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make_batch(StatisticsCase(width=20, dtype=dtype), bias=False)
    expected = activations_of(inputs, device)
    assert inputs.gate is not None
    if layout == "concatenated":
        inputs.gate, inputs.up = torch.cat([inputs.gate, inputs.up], dim=1).chunk(2, dim=1)
    elif layout == "interleaved":
        inputs.gate, inputs.up = torch.stack([inputs.gate, inputs.up], dim=2).unbind(2)
    else:
        pad = torch.nn.functional.pad
        inputs.gate, inputs.up = (
            pad(weight, (0, 16, 0, 5), value=torch.nan)[:, :20, :48]
            for weight in (inputs.gate, inputs.up)
        )
    # On the device as it is here: moving a view would make it contiguous.
    moved = inputs.to(device)
    assert device.type != "cpu" or not moved.up.is_contiguous()
    assert torch.equal(activations_of(inputs, device)[: inputs.offsets[-1]],
                       expected[: inputs.offsets[-1]])  # fmt: skip


def test_rows_of_some_experts_only(device: torch.device) -> None:
    inputs = make_batch(StatisticsCase())
    expected = activations_of(inputs, device)
    begin, end = inputs.offsets[1].item(), inputs.offsets[3].item()
    some = replace(
        inputs,
        **{name: getattr(inputs, name)[1:3] for name in ("gate", "up", "gate_bias", "up_bias")},
        offsets=inputs.offsets[1:4] - begin,
        slots=inputs.slots[begin:end],
    )
    assert torch.equal(activations_of(some, device), expected[begin:end])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_arrays_may_start_anywhere_between_nans(dtype: torch.dtype, device: torch.device) -> None:
    inputs = make_batch(StatisticsCase(width=24, dtype=dtype))
    used = int(inputs.offsets[-1])
    embedded = expert_activations(**inputs.embedded(device).activations_arguments()).cpu()
    assert torch.equal(embedded[:used], activations_of(inputs, device)[:used])


def test_what_does_not_fit_is_refused_by_name(device: torch.device) -> None:
    inputs = make_batch(StatisticsCase()).to(device)
    arguments = inputs.activations_arguments()

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(InvalidArgument, match=message):
            expert_activations(**{**arguments, **changes})

    refused("^expert_activations: up must be 3-dimensional, got 0", up=inputs.up[0, 0, 0])
    refused("gate must be strided like up", gate=inputs.up.repeat(1, 1, 2)[:, :, :48])
    refused(r"up must be contiguous along its last dimension", up=inputs.up.mT.contiguous().mT)
    refused("up_bias must be bfloat16|up_bias must be float32", up_bias=inputs.up.double()[:, :, 0])
    refused("experts_per_token|per_token must be positive", experts_per_token=0)
    refused("activation must be one of", activation="tanh")
    if device.type == "cpu":
        refused("slots must be within", slots=inputs.slots + 1000)
