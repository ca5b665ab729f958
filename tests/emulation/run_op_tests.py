# SPDX-License-Identifier: Apache-2.0
"""Run the op tests on the CUDA kernels without a GPU.

    cmake -B build/emulation -DTENP_EMULATE_CUDA=ON -DTENP_BUILD_PYTHON=ON
    cmake --build build/emulation
    python tests/emulation/run_op_tests.py build/emulation [pytest arguments]

The native module of that build, whose CPU arrays go through emulated CUDA kernels, takes the place of
`tenp._C`; the tests are those of tests/ops.
"""

import sys
from importlib import util
from pathlib import Path

import pytest

_TESTS = Path(__file__).parents[1]


def main(build_dir: str, *arguments: str) -> int:
    """Load the module of `build_dir`, then run pytest with the arguments or on all op tests."""
    (library,) = Path(build_dir).glob("_C.*.so")
    spec = util.spec_from_file_location("tenp._C", library)
    assert spec is not None
    assert spec.loader is not None
    native = util.module_from_spec(spec)
    spec.loader.exec_module(native)
    sys.modules["tenp._C"] = native
    sys.path[:0] = [str(_TESTS.parent), str(_TESTS)]
    # The CPU promises more than CUDA, whose path for few tokens adds in another order.
    options = ["-k", "not (depend_on_its_neighbours and not same_path) and not instruction_sets"]
    return int(pytest.main(options + (list(arguments) or ["-q", str(_TESTS / "ops")])))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
