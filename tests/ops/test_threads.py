# SPDX-License-Identifier: Apache-2.0
"""The number of threads: what it is, and that no result depends on it."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from support.op_cases import (
    FLOAT_DTYPES,
    ExpertGemmCase,
    StatisticsCase,
    make_expert_gemm,
    make_statistics,
)
from support.processes import run_python
from tenp.errors import InvalidArgument
from tenp.ops import (
    accumulate_activation_stats,
    accumulate_direction_change,
    accumulate_neuron_contribution,
    expert_gemm,
    num_threads,
    route,
    set_num_threads,
)


@pytest.fixture(autouse=True)
def _restored_number_of_threads() -> Iterator[None]:
    before = num_threads()
    yield
    set_num_threads(before)


def every_op(dtype: torch.dtype, tokens: int) -> dict[str, Tensor]:
    statistics = make_statistics(
        StatisticsCase(tokens=tokens, width=130, hidden_size=100, num_experts=9, dtype=dtype)
    )
    stats = statistics.zero_activation_stats()
    accumulate_activation_stats(**statistics.activation_stats_arguments(), **stats)
    change = statistics.zero_direction_change()
    accumulate_direction_change(**statistics.direction_change_arguments(), **change)
    contribution = statistics.zero_neuron_contribution()
    accumulate_neuron_contribution(**statistics.neuron_contribution_arguments(), **contribution)
    layer = make_expert_gemm(ExpertGemmCase(tokens=tokens, dtype=dtype))
    routing = route(layer.expert_ids, len(layer.widths))
    out = expert_gemm(**layer.arguments())
    return {"out": out, **stats, **change, **contribution, **routing._asdict()}


@pytest.mark.parametrize("tokens", [1, 3, 257])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype, tokens: int) -> None:
    set_num_threads(1)
    expected = every_op(dtype, tokens)
    for threads in (1, 2, 3):
        set_num_threads(threads)
        assert num_threads() == threads
        for name, value in every_op(dtype, tokens).items():
            assert torch.equal(value, expected[name]), f"{name} with {threads} threads"


def test_twenty_runs_agree() -> None:
    set_num_threads(3)
    expected = every_op(torch.bfloat16, 129)
    for _ in range(20):
        for name, value in every_op(torch.bfloat16, 129).items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("count", [0, -1])
def test_a_number_below_one_is_refused(count: int) -> None:
    with pytest.raises(InvalidArgument, match="must be"):
        set_num_threads(count)


def test_the_environment_sets_the_default() -> None:
    code = "from tenp import _C; print(_C.num_threads())"
    assert run_python(code, {"TENP_NUM_THREADS": "5"}).stdout.strip() == "5"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_the_default_is_what_the_process_may_run_on() -> None:
    code = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from tenp import _C
print(_C.num_threads())
"""
    assert run_python(code, {"TENP_NUM_THREADS": ""}).stdout.strip() == "1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
def test_a_forked_child_computes_the_same() -> None:
    set_num_threads(2)
    layer = make_expert_gemm(ExpertGemmCase(tokens=129))
    expected = expert_gemm(**layer.arguments())  # starts the pool
    child = os.fork()
    if child == 0:
        same = torch.equal(expert_gemm(**layer.arguments()), expected)
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
