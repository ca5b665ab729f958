# SPDX-License-Identifier: Apache-2.0
"""Runs a command in a child process that dies at a chosen moment, as by SIGKILL.

Moments are counted in calls that change what is on the disk, so a test covers every kind of moment
without waiting for luck, and the next start of the command finds what a real kill leaves.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def run_and_die(
    arguments: Sequence[object],
    moment: int | None = None,
    prepare: Callable[[], None] | None = None,
    errors: str | Path = os.devnull,
) -> tuple[int, int]:
    """Run `tenp` in a fork of this process, and kill it before its `moment`-th change of the disk.

    Args:
        arguments: Of `tenp`.
        moment: None lets it run to its end.
        prepare: Called in the child first.
        errors: File for what it says on stderr.

    Returns:
        Exit code (negative: the signal), and how many changes it made.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _child(arguments, moment, write, prepare, errors)
    os.close(write)
    with os.fdopen(read) as pipe:
        counted = pipe.read().count(".")
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), counted


def _child(
    arguments: Sequence[object],
    moment: int | None,
    pipe: int,
    prepare: Callable[[], None] | None,
    errors: str | Path,
) -> None:
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        if prepare is not None:
            prepare()
        sys.argv = ["tenp", *map(str, arguments)]
        seen = 0

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal seen
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1
                os.write(pipe, b".")
                return function(*args, **kwargs)

            return call

        for owner, name in (
            (Path, "replace"),
            (Path, "rename"),
            (Path, "mkdir"),
            (Path, "unlink"),
            (os, "fsync"),
        ):
            setattr(owner, name, counted(getattr(owner, name)))
        from tenp.cli import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stderr.flush()
        os._exit(code)
