# SPDX-License-Identifier: Apache-2.0
"""`generate` of a pruned model against the dense one, both through transformers, in one process.

    python benchmarks/bench_generate.py                          # Qwen1.5-MoE's shapes, 2 layers, random
    python benchmarks/bench_generate.py --dense DIR --pruned DIR  # two checkpoints

Every round lets each model write --new-tokens tokens after one prompt, greedily, in turn. The random
model is pruned to --keep by a TENP profile: a quarter of the experts whole, the rest equally narrow, and
also in 8 bits. Dense experts run by each of transformers' implementations.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import compare, save
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2MoeConfig

from tenp import ops, pipeline, pruning
from tenp.checkpoint import Checkpoint
from tenp.plan import Plan

#: What is Qwen1.5-MoE-A2.7B's, but for the number of layers and the vocabulary.
SHAPES = dict(
    hidden_size=2048,
    num_attention_heads=16,
    num_key_value_heads=16,
    num_experts=60,
    num_experts_per_tok=4,
    moe_intermediate_size=1408,
    shared_expert_intermediate_size=5632,
    vocab_size=8192,
)
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def random_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model without its buffers, which a checkpoint does not hold either."""
    torch.manual_seed(0)
    with torch.device("meta"):  # the family's own initialisation takes minutes
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.03, 0.03)
    return model


def random_checkpoints(directory: Path, layers: int, keep: float) -> dict[str, Path]:
    """Write the random dense model and what pruning makes of it."""
    config = Qwen2MoeConfig(**SHAPES, num_hidden_layers=layers, eos_token_id=None)
    paths = {name: directory / name for name in ("dense", "pruned", "pruned int8")}
    model = random_model(config, torch.bfloat16)
    model.save_pretrained(paths["dense"])
    del model
    dense = Checkpoint(paths["dense"])
    experts, width = SHAPES["num_experts"], SHAPES["moe_intermediate_size"]
    whole = experts // 4
    narrow = int(width * (keep * experts - whole) / (experts - whole)) // 16 * 16
    widths = torch.tensor([width] * whole + [narrow] * (experts - whole))
    mask = torch.arange(width) < widths[:, None]
    plan = Plan(
        pruning.source_of(dense), "", {"method": "tenp"}, dict.fromkeys(range(layers), mask), keep
    )
    pipeline.apply(dense, plan, paths["pruned"], verify=False)
    pipeline.apply(dense, plan, paths["pruned int8"], verify=False, weights="int8")
    return paths


def load(directory: Path, dtype: str) -> PreTrainedModel:
    """Load for greedy decoding without an end."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def writer(
    model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, implementation: str | None
) -> Callable[[], Any]:
    """Return what writes so many tokens."""

    def write() -> Any:
        if implementation is not None:
            model.set_experts_implementation(implementation)
        return model.generate(
            prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
        )

    return write


def main() -> None:
    """Compare and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dense", type=Path)
    parser.add_argument("--pruned", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--out", type=Path, help="JSON lines")
    arguments = parser.parse_args()
    torch.set_num_threads(ops.num_threads())
    with tempfile.TemporaryDirectory() as directory:
        if arguments.dense:
            paths = {"dense": arguments.dense, "pruned": arguments.pruned}
            name = arguments.dense.name
        else:
            paths = random_checkpoints(Path(directory), arguments.layers, arguments.keep)
            name = f"qwen1.5-moe, {arguments.layers} layers, keep {arguments.keep}"
        models = {name: load(path, arguments.dtype) for name, path in paths.items()}
    generator = torch.Generator().manual_seed(0)
    vocabulary = models["dense"].config.vocab_size
    prompt = torch.randint(3, vocabulary, (1, arguments.prompt_tokens), generator=generator)
    dense = models.pop("dense")
    providers = {
        f"dense {implementation}": writer(dense, prompt, arguments.new_tokens, implementation)
        for implementation in IMPLEMENTATIONS
    }
    for label, model in models.items():
        providers[label] = writer(model, prompt, arguments.new_tokens, None)
    case = {
        "op": "generate",
        "model": name,
        "dtype": arguments.dtype,
        "prompt": arguments.prompt_tokens,
        "new": arguments.new_tokens,
    }
    records = compare(
        case,
        providers,
        "pruned",
        rounds=arguments.rounds,
        warmup=1,
        seconds_at_most=arguments.seconds,
    )
    if arguments.out:
        save(arguments.out, records)


if __name__ == "__main__":
    main()
