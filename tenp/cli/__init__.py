# SPDX-License-Identifier: Apache-2.0
"""The command `tenp`: one module a command, all of them thin over `tenp.pipeline`."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from rich.console import Console
from rich.markup import escape

from tenp.cli.app import app
from tenp.errors import TenpError

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; an expected error is one sentence on stderr and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet_transformers()
    try:
        app()
    except TenpError as error:
        Console(stderr=True).print(
            f"[bold red]tenp:[/] {escape(str(error))}", soft_wrap=True, highlight=False
        )
        sys.exit(2)


def _quiet_transformers() -> None:
    """What transformers reports while loading is repeated, if it matters, by our own checks."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.captureWarnings(True)
    warnings.simplefilter("ignore")
