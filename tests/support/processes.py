# SPDX-License-Identifier: Apache-2.0
"""What the native library reads once per process has to be tested in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tenp import _C

TESTS = Path(__file__).parents[1]

# tenp without its __init__, which imports transformers and takes longer than the tests.
_BARE_PACKAGE = f"""
import sys, types
sys.modules["tenp"] = types.ModuleType("tenp")
sys.modules["tenp"].__path__ = [{str(Path(_C.__file__).parent)!r}]
"""


def begin_fork() -> None:
    """What a fork of a process with torch does first, while it has one thread.

    torch makes its pool of threads anew after a fork; of two threads that need it at once, one finds none.
    """
    torch.set_num_threads(1)


def run_python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process that can import `tenp._C`, `tenp.ops` and the tests."""
    return subprocess.run(
        [sys.executable, "-c", _BARE_PACKAGE + code],
        env={**os.environ, "PYTHONPATH": str(TESTS), **environment},
        capture_output=True,
        text=True,
    )
