# SPDX-License-Identifier: Apache-2.0
"""`python -m tenp.lm_eval` scores pruned checkpoints."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from support.fixtures import Tiny
from tenp import lm_eval
from tenp.checkpoint import Checkpoint
from tenp.pruning import export_padded

TASKS = Path(__file__).parent / "lm_eval_tasks"


def test_a_pruned_model_scores_as_its_padded_export_does(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    export_padded(Checkpoint(tiny.pruned), tmp_path / "padded")

    def table(directory: Path) -> list[str]:
        arguments = [
            *("--model", "hf", "--model_args", f"pretrained={directory},dtype=float32"),
            *("--include_path", TASKS, "--tasks", "tenp_choice,tenp_perplexity"),
            *("--device", "cpu", "--batch_size", "8"),
        ]
        monkeypatch.setattr(sys, "argv", ["lm_eval", *map(str, arguments)])
        lm_eval.main()
        return [line for line in capsys.readouterr().out.split("\n") if line.startswith("|")]

    pruned = table(tiny.pruned)
    assert pruned == table(tmp_path / "padded")
    assert any("byte_perplexity" in line for line in pruned)


def test_without_lm_eval_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        lm_eval.main()
    assert exit_.value.code == 2
    assert "pip install 'tenp[eval]'" in capsys.readouterr().err
