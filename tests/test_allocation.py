# SPDX-License-Identifier: Apache-2.0
"""Widths meet their budgets and cost as little as any others would."""

import itertools

import pytest
import torch
from torch import Tensor

from tenp import allocation
from tenp.allocation import Curves
from tenp.errors import PlanError


def _curves(experts: int = 3, width: int = 6, seed: int = 0, **more: float) -> Curves:
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(experts, width, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 20, (experts,), generator=generator).double()
    return Curves(costs.sort(dim=1).values, tokens, **more)


def _error(curves: Curves, widths: list[int]) -> float:
    removed = [curves.costs.shape[1] - w for w in widths]
    return sum(float(cost[:count].sum()) for cost, count in zip(curves.costs, removed, strict=True))


def test_no_other_widths_of_the_budget_cost_less() -> None:
    curves = _curves()
    widths = allocation.allocate([curves], 1, 0.5)[0]
    assert sum(widths) == 9
    others = (w for w in itertools.product(range(7), repeat=3) if sum(w) == 9)
    assert _error(curves, widths) == pytest.approx(min(_error(curves, list(w)) for w in others))


@pytest.mark.parametrize("keep", [0.9, 0.6, 0.31, 0.05])
@pytest.mark.parametrize("multiple", [1, 4, 5])
def test_the_static_budget_is_never_exceeded(keep: float, multiple: int) -> None:
    layers = [_curves(4, 12, seed) for seed in range(3)]
    for widths in allocation.allocate(layers, multiple, keep):
        assert sum(widths) <= keep * 48
        assert all(width % multiple == 0 or width == 12 for width in widths)
        assert sum(widths) > keep * 48 - multiple


def test_pooled_per_layer_every_layer_keeps_its_share() -> None:
    layers = [_curves(4, 12, 0), Curves(100 * _curves(4, 12, 1).costs, torch.ones(4))]
    per_layer = allocation.allocate(layers, 1, 0.5)
    assert [sum(w) for w in per_layer] == [24, 24]
    pooled = allocation.allocate(layers, 1, 0.5, pool="model")
    assert sum(pooled[1]) > sum(pooled[0])
    floored = allocation.allocate(layers, 1, 0.5, pool="model", floor=0.25)
    assert sum(floored[0]) >= 12
    assert sum(map(sum, floored)) == 48


def test_sensitivity_draws_neurons_to_a_layer() -> None:
    curves = _curves(4, 12)
    layers = [curves, Curves(curves.costs, curves.tokens, sensitivity=5.0)]
    first, second = allocation.allocate(layers, 1, 0.5, pool="model")
    assert sum(second) > sum(first)


def _share(layers: list[Curves], widths: list[list[int]]) -> float:
    return allocation.activated_share(layers, widths)


def test_an_activated_budget_is_held_beside_the_static_one() -> None:
    layers = [_curves(6, 12, seed) for seed in range(2)]
    free = allocation.allocate(layers, 1, 0.6)
    target = _share(layers, free) - 0.05
    held = allocation.allocate(layers, 1, 0.6, target)
    assert _share(layers, held) <= target
    assert sum(map(sum, held)) <= 0.6 * 144


def test_an_activated_budget_alone_is_held() -> None:
    layers = [_curves(6, 12, seed) for seed in range(2)]
    widths = allocation.allocate(layers, 1, None, 0.3)
    assert 0.2 < _share(layers, widths) <= 0.3


def test_a_loose_activated_budget_changes_nothing() -> None:
    layers = [_curves(6, 12)]
    assert allocation.allocate(layers, 1, 0.6, 1.0) == allocation.allocate(layers, 1, 0.6)


def test_no_budget_is_refused() -> None:
    with pytest.raises(PlanError, match="got neither"):
        allocation.allocate([_curves()], 1, None)


def test_a_neuron_of_huge_activations_is_found() -> None:
    peak = torch.ones(1, 4, 300, dtype=torch.float64)
    peak[0, 2, 17] = 1000.0
    norms: Tensor = torch.ones(4, 300, dtype=torch.float64)
    found = allocation.super_neurons({0: {"peak": peak, "down_norm": norms}})[0]
    assert torch.nonzero(found).tolist() == [[2, 17]]
    even = allocation.super_neurons({0: {"peak": torch.ones(1, 4, 300), "down_norm": norms}})[0]
    assert not even.any()
