# SPDX-License-Identifier: Apache-2.0
"""What pruning cost: perplexity, divergence from the dense model, and whether a file is what was planned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tenp.adapter import find_experts
from tenp.errors import DataError
from tenp.plan import Plan
from tenp.samples import Samples

#: Tokens whose distributions are compared at a time.
_CHUNK = 512

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class DomainEvaluation:
    """The figures of one domain; every figure is a mean over its predicted tokens.

    Attributes:
        domain: Its name.
        tokens: Predicted tokens: all but the first of every sample.
        perplexity: exp of the mean negative log-likelihood in nats.
        divergence: KL(reference || model) of the next-token distributions in nats, or None.
        agreement: Share of tokens where both models' likeliest next token is the same, or None.
    """

    domain: str
    tokens: int
    perplexity: float
    divergence: float | None = None
    agreement: float | None = None


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    samples: Sequence[Samples],
    reference: PreTrainedModel | None = None,
    batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> list[DomainEvaluation]:
    """Measure a model on text, and how far it is from a reference.

    Args:
        model: The model to measure.
        samples: One entry per domain.
        reference: The dense model, for divergence and agreement.
        batch_tokens: Token positions per forward pass.
        progress: Called with (domain, tokens) after every batch.

    Returns:
        One evaluation per domain, in order.

    Raises:
        DataError: A domain has only samples of one token.
    """
    return [
        _evaluate_domain(model, domain, reference, batch_tokens, progress) for domain in samples
    ]


def _evaluate_domain(
    model: PreTrainedModel,
    samples: Samples,
    reference: PreTrainedModel | None,
    batch_tokens: int,
    progress: Progress | None,
) -> DomainEvaluation:
    if all(len(ids) < 2 for ids in samples.ids):
        raise DataError(
            f"domain {samples.domain} must have a sample of two tokens or more, or there is nothing to predict"
        )
    tokens = 0
    # Read once, at the end: a GPU would have to be waited for each time.
    totals = torch.zeros(3, dtype=torch.float64, device=model.device)
    for ids, mask in samples.batches(batch_tokens, model.device):
        predicted = mask[:, 1:].bool()
        targets = ids[:, 1:][predicted]
        tokens += len(targets)
        logits = _logits(model, ids, mask, predicted)
        dense = None if reference is None else _logits(reference, ids, mask, predicted)
        # A float32 distribution over a large vocabulary is the largest tensor: few tokens at a time.
        for begin in range(0, len(targets), _CHUNK):
            chunk = slice(begin, begin + _CHUNK)
            ours = F.log_softmax(logits[chunk].float(), dim=-1)
            totals[0] -= ours.gather(1, targets[chunk, None]).double().sum()
            if dense is not None:
                theirs = F.log_softmax(dense[chunk].to(ours.device).float(), dim=-1)
                terms = F.kl_div(ours, theirs, log_target=True, reduction="none")
                totals[1] += terms.double().sum()
                totals[2] += (ours.argmax(dim=1) == theirs.argmax(dim=1)).sum()
        if progress is not None:
            progress(samples.domain, int(mask.sum()))
    loss, divergence, agreed = totals.tolist()
    return DomainEvaluation(
        samples.domain,
        tokens,
        _perplexity(loss / tokens),
        divergence / tokens if reference is not None else None,
        agreed / tokens if reference is not None else None,
    )


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, predicted: Tensor) -> Tensor:
    """`[N, V]`: the logits of the N predicted tokens, on the model's device."""
    ids, mask, predicted = (tensor.to(model.device) for tensor in (ids, mask, predicted))
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[:, :-1][predicted]


def mask_neurons(model: PreTrainedModel, plan: Plan) -> None:
    """Zero the down projections of pruned neurons, in place: the dense twin of the pruned model."""
    for experts in find_experts(model):
        experts.down.mul_(plan.keep[experts.layer].unsqueeze(1).to(experts.down.device))


@torch.no_grad()
def logit_difference(model: PreTrainedModel, reference: PreTrainedModel, ids: Tensor) -> float:
    """Return the largest difference of two models' logits, as a share of the largest logit.

    Args:
        model: The model to check.
        reference: What it should equal.
        ids: `[B, n]` int64 token ids.
    """
    ours = model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
    theirs = reference(input_ids=ids.to(reference.device), use_cache=False).logits.float().cpu()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@dataclass(frozen=True)
class Recording:
    """What a model computed for some tokens, to compare another with.

    Attributes:
        logits: `[B, n, V]`, float32 on the CPU.
        routing: Experts module to what it was called with: `[T, k]` indices and `[T, k]` weights.
    """

    logits: Tensor
    routing: dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def record(model: PreTrainedModel, ids: Tensor) -> Recording:
    """Run a dense model on token ids `[B, n]`, and keep its logits and its routers' choices."""
    routing: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, call: routing.update({name: (call[1].cpu(), call[2].cpu())})

    hooks = [
        experts.module.register_forward_pre_hook(keep(experts.name))
        for experts in find_experts(model)
    ]
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
    for hook in hooks:
        hook.remove()
    return Recording(logits, routing)


@torch.no_grad()
def compare(model: PreTrainedModel, ids: Tensor, recording: Recording) -> tuple[float, float]:
    """Compare a model with a recording of the one that it should equal.

    Rounding turns a router's choice now and then where two experts score alike, the more often the
    deeper the model, and changes what follows. So the experts are given the recorded choices, and
    how often the routers would have chosen differently is a figure of its own.

    Args:
        model: The model to check.
        ids: The token ids that were recorded.
        recording: Of the other model.

    Returns:
        The largest difference of two logits as a share of the largest logit, and the share of
        (token, layer) pairs for which the routers chose other experts.
    """
    choices, changed = 0, 0

    def replay(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(module: nn.Module, call: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal choices, changed
            index, weights = (recorded.to(call[1].device) for recorded in recording.routing[name])
            choices += len(index)
            other = (call[1].sort(dim=1).values != index.sort(dim=1).values).any(dim=1)
            changed += int(other.sum())
            return (call[0], index, weights, *call[3:])

        return hook

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(replay(name))
        for name in recording.routing
    ]
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
    for active in hooks:
        active.remove()
    difference = (logits - recording.logits).abs().max() / recording.logits.abs().max()
    return difference.item(), changed / choices
