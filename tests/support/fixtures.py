# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the Python tests: one tiny model taken through all stages, and the command line."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.tiny_models import make_samples, save_model
from tenp import adapter, calibration, pipeline, planning, pruning, scoring
from tenp.checkpoint import Checkpoint
from tenp.cli import main
from tenp.plan import Plan
from tenp.planning import Budget
from tenp.samples import Samples
from tenp.scores import Scores
from tenp.source import Source
from tenp.statistics import Statistics

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Tiny:
    """A tiny Qwen2-MoE with a tokenizer, and what every stage makes of it. Not to be changed."""

    directory: Path
    checkpoint: Checkpoint
    source: Source
    samples: list[Samples]
    statistics: Statistics
    scores: Scores
    plan: Plan  # has experts of width 0
    pruned: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    checkpoint = Checkpoint(save_model(root / "dense", with_tokenizer=True))
    source = pruning.source_of(checkpoint)
    samples = [make_samples("prose", seed=0), make_samples("code", seed=1)]
    statistics = calibration.collect(
        adapter.load_model(checkpoint.directory), samples, source, batch_tokens=100
    )
    scores = scoring.score(statistics)
    plan = planning.plan(scores, statistics, Budget(0.5, alpha=0.4, width_multiple=1))
    for keep in plan.keep.values():
        keep[1] = False
    pipeline.apply(checkpoint, plan, root / "pruned")
    return Tiny(
        checkpoint.directory,
        checkpoint,
        source,
        samples,
        statistics,
        scores,
        plan,
        root / "pruned",
    )


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Parse what it printed, by the strict standard: no NaN."""
        return json.loads(self.out, parse_constant=pytest.fail)


Command = Callable[..., Result]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Call `tenp` with arguments, in this process."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["tenp", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
            sys.exit(0)
        code = exit_.value.code
        captured = capsys.readouterr()
        return Result(code if isinstance(code, int) else 1, captured.out, captured.err)

    return run


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Some calibration text: enough for every expert of the tiny model to see tokens."""
    return write_text(tmp_path / "text.jsonl")


def write_text(path: Path) -> Path:
    """Write the lines of `text_file`, and return the path."""
    lines = (f"line {number}: " + "abcdefghij"[number % 10] * 3 for number in range(40))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def files_of(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory, hidden ones too, by relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b"directory"
        for path in sorted(directory.rglob("*"))
    }


def of_other_text(statistics: Statistics) -> Statistics:
    """The same sums, as if they came from other samples: two equal runs do not merge."""
    domains = tuple(
        dataclasses.replace(domain, sources=tuple(source[::-1] for source in domain.sources))
        for domain in statistics.domains
    )
    return dataclasses.replace(statistics, domains=domains)
