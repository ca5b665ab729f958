# SPDX-License-Identifier: Apache-2.0
"""Run the tests of CUDA without a GPU.

    cmake -B build/emulation -DTENP_EMULATE_CUDA=ON -DTENP_BUILD_PYTHON=ON
    cmake --build build/emulation
    python tests/emulation/run_op_tests.py build/emulation [pytest arguments]

They are those of tests/ops on the device that `cuda_device.py` makes, and end_to_end.py. This file is also
the plugin of pytest that puts the device there, in every process that runs tests.
"""

import os
import sys
from pathlib import Path

import cuda_device
import pytest

_HERE = Path(__file__).parent


def main(build_dir: str, *arguments: str) -> int:
    """Run pytest on the module of `build_dir`, with the arguments or on all that is there to test."""
    os.environ[cuda_device.BUILD_VARIABLE] = str(Path(build_dir).resolve())
    sys.path[:0] = [str(_HERE), str(_HERE.parents[1])]
    own = [str(_HERE / name) for name in ("device_tests.py", "end_to_end.py")]
    everything = ["-q", "-m", "cuda", *own, str(_HERE.parent / "ops")]
    return int(pytest.main(["-p", Path(__file__).stem, *(arguments or everything)]))


def pytest_load_initial_conftests() -> None:
    """Put the device there before anything imports tenp."""
    cuda_device.install(Path(os.environ[cuda_device.BUILD_VARIABLE]))


if __name__ == "__main__":
    cuda_device.start_sanitized(Path(sys.argv[1]))
    sys.exit(main(*sys.argv[1:]))
