# SPDX-License-Identifier: Apache-2.0
"""`tenp report`: a pruned checkpoint to a page of figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenp import pipeline
from tenp.cli import options


def command(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A checkpoint that tenp pruned.")
    ],
    out: options.Out,
    statistics: Annotated[
        Path | None, typer.Option(help="The statistics of its plan, for frequencies and coverage.")
    ] = None,
    data: Annotated[
        list[str],
        typer.Option(metavar="FILE...", help="Text to count the pruned model's expert choices on."),
    ] = [],  # noqa: B006 - typer copies it
    results: Annotated[
        list[Path],
        typer.Option(metavar="FILE...", help="Files of benchmarks/quality.py."),
    ] = [],  # noqa: B006 - typer copies it
) -> None:
    """Draw what was kept and what it cost: one HTML page with its pictures inside, and PNG files."""
    print(f"written to {pipeline.report(directory, out, statistics, data, results)}")
