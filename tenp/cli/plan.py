# SPDX-License-Identifier: Apache-2.0
"""`tenp plan`: statistics and a budget to a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenp import pipeline
from tenp.cli import display, options
from tenp.files import require_absent
from tenp.planning import Budget
from tenp.statistics import Statistics


def command(
    statistics: Annotated[
        Path, typer.Argument(metavar="STATISTICS", help="A file of `tenp calibrate`.")
    ],
    keep: options.Keep,
    out: Annotated[Path | None, typer.Option(help="Where to write; must not exist.")] = None,
    method: options.Method = options.MethodName.tenp,
    alpha: options.Alpha = None,
    shallow: options.Shallow = 1.0,
    deep: options.Deep = 2.0,
    width_multiple: options.WidthMultiple = None,
    neurons: options.Neurons = options.NeuronCriterionName.projection,
    domain_weight: options.DomainWeight = [],  # noqa: B006 - typer copies it
    under_covered: options.UnderCovered = options.UnderCoveredName.warn,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Decide which neurons are kept. Takes milliseconds; one calibration serves every budget."""
    if out is None and not dry_run:
        raise typer.BadParameter("--out is needed unless --dry-run is given")
    if out is not None:
        require_absent(out)
    loaded = Statistics.load(statistics)
    decided = pipeline.plan(
        loaded,
        Budget(keep, method.value, alpha, shallow, deep, width_multiple),
        neuron_criterion=neurons.value,
        domain_weights=options.parse_weights(domain_weight),
        under_covered=under_covered.value,
    )
    display.warn_of_coverage(loaded)
    if out is not None and not dry_run:
        decided.save(out)
    display.show_plan(decided, json)
