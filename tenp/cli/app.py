# SPDX-License-Identifier: Apache-2.0
"""Puts the commands together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tenp
from tenp.cli import apply, calibrate, evaluate, export, merge, plan, prune, report, show
from tenp.cli.options import ManyValues

app = typer.Typer(
    name="tenp",
    help="Prune Mixture-of-Experts language models to experts of different widths.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

for module in (prune, calibrate, merge, plan, apply, show, report, evaluate, export):
    app.command(cls=ManyValues, name=module.__name__.rpartition(".")[2])(module.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(tenp.__version__)
        raise typer.Exit


def _print_cmake_directory(wanted: bool) -> None:
    if wanted:
        directory = next(Path(tenp.__file__).parent.glob("lib*/cmake/tenp"), None)
        if directory is None:
            raise tenp.errors.Unsupported(
                "--cmake-dir needs an installed wheel; an editable install has no C++ package, use cmake --install"
            )
        print(directory)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version.",
        ),
    ] = False,
    cmake_dir: Annotated[
        bool,
        typer.Option(
            "--cmake-dir",
            callback=_print_cmake_directory,
            is_eager=True,
            help="Print where find_package(tenp) looks.",
        ),
    ] = False,
) -> None:
    pass
