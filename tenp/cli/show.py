# SPDX-License-Identifier: Apache-2.0
"""`tenp show`: what is in a file that tenp wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenp.cli import display, options
from tenp.errors import InvalidArgument
from tenp.plan import Plan
from tenp.pruning import PLAN_FILE
from tenp.statistics import Statistics


def command(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="Statistics, a plan, or a pruned checkpoint."),
    ],
    json: options.Json = False,
) -> None:
    """Show statistics, or a plan with its trapezoid."""
    if path.is_dir():
        if not (path / PLAN_FILE).exists():
            raise InvalidArgument(
                f"{path} must be a checkpoint pruned by tenp, got a directory without {PLAN_FILE}"
            )
        path = path / PLAN_FILE
    if path.suffix == ".json":
        display.show_plan(Plan.load(path), json)
    else:
        display.show_statistics(Statistics.load(path), json)
