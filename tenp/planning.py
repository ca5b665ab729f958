# SPDX-License-Identifier: Apache-2.0
"""Scores and a budget to a plan: how many experts stay whole, how wide the others are, what they keep.

Widths are counted in neurons, which all cost the same, so shares of neurons are shares of routed
parameters. Shares are exact fractions: 0.3 means 3/10, not the nearest binary number.
Equations: docs/method.md, section "Budget and trapezoid".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from math import floor
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tenp.allocation import Pool
from tenp.errors import PlanError
from tenp.plan import Plan
from tenp.scores import Scores
from tenp.statistics import Statistics

Method = Literal["tenp", "enp", "best", "drop", "dern"]
UnderCovered = Literal["warn", "keep", "fail"]

#: What a method uses of a budget beside the kept share; the rest must be left alone.
_USED: Mapping[Method, tuple[str, ...]] = {
    "tenp": ("alpha", "shallow", "deep", "width_multiple"),
    "enp": ("width_multiple",),
    "best": ("width_multiple", "activated", "pool", "floor"),
    "drop": (),
    "dern": (),
}

#: Below this many calibration tokens the scores of an expert's neurons are mostly noise.
MINIMUM_COVERAGE = 32


@dataclass(frozen=True)
class Budget:
    """How much is kept, and in which shape.

    Attributes:
        keep: Kept share rho of the routed experts' parameters, 0 < keep <= 1. The paper's "40 %
            sparsity" is 0.6.
        method: `tenp` keeps the important experts whole and narrows the others; `enp` narrows all
            experts to one width, which gives an ordinary smaller checkpoint. `drop` removes the experts
            of the lowest scores from the model and its routers; `dern` hands their neurons on to the
            others first (`tenp.dern`). `best` removes the neurons whose loss costs least after
            repair (`tenp.reconstruction`).
        alpha: For `tenp`: share of the experts kept whole; None is keep / 2.
        shallow: For `tenp`: weight of the first MoE layer in the trapezoid.
        deep: Weight of the last one. Equal weights give a rectangle.
        width_multiple: For `tenp`, `enp` and `best`: widths are multiples of this; None picks it from
            the full width.
        activated: For `best`: kept share of the routed parameters that calibration tokens activate,
            at most.
        pool: For `best`: experts compete within their `layer`, or over the whole `model`.
        floor: Share that every layer keeps at least when pooled over the model; None is keep / 2.
    """

    keep: float
    method: Method = "tenp"
    alpha: float | None = None
    shallow: float = 1.0
    deep: float = 2.0
    width_multiple: int | None = None
    activated: float | None = None
    pool: Pool = "layer"
    floor: float | None = None


def plan(
    scores: Scores,
    statistics: Statistics,
    budget: Budget,
    under_covered: UnderCovered = "warn",
) -> Plan:
    """Decide what every expert keeps.

    Args:
        scores: From `tenp.scoring.score` on the same statistics.
        statistics: Give the tokens per expert, for the activated share and for coverage.
        budget: What is kept.
        under_covered: What becomes of experts that saw fewer than `MINIMUM_COVERAGE` tokens:
            `warn` treats them like the others, `keep` keeps them whole, which the methods that drop
            experts cannot, `fail` refuses.

    Returns:
        A plan whose kept share is never above `budget.keep` and less than one width multiple per
        narrow expert below it.

    Raises:
        PlanError: The budget cannot be met, and the message says what would fit; or an expert saw
            too few tokens.
    """
    keep, alpha = check_budget(budget)
    check_under_covered(under_covered, budget.method)
    kept_whole = kept_for_coverage(statistics, under_covered)
    if budget.method in ("drop", "dern"):
        return _drop_experts(scores.experts, statistics, budget, keep, under_covered)
    counts = {layer: tensors["counts"].sum(dim=0) for layer, tensors in statistics.layers.items()}
    whole = _whole_experts(scores.experts, budget, alpha)
    for layer, expert in kept_whole:
        whole[layer][expert] = True
    full_widths = {layer: neurons.shape[1] for layer, neurons in scores.neurons.items()}
    multiples = {
        layer: budget.width_multiple or automatic_width_multiple(width)
        for layer, width in full_widths.items()
    }
    widths = allocate_widths(
        scores.experts,
        whole,
        full_widths,
        multiples,
        keep,
        spread=budget.method == "tenp",
    )
    masks = {layer: keep_highest(scores.neurons[layer], widths[layer]) for layer in widths}
    return Plan(
        source=statistics.source,
        statistics=statistics.digest(),
        settings={**settings_of(budget), "under_covered": under_covered},
        keep=masks,
        activated_share=activated_share(masks, counts),
    )


def _drop_experts(
    expert_scores: Mapping[int, Tensor],
    statistics: Statistics,
    budget: Budget,
    keep: Fraction,
    under_covered: UnderCovered,
) -> Plan:
    """Keep the floor(keep E) experts of the highest scores of every layer, and nothing of the others."""
    experts, masks = {}, {}
    for layer, scores in expert_scores.items():
        count = floor(keep * len(scores))
        if count == 0:
            raise PlanError(
                f"every layer must keep an expert, got {float(keep):.4g} of {len(scores)} experts"
            )
        stays = keep_highest(scores.unsqueeze(0), [count])[0]
        experts[layer] = torch.nonzero(stays).flatten().tolist()
        width = statistics.layers[layer]["down_norm"].shape[1]
        masks[layer] = stays.unsqueeze(1).repeat(1, width)
    return Plan(
        source=statistics.source,
        statistics=statistics.digest(),
        settings={**settings_of(budget), "under_covered": under_covered},
        keep=masks,
        # Routers choose among those that stay, so as many whole experts work for a token as before.
        activated_share=1.0,
        experts=experts,
    )


def settings_of(budget: Budget) -> dict[str, Any]:
    """Return the fields of a budget that its method uses, for the record."""
    used = {name: getattr(budget, name) for name in ("keep", "method", *_USED[budget.method])}
    if budget.method == "tenp":
        used["alpha"] = float(check_budget(budget)[1])
    if budget.activated is None:
        used.pop("activated", None)
    if budget.pool == "layer":
        used.pop("pool", None)
        used.pop("floor", None)
    return used


def check_budget(budget: Budget) -> tuple[Fraction, Fraction]:
    """Return the exact kept share and alpha.

    Raises:
        PlanError: A value is out of range or they cannot be met together.
    """
    keep = _fraction("keep", budget.keep)
    if not 0 < keep <= 1:
        raise PlanError(f"keep must be above 0 and at most 1, got {budget.keep}")
    if budget.method not in get_args(Method):
        raise PlanError(f"method must be one of {', '.join(get_args(Method))}, got {budget.method}")
    if budget.pool not in get_args(Pool):
        raise PlanError(f"pool must be one of {', '.join(get_args(Pool))}, got {budget.pool}")
    for field in fields(budget):
        value, users = getattr(budget, field.name), _users(field.name)
        if users and budget.method not in users and value != field.default:
            raise PlanError(
                f"{field.name} needs method {' or '.join(users)}, got {value} with method {budget.method}"
            )
    if budget.activated is not None and not 0 < budget.activated <= 1:
        raise PlanError(f"activated must be above 0 and at most 1, got {budget.activated}")
    if budget.floor is not None:
        if budget.pool != "model":
            raise PlanError(
                "a floor needs widths pooled over the model, got widths pooled per layer"
            )
        if not 0 <= budget.floor <= budget.keep:
            raise PlanError(f"floor must be between 0 and keep, {budget.keep}, got {budget.floor}")
    if budget.width_multiple is not None and budget.width_multiple < 1:
        raise PlanError(f"width_multiple must be 1 or more, got {budget.width_multiple}")
    shallow, deep = _fraction("shallow", budget.shallow), _fraction("deep", budget.deep)
    if shallow < 0 or deep < 0 or shallow + deep == 0:
        raise PlanError(
            f"shallow and deep must be 0 or more and not both 0, got {budget.shallow} and {budget.deep}"
        )
    if budget.method != "tenp":
        return keep, Fraction(0)
    alpha = keep / 2 if budget.alpha is None else _fraction("alpha", budget.alpha)
    if not 0 <= alpha <= 1:
        raise PlanError(f"alpha must be between 0 and 1, got {budget.alpha}")
    if alpha > keep:
        raise PlanError(
            f"alpha must be at most keep, got alpha {budget.alpha} with keep {budget.keep}: whole experts alone "
            f"would exceed the budget; {budget.keep} or less would fit"
        )
    return keep, alpha


def _users(field: str) -> list[Method]:
    """The methods that use a field of a budget; none for those that all use."""
    return [method for method, used in _USED.items() if field in used]


def trapezoid(
    experts: Sequence[int], alpha: Fraction, shallow: float = 1.0, deep: float = 2.0
) -> list[int]:
    """Share out the whole experts over the layers, more of them in deeper ones.

    Layer l at depth z = l / (L - 1) has weight N_l (shallow + (deep - shallow) z); round(alpha sum N)
    whole experts are shared out in proportion by largest remainder, at most N_l each, the overflow
    handed on. Ties go to the lower layer. The paper gives no schedule; this one is ours.

    Args:
        experts: Experts N_l of every MoE layer, shallow to deep.
        alpha: Share of all experts that stay whole, 0..1.
        shallow: Weight of the first layer.
        deep: Weight of the last layer.

    Returns:
        Whole experts of every layer.
    """
    last = max(len(experts) - 1, 1)
    low, high = Fraction(str(shallow)), Fraction(str(deep))
    weights = [
        count * (low + (high - low) * Fraction(index, last)) for index, count in enumerate(experts)
    ]
    shares = [0] * len(experts)
    remaining = floor(alpha * sum(experts) + Fraction(1, 2))
    # Each round either shares out everything or fills at least one layer, so it ends.
    while remaining:
        open_layers = [index for index in range(len(experts)) if shares[index] < experts[index]]
        total = sum(weights[index] for index in open_layers)
        # Layers of weight 0 get something only when the others are full.
        quota = {
            index: remaining * (weights[index] / total if total else Fraction(1, len(open_layers)))
            for index in open_layers
        }
        given = {index: floor(quota[index]) for index in open_layers}
        by_remainder = sorted(open_layers, key=lambda index: (given[index] - quota[index], index))
        for index in by_remainder[: remaining - sum(given.values())]:
            given[index] += 1
        for index, count in given.items():
            taken = min(count, experts[index] - shares[index])
            shares[index] += taken
            remaining -= taken
    return shares


def automatic_width_multiple(full_width: int) -> int:
    """Return 64 from 512 neurons on, else the largest power of two not above a sixteenth.

    64 is the neuron tile of the kernels, so wider experts lose nothing to padding; narrow ones
    need a finer step to come near the budget.
    """
    return 64 if full_width >= 512 else 1 << max(full_width // 16, 1).bit_length() - 1


def allocate_widths(
    expert_scores: Mapping[int, Tensor],
    whole: Mapping[int, Tensor],
    full_widths: Mapping[int, int],
    multiples: Mapping[int, int],
    keep: Fraction,
    spread: bool,
) -> dict[int, list[int]]:
    """Return the width of every expert under the budget.

    Narrow experts get beta = (keep P_all - P_whole) / P_narrow of their neurons, rounded down to the
    multiple; with `spread` the blocks left over go to the narrow experts in order of score.

    Args:
        expert_scores: Layer to `[E]`, which narrow expert comes first for a block left over.
        whole: Layer to `[E]`, bool, the experts that keep their full width.
        full_widths: Layer to the full width.
        multiples: Layer to the width multiple.
        keep: Share of all neurons that may be kept.
        spread: Hand out the blocks left over; False keeps all narrow experts of a layer equal.

    Raises:
        PlanError: The whole experts alone exceed the budget.
    """
    total = sum(full_widths[layer] * len(flags) for layer, flags in whole.items())
    in_whole = sum(full_widths[layer] * int(flags.sum()) for layer, flags in whole.items())
    budget = floor(keep * total)
    if in_whole > budget:
        experts = sum(len(flags) for flags in whole.values())
        raise PlanError(
            f"the whole experts must fit the budget of {budget} neurons, got {in_whole}; "
            f"alpha {floor(keep * experts) / experts:.4g} or less would fit, or fewer experts kept for coverage"
        )
    narrow = total - in_whole
    beta = Fraction(keep * total - in_whole, narrow) if narrow else Fraction(1)
    widths: dict[int, list[int]] = {}
    for layer, flags in whole.items():
        full, multiple = full_widths[layer], multiples[layer]
        width = full if beta == 1 else floor(beta * full / multiple) * multiple
        if width == 0 and not spread and not flags.all():
            fits = floor(beta * full)
            raise PlanError(
                f"every expert must keep a neuron, got width 0: {float(beta):.4g} of {full} neurons is less than the "
                f"width_multiple {multiple}; "
                + (
                    f"width_multiple {fits} or less would fit"
                    if fits
                    else f"keep {1 / full:.4g} or more would fit"
                )
            )
        widths[layer] = [full if is_whole else width for is_whole in flags.tolist()]
    if spread:
        remaining = budget - sum(sum(layer) for layer in widths.values())
        by_score = sorted(
            (
                (layer, expert)
                for layer, flags in whole.items()
                for expert in torch.nonzero(~flags).flatten().tolist()
            ),
            key=lambda at: (-float(expert_scores[at[0]][at[1]]), at),
        )
        for layer, expert in by_score:
            block = min(multiples[layer], full_widths[layer] - widths[layer][expert])
            if block <= remaining:
                widths[layer][expert] += block
                remaining -= block
    return widths


def keep_highest(scores: Tensor, widths: Sequence[int]) -> Tensor:
    """Return `[E, I]` bool: each expert's highest scores, as many as its width; ties to the lower index.

    Args:
        scores: `[E, I]`.
        widths: `E` widths, 0..I.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(scores.shape[1]).expand_as(order)
    )
    return rank < torch.tensor(widths).unsqueeze(1)


