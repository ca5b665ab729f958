# SPDX-License-Identifier: Apache-2.0
"""Statistics to scores: one pure function per equation.

An expert criterion maps the statistics of a layer to `[D, E]`, a neuron criterion to `[D, E, I]`;
domains are normalised and combined here, once for all of them. Equations: docs/method.md.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from tenp.adapter import Experts
from tenp.errors import InvalidArgument
from tenp.scores import Scores
from tenp.statistics import LayerStatistics, Statistics, domain_weights_of

ExpertCriterion = Literal[
    "direction-change",
    "frequency",
    "gating-score",
    "normalized-gating-score",
    "ean",
    "weighted-ean",
    "reap",
    "easy-ep",
    "aimer",
    "random",
]
NeuronCriterion = Literal["projection", "l2", "camera", "wanda", "heapr", "random"]

Criterion = Callable[[LayerStatistics], Tensor]
WeightsCriterion = Callable[[LayerStatistics, Experts], Tensor]


# ---- expert criteria: [D, E] ----


def expert_importance(layer: LayerStatistics) -> Tensor:
    """TENP: I_e = sum_t g |y| (1 - cos(x, y)), a sum over tokens as in the paper's equation."""
    return layer["direction_change"]


def frequency(layer: LayerStatistics) -> Tensor:
    """How many tokens chose the expert, n_e."""
    return layer["counts"].double()


def gating_score(layer: LayerStatistics) -> Tensor:
    """Sum_t g (the soft count of SEER-MoE, arXiv 2404.05089)."""
    return layer["gate_sum"]


def normalized_gating_score(layer: LayerStatistics) -> Tensor:
    """DERN's router statistic: sum_t of g over the sum of the token's gates (arXiv 2509.10377)."""
    return layer["normalized_gate_sum"]


def activation_norm(layer: LayerStatistics) -> Tensor:
    """EAN: sum_t |y|."""
    return layer["norm_sum"]


def gated_activation_norm(layer: LayerStatistics) -> Tensor:
    """Weighted EAN: sum_t g |y|."""
    return layer["gated_norm_sum"]


def router_weighted_activation(layer: LayerStatistics) -> Tensor:
    """REAP: mean_t g |y| over the tokens that chose the expert (arXiv 2510.13999)."""
    return layer["gated_norm_sum"] / layer["counts"].clamp(min=1)


def residual_change(layer: LayerStatistics) -> Tensor:
    """EASY-EP: sum_t g |y| max(0, 1 - cos(h, h + z)), h the residual stream (arXiv 2504.06792)."""
    return _optional(layer, "residual_change", "easy-ep", "--second-pass")


# ---- neuron criteria: [D, E, I] ----


def projected_contribution(layer: LayerStatistics) -> Tensor:
    """TENP: P_k = mean_t m_k <w_k, y> / |y|, signed."""
    return _per_token(layer, layer["projection"])


def output_magnitude(layer: LayerStatistics) -> Tensor:
    """ENP-L2 of the TENP paper's ablation: mean_t |m_k| |w_k|."""
    return _per_token(layer, layer["magnitude"] * layer["down_norm"])


def camera(layer: LayerStatistics) -> Tensor:
    """CAMERA: |w_k|^2 (sum_t (g m_k)^2 / 2 + max_t (g m_k)^2 / 2)."""
    energy = 0.5 * layer["energy"] + 0.5 * layer["peak"].square()
    return layer["down_norm"].square() * energy


def heapr(layer: LayerStatistics) -> Tensor:
    """HEAPr: mean_t m_k^2 mean_t (dL/dm_k)^2 (arXiv 2509.22299), without its [H, H] matrix.

    The paper's w_k^T G w_k with G = mean_t dL/dy dL/dy^T is mean_t <w_k, dL/dy>^2.
    """
    gradients = _optional(layer, "gradient_energy", "heapr", "--second-pass")
    return _per_token(layer, layer["activation_energy"]) * _per_token(layer, gradients)


# ---- criteria that need the weights too ----


def router_weighted_wanda(layer: LayerStatistics, experts: Experts) -> Tensor:
    """Wanda with router weights, over a neuron's weights: sum_j |W_kj| |g X_j|_2, `[D, E, I]`.

    MoE-Pruner's |W_ij| |X_j g|_2 summed over the gate row, the up row and the down column.
    """
    gate, up = experts.gate_and_up()
    inputs = layer["input_energy"].sqrt()  # [D, E, H]
    total = torch.zeros_like(layer["energy"])
    for expert in range(experts.num_experts):
        rows = up[expert].double().abs()
        if gate is not None:
            rows = rows + gate[expert].double().abs()
        total[:, expert] = inputs[:, expert] @ rows.t()
        column = experts.down[expert].double().abs().sum(dim=0)
        total[:, expert] += column * layer["energy"][:, expert].sqrt()
    return total


def aimer(layer: LayerStatistics, experts: Experts) -> Tensor:
    """AIMER: -mean|W| / RMS(W) over all weights of an expert, `[D, E]`; the flattest go first."""
    gate, up = experts.gate_and_up()
    values = []
    for expert in range(experts.num_experts):
        parts = [matrix[expert] for matrix in (gate, up, experts.down) if matrix is not None]
        weights = torch.cat([part.double().flatten() for part in parts])
        values.append(-weights.abs().mean() / weights.square().mean().sqrt())
    return torch.stack(values).expand_as(layer["gate_sum"])


