# SPDX-License-Identifier: Apache-2.0
"""Run a program with a CUDA device that is none: torch's arrays there, and tenp's kernels, on the host.

    cmake -B build/emulation -DTENP_EMULATE_CUDA=ON -DTENP_BUILD_PYTHON=ON
    cmake --build build/emulation
    python tests/emulation/cuda_device.py build/emulation tenp prune … --device cuda

Needs a torch without CUDA. The native module of that build takes the place of `tenp._C`; what torch itself
does on the device is done by the CPU (`cuda_device.cpp`), and fails as on a GPU when the arrays of one
operation lie on two devices.

With -DTENP_SANITIZE=address,undefined all of it runs under AddressSanitizer, which then sees every access
outside an array of torch, too.
"""

import ctypes
import os
import re
import runpy
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

#: Names the build for the processes that tests start.
BUILD_VARIABLE = "TENP_EMULATION_BUILD"


def install(build_dir: Path) -> None:
    """Give this process the device and the module, before anything imports tenp."""
    # Before torch: what it asks the device for, it asks once.
    ctypes.CDLL(str(build_dir / "tests/emulation/libcuda_device.so"))
    import torch

    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    replacements: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "current_stream": lambda device=None: stream,
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (1 << 34, 1 << 34),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)

    (library,) = build_dir.glob("_C.*.so")
    spec = util.spec_from_file_location("tenp._C", library)
    assert spec is not None
    assert spec.loader is not None
    native = util.module_from_spec(spec)
    spec.loader.exec_module(native)
    sys.modules["tenp._C"] = native


def start_sanitized(build_dir: Path) -> None:
    """When the module of `build_dir` is sanitized: start this process again, with what it needs.

    The runtime of AddressSanitizer comes before all other libraries, as it takes the place of
    malloc, and libstdc++ next, as it looks for what throws exceptions when it starts.
    """
    cache = (build_dir / "CMakeCache.txt").read_text()
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


if __name__ == "__main__":
    start_sanitized(Path(sys.argv[1]))
    install(Path(sys.argv[1]).resolve())
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
