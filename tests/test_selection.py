# SPDX-License-Identifier: Apache-2.0
"""The removal cost is exact, and greedy elimination follows it."""

import time

import pytest
import torch
from torch import Tensor

from tenp.selection import eliminate


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _case(experts: int, width: int, tokens: int, hidden: int = 8) -> tuple[Tensor, Tensor]:
    down = _random(experts, hidden, width)
    m = _random(experts, tokens, width, seed=1) @ (
        torch.eye(width, dtype=torch.float64) + 0.2 * _random(width, width, seed=2)
    )
    return down, m.mT @ m


def _ridged(moment: Tensor, ridge: float) -> Tensor:
    return moment + ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)


def _error(down: Tensor, moment: Tensor, removed: list[int]) -> Tensor:
    """The least error without some neurons, by a fresh least-squares solution."""
    kept = [k for k in range(len(moment)) if k not in removed]
    cross = moment[removed][:, kept]
    inner = moment[removed][:, removed] - cross @ torch.linalg.solve(moment[kept][:, kept], cross.T)
    return torch.trace(down[:, removed] @ inner @ down[:, removed].T)


# 150 neurons pass the block of 64 twice.
@pytest.mark.parametrize("width", [5, 64, 150])
def test_every_removal_is_the_cheapest_and_costs_what_it_says(width: int) -> None:
    down, moment = _case(1, width, 3 * width)
    found = eliminate(down.mT @ down, moment, ridge=1e-3)
    weights, target = down[0].clone(), _ridged(moment[0], 1e-3)
    alive = list(range(width))
    for neuron, cost in zip(found.order[0].tolist(), found.costs[0].tolist(), strict=True):
        inverse = torch.linalg.inv(target[alive][:, alive])
        costs = weights[:, alive].square().sum(dim=0) / inverse.diagonal()
        at = alive.index(neuron)
        assert cost == pytest.approx(float(costs[at]), rel=1e-6)
        assert cost <= float(costs.min()) * (1 + 1e-6)
        weights[:, alive] -= weights[:, [neuron]] * (inverse[:, at] / inverse[at, at])
        alive.pop(at)


def test_costs_add_up_to_the_error_of_least_squares() -> None:
    down, moment = _case(1, 12, 60)
    found = eliminate(down.mT @ down, moment, ridge=1e-3)
    target = _ridged(moment[0], 1e-3)
    for count in (1, 4, 11):
        removed = found.order[0, :count].tolist()
        lost = found.costs[0, :count].sum()
        torch.testing.assert_close(lost, _error(down[0], target, removed), rtol=1e-8, atol=0)


def test_experts_at_once_are_experts_one_by_one() -> None:
    down, moment = _case(3, 70, 200)
    together = eliminate(down.mT @ down, moment)
    for expert in range(3):
        alone = eliminate(
            down[expert : expert + 1].mT @ down[expert : expert + 1], moment[expert : expert + 1]
        )
        assert torch.equal(together.order[expert], alone.order[0])
        torch.testing.assert_close(together.costs[expert], alone.costs[0])


def test_a_copy_goes_first_and_costs_nothing() -> None:
    down, moment = _case(1, 6, 40)
    m = torch.linalg.cholesky(moment[0]).T
    m[:, 3] = m[:, 5]
    found = eliminate(down.mT @ down, (m.T @ m)[None], ridge=1e-10)
    assert found.order[0, 0] in (3, 5)
    assert found.costs[0, 0] < 1e-6 * found.costs[0, 1]


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_fewer_tokens_than_neurons_give_no_nan(tokens: int) -> None:
    down, moment = _case(2, 20, tokens)
    found = eliminate(down.mT @ down, moment)
    assert found.costs.isfinite().all()
    assert found.order.sort(dim=1).values.equal(torch.arange(20).repeat(2, 1))
    if tokens == 0:
        assert not found.costs.any()


def test_fixed_variables_stay_and_protected_ones_go_last() -> None:
    down, moment = _case(2, 10, 50)
    fixed = torch.arange(10) == 9
    protected = torch.zeros(2, 10, dtype=torch.bool)
    protected[1, :2] = True
    found = eliminate(down.mT @ down, moment, fixed=fixed, protected=protected)
    assert found.order.shape == (2, 9)
    assert 9 not in found.order
    assert set(found.order[1, -2:].tolist()) == {0, 1}


def test_one_wide_expert_takes_seconds() -> None:
    down, moment = _case(1, 1408, 3000, hidden=256)
    begin = time.process_time()
    eliminate(down.mT @ down, moment)
    assert time.process_time() - begin < 10  # processor seconds, 5 on each of two cores
