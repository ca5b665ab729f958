# SPDX-License-Identifier: Apache-2.0
"""Perplexity, divergence and agreement are what a token-by-token computation gives."""

import math

import pytest
import torch

from support.fixtures import Tiny
from support.tiny_models import logit_difference, make_model, make_samples, token_ids
from tenp import adapter, evaluation
from tenp.errors import DataError
from tenp.samples import Samples


@pytest.fixture(scope="module")
def model(tiny: Tiny):
    return adapter.load_model(tiny.directory)


@pytest.fixture(scope="module")
def other(tiny: Tiny):
    return adapter.load_model(tiny.pruned)


@torch.no_grad()
def _by_hand(model, reference, samples: Samples) -> tuple[float, float, float]:
    losses, divergences, agreed = [], [], []
    for ids in samples.ids:
        ours = model(ids[None]).logits[0].double().log_softmax(-1)
        theirs = reference(ids[None]).logits[0].double().log_softmax(-1)
        for position in range(len(ids) - 1):
            losses.append(-ours[position, ids[position + 1]])
            p, q = theirs[position], ours[position]
            divergences.append((p.exp() * (p - q)).sum())
            agreed.append(float(p.argmax() == q.argmax()))
    count = len(losses)
    return math.exp(sum(losses) / count), float(sum(divergences) / count), sum(agreed) / count


def test_figures_are_means_over_predicted_tokens(model, other) -> None:
    samples = make_samples("d", (12, 5, 9, 1))
    [figures] = evaluation.evaluate(other, [samples], model, batch_tokens=40)
    perplexity, divergence, agreement = _by_hand(other, model, samples)
    assert figures.tokens == 11 + 4 + 8
    assert figures.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert figures.divergence == pytest.approx(divergence, rel=1e-4)
    assert figures.agreement == pytest.approx(agreement)


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_batches_do_not_matter(model, other, batch_tokens: int) -> None:
    samples = [make_samples("d", (20, 3, 11))]
    [figures] = evaluation.evaluate(other, samples, model, batch_tokens)
    [expected] = evaluation.evaluate(other, samples, model, 50)
    assert figures.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert figures.divergence == pytest.approx(expected.divergence, rel=1e-4)
    assert figures.agreement == expected.agreement


def test_a_model_does_not_differ_from_itself(model) -> None:
    [figures] = evaluation.evaluate(model, [make_samples()], model)
    assert figures.divergence == 0
    assert figures.agreement == 1


def test_without_a_reference_there_is_only_perplexity(model) -> None:
    [figures] = evaluation.evaluate(model, [make_samples()])
    assert figures.perplexity > 1
    assert figures.divergence is None
    assert figures.agreement is None


def test_a_domain_of_single_tokens_has_nothing_to_predict(model) -> None:
    with pytest.raises(DataError, match="domain d must have a sample of two tokens or more"):
        evaluation.evaluate(model, [Samples("d", (torch.tensor([5]), torch.tensor([6])))])


def test_a_model_far_off_has_an_infinite_perplexity_and_no_crash(model) -> None:
    wild = make_model()
    wild.lm_head.weight.data.mul_(1e4)
    [figures] = evaluation.evaluate(wild, [make_samples()])
    assert figures.perplexity == math.inf


def test_masking_silences_exactly_the_pruned_neurons(tiny: Tiny) -> None:
    masked, dense = (adapter.load_model(tiny.directory) for _ in range(2))
    evaluation.mask_neurons(masked, tiny.plan)
    for ours, theirs in zip(adapter.find_experts(masked), adapter.find_experts(dense), strict=True):
        keep = tiny.plan.keep[ours.layer].unsqueeze(1).expand_as(ours.down)
        assert torch.equal(ours.down[keep], theirs.down[keep])
        assert not ours.down[~keep].any()


def test_keeping_all_neurons_changes_no_logit(tiny: Tiny) -> None:
    masked, dense = (adapter.load_model(tiny.directory) for _ in range(2))
    keep = {layer: torch.ones_like(mask) for layer, mask in tiny.plan.keep.items()}
    evaluation.mask_neurons(masked, type(tiny.plan)(tiny.source, "", {}, keep, 1.0))
    assert logit_difference(masked, dense, token_ids()) == 0
