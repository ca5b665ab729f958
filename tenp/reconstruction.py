# SPDX-License-Identifier: Apache-2.0
"""Plans by what the experts' outputs lose: the method `best`, and repair for the plans of any method.

Second moments to plan, with no forward pass: `tenp.selection` orders every expert's neurons,
`tenp.allocation` shares out the widths, `tenp.repair` refits what stays and predicts the error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenp import allocation, repair, selection
from tenp.allocation import Curves
from tenp.plan import Plan, Repair
from tenp.planning import (
    Budget,
    UnderCovered,
    activated_share,
    automatic_width_multiple,
    check_budget,
    check_under_covered,
    kept_for_coverage,
    settings_of,
)
from tenp.selection import Elimination
from tenp.statistics import Statistics

#: Experts whose matrices are worked on at once take up to so many bytes.
_CHUNK_BYTES = 1 << 28

#: Steps of re-weighting that --worst-domain takes, and how strongly a step reacts.
_WORST_DOMAIN_STEPS, _WORST_DOMAIN_RATE = 6, 1.0


@dataclass(frozen=True)
class Eliminations:
    """The order of removals of all layers: every budget's plan is a cut through it.

    Attributes:
        layers: Decoder layer index to the removals of its experts.
        weights: What each domain's second moments were multiplied by.
        protected: Decoder layer index to `[E, I]` bool, the neurons that go last.
    """

    layers: dict[int, Elimination]
    weights: dict[str, float]
    protected: dict[int, Tensor]


def plan(
    statistics: Statistics,
    budget: Budget,
    domain_weights: Mapping[str, float] | None = None,
    under_covered: UnderCovered = "warn",
    worst_domain: bool = False,
) -> Plan:
    """Decide by removal cost what every expert keeps, and how it is repaired.

    Args:
        statistics: With second moments.
        budget: Of method `best`.
        domain_weights: Weight of each domain's error, 1 if not given.
        under_covered: As in `tenp.planning.plan`; `keep` keeps such experts whole as far as the
            budget allows.
        worst_domain: Re-weight the domains until the largest relative error of one is smallest.

    Raises:
        InvalidArgument: The statistics have no second moments.
        PlanError: The budget cannot be met.
    """
    check_budget(budget)
    check_under_covered(under_covered, budget.method)
    repair.require_moments(statistics)
    weights = repair.moment_weights(statistics, domain_weights)

    def decide(weights: Mapping[str, float]) -> Plan:
        removals = eliminate(statistics, weights, under_covered)
        return cut(statistics, removals, budget, under_covered)

    if not worst_domain:
        return decide(weights)
    best: tuple[float, Plan] | None = None
    for _ in range(_WORST_DOMAIN_STEPS):
        decided = decide(weights)
        errors = domain_errors(statistics, decided)
        worst = max(errors.values())
        if best is None or worst < best[0]:
            best = worst, decided
        mean = sum(errors.values()) / len(errors)
        if mean == 0:
            break
        weights = {
            name: weight * (errors[name] / mean) ** _WORST_DOMAIN_RATE
            for name, weight in weights.items()
        }
    assert best is not None
    return dataclasses.replace(best[1], settings={**best[1].settings, "worst_domain": True})


def eliminate(
    statistics: Statistics,
    weights: Mapping[str, float],
    under_covered: UnderCovered = "warn",
    protected: Mapping[int, Tensor] | None = None,
) -> Eliminations:
    """Order the removals of every expert of every layer.

    Args:
        statistics: With second moments.
        weights: What each domain's second moments are multiplied by, by name.
        under_covered: As in `plan`.
        protected: Decoder layer index to `[E, I]` bool, the neurons that go last; None finds those of
            huge activations.
    """
    guards = {**(protected or allocation.super_neurons(statistics.layers))}
    for layer, expert in kept_for_coverage(statistics, under_covered):
        guards[layer][expert] = True
    layers = {}
    for layer in statistics.layers:
        moments = repair.layer_moments(statistics, layer, weights)
        total, fixed = moments.moment, moments.fixed()
        guarded = torch.nn.functional.pad(guards[layer], (0, len(fixed) - moments.width))
        size = max(_CHUNK_BYTES // (8 * len(fixed) ** 2), 1)
        parts = [
            selection.eliminate(gram, moment, fixed=fixed, protected=guard)
            for gram, moment, guard in zip(
                moments.gram.split(size),
                total.split(size),
                guarded.split(size),
                strict=True,
            )
        ]
        layers[layer] = Elimination(
            torch.cat([part.order for part in parts]),
            torch.cat([part.costs for part in parts]),
        )
    return Eliminations(layers, dict(weights), guards)


def widths_for(
    statistics: Statistics, removals: Eliminations, budget: Budget
) -> dict[int, list[int]]:
    """Return the widths that a budget buys, by layer.

    Raises:
        InvalidArgument: Widths are to be pooled over the model, without measured sensitivities.
    """
    keep, _ = check_budget(budget)
    curves = []
    for layer, removal in removals.layers.items():
        costs = removal.costs
        guarded = removals.protected[layer].gather(1, removal.order)
        # Far above every cost, yet small enough to be added up.
        costs = costs.masked_fill(guarded, 1e9 * float(costs.max().clamp(min=1.0)))
        tokens = statistics.layers[layer]["counts"].sum(dim=0).double()
        sensitivity = 1.0
        if budget.pool == "model":
            sensitivity = repair.sensitivity(statistics, layer, removals.weights)
        curves.append(Curves(costs, tokens, sensitivity))
    width = curves[0].costs.shape[1]
    multiple = budget.width_multiple or automatic_width_multiple(width)
    floor = budget.keep / 2 if budget.floor is None else budget.floor
    found = allocation.allocate(curves, multiple, float(keep), budget.activated, budget.pool, floor)
    return dict(zip(removals.layers, found, strict=True))


def cut(
    statistics: Statistics,
    removals: Eliminations,
    budget: Budget,
    under_covered: UnderCovered = "warn",
) -> Plan:
    """Make the plan that keeps what the budget buys.

    Args:
        statistics: With second moments.
        removals: Of the same statistics; they serve every budget.
        budget: Of method `best`.
        under_covered: For the record.
    """
    masks = {}
    for layer, widths in widths_for(statistics, removals, budget).items():
        masks[layer] = keep_last(removals.layers[layer].order, widths)
    counts = {layer: sums["counts"].sum(dim=0) for layer, sums in statistics.layers.items()}
    decided = Plan(
        source=statistics.source,
        statistics=statistics.digest(),
        settings={**settings_of(budget), "under_covered": under_covered},
        keep=masks,
        activated_share=activated_share(masks, counts),
    )
    return _repaired(decided, statistics, removals.weights)


def keep_last(order: Tensor, widths: Sequence[int]) -> Tensor:
    """Return `[E, I]` bool: the neurons that are removed last, as many as each expert's width.

    Args:
        order: `[E, I]`, neurons in the order of their removal.
        widths: `E` widths, 0..I.
    """
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return rank >= order.shape[1] - torch.tensor(widths).unsqueeze(1)


def with_repair(
    decided: Plan,
    statistics: Statistics,
    domain_weights: Mapping[str, float] | None = None,
) -> Plan:
    """Return a plan that also refits what it keeps.

    Args:
        decided: A plan that narrows experts; what it keeps stays as it is.
        statistics: The ones it was made from, with second moments.
        domain_weights: Weight of each domain's error, 1 if not given.
    """
    repair.require_moments(statistics)
    return _repaired(decided, statistics, repair.moment_weights(statistics, domain_weights))


def _repaired(decided: Plan, statistics: Statistics, weights: Mapping[str, float]) -> Plan:
    ridges, errors = {}, {}
    for layer, keep in decided.keep.items():
        moments = repair.layer_moments(statistics, layer, weights)
        fits = repair.fit_layer(moments, keep)
        ridges[layer] = [fit.ridge for fit in fits]
        errors[layer] = repair.relative_errors(moments, fits)
    singular = repair.singular_experts(statistics)
    return dataclasses.replace(decided, repair=Repair(ridges, dict(weights), errors, singular))


def domain_errors(statistics: Statistics, decided: Plan) -> dict[str, float]:
    """Predict what a repaired plan costs every domain: error over energy, the mean over layers.

    Args:
        statistics: The ones that the plan was made from.
        decided: A plan with repair.
    """
    assert decided.repair is not None
    errors = {domain.name: 0.0 for domain in statistics.domains}
    for layer, keep in decided.keep.items():
        fitted_on = repair.layer_moments(statistics, layer, decided.repair.weights)
        masks = fitted_on.with_bias(keep)
        transforms = [
            repair.refit(moment, mask, ridge)
            for moment, mask, ridge in zip(
                fitted_on.moment, masks, decided.repair.ridges[layer], strict=True
            )
        ]
        for name in errors:
            only = {other: float(other == name) for other in errors}
            moment = repair.layer_moments(statistics, layer, only).moment
            energy = float(repair.energy(fitted_on.gram, moment).sum()) or 1.0
            lost = sum(map(repair.residual, fitted_on.gram, moment, masks, transforms))
            errors[name] += lost / energy / len(decided.keep)
    return errors


@dataclass(frozen=True)
class Prediction:
    """What a budget would give, before anything is written.

    Attributes:
        keep: The share asked for.
        static_share: The share of routed parameters kept.
        activated_share: The share of activated routed parameters kept.
        parameters: Of the whole pruned model.
        bytes: Of the whole pruned model.
        error: Squared output error of the experts over their squared output, mean over layers.
        crossed: The same on one half of the samples when fitted on the other.
    """

    keep: float
    static_share: float
    activated_share: float
    parameters: int
    bytes: int
    error: float
    crossed: float


def predict(decided: Plan) -> Prediction:
    """Summarise a plan with repair."""
    assert decided.repair is not None
    errors = decided.repair.errors.values()
    return Prediction(
        decided.settings["keep"],
        decided.static_share(),
        decided.activated_share,
        decided.total_parameters(),
        decided.total_bytes(),
        sum(error["repaired"] for error in errors) / len(errors),
        sum(error["crossed"] for error in errors) / len(errors),
    )
