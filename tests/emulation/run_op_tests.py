# SPDX-License-Identifier: Apache-2.0
"""Run the op tests on the CUDA kernels without a GPU.

    cmake -B build/emulation -DTENP_EMULATE_CUDA=ON -DTENP_BUILD_PYTHON=ON
    cmake --build build/emulation
    python tests/emulation/run_op_tests.py build/emulation [pytest arguments]

The native module of that build, whose CPU arrays go through emulated CUDA kernels, takes the place of
`tenp._C`; the tests are those of tests/ops. This file is also the plugin of pytest that puts it there,
in every process that runs tests.

With -DTENP_SANITIZE=address,undefined the same commands run under AddressSanitizer, which then sees every
access outside an array of torch, too.
"""

import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

_TESTS = Path(__file__).parents[1]
_BUILD_VARIABLE = "TENP_EMULATION_BUILD"
# The CPU promises more than CUDA, whose path for few tokens adds in another order, and has kernels for
# int8 weights.
_SELECTED = "not (depend_on_its_neighbours and not same_path) and not instruction_sets and not int8"


def main(build_dir: str, *arguments: str) -> int:
    """Run pytest on the module of `build_dir`, with the arguments or on all op tests and end_to_end.py."""
    os.environ[_BUILD_VARIABLE] = str(Path(build_dir).resolve())
    sys.path[:0] = [str(Path(__file__).parent), str(_TESTS.parent)]
    options = ["-p", Path(__file__).stem, "-k", _SELECTED]
    everything = ["-q", str(_TESTS / "ops"), str(Path(__file__).with_name("end_to_end.py"))]
    return int(pytest.main([*options, *(arguments or everything)]))


def start_sanitized(build_dir: str) -> None:
    """When the module of `build_dir` is sanitized: start this process again, with what it needs.

    The runtime of AddressSanitizer comes before all other libraries, as it takes the place of
    malloc, and libstdc++ next, as it looks for what throws exceptions when it starts.
    """
    cache = (Path(build_dir) / "CMakeCache.txt").read_text()
    compiler = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", cache, re.MULTILINE)
    if compiler is None or not re.search(r"^TENP_SANITIZE:\w+=.*address", cache, re.MULTILINE):
        return
    names = ("libasan.so", "libstdc++.so.6")
    libraries = [
        subprocess.run(
            [compiler[1], f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    if os.environ.get("LD_PRELOAD") == ":".join(libraries):
        return
    os.environ["LD_PRELOAD"] = ":".join(libraries)
    os.environ["ASAN_OPTIONS"] = "detect_leaks=0"  # Python keeps what it has to the end
    os.environ["UBSAN_OPTIONS"] = "print_stacktrace=1"
    os.execv(sys.executable, [sys.executable, *sys.argv])


def pytest_load_initial_conftests() -> None:
    """Put the module there before anything imports tenp."""
    (library,) = Path(os.environ[_BUILD_VARIABLE]).glob("_C.*.so")
    spec = util.spec_from_file_location("tenp._C", library)
    assert spec is not None
    assert spec.loader is not None
    native = util.module_from_spec(spec)
    spec.loader.exec_module(native)
    sys.modules["tenp._C"] = native


if __name__ == "__main__":
    start_sanitized(sys.argv[1])
    sys.exit(main(*sys.argv[1:]))