def under_covered_experts(statistics: Statistics) -> list[tuple[int, int]]:
    """Return (layer, expert) of every expert that saw fewer than `MINIMUM_COVERAGE` tokens."""
    return [
        (layer, expert)
        for layer, tensors in statistics.layers.items()
        for expert in torch.nonzero(tensors["counts"].sum(dim=0) < MINIMUM_COVERAGE)
        .flatten()
        .tolist()
    ]


def check_under_covered(under_covered: UnderCovered, method: Method) -> None:
    """Refuse what cannot become of experts that saw little text.

    Raises:
        PlanError: It is not known, or not for this method.
    """
    if under_covered not in get_args(UnderCovered):
        known = ", ".join(get_args(UnderCovered))
        raise PlanError(f"under_covered must be one of {known}, got {under_covered}")
    if under_covered == "keep" and method in ("drop", "dern"):
        raise PlanError(
            f"under_covered must be warn or fail with method {method}, which keeps experts by their scores, got keep"
        )


def kept_for_coverage(statistics: Statistics, under_covered: UnderCovered) -> list[tuple[int, int]]:
    """Return (layer, expert) of every expert that is kept whole because it saw too few tokens.

    Raises:
        PlanError: Such experts are to `fail`, and there is one.
    """
    found = [] if under_covered == "warn" else under_covered_experts(statistics)
    if found and under_covered == "fail":
        layer, expert = found[0]
        tokens = int(statistics.layers[layer]["counts"][:, expert].sum())
        raise PlanError(
            f"every expert must see {MINIMUM_COVERAGE} calibration tokens, got {tokens} for layer {layer} "
            f"expert {expert}; calibrate on more text"
        )
    return found


def _whole_experts(
    expert_scores: Mapping[int, Tensor], budget: Budget, alpha: Fraction
) -> dict[int, Tensor]:
    counts = [len(scores) for scores in expert_scores.values()]
    shares = trapezoid(counts, alpha, budget.shallow, budget.deep)
    return {
        layer: keep_highest(scores.unsqueeze(0), [share]).squeeze(0)
        for (layer, scores), share in zip(expert_scores.items(), shares, strict=True)
    }


def activated_share(keep: Mapping[int, Tensor], counts: Mapping[int, Tensor]) -> float:
    """Return A: the kept neurons summed over tokens and their experts, over the same sum of all neurons."""
    kept = sum(int((mask.sum(dim=1) * counts[layer]).sum()) for layer, mask in keep.items())
    full = sum(int(mask.shape[1] * counts[layer].sum()) for layer, mask in keep.items())
    return kept / full if full else 1.0


def _fraction(name: str, value: float) -> Fraction:
    try:
        return Fraction(str(value))
    except ValueError:
        raise PlanError(f"{name} must be a number, got {value}") from None
