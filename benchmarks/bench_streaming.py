# SPDX-License-Identifier: Apache-2.0
"""Calibrates and prunes a random checkpoint of a large model's shapes within a stated memory.

    python benchmarks/bench_streaming.py                       # DeepSeek-V2-Lite's shapes, 31 GB
    python benchmarks/bench_streaming.py --layers 4            # the same shapes, 4 of 27 layers
    python benchmarks/bench_streaming.py --shapes deepseek-v3-layer

For every phase: seconds, GB read from the checkpoint, GB/s, and the peak of the memory held
(`RssAnon`, sampled every 10 ms). Writing is compared with plain copies of a shard, timed in the
same process before and after it. Weights and tokens are random: costs do not depend on their
values. What is made is removed at the end; with `--directory` it is kept, and a run that was
stopped goes on there from the last finished layer. Exit code 1 if the peak is above the stated
memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import machine
from transformers import AutoConfig

from tenp import adapter, execution, pruning, scoring, verification
from tenp.checkpoint import INDEX_FILE, Checkpoint, ShardWriter
from tenp.distributed import Group
from tenp.execution import Execution
from tenp.memory import parse_bytes
from tenp.planning import Budget, plan
from tenp.reading import Reader
from tenp.samples import Samples

_LATENT_ATTENTION: dict[str, Any] = dict(
    kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, hidden_act="silu"
)
SHAPES: dict[str, dict[str, Any]] = {
    "deepseek-v2-lite": dict(
        model_type="deepseek_v2",
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        q_lora_rank=None,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        **_LATENT_ATTENTION,
    ),
    "deepseek-v3-layer": dict(
        model_type="deepseek_v3",
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=1,
        num_attention_heads=128,
        num_key_value_heads=128,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        first_k_dense_replace=0,
        q_lora_rank=1536,
        n_group=8,
        topk_group=4,
        **_LATENT_ATTENTION,
    ),
}
_SHARD_BYTES = 4 << 30
_POOL = 1 << 25  # numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", choices=SHAPES, default="deepseek-v2-lite")
    parser.add_argument("--layers", type=int, help="fewer layers")
    parser.add_argument("--experts", type=int, help="fewer routed experts per layer")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512, help="per sample")
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--stream", choices=("layers", "experts"), help="else what fits")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--directory", type=Path, help="where a stopped run goes on; kept")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--note", help="kept in the result, for example what else the machine did")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    config = dict(SHAPES[options.shapes])
    if options.layers:
        config["num_hidden_layers"] = options.layers
    if options.experts:
        config["n_routed_experts"] = options.experts
    torch.set_num_threads(options.threads)
    if options.make:
        make_checkpoint(options.make, config)
        return 0
    if options.directory:
        return run(options.directory, options)
    with tempfile.TemporaryDirectory(prefix="tenp-bench-") as root:
        return run(Path(root), options)


def run(root: Path, options: argparse.Namespace) -> int:
    if not (root / "dense").exists():
        # In a process of its own, so that nothing it held is counted.
        partial = root / "dense.partial"
        shutil.rmtree(partial, ignore_errors=True)
        subprocess.run([sys.executable, *sys.argv, "--make", str(partial)], check=True)
        partial.rename(root / "dense")
    memory = parse_bytes(options.memory)
    how = Execution(options.stream, memory, work_dir=root / "work")
    checkpoint = Checkpoint(root / "dense")
    source = pruning.source_of(checkpoint)
    generator = torch.Generator().manual_seed(0)
    vocabulary = checkpoint.config["vocab_size"]
    ids = torch.randint(vocabulary, (options.samples, options.tokens), generator=generator)
    samples = [Samples("random", tuple(ids))]
    phases = Phases()
    forecast: list[str] = []
    environment = machine()

    with phases("calibrate", root / "calibrate.json") as phase, how.work(Group()) as work:

        def progress(its_reader: Reader) -> Any:
            phase["reader"] = its_reader
            return LayerLog(phase, root / "calibrate.json")

        collected = execution.calibrate_streamed(
            checkpoint,
            source,
            samples,
            {"batch_tokens": 4096, "dtype": "float32"},
            how,
            torch.float32,
            "cpu",
            Group(),
            work,
            progress,
            forecast.append,
        )
        print(*forecast, flush=True)
    with phases("plan"):
        decided = plan(scoring.score(collected), collected, Budget(options.keep))
    begun: list[float] = []

    def verify(written: Path) -> None:
        begun.append(time.perf_counter())
        with phases("verify") as phase:
            verification.verify(checkpoint, decided, None, None, written)
            phase["bytes"] = checkpoint.bytes + decided.total_bytes()

    shards = [root / "dense" / shard for shard in checkpoint.shards()]
    plain_copies = copy_rates(shards[0], root / "copy")
    forget(*shards)
    with phases("write") as phase:
        pruning.apply(checkpoint, decided, root / "pruned", verify, memory=memory)
        phase["bytes"] = checkpoint.bytes + decided.total_bytes()
        phase["until"] = begun[0]
    plain_copies += copy_rates(shards[0], root / "copy")
    record = {
        "shapes": options.shapes,
        "layers": checkpoint.config["num_hidden_layers"],
        "routed_experts": checkpoint.config["n_routed_experts"],
        "checkpoint_bytes": checkpoint.bytes,
        "samples": options.samples,
        "tokens_per_sample": options.tokens,
        "memory_stated_bytes": memory,
        "forecast": forecast[0],
        "peak_anonymous_bytes": max(phase["peak"] for phase in phases.done),
        "kept_share": decided.static_share(),
        "phases": [measured(p) for p in sorted(phases.done, key=lambda phase: phase["begin"])],
        "plain_copy_bytes_per_second": plain_copies,
        "machine": environment,
        "note": options.note,
    }
    print(f"{'phase':<10} {'seconds':>9} {'GB':>7} {'GB/s':>6} {'peak GiB':>9}")
    for phase in record["phases"]:
        moved, seconds = phase["bytes"] / 1e9, phase["seconds"]
        print(
            f"{phase['phase']:<10} {seconds:>9.1f} {moved:>7.1f} {moved / seconds:>6.2f} "
            f"{phase['peak'] / 2**30:>9.2f}"
        )
    written = next(phase for phase in record["phases"] if phase["phase"] == "write")
    ratios = sorted(written["bytes"] / written["seconds"] / rate for rate in plain_copies)
    print(
        f"writing moves bytes at {statistics.median(ratios):.2f} of the rate of a plain copy "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    peak = record["peak_anonymous_bytes"]
    print(f"peak {peak / 2**30:.2f} GiB of {memory / 2**30:.2f} GiB stated")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if peak <= memory else 1


class Phases:
    """Times phases and samples the anonymous memory of this process meanwhile."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []

    @contextmanager
    def __call__(self, name: str, kept: Path | None = None) -> Iterator[dict[str, Any]]:
        """Measure a phase; `kept` is what `LayerLog` wrote in runs that were stopped in it."""
        before = json.loads(kept.read_text()) if kept is not None and kept.exists() else {}
        phase: dict[str, Any] = {
            "phase": name,
            "begin": time.perf_counter() - before.get("seconds", 0.0),
            "bytes_before": before.get("bytes", 0),
            "peak": max(before.get("peak", 0), anonymous_bytes()),
            "runs": before.get("runs", 0) + 1,
        }
        stop = threading.Event()

        def sample() -> None:
            while not stop.wait(0.01):
                phase["peak"] = max(phase["peak"], anonymous_bytes())

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        try:
            yield phase
        finally:
            stop.set()
            sampler.join()
        phase.setdefault("until", time.perf_counter())
        self.done.append(phase)


