# SPDX-License-Identifier: Apache-2.0
"""What the native library reads once per process has to be tested in processes of its own."""

import os
import subprocess
import sys

from tenp import _C


def call_native_alone(
    function: str, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Print `_C.function()` in a new process, which loads `_C` without the package around it."""
    code = f"""
from importlib import util
spec = util.spec_from_file_location("_C", {_C.__file__!r})
native = util.module_from_spec(spec)
spec.loader.exec_module(native)
print(native.{function}())
"""
    return run_python(["-c", code], environment)


def run_python(
    arguments: list[str], environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
