# SPDX-License-Identifier: Apache-2.0
"""accumulate_neuron_contribution against the reference.

Every test goes through `contribution_of` or `assert_checksum`: whatever else it asks, the
projections of an expert must add up to the lengths of its outputs.
"""

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
from support.tolerance import (
    assert_close,
    assert_same_lowest_half,
    checksum_tolerance,
    neuron_contribution_tolerance,
)
from tenp.errors import InvalidArgument
from tenp.ops import accumulate_neuron_contribution, reference


def assert_checksum(inputs: StatisticsInputs, projection: Tensor) -> None:
    """sum_k P_k = mean_t |y_t| for every expert, both sides times n_e."""
    stats = inputs.zero_activation_stats()
    reference.accumulate_activation_stats(**inputs.activation_stats_arguments(), **stats)
    lengths = stats["norm_sum"]
    assert_close("sum of P", projection.cpu().sum(dim=1), lengths, checksum_tolerance(inputs))


def contribution_of(inputs: StatisticsInputs, device: torch.device) -> dict[str, Tensor]:
    moved = inputs.to(device)
    sums = moved.zero_neuron_contribution()
    accumulate_neuron_contribution(**moved.neuron_contribution_arguments(), **sums)
    assert_checksum(inputs, sums["projection"])
    return {name: value.cpu() for name, value in sums.items()}


def expected_contribution(inputs: StatisticsInputs) -> dict[str, Tensor]:
    expected = inputs.zero_neuron_contribution()
    reference.accumulate_neuron_contribution(**inputs.neuron_contribution_arguments(), **expected)
    return expected


def assert_matches_the_reference(inputs: StatisticsInputs, sums: dict[str, Tensor]) -> None:
    tolerance = neuron_contribution_tolerance(inputs)
    for name, value in expected_contribution(inputs).items():
        assert_close(name, sums[name], value, tolerance[name])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("case", STATISTICS_CASES)
