# SPDX-License-Identifier: Apache-2.0
"""The report is one page with everything in it."""

import re
import sys
from pathlib import Path

import pytest
import torch

from support.fixtures import Command, Tiny, of_other_text
from tenp import adapter, report
from tenp.errors import DataError

pytest.importorskip("matplotlib")


def _row(method: str, share: float, kl: float, samples: int) -> dict[str, object]:
    domains = {"prose": {"kl": kl, "perplexity": 2.0, "agreement": 1.0, "tokens": 5}}
    return {"method": method, "share": share, "seed": 0, "samples": samples, "domains": domains}


def test_the_page_needs_no_other_file(
    tiny: Tiny, tmp_path: Path, command: Command, text_file: Path
) -> None:
    tiny.statistics.save(tmp_path / "statistics.safetensors")
    result = command(
        *("report", tiny.pruned, "--out", tmp_path / "report"),
        *("--statistics", tmp_path / "statistics.safetensors", "--data", text_file),
    )
    assert result.code == 0, result.err
    page = (tmp_path / "report" / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 3
    for name in ("widths", "frequency", "coverage"):
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for fact in (tiny.source.fingerprint, tiny.plan.statistics, "Provenance"):
        assert fact in page


def test_mistakes_are_found_before_the_model_is_run(
    tiny: Tiny, tmp_path: Path, command: Command, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr(report, "selection_counts", must_not_run)
    (tmp_path / "other.json").write_text("[]")
    of_other_text(tiny.statistics).save(tmp_path / "other.safetensors")
    arguments = ("report", tiny.pruned, "--out", tmp_path / "report", "--data", text_file)
    for option, file, message in (
        ("--statistics", "other.safetensors", "must be the statistics of the plan, "),
        ("--results", "other.json", "must be a file of benchmarks/quality.py"),
    ):
        result = command(*arguments, option, tmp_path / file)
        assert result.code == 2
        assert message in result.err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "a report needs matplotlib" in command(*arguments).err
    assert not (tmp_path / "report").exists()


def test_results_become_figures(tiny: Tiny) -> None:
    rows = [_row("TENP", s, 1 - s + 1 / n, n) for s in (0.6, 0.3) for n in (8, 16)]
    names = [figure.name for figure in report.figures(tiny.plan, results=rows)]
    assert names == ["widths", "calibration", "quality"]


def test_another_json_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(DataError, match="benchmarks/quality.py"):
        report.read_results(tmp_path / "other.json")


def test_every_token_chooses_k_experts(tiny: Tiny) -> None:
    counts = report.selection_counts(adapter.load_model(tiny.pruned), tiny.samples)
    tokens = sum(domain.tokens() for domain in tiny.samples)
    assert {int(c.sum()) for c in counts.values()} == {2 * tokens}
    dense = report.selection_counts(adapter.load_model(tiny.directory), tiny.samples)
    for layer, sums in tiny.statistics.layers.items():
        assert torch.equal(dense[layer], sums["counts"].sum(dim=0))
