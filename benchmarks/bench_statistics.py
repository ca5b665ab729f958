# SPDX-License-Identifier: Apache-2.0
"""The three statistics ops against the same formulas in torch, one layer's routed rows at a time."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from harness import compare, save
from torch import Tensor

from tenp import ops

#: Axes. Shapes of Qwen3-30B-A3B, DeepSeek-V2-Lite, and the tiny model of examples/, fewer experts.
SHAPES = {
    "qwen3-30b": {"hidden": 2048, "width": 768, "experts": 8},
    "deepseek-v2-lite": {"hidden": 2048, "width": 1408, "experts": 4},
    "tiny-moe": {"hidden": 192, "width": 96, "experts": 24},
}
ROWS_PER_EXPERT = 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Case:
    """The inputs and sums of one layer."""

    def __init__(self, hidden: int, width: int, experts: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        rows = ROWS_PER_EXPERT * experts
        self.hidden = random(rows, hidden)
        self.activations = random(rows, width)
        self.outputs = random(rows, hidden)
        self.down = random(experts, hidden, width)
        self.gates = torch.rand(rows, generator=generator)
        self.tokens = torch.arange(rows, dtype=torch.int32)
        self.offsets = torch.arange(0, rows + 1, ROWS_PER_EXPERT, dtype=torch.int32)
        self.experts, self.width = experts, width

    def expert_sums(self, *names: str) -> dict[str, Tensor]:
        return {name: torch.zeros(self.experts, dtype=torch.float64) for name in names}

    def neuron_sums(self) -> dict[str, Tensor]:
        shape = (self.experts, self.width)
        names = ("projection", "magnitude", "energy", "peak")
        return {name: torch.zeros(shape, dtype=torch.float64) for name in names}


def activation_stats(case: Case) -> dict[str, Tensor]:
    sums = case.expert_sums("gate_sum", "norm_sum", "gated_norm_sum", "norm_max")
    counts = torch.zeros(case.experts, dtype=torch.int64)
    ops.accumulate_activation_stats(case.outputs, case.gates, case.offsets, counts=counts, **sums)
    return sums


def activation_stats_in_torch(case: Case) -> dict[str, Tensor]:
    norms = case.outputs.float().norm(dim=1).double().view(case.experts, -1)
    gates = case.gates.double().view(case.experts, -1)
    return {
        "gate_sum": gates.sum(1),
        "norm_sum": norms.sum(1),
        "gated_norm_sum": (gates * norms).sum(1),
        "norm_max": norms.amax(1),
    }


def direction_change(case: Case) -> dict[str, Tensor]:
    sums = case.expert_sums("direction_change")
    ops.accumulate_direction_change(
        case.hidden, case.outputs, case.tokens, case.gates, case.offsets, **sums
    )
    return sums


def direction_change_in_torch(case: Case) -> dict[str, Tensor]:
    x, y = case.hidden[case.tokens.long()].float(), case.outputs.float()
    term = y.norm(dim=1) * (1 - torch.cosine_similarity(x, y))
    return {"direction_change": (case.gates * term).double().view(case.experts, -1).sum(1)}


def neuron_contribution(case: Case) -> dict[str, Tensor]:
    sums = case.neuron_sums()
    ops.accumulate_neuron_contribution(
        case.activations, case.outputs, case.down, case.gates, case.offsets, **sums
    )
    return sums


def neuron_contribution_in_torch(case: Case) -> dict[str, Tensor]:
    sums = case.neuron_sums()
    for expert in range(case.experts):
        rows = slice(case.offsets[expert], case.offsets[expert + 1])
        m, y = case.activations[rows], case.outputs[rows]
        gated = (m.float() * case.gates[rows, None]).abs()
        q = (y @ case.down[expert]).float() / y.float().norm(dim=1, keepdim=True)
        sums["projection"][expert] = (m.float() * q).sum(0)
        sums["magnitude"][expert] = m.float().abs().sum(0)
        sums["energy"][expert] = gated.square().sum(0)
        sums["peak"][expert] = gated.amax(0)
    return sums


OPS = {
    "activation_stats": (activation_stats, activation_stats_in_torch),
    "direction_change": (direction_change, direction_change_in_torch),
    "neuron_contribution": (neuron_contribution, neuron_contribution_in_torch),
}


@torch.no_grad()
def main() -> None:
    """Run all cases and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON lines")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(ops.num_threads())
    records = []
    for shape, sizes in SHAPES.items():
        for dtype_name, dtype in DTYPES.items():
            case = Case(**sizes, dtype=dtype)
            for op, (ours, theirs) in OPS.items():
                # bfloat16 products in torch are rounded before they are summed, ours are not.
                tolerance = 1e-4 if dtype == torch.float32 else 2e-2
                expected = theirs(case)
                for name, value in ours(case).items():
                    worst = (value - expected[name]).norm() / expected[name].norm()
                    assert worst < tolerance, (op, shape, dtype_name, name, worst)
                axes = {"op": op, "shape": shape, "dtype": dtype_name}
                providers = {
                    "torch": lambda f=theirs, c=case: f(c),
                    "tenp": lambda f=ours, c=case: f(c),
                }
                records += compare(axes, providers, "torch", rounds=arguments.rounds)
    if arguments.out:
        save(arguments.out, records)


if __name__ == "__main__":
    main()
