# SPDX-License-Identifier: Apache-2.0
"""What stays of a run whose output could not be written, so that it neither repeats nor mixes anything."""

from __future__ import annotations

from pathlib import Path

from tenp import pruning
from tenp.errors import CheckpointError, TenpError
from tenp.files import require_absent
from tenp.plan import Plan
from tenp.statistics import Statistics
from tenp.workdir import WorkDirectory


def was_begun(work: WorkDirectory | None, out: Path) -> bool:
    """Whether an earlier run with this work directory was going to write `out`."""
    kept = work.read_note("output") if work is not None else None
    return kept is not None and kept["path"] == str(out.resolve())


def is_finished(work: WorkDirectory | None, out: Path, decided: Plan, weights: str | None) -> bool:
    """Whether an earlier run had written all of `out` and was stopped after that.

    Raises:
        CheckpointError: `out` is there, but is of another plan.
    """
    if not out.exists():
        return False
    kept = work.read_note("output") if work is not None else None
    if kept is None or kept != _note(out, decided, weights):
        require_absent(out)
    return True


def note(work: WorkDirectory | None, out: Path, decided: Plan, weights: str | None) -> None:
    """Remember what is going to be written where: an output appears whole, so it then is this."""
    if work is None:
        return
    before = work.read_note("output")
    if before is not None and before["plan"] != decided.digest():
        pruning.drop_partial(Path(before["path"]), before["plan"])
    work.write_note("output", _note(out, decided, weights))


def _note(out: Path, decided: Plan, weights: str | None) -> dict[str, str]:
    return {
        "path": str(out.resolve()),
        "plan": decided.digest(),
        "weights": weights or "keep",
    }


def keep_statistics(statistics: Statistics, out: Path, error: TenpError) -> TenpError:
    """Keep the statistics of a run without a work directory, and return the error that names them.

    Args:
        statistics: They cost hours, and serve every plan.
        out: The output that was not written; the file lies beside where it would be.
        error: Why. It is returned as it is if the file cannot be written either.
    """
    path = out.with_name(f"{out.name}-{statistics.digest()[:12]}.safetensors")
    try:
        statistics.save(path)
    except CheckpointError:
        return error
    return type(error)(f"{error}; the statistics are kept in {path}, for tenp plan and tenp apply")
