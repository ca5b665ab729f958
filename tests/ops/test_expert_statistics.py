# SPDX-License-Identifier: Apache-2.0
"""expert_statistics against the reference. Inputs are such that y is exact in every dtype."""

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
from support.tolerance import assert_close, assert_same_lowest_half, batch_tolerance
from tenp.errors import InvalidArgument
from tenp.ops import expert_activations, expert_statistics, reference

Sums = dict[str, Tensor]


def sums_of(inputs: BatchInputs, device: torch.device) -> Sums:
    moved = inputs.to(device)
    sums = moved.zeros()
    expert_statistics(**moved.statistics_arguments(), **sums)
    return {name: value.cpu() for name, value in sums.items()}


def assert_equal(actual: Sums, expected: Sums) -> None:
    for name, value in expected.items():
        assert torch.equal(actual[name].cpu(), value.cpu()), name


def assert_matches_the_reference(inputs: BatchInputs, sums: Sums) -> None:
    expected, tolerance = inputs.zeros(), batch_tolerance(inputs)
    expected["out"] = expected["out"].double()
    reference.expert_statistics(**inputs.statistics_arguments(), **expected)
    for name, value in expected.items():
        assert_close(name, sums[name], value, tolerance[name])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("case", STATISTICS_CASES)
def test_output_and_sums_are_those_of_the_reference(
    case: StatisticsCase, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make_batch(replace(case, dtype=dtype))
    assert_matches_the_reference(inputs, sums_of(inputs, device))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("layout", ["hidden-contiguous", "padded"])
def test_down_may_be_stored_either_way(
    layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make_batch(StatisticsCase(hidden_size=37, width=65, dtype=dtype), bias=False)
    if layout == "hidden-contiguous":
        inputs.down = inputs.down.mT.contiguous().mT
    else:
        inputs.down = torch.nn.functional.pad(inputs.down, (0, 7, 0, 3), value=torch.nan)
        inputs.down = inputs.down[:, :37, :65]
    assert_matches_the_reference(inputs, sums_of(inputs, device))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_y_is_rounded_once_before_it_is_used(dtype: torch.dtype, device: torch.device) -> None:
    case = StatisticsCase(pattern="uniform", experts_per_token=1, width=96, dtype=dtype)
    inputs = make_batch(case, bias=False)
    inputs.gates = torch.ones_like(inputs.gates)
    generator = torch.Generator().manual_seed(1)
    inputs.down = torch.randn(inputs.down.shape, generator=generator).to(dtype)
    sums = sums_of(inputs, device)
    y = sums["out"]  # a token has one row, whose gate is 1
    assert torch.equal(y, y.to(dtype).float())
    by_expert = torch.zeros(case.num_experts, dtype=torch.float64)
    expert = torch.bucketize(inputs.rows[:, 0], inputs.offsets[1:], right=True)
    by_expert.index_add_(0, expert, y.double().norm(dim=1))
    torch.testing.assert_close(sums["norm_sum"], by_expert, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pattern", ["skewed", "duplicates", "unnamed"])
def test_experts_one_by_one_give_the_same_bits(pattern: str, device: torch.device) -> None:
    inputs = make_batch(StatisticsCase(pattern=pattern, experts_per_token=4)).to(device)
    expected = sums_of(inputs, device)
    sums = inputs.zeros()
    for expert in range(len(inputs.down)):
        begin, end = inputs.offsets[expert : expert + 2].tolist()
        mine = slice(expert, expert + 1)
        assert inputs.down_bias is not None
        one = replace(
            inputs,
            activations=inputs.activations[begin:end],
            down=inputs.down[mine],
            down_bias=inputs.down_bias[mine],
            offsets=inputs.offsets[expert : expert + 2] - begin,
            slots=inputs.slots[begin:end],
            rows=inputs.rows - begin,
        )
        own = {name: value if name == "out" else value[mine] for name, value in sums.items()}
        expert_statistics(**one.statistics_arguments(), **own)
    assert_equal(sums, expected)


def test_a_call_adds_its_own_sums_once(device: torch.device) -> None:
    inputs = make_batch(StatisticsCase(tokens=70)).to(device)
    once = sums_of(inputs, device)
    sums = inputs.zeros()
    for _ in range(2):
        expert_statistics(**inputs.statistics_arguments(), **sums)
    del once["out"]  # which is added up in float32, row by row
    peaks = ("norm_max", "peak")
    assert_equal(sums, {n: v if n in peaks else 2 * v for n, v in once.items()})


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_arrays_may_start_anywhere_between_nans(dtype: torch.dtype, device: torch.device) -> None:
    inputs = make_batch(StatisticsCase(width=24, dtype=dtype))
    embedded = inputs.embedded(device)
    sums = embedded.zeros()
    expert_statistics(**embedded.statistics_arguments(), **sums)
    assert_matches_the_reference(inputs, {name: value.cpu() for name, value in sums.items()})


def test_projections_add_up_to_the_lengths_of_the_outputs(device: torch.device) -> None:
    inputs = make_batch(StatisticsCase(width=130, hidden_size=300, dtype=torch.bfloat16))
    sums = sums_of(inputs, device)
    torch.testing.assert_close(
        sums["projection"].sum(dim=1), sums["norm_sum"], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_both_halves_of_the_pass_find_the_lowest_half_of_the_equations(
    dtype: torch.dtype, device: torch.device
) -> None:
    case = StatisticsCase(tokens=128, hidden_size=96, width=128, num_experts=4, dtype=dtype)
    inputs = make_batch(case, bias=False)
    generator = torch.Generator().manual_seed(1)
    inputs.gate, inputs.up, inputs.down = (
        (torch.randn(weight.shape, generator=generator) / 10).to(dtype)
        for weight in (inputs.up, inputs.up, inputs.down)
    )
    inputs.activations = reference.expert_activations(**inputs.activations_arguments()).to(dtype)
    expected = inputs.zeros()
    reference.expert_statistics(**inputs.statistics_arguments(), **expected)
    moved = inputs.to(device)
    inputs.activations = expert_activations(**moved.activations_arguments()).cpu()
    assert_same_lowest_half(sums_of(inputs, device)["projection"], expected["projection"])


@pytest.mark.parametrize(
    "sizes", [{"tokens": 0}, {"hidden_size": 0}, {"width": 0}], ids=lambda sizes: next(iter(sizes))
)
def test_what_is_empty_adds_what_there_is(sizes: dict[str, int], device: torch.device) -> None:
    inputs = make_batch(StatisticsCase(**sizes))
    assert_matches_the_reference(inputs, sums_of(inputs, device))


def test_rows_without_a_token_add_nothing(device: torch.device) -> None:
    inputs = make_batch(StatisticsCase(tokens=3))
    inputs.offsets = torch.zeros_like(inputs.offsets)
    inputs.rows, inputs.gates = inputs.rows[:0], inputs.gates[:0]
    inputs.hidden = inputs.hidden[:0]
    for name, value in sums_of(inputs, device).items():
        assert (value == 0).all(), name


def test_what_does_not_fit_is_refused_by_name(device: torch.device) -> None:
    inputs = make_batch(StatisticsCase()).to(device)
    arguments = {**inputs.statistics_arguments(), **inputs.zeros()}

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(InvalidArgument, match=message):
            expert_statistics(**{**arguments, **changes})

    refused("^expert_statistics: hidden must be float32", hidden=inputs.hidden.double())
    refused("^expert_statistics: down must be 3-dimensional, got 0", down=inputs.down[0, 0, 0])
    refused("out must be float32", out=arguments["out"].double())
    refused("down must be contiguous along", down=inputs.down.repeat(1, 2, 2)[:, ::2, ::2])
    refused("input_energy must be", input_energy=arguments["input_energy"][:, :-1])
    refused("peak must be memory of its own|must be memory of its own", peak=arguments["energy"])
    refused("rows must be", rows=inputs.rows[:-1])
    if device.type == "cpu":
        refused("slots must be within", slots=inputs.slots + 1000)
        refused("offsets must be non-decreasing", offsets=inputs.offsets.flip(0))
