# SPDX-License-Identifier: Apache-2.0
"""`tenp apply`: a checkpoint and a plan to a pruned checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenp import pipeline
from tenp.checkpoint import Checkpoint
from tenp.cli import display, options
from tenp.plan import Plan
from tenp.statistics import Statistics


def command(
    model: options.Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A file of `tenp plan`.")],
    out: options.Out,
    weights: options.Weights = "keep",
    statistics: options.StatisticsFile = None,
    verify: options.Verify = True,
    memory: options.Memory = None,
    work_dir: options.WorkDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the pruned checkpoint, tensor by tensor."""
    decided = Plan.load(plan)
    loaded = None if statistics is None else Statistics.load(statistics)
    run = pipeline.Run(execution=options.execution(None, memory, None, work_dir))
    with display.progress(quiet, json) as report:
        error = pipeline.apply(
            Checkpoint.resolve(model),
            decided,
            out,
            verify,
            run=run,
            report=report,
            statistics=loaded,
            weights=options.weights(weights),
        )
    display.show_applied(decided, error, out, json)
