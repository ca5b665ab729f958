# SPDX-License-Identifier: Apache-2.0
"""The command `tenp`: one module a command, all of them thin over `tenp.pipeline`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from typing import NoReturn

import torch
from rich.console import Console
from rich.markup import escape

from tenp.cli.app import app
from tenp.errors import TenpError

__all__ = ["app", "fail", "main"]


def main() -> None:
    """Run the command line; an expected error is one sentence on stderr and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet_transformers()
    before = signal.signal(signal.SIGTERM, _unwind)
    try:
        app()
    except TenpError as error:
        fail(str(error))
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason = str(error).strip().split("\n")[0]
        fail(f"out of memory; a smaller --batch-tokens or --max-length needs less: {reason}")
    finally:
        signal.signal(signal.SIGTERM, before)


def fail(message: str) -> NoReturn:
    """Print one sentence on stderr and leave with exit code 2."""
    line = " ".join(message.split())
    Console(stderr=True).print(
        f"[bold red]tenp:[/] {escape(line)}", soft_wrap=True, highlight=False
    )
    sys.exit(2)


def _unwind(number: int, frame: object) -> NoReturn:
    """Leave as after an error, so that schedulers and `kill` leave no half-written files either."""
    sys.exit(128 + number)


def _quiet_transformers() -> None:
    """What transformers reports while loading is repeated, if it matters, by our own checks."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.captureWarnings(True)
    warnings.simplefilter("ignore")
