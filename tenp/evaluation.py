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
CHUNK = 512

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


def require_targets(samples: Samples) -> None:
    """Refuse a domain in which there is nothing to predict.

    Raises:
        DataError: All its samples have one token.
    """
    if all(len(ids) < 2 for ids in samples.ids):
        raise DataError(
            f"domain {samples.domain} must have a sample of two tokens or more, or there is nothing to predict"
        )


class DomainSums:
    """What is added up over the predicted tokens of a domain.

    Args:
        device: Of the logits.
    """

    def __init__(self, device: torch.device) -> None:
        self._tokens = 0
        self._has_reference = False
        # Read once, at the end: a GPU would have to be waited for each time.
        self._totals = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, targets: Tensor, dense: Tensor | None = None) -> None:
        """Add some tokens: few at a time, because float32 distributions over a vocabulary are large.

        Args:
            logits: `[N, V]`, of the tokens before them.
            targets: `[N]`, int64.
            dense: `[N, V]`, the reference's.
        """
        self._tokens += len(targets)
        ours = F.log_softmax(logits.float(), dim=-1)
        self._totals[0] -= ours.gather(1, targets[:, None]).double().sum()
        if dense is None:
            return
        self._has_reference = True
        theirs = F.log_softmax(dense.to(ours.device).float(), dim=-1)
        terms = F.kl_div(ours, theirs, log_target=True, reduction="none")
        self._totals[1] += terms.double().sum()
        self._totals[2] += (ours.argmax(dim=1) == theirs.argmax(dim=1)).sum()

    def figures(self, domain: str) -> DomainEvaluation:
        """Return the means."""
        loss, divergence, agreed = (self._totals / self._tokens).tolist()
        return DomainEvaluation(
            domain,
            self._tokens,
            _perplexity(loss),
            divergence if self._has_reference else None,
            agreed if self._has_reference else None,
        )


def _evaluate_domain(
    model: PreTrainedModel,
    samples: Samples,
    reference: PreTrainedModel | None,
    batch_tokens: int,
    progress: Progress | None,
) -> DomainEvaluation:
    require_targets(samples)
    sums = DomainSums(model.device)
    for ids, mask in samples.batches(batch_tokens, model.device):
        predicted = mask[:, 1:].bool()
        targets = ids[:, 1:][predicted]
        logits = _logits(model, ids, mask, predicted)
        dense = None if reference is None else _logits(reference, ids, mask, predicted)
        for begin in range(0, len(targets), CHUNK):
            chunk = slice(begin, begin + CHUNK)
            sums.add(logits[chunk], targets[chunk], None if dense is None else dense[chunk])
        if progress is not None:
            progress(samples.domain, int(mask.sum()))
    return sums.figures(samples.domain)


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
