# SPDX-License-Identifier: Apache-2.0
"""The tests that compare an op with its oracle, as a plain loop for a process without pytest."""

import itertools
from collections.abc import Callable, Sequence

import torch
from ops import (
    test_activation_stats,
    test_direction_change,
    test_expert_gemm,
    test_neuron_contribution,
)
from support.op_cases import ACTIVATION_CASES, EXPERT_GEMM_CASES, FLOAT_DTYPES, STATISTICS_CASES

TOKENS_BEFORE = (1, 7, 64)
LAYOUTS = ("neurons-contiguous", "hidden-contiguous", "padded")


def run() -> None:
    """Run them all on the CPU; print each before it runs, so that the last line names a failure."""
    torch.set_num_threads(1)
    statistics = [case.values[0] for case in STATISTICS_CASES]
    of_gemm = test_expert_gemm
    of_neurons = test_neuron_contribution
    _run(test_activation_stats.test_sums_are_those_of_the_reference, statistics)
    _run(test_direction_change.test_sums_are_those_of_the_reference, statistics)
    _run(of_neurons.test_sums_are_those_of_the_reference, statistics)
    _run(of_neurons.test_down_may_be_stored_either_way, LAYOUTS)
    _run(
        of_gemm.test_outputs_are_those_of_the_reference,
        [case.values[0] for case in EXPERT_GEMM_CASES],
    )
    _run(
        of_gemm.test_every_activation_is_the_one_of_the_reference,
        [case.values[0] for case in ACTIVATION_CASES],
    )
    _run(of_gemm.test_a_token_does_not_depend_on_its_neighbours, TOKENS_BEFORE)


def _run(test: Callable[..., None], cases: Sequence[object]) -> None:
    for case, dtype in itertools.product(cases, FLOAT_DTYPES):
        print(test.__module__, test.__name__, case, dtype.id)
        test(case, dtype.values[0], torch.device("cpu"))
