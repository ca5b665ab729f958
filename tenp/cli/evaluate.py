# SPDX-License-Identifier: Apache-2.0
"""`tenp evaluate`: perplexity, and the distance from a reference."""

from __future__ import annotations

from typing import Annotated

import typer

from tenp import pipeline
from tenp.cli import display, options


def command(
    model: options.Model,
    data: Annotated[
        list[str],
        typer.Option(metavar="FILE...", help="Text, one domain a file, as for calibration."),
    ],
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The dense model, for KL and top-token agreement."),
    ] = None,
    max_length: options.MaxLength = None,
    batch_tokens: options.BatchTokens = 4096,
    dtype: options.DType = "auto",
    device: options.Device = "cpu",
    stream: options.EvaluationStream = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure a model, dense or pruned, on text."""
    run = pipeline.Run(
        None,
        max_length,
        batch_tokens,
        dtype=dtype,
        device=device,
        execution=options.execution(stream),
    )
    with display.progress(quiet, json) as report:
        evaluations = pipeline.evaluate(model, data, run, reference, report)
    if json:
        display.print_json(display.evaluation_rows(evaluations))
    else:
        display.print_evaluations(evaluations)
