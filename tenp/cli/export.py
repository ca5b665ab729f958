# SPDX-License-Identifier: Apache-2.0
"""`tenp export`: a pruned checkpoint for runtimes that know one width only."""

from __future__ import annotations

from typing import Annotated

import typer

from tenp.checkpoint import Checkpoint
from tenp.cli import options
from tenp.pruning import export_padded


def command(
    model: options.Model,
    out: options.Out,
    padded: Annotated[
        bool,
        typer.Option("--padded", help="Pad every expert with zeros to the full width."),
    ] = False,
) -> None:
    """Write a stock checkpoint that computes the same as the pruned one, at the dense size."""
    if not padded:
        raise typer.BadParameter("choose a format: --padded")
    export_padded(Checkpoint.resolve(model), out)
    print(f"written to {out}")
