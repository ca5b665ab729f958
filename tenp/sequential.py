# SPDX-License-Identifier: Apache-2.0
"""Decides layer by layer, each on what the layers before it put out as they are pruned already.

How wide every expert is, is decided on the dense model, because all layers share one budget. Which
of its neurons stay, and how they are refitted, is decided here when the layer is reached: its experts
are measured, dense as they are, on the hidden states that the pruned and refitted layers before put
out. With `against_dense`, refitting makes each expert put out what it does in the dense model, and so
makes up for the layers before as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tenp import moments, reconstruction, repair, scoring
from tenp.adapter import Experts
from tenp.allocation import super_neurons
from tenp.errors import InvalidArgument
from tenp.layerwise import LayerwiseModel
from tenp.plan import Plan, Repair
from tenp.planning import activated_share, keep_highest
from tenp.repair import LayerMoments
from tenp.statistics import Domain, LayerStatistics, Statistics


@dataclass(frozen=True)
class Options:
    """How a sequential run decides.

    Attributes:
        against_dense: Refit to what the expert puts out in the dense model, not to what it would put
            out, dense, on what it gets.
    """

    against_dense: bool = False


def check(options: Options, method: str, refits: bool) -> None:
    """Refuse what cannot be decided layer by layer, before the model is read.

    Args:
        options: How to decide.
        method: Of the budget.
        refits: Whether what is kept is refitted.

    Raises:
        InvalidArgument: The method drops whole experts, or there is nothing to refit.
    """
    if method in ("drop", "dern"):
        raise InvalidArgument(
            f"--sequential needs a method that chooses neurons, tenp, enp or best, got {method}"
        )
    if options.against_dense and not refits:
        raise InvalidArgument("--against-dense needs --repair ls or --method best, got neither")


@dataclass(frozen=True)
class _Decision:
    """What becomes of a layer."""

    keep: Tensor  # [E, I], bool
    ridges: list[float]  # empty without repair
    errors: dict[str, float]


class Narrowing:
    """What experts become, layer by layer.

    Args:
        first: The plan of the dense model: its widths, and whether and with which weights it repairs.
        dense: The statistics that it was made from.
        options: How to decide.
        neuron_criterion: How neurons are scored; not used by the method `best`.
        domain_weights: Weight of each domain, 1 if not given.
        seed: For the criterion `random`.
        weights: Reads a layer's experts, for criteria that need weights.

    """

    def __init__(
        self,
        first: Plan,
        dense: Statistics,
        options: Options,
        neuron_criterion: str = "projection",
        domain_weights: Mapping[str, float] | None = None,
        seed: int = 0,
        weights: Callable[[int], Experts] | None = None,
    ) -> None:
        self.first, self.options = first, options
        self._criterion, self._domain_weights = neuron_criterion, domain_weights
        self._seed, self._weights = seed, weights
        self._protected = super_neurons(dense.layers)
        self._domains = dense.domains
        self._decisions: dict[int, _Decision] = {}

    def settings(self) -> dict[str, object]:
        """What the statistics of the run depend on, beside the model and the text."""
        return {"plan": self.first.digest(), **dataclasses.asdict(self.options)}

    def successors(
        self, model: LayerwiseModel, stored: torch.dtype
    ) -> Callable[[int, LayerStatistics], Callable[[int], dict[str, Tensor]]]:
        """Return what decides about a layer and reads its experts as they become.

        Args:
            model: The dense model.
            stored: The dtype of the checkpoint: what is refitted is rounded as it will be stored.
        """

        def of_layer(layer: int, sums: LayerStatistics) -> Callable[[int], dict[str, Tensor]]:
            decision, known = self._decide(layer, sums)
            self._decisions[layer] = decision
            experts, read = model.experts[layer], model.expert_reader(layer)
            return lambda expert: _narrowed(experts, read(expert), decision, known, expert, stored)

        return of_layer

    def plan(self, statistics: Statistics) -> Plan:
        """Return the plan that was carried out layer by layer.

        Args:
            statistics: Of the run.
        """
        for layer, sums in statistics.layers.items():
            if layer not in self._decisions:  # finished before the run was stopped
                self._decisions[layer], _ = self._decide(layer, sums)
        masks = {layer: self._decisions[layer].keep for layer in statistics.layers}
        counts = {layer: sums["counts"].sum(dim=0) for layer, sums in statistics.layers.items()}
        fitted = None
        if self.first.repair is not None:
            ridges = {layer: self._decisions[layer].ridges for layer in masks}
            errors = {layer: self._decisions[layer].errors for layer in masks}
            singular = repair.singular_experts(statistics)
            fitted = Repair(ridges, self.first.repair.weights, errors, singular)
        return dataclasses.replace(
            self.first,
            statistics=statistics.digest(),
            settings={**self.first.settings, "sequential": dataclasses.asdict(self.options)},
            keep=masks,
            activated_share=activated_share(masks, counts),
            repair=fitted,
        )

    def _decide(self, layer: int, sums: LayerStatistics) -> tuple[_Decision, LayerMoments | None]:
        statistics = self._statistics(layer, sums)
        widths = self.first.widths()[layer]
        if self.first.settings["method"] == "best":
            assert self.first.repair is not None
            removals = reconstruction.eliminate(
                statistics, self.first.repair.weights, protected=self._protected
            )
            keep = reconstruction.keep_last(removals.layers[layer].order, widths)
        else:
            scores = scoring.score(
                statistics,
                neuron_criterion=self._criterion,
                domain_weights=self._domain_weights,
                seed=self._seed,
                weights=self._weights,
            )
            keep = keep_highest(scores.neurons[layer], widths)
        if self.first.repair is None:
            return _Decision(keep, [], {}), None
        known = repair.layer_moments(statistics, layer, self.first.repair.weights)
        fits = repair.fit_layer(known, keep)
        ridges = [fit.ridge for fit in fits]
        return _Decision(keep, ridges, repair.relative_errors(known, fits)), known

    def _statistics(self, layer: int, sums: LayerStatistics) -> Statistics:
        """The layer alone, the halves of its samples joined."""
        here = {name: tensor.cpu() for name, tensor in sums.items()}
        rows = len(here["counts"])
        if rows == len(self._domains):
            return Statistics(self.first.source, self._domains, {layer: here}, {})
        halves = tuple(
            Domain(f"{domain.name}/{fold}", 0, 0, ())
            for domain in self._domains
            for fold in range(moments.FOLDS)
        )
        return moments.join_halves(Statistics(self.first.source, halves, {layer: here}, {}))


def _narrowed(
    experts: Experts,
    parameters: dict[str, Tensor],
    decision: _Decision,
    known: LayerMoments | None,
    expert: int,
    stored: torch.dtype,
) -> dict[str, Tensor]:
    """Return the parameters of an expert with the neurons that stay, refitted, in the family's layout."""
    keep = decision.keep[expert : expert + 1]
    if known is not None:
        one = experts.with_parameters(parameters)
        bias = one.biases()[2]
        columns, new_bias = repair.refitted_down(
            one.down[0],
            None if bias is None else bias[0],
            known.folds[:, expert].sum(dim=0),
            known.with_bias(keep)[0],
            decision.ridges[expert],
            known.target(expert),
        )
        one.down[0][:, keep[0]] = columns.to(stored).to(one.down.dtype)
        if bias is not None and new_bias is not None:
            bias[0].copy_(new_bias.to(stored))
    return {name: experts.select_neurons(name, tensor, keep) for name, tensor in parameters.items()}
