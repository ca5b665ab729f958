# SPDX-License-Identifier: Apache-2.0
"""Every instruction set of the CPU backend gives right results, not only this machine's best.

TENP_ISA is read once per process, so the numeric tests run again in one process per set.
"""

import pytest

from support.processes import run_python
from tenp import _C

PRINT_ISA = "from tenp import _C; print(_C.cpu_isa())"


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
def test_the_numeric_tests_pass_with(isa: str) -> None:
    if isa == _C.cpu_isa():
        pytest.skip("the other tests of this process have used it")
    probe = run_python(PRINT_ISA, {"TENP_ISA": isa})
    if "errors.Unsupported" in probe.stderr:
        pytest.skip(probe.stderr.strip().splitlines()[-1])
    assert probe.stdout.strip() == isa
    result = run_python("from support import numeric_tests; numeric_tests.run()", {"TENP_ISA": isa})
    assert result.returncode == 0, result.stdout[-300:] + result.stderr[-3000:]


def test_an_instruction_set_that_does_not_exist_is_refused() -> None:
    probe = run_python(PRINT_ISA, {"TENP_ISA": "avx1024"})
    assert "InvalidArgument" in probe.stderr
    assert "TENP_ISA" in probe.stderr
