# SPDX-License-Identifier: Apache-2.0
"""Carry out a plan of any kind, in memory or within a bound, and check what was written before it appears."""

from __future__ import annotations

import functools
from pathlib import Path

from tenp import (
    dern,
    dropping,
    equivalence,
    memory,
    moments,
    output,
    pruning,
    rounding,
    verification,
)
from tenp.checkpoint import Checkpoint
from tenp.distributed import Group
from tenp.errors import InvalidArgument, Unsupported
from tenp.plan import Plan
from tenp.quantization import Int8
from tenp.refitting import Refitting
from tenp.running import Reporter, Run
from tenp.statistics import Statistics
from tenp.workdir import WorkDirectory


def rounding_of(weights: str | None, method: str) -> Int8 | None:
    """Return what rounds the experts' weights and adds up by how much, or None if they stay.

    Args:
        weights: `int8` or None.
        method: Of the plan.

    Raises:
        InvalidArgument: `weights` is something else.
        Unsupported: The method makes a stock checkpoint, whose format has no such weights.
    """
    if weights is None:
        return None
    if weights != "int8":
        raise InvalidArgument(f"weights must be int8 or None, got {weights}")
    if method in ("drop", "dern"):
        raise Unsupported(
            f"int8 weights need a plan that narrows experts, got one of method {method}; "
            "quantize its stock checkpoint with another tool"
        )
    return Int8()


def apply(
    checkpoint: Checkpoint,
    decided: Plan,
    out: Path,
    verify: bool,
    run: Run,
    report: Reporter | None,
    statistics: Statistics | None,
    work: WorkDirectory | None,
    int8: Int8 | None = None,
) -> None:
    """Write the pruned checkpoint.

    Args:
        checkpoint: The dense model.
        decided: What is kept.
        out: The new directory.
        verify: Whether to compare what was written with the masked dense model.
        run: How the model is run, and the memory that may be held.
        report: Told of progress.
        statistics: What the plan was made from; needed if it refits weights.
        work: Where it is noted what is being written, so that shards that were finished before a
            stop are not written again.
        int8: Rounds the experts' weights; then all shards are written in one go.
    """
    weights = None if int8 is None else "int8"
    if output.is_finished(work, out, decided, weights):
        return
    output.note(work, out, decided, weights)
    goes_on = work is not None and int8 is None
    progress = report("write", checkpoint.bytes, "bytes") if report else None
    bound = run.execution.memory
    if bound is not None:
        memory.return_freed()
    # Otherwise verification holds a whole model in float32, on the CPU whatever device calibrated.
    is_layerwise = (
        run.execution.is_streamed(Group.from_environment(), checkpoint)
        or 4 * checkpoint.parameters > moments.available_bytes()
    )
    if decided.experts is not None:
        rebuild = dern.rebuilder(checkpoint, decided, statistics)
        dropping.apply(
            checkpoint,
            decided,
            out,
            rebuild,
            verify,
            is_layerwise,
            goes_on,
            bound,
            progress,
        )
        return
    refit = None if decided.repair is None else Refitting(checkpoint, decided, statistics)
    change = rounding.change_of(checkpoint, refit, int8 is not None) if verify else None
    check = functools.partial(equivalence.check, checkpoint, decided, change) if verify else None
    if verify and is_layerwise:
        seen = report("verify", checkpoint.bytes, "bytes") if report else None
        check = functools.partial(verification.verify, checkpoint, decided, change, seen)
    pruning.apply(checkpoint, decided, out, check, goes_on, bound, progress, refit, int8)
