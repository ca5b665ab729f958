# SPDX-License-Identifier: Apache-2.0
"""The timing table of gpu_suite.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gpu_baselines
import gpu_ceilings
from gpu_layers import LAYERS, TINY, Calibration, Layer, ragged_widths
from gpu_report import Suite, line

TOKENS = (1, 8, 32, 64, 128, 1024, 4096, 16384)
KEPT = (1.0, 0.6, 0.5)


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


@dataclass(frozen=True)
class Ceilings:
    """What this GPU does at most, where it is known."""

    flops: float | None = None
    """A second, of `mma.sync` in bfloat16."""
    bytes: float | None = None
    """A second, read."""

    def shares(self, flops: float, num_bytes: float, us: float) -> dict[str, float]:
        """Rates of a call that took `us`, and how much of the ceilings they are."""
        rates = {"TFLOP/s": flops / us * 1e-6, "GB/s": num_bytes / us * 1e-3}
        if self.flops is not None and self.bytes is not None:
            rates["of mma"] = flops / us * 1e6 / self.flops
            rates["of read"] = num_bytes / us * 1e6 / self.bytes
        return rates


def time_ceilings(suite: Suite, device: str) -> Ceilings:
    """What this GPU copies, reads and multiplies in a second."""
    import torch

    size = 1 << (12 if suite.rehearse else 30)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], device)
    suite.timings.append({"op": "torch copy", "GB/s": 2 * size / copy["us"] * 1e-3, **copy})
    n = 64 if suite.rehearse else 8192
    a = torch.randn(n, n, device=device).to(torch.bfloat16)
    product = time_calls([lambda: a @ a], device)
    suite.timings.append(
        {"op": "torch dense product", "TFLOP/s": 2 * n**3 / product["us"] * 1e-6, **product}
    )
    if device != "cuda":
        suite.skip("what mma.sync and reads reach at most: a rehearsal has no GPU")
        return Ceilings()
    major, minor = torch.cuda.get_device_capability()
    rates = gpu_ceilings.measure(f"{major}{minor}", seconds=30)
    if isinstance(rates, str):
        suite.skip(f"what mma.sync and reads reach at most: {rates}")
        return Ceilings()
    for dtype in ("bfloat16", "float16"):
        suite.timings.append({"op": f"mma.sync {dtype}", "TFLOP/s": rates[f"mma {dtype} TFLOP/s"]})
    suite.timings.append({"op": "read", "GB/s": rates["read GB/s"]})
    return Ceilings(rates["mma bfloat16 TFLOP/s"] * 1e12, rates["read GB/s"] * 1e9)


def time_layers(suite: Suite, device: str, ceilings: Ceilings) -> None:
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
                        **ceilings.shares(flops, active, timing["us"]),
                        **timing,
                    }
                )
                print(line(suite.timings[-1]), flush=True)
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
        print(line(record), flush=True)


def time_calibration(suite: Suite, device: str) -> None:
    """A batch of calibration; expert_gemm of the same table is the plain forward pass."""
    shape = TINY if suite.rehearse else LAYERS[0]
    count = 40 if suite.rehearse else 16384
    layer = Layer(shape, ragged_widths(shape, 1.0), device)
    for name, call in Calibration(layer, count).calls().items():
        timing = time_calls([call], device, samples=10)
        suite.timings.append({"op": name, "shape": shape.name, "tokens": count, **timing})
