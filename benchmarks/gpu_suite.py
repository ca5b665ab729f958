# SPDX-License-Identifier: Apache-2.0
"""Everything that is to be known about the CUDA kernels on one GPU, in one command.

    python benchmarks/gpu_suite.py --output benchmarks/results/<gpu>

Builds the library for this GPU, runs the op tests on it, `tenp prune` and `tenp evaluate` on both devices,
compute-sanitizer on tiny layers, checks that results do not depend on the grid, on the run or on graph
capture, then times. Writes suite.json and suite.md; both name what was skipped and why. Needs nvcc, what
pyproject.toml has for building and running, pytest and torch with CUDA; no network. Stays below --seconds (480) by
skipping what no longer fits.

--rehearse runs what needs no GPU, on the CPU and tiny layers, and writes nothing: it shows that the
script works, not how fast anything is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_timing
from gpu_layers import LAYERS, TINY, Calibration, Layer, ragged_widths, run_tiny
from gpu_report import Suite, describe_machine, write

_ROOT = Path(__file__).resolve().parents[1]
_SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


# ---- in processes of their own ------------------------------------------------------------------


def build(suite: Suite, target: Path) -> dict[str, str]:
    """Install for this GPU into `target`; return the environment in which that is `tenp`."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    begin = time.monotonic()
    install(target, f"{major}{minor}")
    suite.check("build", True, f"{time.monotonic() - begin:.0f} s for sm_{major}{minor}")
    return environment_of(target)


def install(target: Path, architecture: str) -> None:
    """Run pip for the kernels of one architecture; needs no network."""
    shutil.rmtree(target, ignore_errors=True)
    command = [
        *(
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-build-isolation",
            "--no-deps",
            "--no-index",
        ),
        *("--target", str(target), str(_ROOT)),
    ]
    arguments = f"-DTENP_BUILD_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES={architecture}-real"
    result = subprocess.run(
        command, env={**os.environ, "CMAKE_ARGS": arguments}, capture_output=True, text=True
    )
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}:\n{result.stdout[-8000:]}\n{result.stderr[-4000:]}")


