# SPDX-License-Identifier: Apache-2.0
"""Error curves and a budget to widths: the next neurons go where their loss costs least.

With curves error(width) that are convex (their steps are made so, by a running maximum) taking the
cheapest step again and again is optimal: it is the Lagrangian of min sum error(width) under sum
width <= B. A second budget on activated neurons, sum n_e width <= B_A, raises the price of an expert
by 1 + mu n_e / mean n; where no mu is enough, steps are taken by what they cost per activated neuron
until both budgets are met. Steps compete within a layer or over the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Pool = Literal["layer", "model"]

#: Beyond this mu the order of removals is that of error per token.
_HIGHEST_PRICE = 1e6


@dataclass(frozen=True)
class Curves:
    """What each removal costs, for the experts of one layer.

    Attributes:
        costs: `[E, I]`, float64. Of `Elimination`, the first removal first.
        tokens: `[E]`, float64. n_e, what a neuron of the expert costs of the activated budget.
        sensitivity: How much the model suffers from an error of this layer; counts when layers compete.
    """

    costs: Tensor
    tokens: Tensor
    sensitivity: float = 1.0


def allocate(
    layers: Sequence[Curves],
    multiple: int,
    keep: float,
    activated: float | None = None,
    pool: Pool = "layer",
    floor: float = 0.0,
) -> list[list[int]]:
    """Share out the widths.

    Args:
        layers: Shallow to deep.
        multiple: Widths are multiples of this, or the full width.
        keep: Share of all neurons to keep at most.
        activated: Share of the activated neurons to keep at most; None for no such budget.
        pool: Experts compete within their `layer`, so that each layer keeps the same share, or over
            the whole `model`.
        floor: Share of its neurons that every layer keeps at least, when pooled over the model.

    Returns:
        The widths of every layer's experts.
    """

    def widths(price: float) -> list[list[int]]:
        groups = [[layer] for layer in layers] if pool == "layer" else [list(layers)]
        return [w for g in groups for w in _spend(g, multiple, keep, activated, price, floor)]

    if activated is None:
        return widths(0.0)
    low, high = 0.0, _HIGHEST_PRICE
    for price in (low, high, math.inf):
        if activated_share(layers, found := widths(price)) <= activated:
            break
    if price == low or price == math.inf:
        return found
    # The least price that is enough, by halving on a logarithmic scale.
    low = 1e-3
    for _ in range(24):
        middle = math.sqrt(low * high)
        if activated_share(layers, widths(middle)) > activated:
            low = middle
        else:
            high = middle
    return widths(high)


def activated_share(layers: Sequence[Curves], widths: Sequence[Sequence[int]]) -> float:
    """Return A = sum n_e width_e / sum n_e I."""
    kept = sum(
        float(layer.tokens @ torch.tensor(w, dtype=torch.float64))
        for layer, w in zip(layers, widths, strict=True)
    )
    full = sum(float(layer.tokens.sum()) * layer.costs.shape[1] for layer in layers)
    return kept / full if full else 1.0


def _spend(
    layers: Sequence[Curves],
    multiple: int,
    keep: float,
    activated: float | None,
    price: float,
    floor: float,
) -> list[list[int]]:
    """Take blocks of neurons out of a pool, the cheapest per neuron first, until it fits."""
    costs, sizes, owners = [], [], []
    for index, layer in enumerate(layers):
        per_neuron, size = _blocks(layer.costs, multiple)  # [E, blocks], [blocks]
        mean = layer.tokens.mean().clamp(min=1e-300)
        dear = layer.tokens / mean
        worth = layer.sensitivity * per_neuron
        # At an infinite price only activated neurons count.
        worth /= (dear.clamp(min=1e-9) if math.isinf(price) else 1 + price * dear)[:, None]
        if floor and len(layers) > 1:
            worth = _with_floor(worth, size, floor)
        costs.append(worth.flatten())
        sizes.append(size.expand_as(worth).flatten())
        owners.append(
            torch.stack([torch.full(worth.shape, index), _rows(worth)], dim=-1).flatten(0, 1)
        )
    cost, size, owner = torch.cat(costs), torch.cat(sizes), torch.cat(owners)
    order = cost.argsort(stable=True)
    total = int(size.sum())
    # The smallest prefix of cheap blocks whose removal meets the budget.
    needed = total - int(keep * total + 1e-9)
    count = int((size[order].cumsum(0) - size[order] < needed).sum())
    if activated is not None and math.isinf(price):
        tokens = torch.cat([layer.tokens for layer in layers])
        first = torch.tensor([0] + [len(layer.tokens) for layer in layers]).cumsum(0)
        paid = tokens[first[owner[order, 0]] + owner[order, 1]] * size[order]
        needed_tokens = (1 - activated) * float(paid.sum())
        count = max(count, int((paid.cumsum(0) - paid < needed_tokens).sum()))
    gone = order[:count]
    removed = [torch.zeros(len(layer.costs), dtype=torch.int64) for layer in layers]
    for (layer_index, expert), neurons in zip(
        owner[gone].tolist(), size[gone].tolist(), strict=True
    ):
        removed[layer_index][expert] += neurons
    return [(layer.costs.shape[1] - r).tolist() for layer, r in zip(layers, removed, strict=True)]


def _blocks(costs: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Cost per neuron of each block `[E, blocks]`, never falling, and the neurons of a block `[blocks]`."""
    width = costs.shape[1]
    first = width % multiple
    sizes = torch.tensor(([first] if first else []) + [multiple] * (width // multiple))
    ends = sizes.cumsum(0)
    running = torch.nn.functional.pad(costs.cumsum(dim=1), (1, 0))
    per_neuron = (running[:, ends] - running[:, ends - sizes]) / sizes
    return per_neuron.cummax(dim=1).values, sizes


def _with_floor(worth: Tensor, size: Tensor, floor: float) -> Tensor:
    """Make a layer's dearest blocks, `floor` of its neurons, the last to go."""
    order = worth.flatten().argsort(stable=True, descending=True)
    sizes = size.expand_as(worth).flatten()[order]
    safe = order[sizes.cumsum(0) <= floor * sizes.sum()]
    guarded = worth.flatten().clone()
    guarded[safe] = torch.inf
    # An expert's blocks go in order, so what follows a safe block is safe as well.
    return guarded.view_as(worth).cummax(dim=1).values


def _rows(matrix: Tensor) -> Tensor:
    return torch.arange(matrix.shape[0]).unsqueeze(1).expand_as(matrix)


def super_neurons(layers: Mapping[int, Mapping[str, Tensor]]) -> dict[int, Tensor]:
    """Return `[E, I]` bool per layer: neurons of experts that carry the model's huge activations.

    A neuron is one when max_t g |m_k| |w_k| is above the 99.9 % quantile of all neurons and at least
    a third of the model's largest (after the super experts of arXiv 2507.23279; the bounds are ours).

    Args:
        layers: Statistics by layer.
    """
    peaks = {layer: sums["peak"].amax(dim=0) * sums["down_norm"] for layer, sums in layers.items()}
    everything = torch.cat([peak.flatten() for peak in peaks.values()]).sort().values
    quantile = everything[int(0.999 * (len(everything) - 1))]
    bound = max(float(quantile), float(everything[-1]) / 3)
    return {layer: peak > bound for layer, peak in peaks.items()}
