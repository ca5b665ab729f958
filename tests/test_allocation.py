# SPDX-License-Identifier: Apache-2.0
"""Widths meet their budgets and cost as little as any others would."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenp import allocation
from tenp.allocation import Curves


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


def test_a_tight_activated_budget_is_the_one_that_binds() -> None:
    layers = [_curves(6, 12, seed) for seed in range(2)]
    widths = allocation.allocate(layers, 1, 0.9, 0.3)
    assert 0.2 < _share(layers, widths) <= 0.3


def test_an_activated_budget_that_no_price_meets_leaves_the_static_one_in_force() -> None:
    # By error per token the experts that are seldom or never chosen lose nothing, however wide.
    costs = [[1.0, 2, 10, 1000], [2, 5, 1000, 1000]], [[5.0, 50, 50, 1000], [2, 2, 5, 5]]
    chosen = [10.0, 1], [100.0, 10]
    layers = [
        Curves(torch.tensor(cost, dtype=torch.float64), torch.tensor(tokens, dtype=torch.float64))
        for cost, tokens in zip(costs, chosen, strict=True)
    ]
    unseen = Curves(layers[0].costs, torch.zeros(2, dtype=torch.float64))
    for pair, activated in ((layers, 0.4), ([unseen, layers[1]], 0.1)):
        widths = allocation.allocate(pair, 1, 0.25, activated)
        assert sum(map(sum, widths)) <= 4
        assert _share(pair, widths) <= activated


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 10**6)), min_size=1, max_size=4),
    st.sampled_from([1, 3, 4]),
    st.integers(1, 100).map(lambda n: n / 100),
    st.integers(1, 100).map(lambda n: n / 100),
    st.sampled_from(["layer", "model"]),
    st.sampled_from([0.0, 0.5]),
)
@settings(max_examples=150, deadline=None)
def test_neither_budget_is_ever_exceeded(
    shapes: list[tuple[int, int]],
    multiple: int,
    keep: float,
    activated: float,
    pool: allocation.Pool,
    floor: float,
) -> None:
    layers = []
    for experts, seed in shapes:
        curves = _curves(experts, 8, seed)
        tokens = curves.tokens * (seed % 3) * (torch.arange(experts) != seed % 4)  # some see none
        layers.append(Curves(curves.costs, tokens))
    widths = allocation.allocate(layers, multiple, keep, activated, pool, floor * keep)
    total = sum(layer.costs.numel() for layer in layers)
    assert sum(map(sum, widths)) <= keep * total + 1e-9
    if any(layer.tokens.any() for layer in layers):
        assert _share(layers, widths) <= activated + 1e-12


def test_a_loose_activated_budget_changes_nothing() -> None:
    layers = [_curves(6, 12)]
    assert allocation.allocate(layers, 1, 0.6, 1.0) == allocation.allocate(layers, 1, 0.6)


def test_a_neuron_of_huge_activations_is_found() -> None:
    peak = torch.ones(1, 4, 300, dtype=torch.float64)
    peak[0, 2, 17] = 1000.0
    norms: Tensor = torch.ones(4, 300, dtype=torch.float64)
    found = allocation.super_neurons({0: {"peak": peak, "down_norm": norms}})[0]
    assert torch.nonzero(found).tolist() == [[2, 17]]
    even = allocation.super_neurons({0: {"peak": torch.ones(1, 4, 300), "down_norm": norms}})[0]
    assert not even.any()
