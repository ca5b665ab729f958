# SPDX-License-Identifier: Apache-2.0
"""Evaluation layer by layer, for models larger than memory.

All batches go through the layers as in `tenp.streaming`. What the last layer puts out is kept for
every predicted token and every model; the logits are made from that a few tokens at a time, so
that two models are compared without ever being in memory together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tenp.evaluation import CHUNK, DomainEvaluation, DomainSums, require_targets
from tenp.layerwise import LayerwiseModel
from tenp.samples import Samples
from tenp.storage import Storage
from tenp.streaming import Batch, Progress, Stream, StreamedRun, make_batches


@torch.no_grad()
def evaluate(
    model: LayerwiseModel,
    samples: Sequence[Samples],
    reference: LayerwiseModel | None = None,
    batch_tokens: int = 4096,
    stream: Stream = "layers",
    progress: Progress | None = None,
) -> list[DomainEvaluation]:
    """Evaluate like `tenp.evaluation.evaluate`, with the weights read layer by layer.

    Args:
        model: The model to measure; its experts may have any widths.
        samples: One entry per domain.
        reference: The dense model, for divergence and agreement.
        batch_tokens: Token positions per forward pass.
        stream: `layers` or `experts`.
        progress: Told of every batch and layer.

    Returns:
        One evaluation per domain, in order: that of a run in memory, but for the rounding of sums in
        another order.

    Raises:
        DataError: A domain has only samples of one token.
        CheckpointError: A checkpoint is damaged.
    """
    for domain in samples:
        require_targets(domain)
    batches = make_batches(samples, batch_tokens)
    models = [model] if reference is None else [model, reference]
    states = []
    for each in models:
        states.append(_last_hidden(each, batches, stream, progress))
        each.load_head()
    sums = [DomainSums(model.device) for _ in samples]
    for number, batch in enumerate(batches):
        predicted = batch.mask[:, 1:].bool()
        targets = batch.ids[:, 1:][predicted].to(model.device)
        rows = [hidden[number][:, :-1][predicted.to(hidden[number].device)] for hidden in states]
        for begin in range(0, len(targets), CHUNK):
            chunk = slice(begin, begin + CHUNK)
            logits = [each.logits(row[chunk]) for each, row in zip(models, rows, strict=True)]
            sums[batch.domain].add(logits[0], targets[chunk], *logits[1:])
    return [each.figures(domain.domain) for each, domain in zip(sums, samples, strict=True)]


def _last_hidden(
    model: LayerwiseModel,
    batches: Sequence[Batch],
    stream: Stream,
    progress: Progress | None,
) -> list[Tensor]:
    """Return what the last layer puts out for every batch, `[B, n, H]` each."""
    run = StreamedRun(model, batches, stream, Storage(), progress)
    run.last_layer = len(model) - 1
    for layer in range(len(model)):
        run.pass_layer(layer)
    assert run.hidden is not None
    return run.hidden
