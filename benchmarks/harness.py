# SPDX-License-Identifier: Apache-2.0
"""Compares implementations in one process and reports ratios with their spread.

Every round calls each provider once, in turn, and divides its time by the baseline's of the same
round, so a machine that slows down slows both. Results are checked before anything is timed. On a
CPU only ratios are reported: absolute times of a shared machine mean nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import tenp
from tenp import ops

#: A decile of fewer says nothing.
_FEWEST_ROUNDS = 5


def compare(
    case: Mapping[str, Any],
    providers: Mapping[str, Callable[[], Any]],
    baseline: str,
    rounds: int = 30,
    warmup: int = 3,
    seconds_at_most: float = math.inf,
) -> list[dict[str, Any]]:
    """Time providers against one of them.

    Args:
        case: What is being measured, copied into the result.
        providers: Name to a function that does the whole work once.
        baseline: The provider whose time is 1.
        rounds: Timed rounds.
        warmup: Rounds before them.
        seconds_at_most: Stop after so much time, but not before 5 timed rounds.

    Returns:
        One record a provider: median, 10th and 90th percentile of time over the baseline's.
    """
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    begin_of_all = time.monotonic()
    for round_number in range(warmup + rounds):
        is_late = time.monotonic() - begin_of_all > seconds_at_most
        if is_late and round_number >= warmup + _FEWEST_ROUNDS:
            break
        for name, run in providers.items():
            begin = time.perf_counter_ns()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_number >= warmup:
                seconds[name].append((time.perf_counter_ns() - begin) * 1e-9)
    records = []
    for name, times in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(times, seconds[baseline], strict=True)]
        deciles = statistics.quantiles(ratios, n=10)
        record = {
            **case,
            "provider": name,
            "baseline": baseline,
            "ratio": statistics.median(ratios),
            "p10": deciles[0],
            "p90": deciles[-1],
            "rounds": len(ratios),
        }
        records.append(record)
        axes = " ".join(f"{key}={value}" for key, value in case.items())
        print(
            f"{axes:<60} {name:<24} {record['ratio']:6.2f} x {baseline}  ({deciles[0]:.2f}-{deciles[-1]:.2f})",
            flush=True,
        )
    return records


def machine() -> dict[str, Any]:
    """Describe where and with what the numbers were taken."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {
        "cpu": cpu,
        "isa": tenp._C.cpu_isa(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": {"tenp": ops.num_threads(), "torch": torch.get_num_threads()},
        "versions": {
            name: importlib.metadata.version(name) for name in ("tenp", "torch", "transformers")
        },
        "commit": commit,
    }


def save(path: Path, records: list[dict[str, Any]]) -> None:
    """Write the machine and then every record as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(entry) for entry in ({"machine": machine()}, *records)]
    path.write_text("\n".join(lines) + "\n")
