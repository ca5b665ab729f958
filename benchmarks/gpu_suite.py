# SPDX-License-Identifier: Apache-2.0
"""Everything that is to be known about the CUDA kernels on one GPU, in one command.

    python benchmarks/gpu_suite.py --output benchmarks/results/<gpu>

Builds the library for this GPU, runs the op tests on it, compute-sanitizer on tiny layers, checks that
results do not depend on the grid, on the run or on graph capture, then times. Writes suite.json and
suite.md; both name what was skipped and why. Needs nvcc, cmake, ninja, pybind11, pytest and torch with
CUDA; no network. Stays below --seconds (480) by skipping what no longer fits.

--rehearse runs the same steps, without build and sanitizer, on the CPU and tiny layers, and writes
nothing: it shows that the script works, not how fast anything is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gpu_baselines

_ROOT = Path(__file__).resolve().parents[1]
_SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


@dataclass(frozen=True)
class LayerShape:
    """The routed experts of one layer of a published model."""

    name: str
    hidden_size: int
    width: int
    num_experts: int
    experts_per_token: int


LAYERS = (
    LayerShape("Qwen3-30B-A3B", 2048, 768, 128, 8),
    LayerShape("DeepSeek-V2-Lite", 2048, 1408, 64, 6),
)
TINY = LayerShape("tiny", 64, 48, 8, 2)
TOKENS = (1, 8, 32, 64, 128, 1024, 4096, 16384)
KEPT = (1.0, 0.6, 0.5)


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


# ---- in processes of their own ------------------------------------------------------------------


def build(suite: Suite, build_dir: Path) -> dict[str, str]:
    """Build for this GPU; return the environment in which `tenp` has the module just built."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    begin = time.monotonic()
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    for command in (
        [
            *("cmake", "-G", "Ninja", "-S", str(_ROOT), "-B", str(build_dir)),
            f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}-real",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DTENP_BUILD_CUDA=ON",
            "-DTENP_BUILD_PYTHON=ON",
            "-DTENP_BUILD_TESTS=OFF",
            f"-Dpybind11_DIR={pybind11}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ],
        ["cmake", "--build", str(build_dir)],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            sys.exit(f"{' '.join(command)}:\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}")
    suite.check("build", True, f"{time.monotonic() - begin:.0f} s for sm_{major}{minor}")

    # The package of the source tree with this module in it, wherever another one may be installed.
    package = build_dir / "package" / "tenp"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in (_ROOT / "tenp").iterdir():
        if not entry.name.startswith("_C.c") and entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    (module,) = build_dir.glob("_C.*.so")
    shutil.copy(module, package)
    return {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONSAFEPATH": "1"}


def run_op_tests(suite: Suite, environment: dict[str, str]) -> None:
    """Run the op tests on the GPU."""
    result = _run(
        suite,
        [
            *(sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"),
            str(_ROOT / "tests" / "ops"),
        ],
        environment,
        limit=240,
    )
    if result is None:
        suite.check("op tests", False, "did not end in time")
        return
    lines = result.stdout.strip().splitlines()
    suite.check("op tests", result.returncode == 0, lines[-1] if lines else "")
    if result.returncode != 0:
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
                *("--kernel-regex", "kns=tenp"),
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


# ---- one layer ----------------------------------------------------------------------------------


@dataclass
class Layer:
    """Random weights of one layer, and what calls its ops."""

    shape: LayerShape
    widths: list[int]
    device: str
    seed: int = 0

    def __post_init__(self) -> None:
        import torch

        from tenp import ops

        generator = torch.Generator(self.device).manual_seed(self.seed)

        def normal(*size: int) -> Any:
            values = torch.randn(*size, generator=generator, device=self.device)
            return values.to(torch.bfloat16)

        offsets = ops.neuron_offsets(self.widths)
        self.gate_up = normal(2 * offsets[-1], self.shape.hidden_size) / 45
        self.down = normal(offsets[-1], self.shape.hidden_size) / 28
        self.offsets = torch.tensor(offsets, dtype=torch.int32, device=self.device)
        self.width_tensor = torch.tensor(self.widths, dtype=torch.int32, device=self.device)
        self.normal = normal
        self.generator = generator

    def tokens(self, count: int) -> tuple[Any, Any, Any]:
        """x, expert ids (uniform, no duplicates) and gates."""
        import torch

        shape = (count, self.shape.num_experts)
        scores = torch.rand(shape, generator=self.generator, device=self.device)
        gates, ids = scores.topk(self.shape.experts_per_token)
        return self.normal(count, self.shape.hidden_size), ids.int(), gates / gates.sum(1)[:, None]

    def forward(self, hidden: Any, ids: Any, gates: Any) -> Any:
        """The op under test."""
        from tenp import ops

        return ops.expert_gemm(
            hidden,
            ids,
            gates,
            self.gate_up,
            self.down,
            self.width_tensor,
            self.offsets,
            max_width=max(self.widths),
        )

    def loop(self, hidden: Any, ids: Any, gates: Any) -> Any:
        """The same by torch, expert by expert."""
        import torch
        from torch.nn.functional import silu

        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        packed_rows = len(self.down)
        first = 0
        for expert, width in enumerate(self.widths):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            x = hidden[token]
            gate = self.gate_up[first : first + width]
            up = self.gate_up[packed_rows + first : packed_rows + first + width]
            y = (silu(x @ gate.T) * (x @ up.T)) @ self.down[first : first + width]
            out.index_add_(0, token, y.float() * gates[token, slot, None])
            first += (width + 15) // 16 * 16
        return out.to(hidden.dtype)

    def flops(self, ids: Any) -> float:
        """Floating-point operations of these rows, padding not counted."""
        rows = ids.flatten().bincount(minlength=len(self.widths)).tolist()
        each = 6 * self.shape.hidden_size
        return float(sum(each * r * w for r, w in zip(rows, self.widths, strict=True)))

    def active_bytes(self, ids: Any) -> float:
        """Bytes of the weights that these rows need."""
        each = 3 * self.shape.hidden_size * 2
        return float(sum(each * self.widths[expert] for expert in ids.unique().tolist()))


def ragged_widths(shape: LayerShape, kept: float) -> list[int]:
    """Widths that differ by expert, multiples of 16, `kept` of the full width in the mean."""
    if kept == 1:
        return [shape.width] * shape.num_experts
    spread = 0.5 * kept
    widths = []
    for expert in range(shape.num_experts):
        share = kept + spread * (
            2 * (expert * 37 % shape.num_experts) / (shape.num_experts - 1) - 1
        )
        widths.append(min(shape.width, max(16, round(shape.width * share / 16) * 16)))
    return widths


# ---- checks -------------------------------------------------------------------------------------


def check_bits(suite: Suite, device: str) -> None:
    """The same bits in 20 runs, for several grid sizes and in a captured graph."""
    import torch

    shape = TINY if suite.rehearse else LAYERS[0]
    layer = Layer(shape, ragged_widths(shape, 0.6), device)
    for count in (1, 64, 129) if suite.rehearse else (1, 64, 700):
        arguments = layer.tokens(count)
        expected = layer.forward(*arguments)
        runs = all(torch.equal(layer.forward(*arguments), expected) for _ in range(20))
        suite.check(f"20 runs give the same bits, {count} tokens", runs)
        for multiprocessors in ("1", "66", "132"):
            os.environ["TENP_CUDA_SMS"] = multiprocessors
            same = torch.equal(layer.forward(*arguments), expected)
            suite.check(f"{multiprocessors} multiprocessors give them, {count} tokens", same)
        del os.environ["TENP_CUDA_SMS"]
        by_torch = layer.loop(*arguments).float()
        error = float((expected.float() - by_torch).norm() / by_torch.norm())
        suite.check(f"near torch's loop, {count} tokens", error < 1e-2, f"{error:.2e}")
        if device == "cuda":
            replayed = _replay(layer, arguments)
            suite.check(f"a graph gives them, {count} tokens", torch.equal(replayed, expected))


def _replay(layer: Layer, arguments: tuple[Any, Any, Any]) -> Any:
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.forward(*arguments)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return out


def run_tiny(device: str) -> None:
    """Every kernel once, on layers small enough for compute-sanitizer."""
    import torch

    from tenp import ops

    for kept, counts in ((1.0, (70,)), (0.5, (1, 5, 90))):
        layer = Layer(TINY, ragged_widths(TINY, kept), device)
        for count in counts:
            hidden, ids, gates = layer.tokens(count)
            layer.forward(hidden, ids, gates)
    for call in calibration_calls(layer, 40).values():
        call()
    ops.tile_table(
        ops.route(ids, TINY.num_experts).offsets, layer.width_tensor, 64, 128, rows=ids.numel()
    )
    ops.route(torch.zeros(3000, 2, dtype=torch.int32, device=device), TINY.num_experts)
    if device == "cuda":
        torch.cuda.synchronize()


def calibration_calls(layer: Layer, count: int) -> dict[str, Callable[[], None]]:
    """What calibration does with one batch: both halves of its pass, and the second moments."""
    import torch

    from tenp import ops

    shape, device = layer.shape, layer.device
    hidden, ids, gates = layer.tokens(count)
    experts, width, size = shape.num_experts, shape.width, shape.hidden_size
    routing = ops.route(ids, experts)
    gate, up = (layer.normal(experts, 2 * width, size) / 45).chunk(2, dim=1)
    down = layer.normal(experts, size, width) / 28
    row_gates = gates.float().flatten()[routing.slots.long()]

    def zeros(*shape: int, dtype: Any = torch.float64) -> Any:
        return torch.zeros(shape, dtype=dtype, device=device)

    by_expert = ("gate_sum", "normalized_gate_sum", "norm_sum", "gated_norm_sum", "norm_max")
    sums = {
        "out": zeros(count, size, dtype=torch.float32),
        "counts": zeros(experts, dtype=torch.int64),
        "input_energy": zeros(experts, size),
        **{name: zeros(experts) for name in (*by_expert, "direction_change")},
        **{name: zeros(experts, width) for name in ("projection", "magnitude", "energy", "peak")},
    }
    second_moment = zeros(experts, width * (width + 1) // 2)

    def activations() -> Any:
        return ops.expert_activations(
            hidden, routing.offsets, routing.slots, gate, up, shape.experts_per_token
        )

    m = activations()

    def statistics() -> None:
        ops.expert_statistics(hidden, m, down, *routing, gates.float(), **sums)

    def moments() -> None:
        ops.accumulate_second_moment(m, row_gates, routing.offsets, second_moment=second_moment)

    return {
        "expert_activations": activations,
        "expert_statistics": statistics,
        "second_moment": moments,
    }


# ---- timing -------------------------------------------------------------------------------------


def time_calls(calls: list[Callable[[], Any]], device: str, samples: int = 30) -> dict[str, Any]:
    """Median, p10 and p90 of one call in microseconds; `calls` take turns, so caches stay cold."""
    import torch

    for call in calls:
        call()
    times = []
    for sample in range(samples):
        call = calls[sample % len(calls)]
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        else:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
    deciles = statistics.quantiles(times, n=10)
    median = statistics.median(times)
    return {"us": median, "p10_us": deciles[0], "p90_us": deciles[-1], "samples": samples}


def as_graph(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The call captured in a CUDA graph: what is timed is then the kernels, not Python."""
    import torch

    if device != "cuda":
        return call
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def time_ceilings(suite: Suite, device: str) -> None:
    """What this GPU copies and multiplies in a second, by torch."""
    import torch

    size = 1 << (12 if suite.rehearse else 30)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], device)
    suite.timings.append({"op": "copy", "GB/s": 2 * size / copy["us"] * 1e-3, **copy})
    n = 64 if suite.rehearse else 8192
    a = torch.randn(n, n, device=device).to(torch.bfloat16)
    product = time_calls([lambda: a @ a], device)
    suite.timings.append(
        {"op": "dense product", "TFLOP/s": 2 * n**3 / product["us"] * 1e-6, **product}
    )


def time_layers(suite: Suite, device: str) -> None:
    """expert_gemm for all shapes, tokens and widths, beside torch's loop."""
    shapes = (TINY,) if suite.rehearse else LAYERS
    tokens = (1, 70) if suite.rehearse else TOKENS
    for shape in shapes:
        for kept in KEPT:
            widths = ragged_widths(shape, kept)
            # Four copies of the weights take turns: more than any L2 cache holds.
            layers = [Layer(shape, widths, device, seed) for seed in range(4)]
            for count in tokens:
                name = f"{shape.name}, {kept:.0%} of the width, {count} tokens"
                if suite.left() < 40:
                    suite.skip(f"timing of {name}: no time left")
                    continue
                calls, inputs = [], []
                for layer in layers:
                    arguments = layer.tokens(count)
                    inputs.append(arguments)
                    calls.append(as_graph(partial(layer.forward, *arguments), device))
                flops = statistics.mean(layers[i].flops(inputs[i][1]) for i in range(4))
                active = statistics.mean(layers[i].active_bytes(inputs[i][1]) for i in range(4))
                timing = time_calls(calls, device)
                suite.timings.append(
                    {
                        "op": "expert_gemm",
                        "shape": shape.name,
                        "kept": kept,
                        "tokens": count,
                        "TFLOP/s": flops / timing["us"] * 1e-6,
                        "weights GB/s": active / timing["us"] * 1e-3,
                        **timing,
                    }
                )
                print(_line(suite.timings[-1]), flush=True)
                if count in (1, 64, 4096, 70) and kept in (1.0, 0.5):
                    about = {"shape": shape.name, "kept": kept, "tokens": count}
                    time_baselines(suite, layers[0], inputs[0], timing["us"], about)
            layers.clear()


def time_baselines(
    suite: Suite, layer: Layer, arguments: tuple[Any, Any, Any], own: float, about: dict[str, Any]
) -> None:
    """What else computes the same layer, one weight set, in the same process."""
    padded = gpu_baselines.padded_weights(
        layer.gate_up, layer.down, layer.widths, layer.offsets.tolist()
    )
    found: dict[str, Callable[[], Any] | str] = {"torch loop": partial(layer.loop, *arguments)}
    found |= gpu_baselines.baselines(*arguments, *padded)
    expected = layer.forward(*arguments).float()
    for name, call in found.items():
        if isinstance(call, str):
            suite.skip(f"{name}: {call}")
            continue
        error = float((call().float() - expected).norm() / expected.norm())
        suite.check(f"{name} agrees, {about['tokens']} tokens", error < 2e-2, f"{error:.2e}")
        timing = time_calls([call], layer.device, samples=10)
        record = {"op": name, **about, "x expert_gemm": timing["us"] / own, **timing}
        suite.timings.append(record)
        print(_line(record), flush=True)


def time_calibration(suite: Suite, device: str) -> None:
    """A batch of calibration; expert_gemm of the same table is the plain forward pass."""
    shape = TINY if suite.rehearse else LAYERS[0]
    count = 40 if suite.rehearse else 16384
    layer = Layer(shape, ragged_widths(shape, 1.0), device)
    for name, call in calibration_calls(layer, count).items():
        timing = time_calls([call], device, samples=10)
        suite.timings.append({"op": name, "shape": shape.name, "tokens": count, **timing})


# ---- results ------------------------------------------------------------------------------------


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


def _line(record: dict[str, Any]) -> str:
    return "| " + " | ".join(_cells(record)) + " |"


def _cells(record: dict[str, Any]) -> Iterator[str]:
    for key in (
        "op",
        "shape",
        "kept",
        "tokens",
        "us",
        "p10_us",
        "p90_us",
        "TFLOP/s",
        "weights GB/s",
        "x expert_gemm",
    ):
        value = record.get(key, "")
        yield f"{value:.1f}" if isinstance(value, float) and key != "kept" else str(value)


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
    lines.append(
        "| op | shape | kept | tokens | us | p10 | p90 | TFLOP/s | weights GB/s | x expert_gemm |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    lines += [_line(record) for record in suite.timings]
    (output / "suite.md").write_text("\n".join(lines) + "\n")


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
    if arguments.rehearse or arguments.measure:
        run_tiny(device)
        check_bits(suite, device)
        time_ceilings(suite, device)
        time_calibration(suite, device)
        time_layers(suite, device)
    else:
        environment = build(suite, arguments.build_dir)
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
    return 0 if all(check["passed"] for check in suite.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
