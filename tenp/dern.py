# SPDX-License-Identifier: Apache-2.0
"""DERN: drop experts, hand their neurons on to the experts that stay, and rebuild these.

Zhou et al., Dropping Experts, Recombining Neurons (Findings of EMNLP 2025, arXiv 2509.10377). A
neuron is the triple (gate row, up row, down column). With a neuron goes its part of what the routers
gave its expert: an expert of router statistic s whose share p of neurons moves to a host brings the
mass p s there. Masses weigh neurons in the rebuild and rows in the router. Where the paper leaves
something open, the choice is said where it is made. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tenp.adapter import Experts
from tenp.checkpoint import Checkpoint
from tenp.dropping import Rebuilt
from tenp.errors import PlanError, Unsupported
from tenp.plan import Plan
from tenp.refitting import reader_of_layers, require_statistics
from tenp.statistics import Statistics

Init = Literal["max-gate", "random"]

#: Of k-means, at most; it mostly stands still after five.
_ITERATIONS = 20


@dataclass(frozen=True)
class Options:
    """The settings of DERN.

    Attributes:
        threshold: A neuron moves when its cosine with the most similar kept neuron is above this.
        init: Cluster centres start from the neurons of the largest max|gate row| (`max-gate`), or from
            random ones (`random`, an ablation of the paper).
        weighted: Whether neurons count by their mass; without is an ablation of the paper.
        seed: For random centres.
    """

    threshold: float = 0.6
    init: Init = "max-gate"
    weighted: bool = True
    seed: int = 0


def importance(statistics: Statistics, layer: int) -> Tensor:
    """Return `[E]`: the mean over tokens of 1[e chosen] g / (sum of the token's gates)."""
    return statistics.layers[layer]["normalized_gate_sum"].sum(dim=0) / max(statistics.tokens(), 1)


def rebuilder(
    checkpoint: Checkpoint, plan: Plan, statistics: Statistics | None
) -> Callable[[int], Rebuilt] | None:
    """Return what rebuilds the layers of a plan of method `dern`; None for other plans.

    Raises:
        PlanError: The statistics are not those that the plan was made from, or its settings are of
            another version.
    """
    if "dern" not in plan.settings:
        return None
    require_statistics(plan, statistics)
    assert statistics is not None and plan.experts is not None
    try:
        options = Options(**plan.settings["dern"])
    except TypeError:
        raise PlanError(
            f"the plan must have settings of dern that this version of tenp knows, got {plan.settings['dern']}; "
            "plan again"
        ) from None
    read, stays = reader_of_layers(checkpoint), plan.experts
    return lambda layer: rebuild(read(layer), stays[layer], importance(statistics, layer), options)


def rebuild(experts: Experts, stays: list[int], importance: Tensor, options: Options) -> Rebuilt:
    """Rebuild the experts that stay from their own neurons and those handed on to them.

    Args:
        experts: A layer with its weights.
        stays: The experts that stay, ascending.
        importance: `[E]`, float64. s, of `importance`.
        options: The settings.

    Returns:
        `len(stays)` experts in the family's own layout, of the full width, in the stored dtype, and
        their routers' rows. An expert that no neuron moves to stays as it is, to the bit.

    Raises:
        Unsupported: The experts have biases.

    Note:
        (E - E') I x E' I x 2 H multiplications for the similarities of a layer.
    """
    if experts.has_bias:
        raise Unsupported("dern needs experts without biases, got some with; use drop")
    triples = _triples(experts)  # [E, I, parts, H]
    homes = assign(triples, stays, options)
    masses = _masses(homes, importance, len(stays))
    generator = torch.Generator().manual_seed(options.seed)
    parameters: dict[str, list[Tensor]] = {}
    for host, expert in enumerate(stays):
        moved = homes == host
        centres = triples[expert]
        if (
            int(moved.sum()) > experts.width
        ):  # k-means of I neurons into I is the neurons themselves
            origins = torch.nonzero(moved)[:, 0]
            mass = masses[origins, host] if options.weighted else torch.ones(len(origins)).double()
            centres = cluster(triples[moved], mass, experts.width, options, generator)
        parts = {"up": centres[:, -2], "down": centres[:, -1].t()}
        if experts.has_gate:
            parts["gate"] = centres[:, 0]
        stored = {name: part.to(experts.down.dtype) for name, part in parts.items()}
        for name, fused in experts.fuse(stored).items():
            parameters.setdefault(name, []).append(fused)
    rebuilt = experts.with_parameters({name: torch.cat(each) for name, each in parameters.items()})
    return Rebuilt(rebuilt, (masses / masses.sum(dim=0)).t())


def assign(triples: Tensor, stays: list[int], options: Options) -> Tensor:
    """Find the new home of every neuron.

    Args:
        triples: `[E, I, parts, H]`, float64; parts are gate (if there is one), up, down.
        stays: The experts that stay.
        options: The settings.

    Returns:
        `[E, I]`, int64: which of `stays` has it from now on; -1 for a neuron that is dropped.
    """
    whole = torch.nn.functional.normalize(triples.flatten(2), dim=-1)  # [E, I, .]
    # The paper finds the gate row better left out of the similarity.
    compared = torch.nn.functional.normalize(triples[:, :, -2:].flatten(2), dim=-1)
    homes = torch.full(triples.shape[:2], -1)
    for host, expert in enumerate(stays):
        homes[expert] = host
    for expert in sorted(set(range(len(triples))) - set(stays)):
        nearest = torch.full(whole.shape[1:2], options.threshold, dtype=whole.dtype)
        for host, other in enumerate(stays):
            cosine = (compared[expert] @ compared[other].t()).amax(dim=1)
            fires_alike = (whole[expert] @ whole[other].t()).amax(dim=1) > options.threshold
            homes[expert][cosine > nearest] = torch.where(fires_alike, host, -1)[cosine > nearest]
            nearest = torch.maximum(nearest, cosine)
    return homes


def cluster(
    triples: Tensor,
    mass: Tensor,
    count: int,
    options: Options,
    generator: torch.Generator,
) -> Tensor:
    """Weighted spherical k-means: neurons to `count` neurons.

    A neuron belongs to the centre of the largest cosine over the whole triple. One that is like no
    centre, with a cosine not above the threshold, is dropped rather than averaged in (the paper does
    not say). A centre is the mass-weighted mean of its neurons, each scaled to the cluster's mean norm.

    Args:
        triples: `[n, parts, H]`, float64, n >= count.
        mass: `[n]`, float64, above 0.
        count: Clusters; the target width.
        options: The settings.
        generator: For random centres.

    Returns:
        `[count, parts, H]`, float64. A cluster that loses all its neurons keeps its centre.
    """
    flat = triples.flatten(1)
    norms = flat.norm(dim=1)
    unit = torch.nn.functional.normalize(flat, dim=1)
    if options.init == "random":
        start = torch.randperm(len(flat), generator=generator)[:count]
    else:
        start = _strongest(triples, mass, count, options.threshold)
    centres = unit[start]
    members = torch.full((len(flat),), -1)
    for _ in range(_ITERATIONS):
        nearness, assigned = (unit @ centres.t()).max(dim=1)
        if torch.equal(assigned, members):
            break
        members = assigned
        share = mass * (nearness > options.threshold)
        sums = torch.zeros_like(centres).index_add_(0, members, unit * share[:, None])
        moved = sums.norm(dim=1) > 0
        centres = torch.where(moved[:, None], torch.nn.functional.normalize(sums, dim=1), centres)
    share = mass * ((unit * centres[members]).sum(dim=1) > options.threshold)
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, members, share)
    filled = total > 0
    safe = torch.where(filled, total, 1.0)
    mean_norm = torch.zeros(count, dtype=torch.float64).index_add_(0, members, share * norms) / safe
    values = unit * mean_norm[members, None]
    means = torch.zeros_like(centres).index_add_(0, members, values * share[:, None])
    means = means / safe[:, None]
    result = torch.where(filled[:, None], means, centres * norms[start, None])
    return result.view(count, *triples.shape[1:])


