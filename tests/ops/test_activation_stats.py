# SPDX-License-Identifier: Apache-2.0
"""accumulate_activation_stats against the reference."""

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
from support.tolerance import activation_stats_tolerance, assert_close
from tenp.errors import InvalidArgument
from tenp.ops import accumulate_activation_stats, reference


def stats_of(inputs: StatisticsInputs, device: torch.device) -> dict[str, Tensor]:
    moved = inputs.to(device)
    sums = moved.zero_activation_stats()
    accumulate_activation_stats(**moved.activation_stats_arguments(), **sums)
    return {name: value.cpu() for name, value in sums.items()}


def assert_matches_the_reference(inputs: StatisticsInputs, sums: dict[str, Tensor]) -> None:
    expected = inputs.zero_activation_stats()
    reference.accumulate_activation_stats(**inputs.activation_stats_arguments(), **expected)
    tolerance = activation_stats_tolerance(inputs)
    for name, value in expected.items():
        assert_close(name, sums[name], value, tolerance[name])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("case", STATISTICS_CASES)
def test_sums_are_those_of_the_reference(
    case: StatisticsCase, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make_statistics(replace(case, dtype=dtype))
    assert_matches_the_reference(inputs, stats_of(inputs, device))


def test_an_expert_without_tokens_keeps_its_sums(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(pattern="one_takes_all")).to(device)
    sums = {name: value + 5 for name, value in inputs.zero_activation_stats().items()}
    accumulate_activation_stats(**inputs.activation_stats_arguments(), **sums)
    for value in sums.values():
        assert (value[:-1] == 5).all()


def test_the_maximum_is_kept_when_the_batch_has_none_larger(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(pattern="uniform")).to(device)
    sums = inputs.zero_activation_stats()
    sums["norm_max"] += 1e6
    accumulate_activation_stats(**inputs.activation_stats_arguments(), **sums)
    assert (sums["norm_max"] == 1e6).all()


def test_a_call_adds_its_own_sums_once(device: torch.device) -> None:
    first, second = (make_statistics(StatisticsCase(seed=seed)).to(device) for seed in (1, 2))
    whole = first.zero_activation_stats()
    for inputs in (first, second):
        accumulate_activation_stats(**inputs.activation_stats_arguments(), **whole)
    parts = [stats_of(inputs, device) for inputs in (first, second)]
    for name, value in whole.items():
        merge = torch.maximum if name == "norm_max" else torch.add
        assert torch.equal(value.cpu(), merge(parts[0][name], parts[1][name])), name


def test_permuting_the_experts_permutes_the_sums(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(pattern="skewed"))
    order = torch.randperm(inputs.num_experts, generator=torch.Generator().manual_seed(0))
    before, after = stats_of(inputs, device), stats_of(inputs.with_experts(order), device)
    for name, value in before.items():
        assert torch.equal(after[name], value[order]), name


def test_doubled_tokens_double_the_sums(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(pattern="skewed"))
    doubled = inputs.doubled()
    sums = stats_of(doubled, device)
    assert_matches_the_reference(doubled, sums)
    single = stats_of(inputs, device)
    assert torch.equal(sums["counts"], 2 * single["counts"])
    assert torch.equal(sums["norm_max"], single["norm_max"])


def test_rows_of_any_stride_give_the_same_bits(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(pattern="uniform"))
    expected = stats_of(inputs, device)
    inputs.outputs = torch.cat([inputs.outputs, torch.full_like(inputs.outputs, 7)], dim=1)[
        :, : inputs.hidden_size
    ]
    sums = stats_of(inputs, device)
    for name, value in expected.items():
        assert torch.equal(sums[name], value), name


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_arrays_may_start_at_any_element(dtype: torch.dtype, device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(hidden_size=37, dtype=dtype))
    embedded = inputs.to(device).embedded(device)
    sums = embedded.zero_activation_stats()
    accumulate_activation_stats(**embedded.activation_stats_arguments(), **sums)
    for name, value in stats_of(inputs, device).items():
        assert torch.equal(sums[name].cpu(), value), name


def test_a_nan_stays_in_its_expert(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(pattern="uniform"))
    expected = stats_of(inputs, device)
    inputs.outputs[int(inputs.offsets[2])] = POISON  # the first row of expert 2
    sums = stats_of(inputs, device)
    others = torch.arange(inputs.num_experts) != 2
    for name in ("norm_sum", "gated_norm_sum", "norm_max"):
        assert sums[name][2].isnan(), name
        assert torch.equal(sums[name][others], expected[name][others]), name


def test_nothing_outside_the_sums_is_written(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase(num_experts=5)).to(device)
    with (
        guarded((5,), torch.int64, device) as counts,
        guarded((5,), torch.float64, device) as gate_sum,
        guarded((5,), torch.float64, device) as norm_sum,
        guarded((5,), torch.float64, device) as gated_norm_sum,
        guarded((5,), torch.float64, device) as norm_max,
    ):
        sums = {
            "counts": counts,
            "gate_sum": gate_sum,
            "norm_sum": norm_sum,
            "gated_norm_sum": gated_norm_sum,
            "norm_max": norm_max,
        }
        for value in sums.values():
            value.zero_()
        accumulate_activation_stats(**inputs.activation_stats_arguments(), **sums)


def test_gates_of_another_float_dtype_are_taken(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase())
    inputs.gates = inputs.gates.to(torch.bfloat16)
    sums = stats_of(inputs, device)
    inputs.gates = inputs.gates.float()
    assert_matches_the_reference(inputs, sums)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        pytest.param("outputs", torch.tensor(1.0), id="scalar"),
        pytest.param("outputs", torch.zeros(66), id="rank"),
        pytest.param("outputs", torch.zeros(66, 48, dtype=torch.float64), id="dtype"),
        pytest.param("gates", torch.zeros(65), id="length"),
        pytest.param("offsets", torch.zeros(7, dtype=torch.int64), id="offsets-dtype"),
        pytest.param("counts", torch.zeros(6), id="counts-dtype"),
        pytest.param("norm_max", torch.zeros(7, dtype=torch.float64), id="sum-shape"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, wrong: Tensor) -> None:
    inputs = make_statistics(StatisticsCase())
    arguments = {**inputs.activation_stats_arguments(), **inputs.zero_activation_stats()}
    with pytest.raises(InvalidArgument, match=f"accumulate_activation_stats: {name} must be"):
        accumulate_activation_stats(**{**arguments, name: wrong})
