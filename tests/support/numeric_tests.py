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

from support.op_cases import (
    ACTIVATION_CASES,
    EXPERT_GEMM_CASES,
    FLOAT_DTYPES,
    INT8_CASES,
    STATISTICS_CASES,
)

TOKENS_BEFORE = (1, 7, 64)
LAYOUTS = ("neurons-contiguous", "hidden-contiguous", "padded")


def run() -> None:
    """Run them all on the CPU; print each before it runs, so that the last line names a failure."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    of_gemm, of_neurons = test_expert_gemm, test_neuron_contribution
    layers = [case.values[0] for case in EXPERT_GEMM_CASES]
    activations = [case.values[0] for case in ACTIVATION_CASES]
    quantized = [case.values[0] for case in INT8_CASES]
    statistics = [case.values[0] for case in STATISTICS_CASES]
    for module in (test_activation_stats, test_direction_change, test_neuron_contribution):
        _run(module.test_sums_are_those_of_the_reference, statistics, device)
    _run(of_neurons.test_down_may_be_stored_either_way, LAYOUTS, device)
    _run(of_gemm.test_outputs_are_those_of_the_reference, layers, device)
    _run(of_gemm.test_every_activation_is_the_one_of_the_reference, activations, device)
    _run(of_gemm.test_int8_weights_are_multiplied_by_the_scales_of_their_rows, quantized)
    _run(of_gemm.test_a_token_does_not_depend_on_its_neighbours, TOKENS_BEFORE)


def _run(test: Callable[..., None], cases: Sequence[object], *arguments: object) -> None:
    for case, dtype in itertools.product(cases, FLOAT_DTYPES):
        print(test.__module__, test.__name__, case, dtype.id)
        test(case, dtype.values[0], *arguments)
