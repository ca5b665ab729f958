# SPDX-License-Identifier: Apache-2.0
"""`tenp merge`: statistics of several runs to one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tenp.cli import display, options
from tenp.files import require_absent
from tenp.statistics import Statistics, merge


def command(
    statistics: Annotated[
        list[Path],
        typer.Argument(metavar="STATISTICS...", help="Files of `tenp calibrate`."),
    ],
    out: options.Out,
    json: options.Json = False,
) -> None:
    """Add statistics of one model: other domains stand side by side, equal ones are summed."""
    require_absent(out)
    merged = merge(Statistics.load(path) for path in statistics)
    merged.save(out)
    display.show_statistics(merged, json)
