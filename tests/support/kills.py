# SPDX-License-Identifier: Apache-2.0
"""Runs a command in a child process that dies at a chosen moment, as by SIGKILL.

Moments are counted in calls that change what is on the disk, so a test covers every kind of moment
without waiting for luck, or they are so many seconds into a stage of `tenp prune`, whatever happens
then. The next start of the command finds what a real kill leaves.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.processes import run_in_fork
from tenp import applying, files, pipeline, running
from tenp.sequential import Narrowing

#: What `tenp prune` does; with --sequential the first two come twice.
STAGES = ("calibrating", "planning", "applying", "renaming")


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

    def in_child(pipe: int) -> None:
        if prepare is not None:
            prepare()
        _count_changes(pipe, moment)

    child, read = _start(arguments, in_child, errors)
    with os.fdopen(read) as pipe:
        counted = pipe.read().count(".")
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), counted


@dataclass(frozen=True)
class Run:
    """What became of a run.

    Attributes:
        code: Exit code, negative: the signal.
        seconds: Spent in every stage.
        stage: The one it was in at the end; empty before the first and after the last.
    """

    code: int
    seconds: dict[str, float]
    stage: str


def run_and_kill(
    arguments: Sequence[object],
    stage: str | None = None,
    seconds: float = 0,
    errors: str | Path = os.devnull,
) -> Run:
    """Run `tenp prune` in a fork of this process, and kill it so many seconds into a stage.

    Args:
        arguments: Of `tenp`.
        stage: One of `STAGES`; None lets it run to its end.
        seconds: Into the stage; it runs to its end if the stage takes less.
        errors: File for what it says on stderr.
    """
    child, read = _start(arguments, _tell_stages, errors)
    spent = dict.fromkeys(STAGES, 0.0)
    now, since = "", time.monotonic()
    while True:
        left = max(seconds - spent[stage], 0) if stage is not None and now == stage else None
        told = bool(select.select([read], [], [], left)[0])
        if now:
            spent[now] += time.monotonic() - since
        since = time.monotonic()
        if not told:
            os.kill(child, signal.SIGKILL)
            stage = None  # and see what it may have told before it died
            continue
        number = os.read(read, 1)
        if not number:
            break
        now = STAGES[number[0]] if number[0] < len(STAGES) else ""
    os.close(read)
    _, status = os.waitpid(child, 0)
    return Run(os.waitstatus_to_exitcode(status), spent, now)


def _start(
    arguments: Sequence[object], prepare: Callable[[int], None], errors: str | Path
) -> tuple[int, int]:
    """Run `tenp` in a fork; return its process and the end of a pipe whose other `prepare` gets."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        said = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        run_in_fork(arguments, said, lambda: prepare(write))
    os.close(write)
    return child, read


def _count_changes(pipe: int, moment: int | None) -> None:
    """Tell every change of the disk, and die before the `moment`-th."""
    seen = 0

    def count() -> None:
        nonlocal seen
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1
        os.write(pipe, b".")

    for owner, name in (
        (Path, "replace"),
        (Path, "rename"),
        (Path, "mkdir"),
        (Path, "unlink"),
        (os, "fsync"),
    ):
        _call_before(owner, name, count)


def _tell_stages(pipe: int) -> None:
    """Tell the number of every stage when it begins, and one more when the output is there."""
    first_functions: Sequence[tuple[Any, str, str]] = (
        (running, "calibrate", "calibrating"),
        (pipeline, "plan", "planning"),
        (Narrowing, "plan", "planning"),
        (applying, "apply", "applying"),
        (files, "_sync", "renaming"),
    )
    for owner, name, stage in first_functions:
        number = bytes([STAGES.index(stage)])
        _call_before(owner, name, lambda number=number: os.write(pipe, number))
    apply = applying.apply

    def to_the_end(*args: Any, **kwargs: Any) -> None:
        apply(*args, **kwargs)
        os.write(pipe, bytes([len(STAGES)]))

    applying.apply = to_the_end


def _call_before(owner: Any, name: str, first: Callable[[], Any]) -> None:
    function = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        first()
        return function(*args, **kwargs)

    setattr(owner, name, call)