def _masses(homes: Tensor, importance: Tensor, hosts: int) -> Tensor:
    """Return `[E, E']`: what every expert brings to every host, s times the share of neurons that moved."""
    moved = torch.nn.functional.one_hot(homes + 1, hosts + 1)[:, :, 1:]  # [E, I, E']
    # Experts that no token chose have some mass, so that nothing is divided by zero.
    return importance.clamp(min=1e-12)[:, None] * moved.double().mean(dim=1)


def _strongest(triples: Tensor, mass: Tensor, count: int, threshold: float) -> Tensor:
    """Return `[count]`: neurons of the largest mass times max|gate row|, those like a stronger one last.

    The paper takes the largest max|gate row|. By that alone a guest that has come almost alone takes
    the place of one of the host's own neurons, for all of the host's tokens; and two copies, whose up
    rows and down columns have a cosine above the threshold, make two centres of one cluster.
    """
    strength = mass * triples[:, 0].abs().amax(dim=1)
    order = strength.argsort(descending=True, stable=True)
    unit = torch.nn.functional.normalize(triples[order, -2:].flatten(1), dim=1)
    is_copy = ((unit @ unit.t()).tril(-1) > threshold).any(dim=1)
    return order[is_copy.long().argsort(stable=True)][:count]


def _triples(experts: Experts) -> Tensor:
    gate, up = experts.gate_and_up()
    parts = [part for part in (gate, up, experts.down.transpose(1, 2)) if part is not None]
    return torch.stack([part.double() for part in parts], dim=2)
