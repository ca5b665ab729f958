# SPDX-License-Identifier: Apache-2.0
"""`tenp plan`: statistics and a budget to a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenp import pipeline
from tenp.checkpoint import Checkpoint
from tenp.cli import display, options
from tenp.files import require_absent
from tenp.planning import Budget
from tenp.statistics import Statistics


def command(
    statistics: Annotated[
        Path, typer.Argument(metavar="STATISTICS", help="A file of `tenp calibrate`.")
    ],
    keep: Annotated[
        float | None,
        typer.Option(help="Share of the routed experts' parameters to keep, 0..1."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write; must not exist.")] = None,
    method: options.Method = "tenp",
    alpha: options.Alpha = None,
    shallow: options.Shallow = 1.0,
    deep: options.Deep = 2.0,
    width_multiple: options.WidthMultiple = None,
    neurons: options.Neurons = "projection",
    domain_weight: options.DomainWeight = [],  # noqa: B006 - typer copies it
    under_covered: options.UnderCovered = "warn",
    experts: options.Experts = None,
    activated: options.Activated = None,
    pool: options.Pool = "layer",
    floor: options.Floor = None,
    repair: options.Repair = "none",
    worst_domain: options.WorstDomain = False,
    dern_threshold: options.DernThreshold = 0.6,
    dern_init: options.DernInit = "max-gate",
    dern_weights: options.DernWeights = True,
    seed: options.Seed = 0,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="For criteria that need the weights."),
    ] = None,
    frontier: Annotated[
        str | None,
        typer.Option(
            metavar="SHARES",
            help="Predict the method best for shares like 0.9,0.8,0.7; writes nothing.",
        ),
    ] = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Decide which neurons are kept. Reads no text; one calibration serves every budget."""
    if keep is None and frontier is None:
        raise typer.BadParameter("--keep is needed unless --frontier is given")
    if out is None and not dry_run and frontier is None:
        raise typer.BadParameter("--out is needed unless --dry-run is given")
    if out is not None:
        require_absent(out)
    loaded = Statistics.load(statistics)
    weights = options.parse_weights(domain_weight)
    display.warn_of_coverage(loaded)
    if frontier is not None:
        budgets = [
            Budget(
                share,
                "best",
                width_multiple=width_multiple,
                activated=activated,
                pool=pool,
                floor=floor,
            )
            for share in options.parse_shares(frontier)
        ]
        display.show_frontier(pipeline.frontier(loaded, budgets, weights, under_covered), json)
        return
    assert keep is not None
    decided = pipeline.plan(
        loaded,
        Budget(keep, method, alpha, shallow, deep, width_multiple, activated, pool, floor),
        neuron_criterion=neurons,
        domain_weights=weights,
        under_covered=under_covered,
        expert_criterion=experts,
        refit=repair == "ls",
        worst_domain=worst_domain,
        seed=seed,
        checkpoint=None if model is None else Checkpoint.resolve(model),
        dern_options=options.dern(dern_threshold, dern_init, dern_weights, seed),
    )
    if out is not None and not dry_run:
        decided.save(out)
    display.show_plan(decided, json)
