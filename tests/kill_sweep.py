# SPDX-License-Identifier: Apache-2.0
"""Kills `tenp prune` at random moments of each of its stages, and repeats the command.

Every time the output must be the one of a run that was left alone, byte for byte, with nothing beside
it. The table of docs/streaming.md is what this prints.

    python tests/kill_sweep.py --kills 30
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from support.fixtures import files_of, write_text
from support.kills import STAGES, run_and_kill
from support.tiny_models import save_model

#: What is killed, beside the model and the text.
COMMANDS = {
    "whole layers": ["--stream", "layers", "--offload", "disk"],
    "experts one by one, refitted": ["--stream", "experts", "--repair", "ls"],
    "layer after layer, against the dense model": [
        *("--sequential", "--repair", "ls", "--against-dense")
    ],
    "fewer experts": ["--stream", "experts", "--method", "drop"],
}

#: A stage may be over sooner than it was in the run that was left alone; then another moment is tried.
_ATTEMPTS = 20


@dataclass(frozen=True)
class Kill:
    """One kill, and what the same command then made of it.

    Attributes:
        stage: In which the run died.
        seconds: Into the stage.
        had_output: Whether the output was there already.
        wrong: What differs from a run that was left alone; empty if nothing does.
    """

    stage: str
    seconds: float
    had_output: bool
    wrong: str


def sweep(
    prune: Sequence[object], directory: Path, kills: int, chance: random.Random
) -> Iterator[Kill]:
    """Kill a command so many times in each stage, and repeat it every time.

    Args:
        prune: `tenp prune` without --work-dir and --out.
        directory: For both of these; empty.
        kills: Per stage.
        chance: Chooses the moments.
    """
    work, out, said = (directory / name for name in ("work", "out", "stderr"))
    command = [*prune, "--work-dir", work, "--out", out]
    alone = run_and_kill(command, errors=said)
    if alone.code != 0:
        raise RuntimeError(f"the command must succeed: {said.read_text()}")
    expected = files_of(directory)
    for stage in STAGES:
        for _ in range(kills):
            seconds = alone.seconds[stage] * chance.random()
            for _ in range(_ATTEMPTS):
                _clear(directory)
                killed = run_and_kill(command, stage, seconds)
                if killed.code == -signal.SIGKILL and killed.stage == stage:
                    break
                seconds *= chance.random()
            else:
                raise RuntimeError(f"{stage} is over too soon to be hit")
            had_output = out.exists()
            again = run_and_kill(command, errors=said)
            wrong = said.read_text() if again.code != 0 else _difference(directory, expected)
            yield Kill(stage, seconds, had_output, wrong)


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _difference(directory: Path, expected: dict[str, bytes]) -> str:
    """Name the files that are more, fewer or others, the hidden ones included."""
    found = files_of(directory)
    names = {name for name in found.keys() | expected if found.get(name) != expected.get(name)}
    # A lock holds the number of the process.
    return ", ".join(sorted(name for name in names if Path(name).name != "lock"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Prove what docs/streaming.md says of kills.")
    parser.add_argument("--kills", type=int, default=30, help="per stage, all commands together")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    done: dict[str, list[Kill]] = {stage: [] for stage in STAGES}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model = save_model(root / "model", with_tokenizer=True)
        text = write_text(root / "text.jsonl")
        prune = ["prune", model, "--calibration", text, "--keep", 0.5, "--batch-tokens", 300]
        for number, (name, more) in enumerate(COMMANDS.items()):
            directory = root / f"run-{number}"
            directory.mkdir()
            share = range(number, options.kills, len(COMMANDS))
            for kill in sweep([*prune, *more, "--quiet"], directory, len(share), chance):
                done[kill.stage].append(kill)
                outcome = kill.wrong or "the same bytes"
                print(f"{name}: {kill.stage}, {kill.seconds:.4f} s: {outcome}", flush=True)
    print(
        "\n| killed while | kills | with the output there already | finished with the same bytes |"
    )
    print("|---|---|---|---|")
    for stage, kills in done.items():
        there, same = sum(k.had_output for k in kills), sum(not k.wrong for k in kills)
        print(f"| {stage} | {len(kills)} | {there} | {same} |")
    if any(kill.wrong for kills in done.values() for kill in kills):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