def environment_of(target: Path) -> dict[str, str]:
    """The environment of programs that import `tenp` from there, and this suite's own modules."""
    # Safe path: from where a program is started, nothing is imported.
    path = os.pathsep.join([str(target), str(Path(__file__).parent)])
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def run_op_tests(suite: Suite, environment: dict[str, str]) -> None:
    """Run the op tests on the GPU, and `tenp prune` and `tenp evaluate` against the CPU."""
    result = _run(
        suite,
        [
            *(sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider"),
            str(_ROOT / "tests" / "ops"),
            str(_ROOT / "tests" / "emulation" / "end_to_end.py"),
        ],
        environment,
        limit=240,
    )
    if result is None:
        suite.check("op tests", False, "did not end in time")
        return
    lines = result.stdout.strip().splitlines()
    # All tests skipped is no failure of pytest's.
    passed = result.returncode == 0 and " passed" in lines[-1]
    suite.check("op tests", passed, lines[-1] if lines else "")
    if not passed:
        print(result.stdout[-6000:], result.stderr[-2000:])


def run_sanitizers(suite: Suite, environment: dict[str, str]) -> None:
    """Run the ops on tiny layers under each tool of compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        suite.skip("compute-sanitizer: not on the PATH")
        return
    for tool in _SANITIZER_TOOLS:
        if suite.left() < 150:
            suite.skip(f"compute-sanitizer {tool}: no time left")
            continue
        result = _run(
            suite,
            [
                *(sanitizer, "--tool", tool, "--error-exitcode", "7"),
                # What other kernels write is initialized, too: initcheck watches them all.
                *([] if tool == "initcheck" else ["--kernel-name", "kns=tenp"]),
                *(sys.executable, str(Path(__file__)), "--tiny"),
            ],
            # Arrays of their own allocation, so that memcheck sees where each ends.
            {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            limit=75,
        )
        if result is None:
            suite.skip(f"compute-sanitizer {tool}: did not end within 75 s")
            continue
        lines = [line for line in result.stdout.splitlines() if "ERROR SUMMARY" in line]
        suite.check(f"compute-sanitizer {tool}", result.returncode == 0, " ".join(lines))
        if result.returncode != 0:
            print(result.stdout[-3000:], result.stderr[-1000:])


def _run(
    suite: Suite, command: list[str], environment: dict[str, str], limit: float
) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            command,
            env=environment,
            cwd=_ROOT / "benchmarks",
            capture_output=True,
            text=True,
            timeout=max(1, min(limit, suite.left())),
        )
    except subprocess.TimeoutExpired:
        return None


# ---- in this one --------------------------------------------------------------------------------


def check_bits(suite: Suite, device: str) -> None:
    """The same bits in 20 runs, for several grid sizes and in a captured graph."""
    import torch

    shape = TINY if suite.rehearse else LAYERS[0]
    grids = ("1", "66", "132")
    layer = Layer(shape, ragged_widths(shape, 0.6), device)
    for count in (1, 64, 129) if suite.rehearse else (1, 64, 700):
        arguments = layer.tokens(count)
        expected = layer.forward(*arguments)
        runs = all(torch.equal(layer.forward(*arguments), expected) for _ in range(20))
        suite.check(f"20 runs give the same bits, {count} tokens", runs)
        for grid in grids:
            with _multiprocessors(grid):
                same = torch.equal(layer.forward(*arguments), expected)
            suite.check(f"{grid} multiprocessors give them, {count} tokens", same)
        by_torch = layer.loop(*arguments).float()
        error = float((expected.float() - by_torch).norm() / by_torch.norm())
        suite.check(f"near torch's loop, {count} tokens", error < 1e-2, f"{error:.2e}")
        if device == "cuda":
            replayed = _replay(layer, arguments)
            suite.check(f"a graph gives them, {count} tokens", torch.equal(replayed, expected))
    batch = Calibration(layer, 70 if suite.rehearse else 2000)
    sums = batch.bits()
    for grid in (None, *grids):
        with _multiprocessors(grid):
            same = all(map(torch.equal, batch.bits(), sums))
        run = "another run" if grid is None else f"{grid} multiprocessors"
        suite.check(f"{run} of calibration gives the same bits", same)


@contextmanager
def _multiprocessors(count: str | None) -> Iterator[None]:
    if count is None:
        yield
        return
    os.environ["TENP_CUDA_SMS"] = count
    yield
    del os.environ["TENP_CUDA_SMS"]


def _replay(layer: Layer, arguments: tuple[Any, Any, Any]) -> Any:
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.forward(*arguments)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return out


def main() -> int:
    """Run what the arguments ask for; 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=_ROOT / "build" / "gpu_suite")
    parser.add_argument("--build-dir", type=Path, default=_ROOT / "build" / "gpu")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="what compute-sanitizer watches")
    parser.add_argument("--measure", action="store_true", help="checks and timings, nothing built")
    arguments = parser.parse_args()
    import torch

    device = "cpu" if arguments.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was run and nothing is known")
        return 2
    if arguments.tiny:
        run_tiny(device)
        return 0

    suite = Suite(arguments.seconds, arguments.rehearse)
    describe_machine(suite)
    if arguments.rehearse:
        print("the CPU backend takes the place of the kernels: nothing below is about a GPU")
        for step in ("build", "op tests", "compute-sanitizer", "graphs"):
            suite.skip(f"{step}: a rehearsal has no GPU")
    if arguments.rehearse or arguments.measure:
        run_tiny(device)
        check_bits(suite, device)
        ceilings = gpu_timing.time_ceilings(suite, device)
        gpu_timing.time_calibration(suite, device)
        gpu_timing.time_layers(suite, device, ceilings)
    else:
        environment = build(suite, arguments.build_dir.resolve())
        run_op_tests(suite, environment)
        run_sanitizers(suite, environment)
        # In a process of its own, which imports the package just built.
        measured = arguments.output / "measured"
        command = [sys.executable, str(Path(__file__)), "--measure", "--output", str(measured)]
        left = max(60, suite.left() - 10)
        result = subprocess.run([*command, "--seconds", str(left)], env=environment)
        path = measured / "suite.json"
        if path.exists():
            record = json.loads(path.read_text())
            suite.checks += record["checks"]
            suite.timings += record["timings"]
            suite.skipped += record["skipped"]
            shutil.rmtree(measured)
        else:
            suite.check("timing", False, f"ended with status {result.returncode}")
    if not arguments.rehearse:
        write(suite, arguments.output)
    if not arguments.measure:
        print(suite.summary())
    return 0 if suite.passed() else 1


if __name__ == "__main__":
    sys.exit(main())