def measured(phase: dict[str, Any]) -> dict[str, Any]:
    """Return what a phase has taken so far, stopped runs included."""
    reader = phase.get("reader")
    return {
        "phase": phase["phase"],
        "seconds": phase.get("until", time.perf_counter()) - phase["begin"],
        "bytes": phase.get("bytes", 0) or phase["bytes_before"] + (reader.bytes if reader else 0),
        "peak": phase["peak"],
        "runs": phase["runs"],
    }


class LayerLog:
    """Prints what the phase has taken when a layer is finished, and keeps it for the next run."""

    def __init__(self, phase: dict[str, Any], kept: Path) -> None:
        self._phase, self._kept = phase, kept
        self._layer: str | None = None

    def __call__(self, label: str, tokens: int) -> None:
        layer = label.split(",")[0]
        if self._layer not in (None, layer):
            state = measured(self._phase)
            self._kept.write_text(json.dumps(state))
            print(
                f"{self._layer}: {state['seconds']:.0f} s, {state['bytes'] / 1e9:.1f} GB read, "
                f"peak {state['peak'] / 2**30:.2f} GiB",
                flush=True,
            )
        self._layer = layer


def copy_rates(shard: Path, target: Path, rounds: int = 3) -> list[float]:
    """Copy a shard that is not in the page cache, and return bytes read and written per second."""
    rates = []
    for _ in range(rounds):
        forget(shard)
        begin = time.perf_counter()
        shutil.copyfile(shard, target)
        with target.open("rb") as file:
            os.fsync(file)
        rates.append(2 * shard.stat().st_size / (time.perf_counter() - begin))
        target.unlink()
    return rates


