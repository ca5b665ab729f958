# SPDX-License-Identifier: Apache-2.0
"""What the native library reads once per process has to be tested in processes of its own."""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from tenp import _C

TESTS = Path(__file__).parents[1]

# tenp without its __init__, which imports transformers and takes longer than the tests.
_BARE_PACKAGE = f"""
import sys, types
sys.modules["tenp"] = types.ModuleType("tenp")
sys.modules["tenp"].__path__ = [{str(Path(_C.__file__).parent)!r}]
"""


def run_in_fork(
    arguments: Sequence[object], errors: int, prepare: Callable[[], object] = lambda: None
) -> NoReturn:
    """Be `tenp` in a process that was just forked, and end it with the exit code of the command.

    Args:
        arguments: Of `tenp`.
        errors: File descriptor that gets its stderr, tracebacks too.
        prepare: Called before the command.
    """
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(errors, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        # torch makes its pool of threads anew after a fork; of two threads that need it at once, one
        # finds none.
        torch.set_num_threads(1)
        prepare()
        sys.argv = ["tenp", *map(str, arguments)]
        from tenp.cli import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process that can import `tenp._C`, `tenp.ops` and the tests."""
    return subprocess.run(
        [sys.executable, "-c", _BARE_PACKAGE + code],
        env={**os.environ, "PYTHONPATH": str(TESTS), **environment},
        capture_output=True,
        text=True,
    )
