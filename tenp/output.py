# SPDX-License-Identifier: Apache-2.0
"""What a work directory remembers of the output, so that a stopped run neither repeats nor mixes it."""

from __future__ import annotations

from pathlib import Path

from tenp import pruning
from tenp.files import require_absent
from tenp.plan import Plan
from tenp.workdir import WorkDirectory


def was_begun(work: WorkDirectory | None, out: Path) -> bool:
    """Whether an earlier run with this work directory was going to write `out`."""
    kept = work.read_note("output") if work is not None else None
    return kept is not None and kept["path"] == str(out.resolve())


def is_finished(work: WorkDirectory | None, out: Path, decided: Plan) -> bool:
    """Whether an earlier run had written all of `out` and was stopped after that.

    Raises:
        CheckpointError: `out` is there, but is of another plan.
    """
    if not out.exists():
        return False
    kept = work.read_note("output") if work is not None else None
    if kept is None or kept["plan"] != decided.digest():
        require_absent(out)
    return True


def note(work: WorkDirectory | None, out: Path, decided: Plan) -> None:
    """Remember what is going to be written where: an output appears whole, so it then is this."""
    if work is None:
        return
    before = work.read_note("output")
    if before is not None and before["plan"] != decided.digest():
        pruning.drop_partial(Path(before["path"]), before["plan"])
    work.write_note("output", {"path": str(out.resolve()), "plan": decided.digest()})