def test_sums_are_those_of_the_reference(
    case: StatisticsCase, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make_statistics(replace(case, dtype=dtype))
    assert_matches_the_reference(inputs, contribution_of(inputs, device))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("layout", ["neurons-contiguous", "hidden-contiguous", "padded"])
def test_down_may_be_stored_either_way(
    layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make_statistics(StatisticsCase(hidden_size=37, width=65, dtype=dtype))
    if layout == "hidden-contiguous":
        inputs.down = inputs.down.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "padded":
        padded = torch.full((inputs.num_experts, 40, 80), POISON, dtype=dtype)
        padded[:, :37, :65] = inputs.down
        inputs.down = padded[:, :37, :65]
    assert_matches_the_reference(inputs, contribution_of(inputs, device))


def test_down_may_be_a_view_of_the_packed_rows(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(width=32))
    packed = inputs.down.transpose(1, 2).reshape(-1, inputs.hidden_size).contiguous()
    inputs.down = packed.view(inputs.num_experts, 32, inputs.hidden_size).transpose(1, 2)
    assert_matches_the_reference(inputs, contribution_of(inputs, device))


def test_rows_without_output_contribute_nothing_to_the_projection(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(pattern="uniform"))
    inputs.down.zero_()  # y = W_d m = 0, while m is not
    inputs.outputs[inputs.outputs.isfinite()] = 0
    sums = contribution_of(inputs, device)
    assert (sums["projection"] == 0).all()
    assert (sums["magnitude"] > 0).all()


def test_a_neuron_against_the_output_counts_negative(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(tokens=1, num_experts=1, width=2, experts_per_token=1))
    inputs.activations[:] = torch.tensor([1.0, -1.0])
    inputs.down[0] = 0
    inputs.down[0, 0] = torch.tensor([3.0, 1.0])  # y = 3 - 1 along the first axis
    inputs.outputs[:] = 0
    inputs.outputs[:, 0] = 2
    inputs.offsets = torch.tensor([0, 1], dtype=torch.int32)
    assert contribution_of(inputs, device)["projection"].tolist() == [[3, -1]]


def test_an_expert_without_tokens_keeps_its_sums(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(pattern="one_takes_all"))
    before = contribution_of(inputs, device)
    moved = inputs.to(device)
    sums = {name: value + 5 for name, value in moved.zero_neuron_contribution().items()}
    accumulate_neuron_contribution(**moved.neuron_contribution_arguments(), **sums)
    for name, value in sums.items():
        assert (value[:-1] == 5).all(), name
        assert (before[name][:-1] == 0).all(), name


def test_the_peak_is_kept_when_the_batch_has_none_larger(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(pattern="uniform"))
    moved = inputs.to(device)
    sums = moved.zero_neuron_contribution()
    sums["peak"] += 1e6
    accumulate_neuron_contribution(**moved.neuron_contribution_arguments(), **sums)
    assert_checksum(inputs, sums["projection"])
    assert (sums["peak"] == 1e6).all()


def test_a_call_adds_its_own_sums_once(device: torch.device) -> None:
    whole_inputs = make_statistics(StatisticsCase(tokens=129))
    halves = whole_inputs.split()
    whole = whole_inputs.to(device).zero_neuron_contribution()
    for inputs in halves:
        accumulate_neuron_contribution(**inputs.to(device).neuron_contribution_arguments(), **whole)
    assert_checksum(whole_inputs, whole["projection"])
    first, second = (contribution_of(half, device) for half in halves)
    for name, value in whole.items():
        merge = torch.maximum if name == "peak" else torch.add
        assert torch.equal(value.cpu(), merge(first[name], second[name])), name


def test_doubled_tokens_double_the_sums(device: torch.device) -> None:
    doubled = make_statistics(StatisticsCase(pattern="skewed")).doubled()
    assert_matches_the_reference(doubled, contribution_of(doubled, device))


def test_permuting_the_experts_permutes_the_sums(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(pattern="skewed"))
    order = torch.randperm(inputs.num_experts, generator=torch.Generator().manual_seed(0))
    before = contribution_of(inputs, device)
    after = contribution_of(inputs.with_experts(order), device)
    for name, value in before.items():
        assert torch.equal(after[name], value[order]), name


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_permuting_the_neurons_permutes_the_sums(dtype: torch.dtype, device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(width=65, dtype=dtype))
    order = torch.randperm(65, generator=torch.Generator().manual_seed(0))
    inputs.activations = inputs.activations[:, order].contiguous()
    inputs.down = inputs.down[:, :, order].contiguous()
    assert_matches_the_reference(inputs, contribution_of(inputs, device))


@pytest.mark.parametrize("added", [1, 15, 16, 64])
def test_neurons_that_are_zero_change_nothing(added: int, device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(width=33))
    before = contribution_of(inputs, device)
    inputs.activations = torch.nn.functional.pad(inputs.activations, (0, added))
    inputs.down = torch.nn.functional.pad(inputs.down, (0, added))
    after = contribution_of(inputs, device)
    tolerance = neuron_contribution_tolerance(inputs)
    for name, value in before.items():
        # The number of neurons may move the borders of blocks, so not bit for bit.
        assert_close(name, after[name][:, :33], value, tolerance[name][:, :33])
        assert (after[name][:, 33:] == 0).all(), name


@pytest.mark.parametrize("exponent", [-10, 10])
def test_the_projection_grows_with_the_activations(exponent: int, device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase())
    before = contribution_of(inputs, device)["projection"]
    scale = 2.0**exponent  # exact, so that every rounding stays the same
    inputs.activations, inputs.outputs = inputs.activations * scale, inputs.outputs * scale
    assert torch.equal(contribution_of(inputs, device)["projection"], before * scale)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_the_lowest_half_is_the_one_of_the_reference(
    dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make_statistics(
        StatisticsCase(tokens=256, hidden_size=192, width=256, num_experts=8, dtype=dtype)
    )
    actual = contribution_of(inputs, device)["projection"]
    assert_same_lowest_half(actual, expected_contribution(inputs)["projection"])


def test_rows_of_any_stride_give_the_same_bits(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(pattern="uniform", width=33))
    expected = contribution_of(inputs, device)
    inputs.activations = torch.cat([inputs.activations, inputs.activations], dim=1)[:, :33]
    inputs.outputs = inputs.outputs.repeat_interleave(3, dim=0)[::3]
    for name, value in contribution_of(inputs, device).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_arrays_may_start_at_any_element(dtype: torch.dtype, device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(hidden_size=37, width=33, dtype=dtype))
    expected = contribution_of(inputs, device)
    embedded = inputs.to(device).embedded(device)
    sums = embedded.zero_neuron_contribution()
    accumulate_neuron_contribution(**embedded.neuron_contribution_arguments(), **sums)
    assert_checksum(inputs, sums["projection"])
    for name, value in sums.items():
        assert torch.equal(value.cpu(), expected[name]), name


def test_a_row_of_infinite_length_is_not_left_out(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(pattern="uniform"))
    inputs.outputs[int(inputs.offsets[2]), 0] = torch.inf
    moved = inputs.to(device)
    sums = moved.zero_neuron_contribution()
    accumulate_neuron_contribution(**moved.neuron_contribution_arguments(), **sums)
    assert sums["projection"][2].isnan().all()
    assert sums["projection"][3].isfinite().all()


def test_a_nan_stays_in_its_expert(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(pattern="uniform"))
    expected = contribution_of(inputs, device)
    row = int(inputs.offsets[2])  # the first of expert 2
    inputs.activations[row] = POISON
    inputs.outputs[row] = POISON
    sums = contribution_of(inputs, device)
    others = torch.arange(inputs.num_experts) != 2
    for name, value in sums.items():
        assert value[2].isnan().all(), name
        assert torch.equal(value[others], expected[name][others]), name


def test_nothing_outside_the_sums_is_written(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(num_experts=3, width=17))
    moved = inputs.to(device)
    with (
        guarded((3, 17), torch.float64, device) as projection,
        guarded((3, 17), torch.float64, device) as magnitude,
        guarded((3, 17), torch.float64, device) as energy,
        guarded((3, 17), torch.float64, device) as peak,
    ):
        sums = {
            "projection": projection,
            "magnitude": magnitude,
            "energy": energy,
            "peak": peak,
        }
        for value in sums.values():
            value.zero_()
        accumulate_neuron_contribution(**moved.neuron_contribution_arguments(), **sums)
        assert_checksum(inputs, projection)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        pytest.param("outputs", torch.tensor(1.0), id="scalar"),
        pytest.param("activations", torch.zeros(66, 31), id="activations-shape"),
        pytest.param("outputs", torch.zeros(66, 48, dtype=torch.float16), id="outputs-dtype"),
        pytest.param("down", torch.zeros(6, 48, 32).half(), id="down-dtype"),
        pytest.param("down", torch.zeros(6, 96, 64)[:, ::2, ::2], id="down-strides"),
        pytest.param("gates", torch.zeros(3), id="gates-shape"),
        pytest.param("offsets", torch.full((7,), 67, dtype=torch.int32), id="offsets-outside"),
        pytest.param("energy", torch.zeros(6, 32), id="sum-dtype"),
        pytest.param("peak", torch.zeros(32, 6, dtype=torch.float64), id="sum-shape"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, wrong: Tensor) -> None:
    inputs = make_statistics(StatisticsCase())
    arguments = {**inputs.neuron_contribution_arguments(), **inputs.zero_neuron_contribution()}
    with pytest.raises(InvalidArgument, match=f"accumulate_neuron_contribution: {name} must be"):
        accumulate_neuron_contribution(**{**arguments, name: wrong})
