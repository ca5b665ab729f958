# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu_suite.py, rehearsed: what it does where there is no GPU, and what it says of the rest."""

import sys
from pathlib import Path

import pytest

_BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_a_rehearsal_passes_and_names_what_it_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(_BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--rehearse", "--output", str(tmp_path)])
    import gpu_suite

    assert gpu_suite.main() == 0
    *_, summary = capsys.readouterr().out.partition("checks passed\n")
    left_out = {line.partition(": ")[2].partition(":")[0] for line in summary.splitlines()}
    assert {"build", "op tests", "compute-sanitizer", "graphs"} <= left_out
    assert list(tmp_path.iterdir()) == []
