# SPDX-License-Identifier: Apache-2.0
"""DERN: drop experts, hand their neurons on to the experts that stay, and rebuild these.

Zhou et al., Dropping Experts, Recombining Neurons (Findings of EMNLP 2025, arXiv 2509.10377). A
neuron is the triple (gate row, up row, down column). Where the paper leaves something open, the
choice is said at the option. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tenp.adapter import Experts
from tenp.checkpoint import Checkpoint
from tenp.errors import Unsupported
from tenp.plan import Plan
from tenp.refitting import reader_of_layers, require_statistics
from tenp.statistics import Statistics


@dataclass(frozen=True)
class Options:
    """The settings of DERN.

    Attributes:
        threshold: A neuron moves when its cosine with the most similar kept neuron is above this.
        with_gate: Whether the gate row counts in the similarity; the paper finds it better left out.
        init: Cluster centres start from the neurons of the largest max|gate row| that are not copies
            of each other (`max-gate`; the paper does not say what becomes of copies), from random
            ones (`random`, an ablation of the paper), or from the host's own (`own`).
        weighted: Whether neurons count by their home expert's router statistic; without is an
            ablation of the paper.
        agree: Guests must be like one of the host's neurons with the gate row too: without, neurons
            that fire on other inputs are averaged. The paper does not ask for it.
        even_norms: Neurons of a cluster are scaled to their mean norm before they are averaged.
        iterations: Of k-means, at most.
        seed: For random centres.
    """

    threshold: float = 0.6
    with_gate: bool = False
    init: Literal["max-gate", "own", "random"] = "max-gate"
    weighted: bool = True
    agree: bool = True
    even_norms: bool = True
    iterations: int = 20
    seed: int = 0


def importance(statistics: Statistics, layer: int) -> Tensor:
    """Return `[E]`: the mean over tokens of 1[e chosen] g / (sum of the token's gates)."""
    return statistics.layers[layer]["normalized_gate_sum"].sum(dim=0) / max(statistics.tokens(), 1)


def rebuilder(
    checkpoint: Checkpoint, plan: Plan, statistics: Statistics | None
) -> Callable[[int], Experts] | None:
    """Return what rebuilds the layers of a plan of method `dern`; None for other plans.

    Raises:
        PlanError: The statistics are not those that the plan was made from.
    """
    if "dern" not in plan.settings:
        return None
    require_statistics(plan, statistics)
    assert statistics is not None and plan.experts is not None
    read, stays = reader_of_layers(checkpoint), plan.experts
    options = Options(**plan.settings["dern"])
    return lambda layer: rebuild(read(layer), stays[layer], importance(statistics, layer), options)


def rebuild(experts: Experts, stays: list[int], weights: Tensor, options: Options) -> Experts:
    """Return the experts that stay, rebuilt from their own neurons and those handed on to them.

    Args:
        experts: A layer with its weights.
        stays: The experts that stay, ascending.
        weights: `[E]`, float64. `importance`.
        options: The settings.

    Returns:
        `len(stays)` experts in the family's own layout, of the full width, in the stored dtype.

    Raises:
        Unsupported: The experts have biases.

    Note:
        (E - E') I x E' I x 2 H multiplications for the similarities of a layer, blocked by expert.
    """
    if experts.has_bias:
        raise Unsupported("dern needs experts without biases, got some with; use drop")
    triples = _triples(experts)  # [E, I, parts, H]
    guests, _ = assign(triples, stays, options)
    generator = torch.Generator().manual_seed(options.seed)
    parameters: dict[str, list[Tensor]] = {}
    for new, expert in enumerate(stays):
        rows, homes = [triples[expert]], [torch.full((experts.width,), expert)]
        if options.agree:
            guests[new] = _agreeing(triples, expert, guests[new], options.threshold)
        for home, neuron in guests[new]:
            rows.append(triples[home, neuron].unsqueeze(0))
            homes.append(torch.tensor([home]))
        centres = triples[expert]
        if guests[new]:  # k-means of I neurons into I clusters is the neurons themselves
            mass = (
                weights[torch.cat(homes)] if options.weighted else torch.ones(len(torch.cat(homes)))
            )
            centres = cluster(torch.cat(rows), mass.double(), experts.width, options, generator)
        parts = {"up": centres[:, -2], "down": centres[:, -1].t()}
        if experts.has_gate:
            parts["gate"] = centres[:, 0]
        stored = {name: part.to(experts.down.dtype) for name, part in parts.items()}
        for name, fused in experts.fuse(stored).items():
            parameters.setdefault(name, []).append(fused)
    return experts.with_parameters({name: torch.cat(each) for name, each in parameters.items()})


def assign(
    triples: Tensor, stays: list[int], options: Options
) -> tuple[list[list[tuple[int, int]]], Tensor]:
    """Find the new home of every neuron of a dropped expert.

    Args:
        triples: `[E, I, parts, H]`, float64; parts are gate (if there is one), up, down.
        stays: The experts that stay.
        options: The settings.

    Returns:
        For every expert that stays its guests as (expert, neuron), and `[E, len(stays)]`: the share
        of each dropped expert's neurons that went to each expert that stays; the rest was dropped.
    """
    features = triples if options.with_gate else triples[:, :, -2:]
    unit = torch.nn.functional.normalize(features.flatten(2), dim=-1)  # [E, I, .]
    kept = unit[stays].flatten(0, 1)
    width = triples.shape[1]
    guests: list[list[tuple[int, int]]] = [[] for _ in stays]
    shares = torch.zeros(len(triples), len(stays), dtype=torch.float64)
    for expert in sorted(set(range(len(triples))) - set(stays)):
        best, at = (unit[expert] @ kept.t()).max(dim=1)
        for neuron in torch.nonzero(best > options.threshold).flatten().tolist():
            host = int(at[neuron]) // width
            guests[host].append((expert, neuron))
            shares[expert, host] += 1 / width
    return guests, shares


def cluster(
    triples: Tensor,
    mass: Tensor,
    count: int,
    options: Options,
    generator: torch.Generator,
) -> Tensor:
    """Weighted spherical k-means: neurons to `count` neurons.

    A neuron belongs to the centre of the largest cosine over the whole triple; one that is like no
    centre, with a cosine not above the threshold, is dropped rather than averaged in. A centre is
    the mass-weighted mean of its neurons, each scaled to the cluster's mean norm (`even_norms`).

    Args:
        triples: `[n, parts, H]`, float64, n >= count.
        mass: `[n]`, float64.
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
    elif options.init == "own":
        start = torch.arange(count)  # the host's neurons come first
    else:
        start = _strongest(triples, count, options.threshold)
    centres = unit[start]
    members = torch.full((len(flat),), -1)
    # Weights of 0 for every neuron of an unused home expert would divide by zero.
    mass = mass.clamp(min=1e-12)
    for _ in range(options.iterations):
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
    values = unit * mean_norm[members, None] if options.even_norms else flat
    means = torch.zeros_like(centres).index_add_(0, members, values * share[:, None])
    means = means / safe[:, None]
    result = torch.where(filled[:, None], means, centres * norms[start, None])
    return result.view(count, *triples.shape[1:])


def _agreeing(
    triples: Tensor, host: int, guests: list[tuple[int, int]], threshold: float
) -> list[tuple[int, int]]:
    """Return the guests whose whole triple has a cosine above the threshold with one of the host's."""
    own = torch.nn.functional.normalize(triples[host].flatten(1), dim=1)
    return [
        (home, neuron)
        for home, neuron in guests
        if float((own @ triples[home, neuron].flatten()).max())
        > threshold * float(triples[home, neuron].norm())
    ]


def _strongest(triples: Tensor, count: int, threshold: float) -> Tensor:
    """Return `[count]`: neurons of the largest max|gate row|, none like a stronger one among them.

    A neuron whose up row and down column have a cosine above the threshold with a chosen one's would
    make two centres of one cluster; such are taken only when there are no others left.
    """
    order = triples[:, 0].abs().amax(dim=1).argsort(descending=True, stable=True).tolist()
    unit = torch.nn.functional.normalize(triples[:, -2:].flatten(1), dim=1)
    nearest = torch.full((len(unit),), -2.0, dtype=torch.float64)
    chosen: list[int] = []
    copies: list[int] = []
    for neuron in order:
        if len(chosen) == count:
            break
        if nearest[neuron] > threshold:
            copies.append(neuron)
            continue
        chosen.append(neuron)
        nearest = torch.maximum(nearest, unit @ unit[neuron])
    return torch.tensor((chosen + copies)[:count])


def _triples(experts: Experts) -> Tensor:
    gate, up = experts.gate_and_up()
    parts = [part for part in (gate, up, experts.down.transpose(1, 2)) if part is not None]
    return torch.stack([part.double() for part in parts], dim=2)