def forget(*files: Path) -> None:
    """Take files out of the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous_bytes() -> int:
    """Return `RssAnon` of this process."""
    with Path("/proc/self/status").open() as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def make_checkpoint(directory: Path, fields: dict[str, Any]) -> None:
    """Write a checkpoint of random bfloat16 numbers, in shards, tensor by tensor."""
    config = AutoConfig.for_model(
        **fields, max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16"
    )
    directory.mkdir(parents=True)
    config.architectures = [type(adapter.empty_model(config)).__name__]
    config.save_pretrained(directory)
    shapes = dict(tensor_shapes(config))
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        size += 2 * torch.Size(shape).numel()
        if size > _SHARD_BYTES:
            shards.append({})
            size = 2 * torch.Size(shape).numel()
        shards[-1][name] = (torch.bfloat16, shape)
    generator = torch.Generator().manual_seed(0)
    # Each tensor takes its numbers from another place of one pool, again and again if it is larger.
    pool = (torch.randn(_POOL, generator=generator) * 0.02).bfloat16()
    weight_map = {}
    for number, layout in enumerate(shards):
        shard = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        writer = ShardWriter(directory / shard, layout)
        for name, (_, shape) in layout.items():
            begin = int(torch.randint(_POOL // 2, (), generator=generator))
            count = torch.Size(shape).numel()
            turns = -(-(begin + count) // _POOL)
            values = (pool.repeat(turns) if turns > 1 else pool)[begin : begin + count].view(shape)
            writer.write(name, torch.ones_like(values) if "norm" in name else values)
            weight_map[name] = shard
        writer.close()
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tensor_shapes(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor, experts one by one as on the Hub."""
    model = adapter.empty_model(config)
    layers = {experts.name: experts for experts in adapter.find_experts(model)}
    for name, tensor in model.state_dict().items():
        module, _, parameter = name.rpartition(".")
        if module not in layers:
            yield name, tuple(tensor.shape)
        elif parameter == "down_proj":
            experts = layers[module]
            hidden, width = experts.down.shape[1:]
            for expert in range(experts.num_experts):
                for part, shape in (
                    ("gate", (width, hidden)),
                    ("up", (width, hidden)),
                    ("down", (hidden, width)),
                ):
                    yield f"{module}.{expert}.{part}_proj.weight", shape


if __name__ == "__main__":
    sys.exit(main())
