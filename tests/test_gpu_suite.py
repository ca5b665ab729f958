# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu_suite.py, rehearsed: what it does where there is no GPU, and what it says of the rest."""

import subprocess
import sys
from pathlib import Path

import pytest

_BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_programs_of_the_suite_find_its_modules_and_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(_BENCHMARKS))
    import gpu_suite

    environment = gpu_suite.environment_of(_BENCHMARKS.parent)
    command = [sys.executable, str(_BENCHMARKS / "gpu_suite.py"), "--measure"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (2, "")
    assert run.stdout.startswith("no GPU here")


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
