# SPDX-License-Identifier: Apache-2.0
"""accumulate_second_moment against the reference."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from support.op_cases import (
    FLOAT_DTYPES,
    HOSTILE_WIDTHS,
    POISON,
    STATISTICS_CASES,
    StatisticsCase,
    StatisticsInputs,
    make_statistics,
)
from support.tolerance import assert_close, second_moment_tolerance
from tenp.errors import InvalidArgument
from tenp.ops import accumulate_second_moment, reference


def moment_of(inputs: StatisticsInputs, device: torch.device, has_bias: bool = False) -> Tensor:
    moved = inputs.to(device)
    sums = moved.zero_second_moment(has_bias)
    accumulate_second_moment(**moved.second_moment_arguments(), **sums, has_bias=has_bias)
    return sums["second_moment"].cpu()


def assert_matches_the_reference(
    inputs: StatisticsInputs, moment: Tensor, has_bias: bool = False
) -> None:
    expected = inputs.zero_second_moment(has_bias)
    reference.accumulate_second_moment(
        **inputs.second_moment_arguments(), **expected, has_bias=has_bias
    )
    tolerance = second_moment_tolerance(inputs, has_bias)
    assert_close("second moment", moment, expected["second_moment"], tolerance)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("case", STATISTICS_CASES)
def test_moments_are_those_of_the_reference(
    case: StatisticsCase, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make_statistics(replace(case, dtype=dtype))
    assert_matches_the_reference(inputs, moment_of(inputs, device))


@pytest.mark.parametrize("width", HOSTILE_WIDTHS)
def test_a_bias_is_one_more_neuron_of_activation_one(width: int, device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(width=width))
    assert_matches_the_reference(inputs, moment_of(inputs, device, has_bias=True), has_bias=True)


def test_many_rows_are_added_up_in_float64(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(tokens=3000, num_experts=1, width=3, hidden_size=1))
    assert_matches_the_reference(inputs, moment_of(inputs, device))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_rows_may_start_anywhere(dtype: torch.dtype, device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(width=65, dtype=dtype))
    expected = moment_of(inputs, device)
    assert torch.equal(moment_of(inputs.embedded(device), device), expected)
    padded = torch.full((len(inputs.gates), 80), POISON, dtype=dtype)
    padded[:, :65] = inputs.activations
    inputs.activations = padded[:, :65]
    assert torch.equal(moment_of(inputs, device), expected)


def test_a_call_adds_its_own_sums_once(device: torch.device) -> None:
    whole_inputs = make_statistics(StatisticsCase(tokens=129))
    halves = whole_inputs.split()
    whole = whole_inputs.to(device).zero_second_moment()
    for inputs in halves:
        accumulate_second_moment(**inputs.to(device).second_moment_arguments(), **whole)
    first, second = (moment_of(half, device) for half in halves)
    assert torch.equal(whole["second_moment"].cpu(), first + second)


def test_the_diagonal_is_the_energy(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(width=33))
    energies = inputs.zero_neuron_contribution()
    reference.accumulate_neuron_contribution(**inputs.neuron_contribution_arguments(), **energies)
    row, column = torch.triu_indices(33, 33)
    diagonal = moment_of(inputs, device)[:, row == column]
    torch.testing.assert_close(diagonal, energies["energy"], rtol=1e-6, atol=0)


def test_what_does_not_fit_is_refused_by_name(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(width=5)).to(device)
    sums = inputs.zero_second_moment()
    with pytest.raises(InvalidArgument, match=r"second_moment must be \[6, 21\], got \[6, 15\]"):
        accumulate_second_moment(**inputs.second_moment_arguments(), **sums, has_bias=True)
    with pytest.raises(InvalidArgument, match="gates must be"):
        arguments = {**inputs.second_moment_arguments(), "gates": inputs.gates[:-1]}
        accumulate_second_moment(**arguments, **sums)
