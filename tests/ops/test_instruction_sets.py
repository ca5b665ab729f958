# SPDX-License-Identifier: Apache-2.0
"""Every instruction set of the CPU backend gives right results, not only this machine's best.

TENP_ISA is read once per process, so the numeric tests run again in one process per set.
"""

from pathlib import Path

import pytest
from support.processes import call_native_alone, run_python

from tenp import _C

NUMERIC_TESTS = " or ".join(
    (
        "test_outputs_are_those_of_the_reference",
        "test_every_activation_is_the_one_of_the_reference",
        "test_activations_saturate_where_their_argument_is_large",
        "test_weights_outside_the_widths_are_never_multiplied",
        "test_a_token_does_not_depend_on_its_neighbours",
        "test_sums_are_those_of_the_reference",
        "test_down_may_be_stored_either_way",
    )
)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_the_numeric_tests_pass_with(isa: str) -> None:
    if isa == _C.cpu_isa():
        pytest.skip("the other tests of this process have used it")
    probe = call_native_alone("cpu_isa", {"TENP_ISA": isa})
    if "errors.Unsupported" in probe.stderr:
        pytest.skip(probe.stderr.strip().splitlines()[-1])
    assert probe.stdout.strip() == isa
    options = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not cuda"]
    tests = ["-k", NUMERIC_TESTS, str(Path(__file__).parent)]
    result = run_python([*options, *tests], {"TENP_ISA": isa})
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_an_instruction_set_that_does_not_exist_is_refused() -> None:
    probe = call_native_alone("cpu_isa", {"TENP_ISA": "avx1024"})
    assert "InvalidArgument" in probe.stderr
    assert "TENP_ISA" in probe.stderr