EXPERT_CRITERIA: Mapping[str, Criterion] = {
    "direction-change": expert_importance,
    "frequency": frequency,
    "gating-score": gating_score,
    "normalized-gating-score": normalized_gating_score,
    "ean": activation_norm,
    "weighted-ean": gated_activation_norm,
    "reap": router_weighted_activation,
    "easy-ep": residual_change,
}
NEURON_CRITERIA: Mapping[str, Criterion] = {
    "projection": projected_contribution,
    "l2": output_magnitude,
    "camera": camera,
    "heapr": heapr,
}
#: These need the weights of every layer.
EXPERT_WEIGHTS_CRITERIA: Mapping[str, WeightsCriterion] = {"aimer": aimer}
NEURON_WEIGHTS_CRITERIA: Mapping[str, WeightsCriterion] = {"wanda": router_weighted_wanda}

#: Criteria whose statistics a second pass collects.
NEEDS_SECOND_PASS = ("heapr", "easy-ep")

#: EASY-EP divides a domain's scores by their sum instead of their length.
_SUMS_TO_ONE = ("easy-ep",)


def score(
    statistics: Statistics,
    expert_criterion: str = "direction-change",
    neuron_criterion: str = "projection",
    domain_weights: Mapping[str, float] | None = None,
    seed: int = 0,
    weights: Callable[[int], Experts] | None = None,
) -> Scores:
    """Score every expert and neuron, by default with the equations of TENP.

    Args:
        statistics: One calibration.
        expert_criterion: One of `ExpertCriterion`.
        neuron_criterion: One of `NeuronCriterion`.
        domain_weights: The paper's alpha per domain name; 1 for a domain that is not named.
        seed: For `random`.
        weights: Returns a layer's experts with their weights, for the criteria that need them.

    Returns:
        `Scores`, deterministic in the statistics.

    Raises:
        InvalidArgument: A criterion or a domain is not known, a weight is no weight, or a criterion
            needs what is not there.
    """
    check(expert_criterion, neuron_criterion)
    expert = _look_up(expert_criterion, EXPERT_CRITERIA, EXPERT_WEIGHTS_CRITERIA, weights)
    neuron = _look_up(neuron_criterion, NEURON_CRITERIA, NEURON_WEIGHTS_CRITERIA, weights)
    names = [domain.name for domain in statistics.domains]
    alphas = torch.tensor(domain_weights_of(names, domain_weights or {}), dtype=torch.float64)
    order = 1 if expert_criterion in _SUMS_TO_ONE else 2
    experts, neurons = {}, {}
    for index, layer in statistics.layers.items():
        # Every layer has random numbers of its own, the same when it is scored alone.
        own = random.Random(f"{seed} {index}").getrandbits(32)
        generator = torch.Generator().manual_seed(own)
        # Drawn for every layer, so that the experts of a seed do not depend on the neurons' criterion.
        chances = torch.rand(layer["down_norm"].shape, generator=generator, dtype=torch.float64)
        experts[index] = (
            torch.rand(len(chances), generator=generator, dtype=torch.float64)
            if expert is None
            else combine_experts(expert(index, layer), alphas, order)
        )
        neurons[index] = (
            chances if neuron is None else combine_neurons(neuron(index, layer), alphas)
        )
    return Scores(experts, neurons)


def check(expert_criterion: str, neuron_criterion: str) -> None:
    """Refuse criteria that are not known.

    Raises:
        InvalidArgument: One is not.
    """
    for argument, name, known in (
        ("expert_criterion", expert_criterion, get_args(ExpertCriterion)),
        ("neuron_criterion", neuron_criterion, get_args(NeuronCriterion)),
    ):
        if name not in known:
            raise InvalidArgument(
                f"score: {argument} must be one of {', '.join(known)}, got {name}"
            )


def combine_experts(importance: Tensor, weights: Tensor, order: int = 2) -> Tensor:
    """Return sum_d a_d I^d_e / |I^d|_2, the norm over the experts of the layer.

    Args:
        importance: `[D, E]`, float64.
        weights: `[D]`, float64. The paper's alpha.
        order: Of the norm; 1 makes every domain's scores sum up to 1.
    """
    return torch.einsum("d,de->e", weights, _normalised(importance, order))


def combine_neurons(contribution: Tensor, weights: Tensor) -> Tensor:
    """Return sum_d a_d P^d / |P^d|_2 per expert; a domain without a token for the expert adds 0.

    Args:
        contribution: `[D, E, I]`, float64.
        weights: `[D]`, float64. The paper's alpha.
    """
    return torch.einsum("d,dek->ek", weights, _normalised(contribution))


def _normalised(values: Tensor, order: int = 2) -> Tensor:
    """Scale the last axis to length 1; an all-zero row (no token seen) stays zero."""
    norm = values.norm(p=order, dim=-1, keepdim=True)
    return values / torch.where(norm > 0, norm, 1.0)


def _per_token(layer: LayerStatistics, total: Tensor) -> Tensor:
    return total / layer["counts"].clamp(min=1).unsqueeze(-1)


def _optional(layer: LayerStatistics, name: str, criterion: str, needs: str) -> Tensor:
    if name not in layer:
        raise InvalidArgument(
            f"score: {criterion} needs statistics with {name}, got some without; calibrate with {needs}"
        )
    return layer[name]


def _look_up(
    name: str,
    plain: Mapping[str, Criterion],
    weighted: Mapping[str, WeightsCriterion],
    weights: Callable[[int], Experts] | None,
) -> Callable[[int, LayerStatistics], Tensor] | None:
    """Return a function of a layer's index and statistics; None for random scores."""
    if name == "random":
        return None
    if name in plain:
        criterion = plain[name]
        return lambda index, layer: criterion(layer)
    if weights is None:
        raise InvalidArgument(f"score: {name} needs the model's weights; name the model")
    of_weights, read = weighted[name], weights
    return lambda index, layer: of_weights(layer, read(index))
