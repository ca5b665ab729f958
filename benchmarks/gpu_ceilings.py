# SPDX-License-Identifier: Apache-2.0
"""What a GPU can do at most with the instructions of csrc/cuda, for the timing table of gpu_suite.py.

`mma.sync` is what the kernels multiply with; on Hopper and later the chip has faster instructions, which
torch's dense product uses. Their rates stand beside each other.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(__file__).with_suffix(".cu")


def compile_to(program: Path, arch: str) -> None:
    """Compile the program for one architecture, as `90`; needs nvcc.

    Raises:
        RuntimeError: nvcc refused, with what it said.
    """
    command = [
        *("nvcc", "-std=c++20", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}"),
        *(f"-I{_ROOT / 'csrc'}", f"-I{_ROOT / 'csrc/include'}", str(SOURCE), "-o", str(program)),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"nvcc: {result.stderr[-2000:]}")


def measure(arch: str, seconds: float) -> dict[str, float] | str:
    """Return products and bytes a second on the current GPU, or a sentence that says why not.

    Args:
        arch: Of this GPU, as `90`.
        seconds: The program is stopped after so many.
    """
    if shutil.which("nvcc") is None:
        return "nvcc is not on the PATH"
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "gpu_ceilings"
        try:
            compile_to(program, arch)
            result = subprocess.run([program], capture_output=True, text=True, timeout=seconds)
        except RuntimeError as error:
            return str(error)
        except subprocess.TimeoutExpired:
            return f"did not end within {seconds:.0f} s"
    if result.returncode != 0:
        return result.stderr.strip()
    rates: dict[str, float] = json.loads(result.stdout)
    return rates
