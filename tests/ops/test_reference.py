# SPDX-License-Identifier: Apache-2.0
"""The oracle itself, against the formulas written out once more with plain Python numbers."""

import math
from typing import Any

import pytest
import torch

from support.op_cases import (
    ExpertGemmCase,
    StatisticsCase,
    make_expert_gemm,
    make_statistics,
)
from tenp.ops import reference


def exactly(value: float | list[float]) -> Any:
    return pytest.approx(value, rel=1e-12, abs=1e-12)


def length(vector: list[float]) -> float:
    return math.sqrt(sum(value * value for value in vector))


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_statistics_are_their_formulas() -> None:
    case = StatisticsCase(tokens=5, hidden_size=4, num_experts=3, width=3, pattern="uniform")
    inputs = make_statistics(case)
    stats, change = inputs.zero_activation_stats(), inputs.zero_direction_change()
    contribution = inputs.zero_neuron_contribution()
    reference.accumulate_activation_stats(**inputs.activation_stats_arguments(), **stats)
    reference.accumulate_direction_change(**inputs.direction_change_arguments(), **change)
    reference.accumulate_neuron_contribution(
        **inputs.neuron_contribution_arguments(), **contribution
    )
    for expert in range(3):
        rows = range(int(inputs.offsets[expert]), int(inputs.offsets[expert + 1]))
        gates = [float(inputs.gates[row]) for row in rows]
        ys = [inputs.outputs[row].tolist() for row in rows]
        xs = [inputs.hidden[int(inputs.tokens[row])].tolist() for row in rows]
        ms = [inputs.activations[row].tolist() for row in rows]
        assert stats["counts"][expert] == len(rows)
        assert float(stats["gate_sum"][expert]) == exactly(sum(gates))
        assert float(stats["norm_sum"][expert]) == exactly(sum(map(length, ys)))
        assert float(stats["gated_norm_sum"][expert]) == exactly(
            sum(g * length(y) for g, y in zip(gates, ys, strict=True))
        )
        assert float(stats["norm_max"][expert]) == exactly(max(map(length, ys)))

        importance = 0.0
        for g, x, y in zip(gates, xs, ys, strict=True):
            product = length(x) * length(y)
            cosine = dot(x, y) / product if product else 0.0
            importance += g * length(y) * (1 - cosine)
        assert float(change["direction_change"][expert]) == exactly(importance)

        for neuron in range(3):
            w = inputs.down[expert, :, neuron].tolist()
            own = [m[neuron] for m in ms]
            weighted = [g * m for g, m in zip(gates, own, strict=True)]
            projection = sum(
                m * dot(w, y) / length(y) for m, y in zip(own, ys, strict=True) if length(y)
            )
            for name, value in {
                "projection": projection,
                "magnitude": sum(map(abs, own)),
                "energy": sum(m * m for m in weighted),
                "peak": max(map(abs, weighted)),
            }.items():
                got = float(contribution[name][expert, neuron])
                assert got == exactly(value), name


@pytest.mark.parametrize("gated", [True, False])
def test_expert_gemm_is_its_formula(gated: bool) -> None:
    case = ExpertGemmCase(
        tokens=4, hidden_size=3, widths=(2, 0, 17), experts_per_token=2, gated=gated, bias=True
    )
    inputs = make_expert_gemm(case)
    doubles: dict[str, Any] = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.arguments().items()
    }
    out = reference.expert_gemm(**doubles)
    assert inputs.gate_up_bias is not None
    assert inputs.down_bias is not None
    num_rows = len(inputs.down)

    def silu(value: float) -> float:
        return value / (1 + math.exp(-value))

    for token in range(4):
        expected = [0.0] * 3
        x = inputs.hidden[token].tolist()
        for slot in range(2):
            expert = int(inputs.expert_ids[token, slot])
            if not 0 <= expert < 3:
                continue
            y = inputs.down_bias[expert].tolist()
            for neuron in range(case.widths[expert]):
                row = int(inputs.neuron_offsets[expert]) + neuron
                first = dot(inputs.gate_up[row].tolist(), x) + float(inputs.gate_up_bias[row])
                m = silu(first)
                if gated:
                    row_up = num_rows + row
                    bias = float(inputs.gate_up_bias[row_up])
                    m *= dot(inputs.gate_up[row_up].tolist(), x) + bias
                w = inputs.down[row].tolist()
                y = [value + m * weight for value, weight in zip(y, w, strict=True)]
            g = float(inputs.gates[token, slot])
            expected = [value + g * part for value, part in zip(expected, y, strict=True)]
        assert out[token].tolist() == exactly(expected)
