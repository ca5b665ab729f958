# SPDX-License-Identifier: Apache-2.0
"""Whether a written checkpoint computes what was planned, with both models in memory in turn.

`tenp.verification` does the same expert by expert, for models larger than memory.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tenp import adapter, evaluation
from tenp.checkpoint import Checkpoint
from tenp.errors import CheckpointError
from tenp.plan import Plan
from tenp.rounding import Change

#: float32 sums in another order differ by about 1e-6 of the largest logit in models of some layers.
_EQUIVALENCE_BOUND = 1e-5


#: Of the routers' choices; rounding changes far fewer, a wrong router far more.
_CHANGED_CHOICES_BOUND = 0.01


def check(checkpoint: Checkpoint, decided: Plan, change: Change | None, written: Path) -> None:
    """Compare a written checkpoint with the dense model: pruned neurons silenced, others refitted or rounded."""
    dense = adapter.load_model(checkpoint.directory, torch.float32)
    if change is not None:
        for experts in adapter.find_experts(dense):
            change.fill(experts)
    evaluation.mask_neurons(dense, decided)
    vocabulary = adapter.vocabulary(dense)
    ids = torch.randint(vocabulary, (2, 64), generator=torch.Generator().manual_seed(0))
    recording = evaluation.record(dense, ids)
    del dense  # one model at a time in memory
    pruned = adapter.load_model(written, torch.float32)
    difference, changed = evaluation.compare(pruned, ids, recording)
    if not difference <= _EQUIVALENCE_BOUND or changed > _CHANGED_CHOICES_BOUND:
        raise CheckpointError(
            f"the written checkpoint must compute what the masked dense model does to {_EQUIVALENCE_BOUND}, "
            f"got a difference of {difference:.2e} of the largest logit and {changed:.2%} other choices of the "
            "routers; nothing was kept"
        )
