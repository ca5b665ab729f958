# SPDX-License-Identifier: Apache-2.0
"""Statistics to scores: one pure function per equation.

An expert criterion maps the statistics of a layer to `[D, E]`, a neuron criterion to `[D, E, I]`;
domains are normalised and combined here, once for all of them. Equations: docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tenp.errors import InvalidArgument
from tenp.scores import Scores
from tenp.statistics import LayerStatistics, Statistics

Criterion = Callable[[LayerStatistics], Tensor]


# ---- expert criteria: [D, E] ----


def expert_importance(layer: LayerStatistics) -> Tensor:
    """TENP: I_e = sum_t g |y| (1 - cos(x, y)), a sum over tokens as in the paper's equation."""
    return layer["direction_change"]


# ---- neuron criteria: [D, E, I] ----


def projected_contribution(layer: LayerStatistics) -> Tensor:
    """TENP: P_k = mean_t m_k <w_k, y> / |y|, signed."""
    return _per_token(layer, layer["projection"])


def output_magnitude(layer: LayerStatistics) -> Tensor:
    """ENP-L2 of the TENP paper's ablation: mean_t |m_k| |w_k|."""
    return _per_token(layer, layer["magnitude"] * layer["down_norm"])


EXPERT_CRITERIA: Mapping[str, Criterion] = {"direction-change": expert_importance}
NEURON_CRITERIA: Mapping[str, Criterion] = {
    "projection": projected_contribution,
    "l2": output_magnitude,
}


def score(
    statistics: Statistics,
    expert_criterion: str = "direction-change",
    neuron_criterion: str = "projection",
    domain_weights: Mapping[str, float] | None = None,
) -> Scores:
    """Score every expert and neuron, by default with the equations of TENP.

    Args:
        statistics: One calibration.
        expert_criterion: A name of `EXPERT_CRITERIA`.
        neuron_criterion: A name of `NEURON_CRITERIA`.
        domain_weights: The paper's alpha per domain name; 1 for a domain that is not named.

    Returns:
        `Scores`, deterministic in the statistics.

    Raises:
        InvalidArgument: A criterion or a domain is not known, or a weight is no weight.
    """
    expert = _look_up("expert_criterion", expert_criterion, EXPERT_CRITERIA)
    neuron = _look_up("neuron_criterion", neuron_criterion, NEURON_CRITERIA)
    weights = weights_of([domain.name for domain in statistics.domains], domain_weights or {})
    return Scores(
        experts={
            index: combine_experts(expert(layer), weights)
            for index, layer in statistics.layers.items()
        },
        neurons={
            index: combine_neurons(neuron(layer), weights)
            for index, layer in statistics.layers.items()
        },
    )


def combine_experts(importance: Tensor, weights: Tensor) -> Tensor:
    """Return sum_d a_d I^d_e / |I^d|_2, the norm over the experts of the layer.

    Args:
        importance: `[D, E]`, float64.
        weights: `[D]`, float64. The paper's alpha.
    """
    return torch.einsum("d,de->e", weights, _normalised(importance))


def combine_neurons(contribution: Tensor, weights: Tensor) -> Tensor:
    """Return sum_d a_d P^d / |P^d|_2 per expert; a domain without a token for the expert adds 0.

    Args:
        contribution: `[D, E, I]`, float64.
        weights: `[D]`, float64. The paper's alpha.
    """
    return torch.einsum("d,dek->ek", weights, _normalised(contribution))


def _normalised(values: Tensor) -> Tensor:
    """Scale the last axis to length 1; an all-zero row (no token seen) stays zero."""
    norm = values.norm(dim=-1, keepdim=True)
    return values / torch.where(norm > 0, norm, 1.0)


def _per_token(layer: LayerStatistics, total: Tensor) -> Tensor:
    return total / layer["counts"].clamp(min=1).unsqueeze(-1)


def _look_up(argument: str, name: str, table: Mapping[str, Criterion]) -> Criterion:
    if name not in table:
        raise InvalidArgument(f"score: {argument} must be one of {', '.join(table)}, got {name}")
    return table[name]


def weights_of(domains: Sequence[str], weights: Mapping[str, float]) -> Tensor:
    """Return the weight of every domain, `[D]` float64: as given, or 1.

    Raises:
        InvalidArgument: A weight is for a domain that is not there, is negative, or all are 0.
    """
    if unknown := weights.keys() - set(domains):
        raise InvalidArgument(
            f"score: domain weights must be for {list(domains)}, got {sorted(unknown)}"
        )
    values = [weights.get(name, 1.0) for name in domains]
    if not all(0 <= value < math.inf for value in values) or not any(values):
        raise InvalidArgument(
            f"score: domain weights must be 0 or more and not all 0, got {dict(weights)}"
        )
    return torch.tensor(values, dtype=torch.float64)
