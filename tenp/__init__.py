# SPDX-License-Identifier: Apache-2.0
"""Compress Mixture-of-Experts language models by narrowing experts to their important neurons.

Importing this package also teaches transformers to load and save pruned checkpoints.
"""

from importlib.metadata import version

from tenp import runtime
from tenp.checkpoint import Checkpoint
from tenp.errors import TenpError
from tenp.pipeline import Pruned, Run, apply, calibrate, evaluate, plan, prune
from tenp.plan import Plan
from tenp.planning import Budget
from tenp.statistics import Statistics, merge

__version__ = version("tenp")

__all__ = [
    "Budget",
    "Checkpoint",
    "Plan",
    "Pruned",
    "Run",
    "Statistics",
    "TenpError",
    "apply",
    "calibrate",
    "evaluate",
    "merge",
    "plan",
    "prune",
    "runtime",
]
