# SPDX-License-Identifier: Apache-2.0
"""What gpu_suite.py has found, and how it is written down."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Suite:
    """What was found so far, and how much time is left."""

    seconds: float
    rehearse: bool
    begin: float = field(default_factory=time.monotonic)
    machine: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def left(self) -> float:
        """Seconds until the suite has to end."""
        return self.seconds - (time.monotonic() - self.begin)

    def check(self, name: str, passed: bool, detail: str = "") -> None:
        """Record a check."""
        print(f"{'ok  ' if passed else 'FAIL'} {name} {detail}".rstrip(), flush=True)
        self.checks.append({"name": name, "passed": passed, "detail": detail})

    def skip(self, what: str) -> None:
        """Record what was not done."""
        print(f"skip {what}", flush=True)
        self.skipped.append(what)

    def passed(self) -> bool:
        """Whether something was checked and nothing failed."""
        return bool(self.checks) and all(check["passed"] for check in self.checks)

    def summary(self) -> str:
        """How many checks passed, which failed, what was not done."""
        failed = [check["name"] for check in self.checks if not check["passed"]]
        lines = [f"{len(self.checks) - len(failed)} of {len(self.checks)} checks passed"]
        lines += [f"FAILED: {name}" for name in failed]
        lines += [f"not done: {what}" for what in self.skipped] or ["nothing was left out"]
        return "\n".join(lines)


def describe_machine(suite: Suite) -> None:
    """GPU, driver, versions, commit."""
    import torch

    suite.machine = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(_ROOT), "rev-parse", "HEAD"),
        "nvcc": _output("nvcc", "--version").splitlines()[-1:],
        "driver and clocks": _output(
            "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv"
        ),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


#: Heading of a column and the name of its number in a record.
_COLUMNS = {
    "op": "op",
    "shape": "shape",
    "kept": "kept",
    "tokens": "tokens",
    "us": "us",
    "p10": "p10_us",
    "p90": "p90_us",
    "TFLOP/s": "TFLOP/s",
    "of mma": "of mma",
    "GB/s": "GB/s",
    "of read": "of read",
    "x expert_gemm": "x expert_gemm",
}


def line(record: dict[str, Any]) -> str:
    """A row of the timing table."""
    return "| " + " | ".join(_cells(record)) + " |"


def _cells(record: dict[str, Any]) -> Iterator[str]:
    for name in _COLUMNS.values():
        value = record.get(name, "")
        if isinstance(value, float):
            yield f"{value:.0%}" if name in ("kept", "of mma", "of read") else f"{value:.1f}"
        else:
            yield str(value)


def write(suite: Suite, output: Path) -> None:
    """suite.json and suite.md."""
    output.mkdir(parents=True, exist_ok=True)
    names = ("machine", "checks", "timings", "skipped")
    record = {name: getattr(suite, name) for name in names}
    (output / "suite.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [f"# CUDA kernels on {suite.machine['gpu']}", ""]
    lines += [f"- {key}: {value}" for key, value in suite.machine.items()]
    lines += ["", "## Checks", ""]
    for check in suite.checks:
        lines.append(
            f"- {'passed' if check['passed'] else 'FAILED'}: {check['name']} {check['detail']}"
        )
    lines += ["", "## Not done", "", *([f"- {what}" for what in suite.skipped] or ["- nothing"])]
    lines += ["", "## Timings", ""]
    lines += [
        "GB/s of expert_gemm are bytes of the weights that the rows need; `of mma` and `of read` are shares",
        "of what gpu_ceilings.cu reaches.",
        "",
    ]
    lines += ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    lines += [line(record) for record in suite.timings]
    (output / "suite.md").write_text("\n".join(lines) + "\n")
