# SPDX-License-Identifier: Apache-2.0
"""The trapezoid by hand and by its properties; widths never above the budget, hardly below it."""

import dataclasses
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.fixtures import Tiny
from tenp import planning, scoring
from tenp.errors import PlanError
from tenp.plan import Plan
from tenp.planning import Budget, allocate_widths, automatic_width_multiple, keep_highest, trapezoid
from tenp.source import Source
from tenp.statistics import Domain, Statistics

_fractions = st.integers(0, 40).map(lambda n: Fraction(n, 40))


def _layers(experts: list[int], widths: list[int], seed: int = 0) -> Statistics:
    """Statistics of random numbers with 100 tokens an expert."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(enumerate(zip(experts, widths, strict=True)))
    statistics = Statistics.zeros(
        Source("f" * 64, "Test", 10**6, 10**6, 1, 4), [Domain("d", 1, 1, ())], shapes, {}
    )
    for tensors in statistics.layers.values():
        for name, tensor in tensors.items():
            if name == "counts":
                tensor.fill_(100)
            else:
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
    return statistics


def _plan(statistics: Statistics, budget: Budget, under_covered: str = "warn") -> Plan:
    return planning.plan(scoring.score(statistics), statistics, budget, under_covered)


# ---- the trapezoid ----


@pytest.mark.parametrize(
    ("experts", "alpha", "shallow", "deep", "expected"),
    [
        # Weights 8 * (1, 1.5, 2) = 8, 12, 16; M = round(0.25 * 24) = 6: quotas 4/3, 2, 8/3.
        pytest.param([8, 8, 8], Fraction(1, 4), 1, 2, [1, 2, 3], id="largest remainder"),
        # M = 12 of weights 8, 16: quotas 4, 8.
        pytest.param([8, 8], Fraction(3, 4), 1, 2, [4, 8], id="exact quotas"),
        # M = 14 of 16: quotas 14/3, 28/3 > 8: 8 and the overflow of 1 to the other.
        pytest.param([8, 8], Fraction(14, 16), 1, 2, [6, 8], id="overflow handed on"),
        # Quotas 3/2, 3/2: the tie goes to the lower layer.
        pytest.param([4, 4], Fraction(3, 8), 1, 1, [2, 1], id="tie to the lower layer"),
        pytest.param([4, 4], Fraction(1, 2), 0, 1, [0, 4], id="a layer of weight 0"),
        pytest.param([4, 4], Fraction(3, 4), 0, 1, [2, 4], id="weight 0 takes the overflow"),
        pytest.param([8], Fraction(1, 4), 1, 2, [2], id="one layer"),
        pytest.param([5], Fraction(1, 2), 1, 2, [3], id="half rounds up"),
        pytest.param([4, 4, 4], Fraction(0), 1, 2, [0, 0, 0], id="none"),
        pytest.param([4, 2, 3], Fraction(1), 1, 2, [4, 2, 3], id="all"),
        # Weights 2 * 1, 6 * 2 of M = 4: quotas 4/7, 24/7; the larger remainder is the first's.
        pytest.param([2, 6], Fraction(1, 2), 1, 2, [1, 3], id="layers of other sizes"),
        pytest.param([4, 4], Fraction(3, 8), 2, 1, [2, 1], id="upside down"),
    ],
)  # fmt: skip
def test_trapezoid_by_hand(experts, alpha, shallow, deep, expected) -> None:
    assert trapezoid(experts, alpha, shallow, deep) == expected


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    _fractions,
    st.integers(0, 4),
    st.integers(1, 4),
)
@settings(max_examples=150, deadline=None)
def test_a_trapezoid_gives_out_all_whole_experts_within_the_layers(
    experts: list[int], alpha: Fraction, shallow: int, deep: int
) -> None:
    shares = trapezoid(experts, alpha, shallow, deep)
    assert sum(shares) == int(alpha * sum(experts) + Fraction(1, 2))
    assert all(0 <= share <= count for share, count in zip(shares, experts, strict=True))


@given(st.integers(1, 12), st.integers(1, 40), _fractions)
@settings(max_examples=100, deadline=None)
def test_equal_layers_never_get_fewer_whole_experts_with_depth(
    layers: int, experts: int, alpha: Fraction
) -> None:
    shares = trapezoid([experts] * layers, alpha)
    assert shares == sorted(shares)


@given(st.integers(1, 12), st.integers(1, 40), _fractions)
@settings(max_examples=50, deadline=None)
def test_a_rectangle_differs_by_one_expert_at_most(
    layers: int, experts: int, alpha: Fraction
) -> None:
    shares = trapezoid([experts] * layers, alpha, 1, 1)
    assert max(shares) - min(shares) <= 1


# ---- widths ----


@st.composite
def _budgets(draw: st.DrawFn):
    layers = draw(st.integers(1, 4))
    experts = draw(st.lists(st.integers(1, 9), min_size=layers, max_size=layers))
    multiple = draw(st.sampled_from([1, 2, 4, 8]))
    full = {layer: draw(st.sampled_from([8, 24, 50])) for layer in range(layers)}
    keep = draw(_fractions.filter(lambda share: share > 0))
    whole = {
        layer: torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
        for layer, count in enumerate(experts)
    }
    scores = {
        layer: torch.tensor(
            draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)), dtype=torch.float64
        )
        for layer, count in enumerate(experts)
    }
    return scores, whole, full, dict.fromkeys(range(layers), multiple), keep


@given(_budgets())
@settings(max_examples=200, deadline=None)
def test_widths_are_multiples_never_above_the_budget_and_one_step_below_at_most(case) -> None:
    scores, whole, full, multiples, keep = case
    total = sum(full[layer] * len(flags) for layer, flags in whole.items())
    in_whole = sum(full[layer] * int(flags.sum()) for layer, flags in whole.items())
    if in_whole > keep * total:
        with pytest.raises(PlanError, match="or less would fit"):
            allocate_widths(scores, whole, full, multiples, keep, spread=True)
        return
    widths = allocate_widths(scores, whole, full, multiples, keep, spread=True)
    kept = sum(sum(layer) for layer in widths.values())
    assert kept <= keep * total
    narrow = [
        (layer, expert) for layer, flags in whole.items() for expert in range(len(flags))
        if not flags[expert]
    ]  # fmt: skip
    for layer, flags in whole.items():
        for expert, width in enumerate(widths[layer]):
            if flags[expert]:
                assert width == full[layer]
            else:
                assert 0 <= width <= full[layer]
                assert width % multiples[layer] == 0 or width == full[layer]
    # If any narrow expert could still take a block, less than a block is left.
    blocks = [
        min(multiples[layer], full[layer] - widths[layer][expert])
        for layer, expert in narrow
        if widths[layer][expert] < full[layer]
    ]
    assert not blocks or keep * total - kept < max(blocks) + 1


@given(_budgets())
@settings(max_examples=50, deadline=None)
def test_narrow_experts_of_a_layer_differ_by_one_block_at_most(case) -> None:
    scores, whole, full, multiples, keep = case
    try:
        widths = allocate_widths(scores, whole, full, multiples, keep, spread=True)
    except PlanError:
        return
    for layer, flags in whole.items():
        narrow = [w for w, flag in zip(widths[layer], flags.tolist(), strict=True) if not flag]
        assert not narrow or max(narrow) - min(narrow) <= multiples[layer]


def test_beta_is_the_papers() -> None:
    # rho 0.6, alpha 0.2: the others keep (0.6 - 0.2) / 0.8 = half of their neurons.
    statistics = _layers([10], [40])
    plan = _plan(statistics, Budget(0.6, alpha=0.2, width_multiple=1))
    assert sorted(plan.widths()[0]) == [20] * 8 + [40] * 2


def test_blocks_left_over_go_to_the_best_narrow_experts() -> None:
    # 4 * 10 * 0.55 = 22 neurons: 5 each and 2 blocks of 1 to experts 2 and 0.
    scores = {0: torch.tensor([3.0, 1.0, 4.0, 2.0])}
    widths = allocate_widths(
        scores, {0: torch.zeros(4, dtype=torch.bool)}, {0: 10}, {0: 1}, Fraction(11, 20), True
    )
    assert widths == {0: [6, 5, 6, 5]}


def test_ties_for_a_block_go_to_the_lower_layer_and_index() -> None:
    flags = torch.zeros(2, dtype=torch.bool)
    same = torch.ones(2, dtype=torch.float64)
    widths = allocate_widths(
        {0: same, 1: same},
        {0: flags, 1: flags},
        {0: 10, 1: 10},
        {0: 1, 1: 1},
        Fraction(23, 40),
        True,
    )
    assert widths == {0: [6, 6], 1: [6, 5]}


@pytest.mark.parametrize(
    ("full", "multiple"),
    [(1, 1), (16, 1), (24, 1), (48, 2), (96, 4), (192, 8), (511, 16), (512, 64), (1408, 64)],
)
def test_the_automatic_width_multiple(full: int, multiple: int) -> None:
    assert automatic_width_multiple(full) == multiple


def test_keep_highest_breaks_ties_by_index() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    assert keep_highest(scores, [1, 2]).tolist() == [
        [False, True, False, False],
        [True, True, False, False],
    ]


def test_keep_highest_keeps_none_and_all() -> None:
    assert keep_highest(torch.rand(2, 5), [0, 5]).sum(dim=1).tolist() == [0, 5]


def test_negative_scores_rank_below_positive_ones() -> None:
    assert keep_highest(torch.tensor([[-3.0, 0.1, -0.2]]), [2]).tolist() == [[False, True, True]]


# ---- plans ----


def test_the_most_important_experts_stay_whole() -> None:
    statistics = _layers([6, 6, 6], [24, 24, 24])
    plan = _plan(statistics, Budget(0.6, alpha=0.3, width_multiple=1))
    experts = scoring.score(statistics).experts
    for layer, widths in plan.widths().items():
        whole = [e for e, width in enumerate(widths) if width == 24]
        assert set(whole) == set(experts[layer].argsort(descending=True)[: len(whole)].tolist())


def test_alpha_is_half_of_keep_by_default() -> None:
    plan = _plan(_layers([10] * 4, [20] * 4), Budget(0.6))
    assert plan.settings["alpha"] == 0.3
    assert sum(width == 20 for layer in plan.widths().values() for width in layer) == 12


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.35, 0.6, 0.99])
@pytest.mark.parametrize("multiple", [1, 4])
def test_the_static_share_is_within_one_step_and_never_above(keep: float, multiple: int) -> None:
    plan = _plan(_layers([7, 7, 7], [48, 48, 48]), Budget(keep, width_multiple=multiple))
    assert plan.static_share() <= keep
    assert keep - plan.static_share() < (multiple + 1) / plan.neurons()


def test_enp_gives_all_experts_one_width() -> None:
    plan = _plan(_layers([6, 6], [24, 24]), Budget(0.6, method="enp", width_multiple=4))
    assert plan.uniform_width() == 12  # 0.6 * 24 = 14.4, rounded down to 12


@pytest.mark.parametrize(
    ("method", "used"),
    [
        ("tenp", {"alpha": 0.25, "shallow": 1.0, "deep": 2.0, "width_multiple": None}),
        ("enp", {"width_multiple": None}),
        ("drop", {}),
        ("dern", {}),
    ],
)
def test_a_plan_records_what_its_method_uses(method: str, used: dict[str, object]) -> None:
    settings = dict(_plan(_layers([6], [24]), Budget(0.5, method=method)).settings)
    assert settings == {"keep": 0.5, "method": method, "under_covered": "warn", **used}


def test_keeping_everything_keeps_everything() -> None:
    plan = _plan(_layers([3], [10]), Budget(1.0, width_multiple=4))
    assert plan.static_share() == plan.activated_share == 1


def test_experts_without_any_importance_are_still_planned() -> None:
    statistics = _layers([4], [16])
    for tensor in statistics.layers[0].values():
        tensor.zero_()
    plan = _plan(statistics, Budget(0.5, width_multiple=1))
    assert plan.static_share() == 0.5
    assert plan.activated_share == 1.0  # no token, nothing lost


def test_the_activated_share_weighs_experts_by_their_tokens() -> None:
    statistics = _layers([2], [10])
    statistics.layers[0]["counts"].copy_(torch.tensor([[30, 10]]))
    statistics.layers[0]["direction_change"].copy_(torch.tensor([[2.0, 1.0]]))
    plan = _plan(statistics, Budget(0.75, alpha=0.5, width_multiple=1))
    assert plan.widths() == {0: [10, 5]}
    assert plan.activated_share == (30 * 10 + 10 * 5) / (40 * 10)


def test_a_plan_is_the_same_in_two_runs(tiny: Tiny) -> None:
    budget = Budget(0.4)
    assert _plan(tiny.statistics, budget).digest() == _plan(tiny.statistics, budget).digest()


def test_permuting_neurons_permutes_the_masks() -> None:
    statistics = _layers([4], [16])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))

    def permuted(tensor: Tensor) -> Tensor:
        return tensor[..., order] if tensor.shape[-1] == 16 else tensor

    layers = {0: {name: permuted(tensor) for name, tensor in statistics.layers[0].items()}}
    budget = Budget(0.5, width_multiple=1)
    other = _plan(dataclasses.replace(statistics, layers=layers), budget)
    assert torch.equal(other.keep[0], _plan(statistics, budget).keep[0][:, order])


# ---- coverage ----


def _thin(counts: list[int]) -> Statistics:
    statistics = _layers([4], [16])
    statistics.layers[0]["counts"].copy_(torch.tensor([counts]))
    return statistics


def test_coverage_counts_tokens_of_all_domains() -> None:
    assert planning.under_covered_experts(_thin([31, 32, 0, 33])) == [(0, 0), (0, 2)]


def test_under_covered_experts_are_pruned_like_others_by_default() -> None:
    budget = Budget(0.5, width_multiple=1)
    thin, thick = _plan(_thin([31, 99, 99, 99]), budget), _plan(_thin([99] * 4), budget)
    assert thin.widths() == thick.widths()


def test_under_covered_experts_can_be_kept_whole_within_the_same_budget() -> None:
    statistics = _thin([99, 99, 5, 99])
    statistics.layers[0]["direction_change"].copy_(torch.tensor([[3.0, 2.0, 0.0, 1.0]]))
    plan = _plan(statistics, Budget(0.6, alpha=0.25, width_multiple=1), "keep")
    assert plan.widths()[0][2] == 16
    assert plan.widths()[0][0] == 16
    assert plan.static_share() <= 0.6


def test_under_covered_experts_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(
        PlanError, match="whole experts must fit .* fewer experts kept for coverage"
    ):
        _plan(_thin([5, 5, 5, 99]), Budget(0.5), "keep")


@pytest.mark.parametrize("method", ["tenp", "enp", "drop", "dern"])
def test_under_covered_experts_can_be_an_error(method: str) -> None:
    with pytest.raises(
        PlanError, match="must see 32 calibration tokens, got 5 for layer 0 expert 2"
    ):
        _plan(_thin([99, 99, 5, 99]), Budget(0.5, method), "fail")
    assert _plan(_thin([99, 99, 32, 99]), Budget(0.5, method), "fail").widths()


@pytest.mark.parametrize("method", ["drop", "dern"])
def test_methods_that_drop_experts_keep_none_for_coverage(method: str) -> None:
    with pytest.raises(PlanError, match=f"must be warn or fail with method {method}, .* got keep"):
        _plan(_thin([99, 99, 5, 99]), Budget(0.5, method), "keep")


def test_coverage_spelled_wrong_is_refused() -> None:
    with pytest.raises(PlanError, match="must be one of warn, keep, fail, got kepp"):
        _plan(_thin([99] * 4), Budget(0.5), "kepp")


# ---- what cannot be met ----


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(0.0), "keep must be above 0 and at most 1, got 0.0"),
        (Budget(1.01), "keep must be above 0 and at most 1, got 1.01"),
        (Budget(-0.5), "keep must be above 0"),
        (Budget(float("nan")), "keep must be a number, got nan"),
        (Budget(float("inf")), "keep must be a number, got inf"),
        (Budget(0.5, alpha=-0.1), "alpha must be between 0 and 1, got -0.1"),
        (Budget(0.5, alpha=1.1), "alpha must be between 0 and 1, got 1.1"),
        (Budget(0.5, alpha=0.6), "alpha must be at most keep, .*; 0.5 or less would fit"),
        (Budget(0.5, method="enp", alpha=0.1), "alpha needs method tenp, got 0.1 with method enp"),
        (
            Budget(0.5, method="best", shallow=2.0),
            "shallow needs method tenp, got 2.0 with .* best",
        ),
        (Budget(0.5, method="enp", deep=1.0), "deep needs method tenp, got 1.0 with method enp"),
        (
            Budget(0.5, method="drop", width_multiple=4),
            "width_multiple needs method tenp or enp or best, got 4 with method drop",
        ),
        (Budget(0.5, activated=0.5), "activated needs method best, got 0.5 with method tenp"),
        (Budget(0.5, pool="modle"), "pool must be one of layer, model, got modle"),
        (Budget(0.5, method="easy"), "method must be one of tenp, enp, best, drop, dern, got easy"),
        (Budget(0.5, shallow=-1.0), "shallow and deep must be 0 or more and not both 0, got -1.0"),
        (Budget(0.5, shallow=0.0, deep=0.0), "not both 0, got 0.0 and 0.0"),
        (Budget(0.5, shallow=float("nan")), "shallow must be a number, got nan"),
        (Budget(0.5, width_multiple=0), "width_multiple must be 1 or more, got 0"),
        (Budget(0.5, method="enp", width_multiple=0), "width_multiple must be 1 or more, got 0"),
        (Budget(0.5, method="enp", width_multiple=-4), "width_multiple must be 1 or more, got -4"),
    ],
)
def test_an_impossible_budget_is_refused(budget: Budget, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        planning.check_budget(budget)


def test_whole_experts_rounded_above_the_budget_say_which_alpha_would_fit() -> None:
    # alpha 0.5 of 3 experts rounds to 2, which is more than half.
    with pytest.raises(PlanError, match="alpha 0.3333 or less would fit"):
        _plan(_layers([3], [10]), Budget(0.5, alpha=0.5))
    assert _plan(_layers([3], [10]), Budget(0.5, alpha=0.3333, width_multiple=1)).widths()


def test_enp_without_a_single_neuron_is_refused_with_a_multiple_that_would_fit() -> None:
    # 0.1 * 24 = 2.4 neurons: no multiple of 4, but 2.
    with pytest.raises(PlanError, match="width_multiple 2 or less would fit"):
        _plan(_layers([6], [24]), Budget(0.1, method="enp", width_multiple=4))
