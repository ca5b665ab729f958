# SPDX-License-Identifier: Apache-2.0
"""accumulate_direction_change against the reference."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from support.op_cases import (
    FLOAT_DTYPES,
    POISON,
    STATISTICS_CASES,
    StatisticsCase,
    StatisticsInputs,
    guarded,
    make_statistics,
)
from support.tolerance import assert_close, direction_change_tolerance
from tenp.errors import InvalidArgument
from tenp.ops import accumulate_direction_change, reference


def change_of(inputs: StatisticsInputs, device: torch.device) -> Tensor:
    moved = inputs.to(device)
    sums = moved.zero_direction_change()
    accumulate_direction_change(**moved.direction_change_arguments(), **sums)
    return sums["direction_change"].cpu()


def assert_matches_the_reference(inputs: StatisticsInputs, change: Tensor) -> None:
    expected = inputs.zero_direction_change()
    reference.accumulate_direction_change(**inputs.direction_change_arguments(), **expected)
    tolerance = direction_change_tolerance(inputs)
    assert_close("direction_change", change, expected["direction_change"], tolerance)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("case", STATISTICS_CASES)
def test_sums_are_those_of_the_reference(
    case: StatisticsCase, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make_statistics(replace(case, dtype=dtype))
    assert_matches_the_reference(inputs, change_of(inputs, device))


def one_row_each(hidden: Tensor, outputs: Tensor, device: torch.device) -> list[float]:
    """The contribution of every row of `outputs`, each the only row of its own expert."""
    num_rows = len(outputs)
    change = torch.zeros(num_rows, dtype=torch.float64, device=device)
    accumulate_direction_change(
        hidden.to(device),
        outputs.to(device),
        torch.arange(num_rows, dtype=torch.int32, device=device),
        torch.ones(num_rows, device=device),
        torch.arange(num_rows + 1, dtype=torch.int32, device=device),
        direction_change=change,
    )
    return change.tolist()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_zero_vectors_are_orthogonal_to_everything(
    dtype: torch.dtype, device: torch.device
) -> None:
    zero, vector = [0.0, 0.0], [3.0, 4.0]
    hidden = torch.tensor([zero, vector, zero, vector], dtype=dtype)
    outputs = torch.tensor([vector, zero, zero, vector], dtype=dtype)
    no_input, no_output, neither, parallel = one_row_each(hidden, outputs, device)
    assert (no_input, no_output, neither) == (5, 0, 0)
    assert parallel == pytest.approx(0, abs=5e-6)


@pytest.mark.parametrize("exponent", [-60, -20, 20, 60])
def test_the_length_of_the_input_does_not_matter(exponent: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 33, generator=generator)
    outputs = torch.randn(20, 33, generator=generator)
    change = one_row_each(hidden, outputs, device)
    assert one_row_each(hidden * 2.0**exponent, outputs, device) == change


def test_the_output_counts_with_its_length(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 33, generator=generator)
    outputs = torch.randn(20, 33, generator=generator)
    change = one_row_each(hidden, outputs, device)
    assert one_row_each(hidden, 4 * outputs, device) == [4 * value for value in change]


def test_an_expert_without_tokens_scores_zero(device: torch.device) -> None:
    change = change_of(make_statistics(StatisticsCase(pattern="one_takes_all")), device)
    assert (change[:-1] == 0).all()
    assert change[-1] > 0


def test_a_call_adds_its_own_sum_once(device: torch.device) -> None:
    first, second = make_statistics(StatisticsCase(tokens=129)).split()
    whole = first.to(device).zero_direction_change()
    for inputs in (first, second):
        accumulate_direction_change(**inputs.to(device).direction_change_arguments(), **whole)
    merged = change_of(first, device) + change_of(second, device)
    assert torch.equal(whole["direction_change"].cpu(), merged)


def test_the_same_batch_again_doubles_the_sums(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase())
    moved = inputs.to(device)
    twice = moved.zero_direction_change()
    for _ in range(2):
        accumulate_direction_change(**moved.direction_change_arguments(), **twice)
    assert torch.equal(twice["direction_change"].cpu(), 2 * change_of(inputs, device))


def test_doubled_tokens_double_the_sums(device: torch.device) -> None:
    doubled = make_statistics(StatisticsCase(pattern="skewed")).doubled()
    assert_matches_the_reference(doubled, change_of(doubled, device))


def test_permuting_the_experts_permutes_the_sums(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(pattern="skewed"))
    order = torch.randperm(inputs.num_experts, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        change_of(inputs.with_experts(order), device), change_of(inputs, device)[order]
    )


def test_rows_of_any_stride_give_the_same_bits(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(pattern="uniform"))
    expected = change_of(inputs, device)
    hidden_size = inputs.hidden_size
    inputs.hidden = torch.cat([inputs.hidden, inputs.hidden + 1], dim=1)[:, :hidden_size]
    inputs.outputs = inputs.outputs.repeat_interleave(2, dim=0)[::2]
    assert torch.equal(change_of(inputs, device), expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_arrays_may_start_at_any_element(dtype: torch.dtype, device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(hidden_size=37, dtype=dtype))
    embedded = inputs.to(device).embedded(device)
    sums = embedded.zero_direction_change()
    accumulate_direction_change(**embedded.direction_change_arguments(), **sums)
    assert torch.equal(sums["direction_change"].cpu(), change_of(inputs, device))


def test_a_nan_stays_in_its_expert(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(pattern="uniform"))
    expected = change_of(inputs, device)
    inputs.outputs[int(inputs.offsets[2])] = POISON  # the first row of expert 2
    change = change_of(inputs, device)
    others = torch.arange(inputs.num_experts) != 2
    assert change[2].isnan()
    assert torch.equal(change[others], expected[others])


def test_nothing_outside_the_sums_is_written(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(num_experts=5)).to(device)
    with guarded((5,), torch.float64, device) as change:
        change.zero_()
        accumulate_direction_change(**inputs.direction_change_arguments(), direction_change=change)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        pytest.param("outputs", torch.tensor(1.0), id="scalar"),
        pytest.param("outputs", torch.zeros(66, 48, dtype=torch.bfloat16), id="outputs-dtype"),
        pytest.param("outputs", torch.zeros(66, 47), id="outputs-shape"),
        pytest.param("tokens", torch.zeros(66, dtype=torch.int64), id="tokens-dtype"),
        pytest.param("tokens", torch.full((66,), 33, dtype=torch.int32), id="token-outside"),
        pytest.param("gates", torch.zeros(66, 1), id="gates-rank"),
        pytest.param("offsets", torch.arange(7, 0, -1).int(), id="offsets-decrease"),
        pytest.param("direction_change", torch.zeros(6), id="sum-dtype"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, wrong: Tensor) -> None:
    inputs = make_statistics(StatisticsCase())
    arguments = {**inputs.direction_change_arguments(), **inputs.zero_direction_change()}
    with pytest.raises(InvalidArgument, match=f"accumulate_direction_change: {name} must be"):
        accumulate_direction_change(**{**arguments, name: wrong})
