# SPDX-License-Identifier: Apache-2.0
"""Scores are the equations of docs/method.md, worked out by hand on small numbers."""

import dataclasses
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

import tenp
from support.fixtures import Tiny
from tenp import scoring
from tenp.errors import InvalidArgument
from tenp.source import Source
from tenp.statistics import Domain, Statistics


def _statistics(domains: int, **tensors: Tensor) -> Statistics:
    """Statistics of one layer of 2 experts and 2 neurons, zero but for the given."""
    names = [Domain(f"d{index}", 1, 1, ()) for index in range(domains)]
    statistics = Statistics.zeros(Source("", "", 0, 0, 0, 0), names, {3: (2, 2)}, {})
    for name, tensor in tensors.items():
        statistics.layers[3][name].copy_(tensor)
    return statistics


def _close(ours: Tensor, values: object) -> None:
    torch.testing.assert_close(ours, torch.tensor(values, dtype=torch.float64))


def test_expert_scores_are_shares_of_the_layers_length_summed_over_domains() -> None:
    # |(3, 4)| = 5 and |(0, 2)| = 2: 3/5 + 0, 4/5 + 1.
    statistics = _statistics(2, direction_change=torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    _close(scoring.score(statistics).experts[3], [0.6, 1.8])


def test_expert_scores_sum_over_tokens_and_do_not_average() -> None:
    # Both experts changed as much per token; the one with twice the tokens is worth twice.
    statistics = _statistics(
        1, direction_change=torch.tensor([[1.0, 2.0]]), counts=torch.tensor([[10, 20]])
    )
    scores = scoring.score(statistics).experts[3]
    assert scores[1] == 2 * scores[0]


def test_domain_weights_multiply() -> None:
    statistics = _statistics(2, direction_change=torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    scores = scoring.score(statistics, domain_weights={"d1": 0.5})
    _close(scores.experts[3], [0.6, 1.3])


def test_neuron_scores_are_means_over_tokens_normalised_per_expert_and_domain() -> None:
    # Domain 0: expert 0 has (6, 8) / 2 tokens = (3, 4), length 5. Domain 1: (0, -7), length 7.
    projection = torch.tensor([[[6.0, 8.0], [1.0, 0.0]], [[0.0, -7.0], [0.0, 3.0]]])
    counts = torch.tensor([[2, 1], [1, 1]])
    scores = scoring.score(_statistics(2, projection=projection, counts=counts))
    _close(scores.neurons[3], [[0.6, 0.8 - 1.0], [1.0, 1.0]])


def test_the_projection_keeps_its_sign() -> None:
    projection = torch.tensor([[[-3.0, 4.0], [0.0, 0.0]]])
    scores = scoring.score(_statistics(1, projection=projection, counts=torch.ones(1, 2)))
    _close(scores.neurons[3], [[-0.6, 0.8], [0.0, 0.0]])


def test_a_domain_in_which_an_expert_saw_no_token_is_left_out() -> None:
    projection = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 2.0], [5.0, 12.0]]])
    counts = torch.tensor([[1, 0], [1, 1]])
    scores = scoring.score(_statistics(2, projection=projection, counts=counts))
    _close(scores.neurons[3], [[0.6, 1.8], [5 / 13, 12 / 13]])


def test_an_expert_without_tokens_scores_zero() -> None:
    scores = scoring.score(_statistics(1))
    assert not scores.experts[3].any()
    assert not scores.neurons[3].any()


def test_l2_is_the_mean_size_of_what_a_neuron_adds() -> None:
    # mean|m| |w|: (2/2 * 3, 4/2 * 2) = (3, 4).
    statistics = _statistics(
        1,
        magnitude=torch.tensor([[[2.0, 4.0], [0.0, 0.0]]]),
        down_norm=torch.tensor([[3.0, 2.0], [1.0, 1.0]]),
        counts=torch.tensor([[2, 0]]),
    )
    scores = scoring.score(statistics, neuron_criterion="l2")
    _close(scores.neurons[3][0], [0.6, 0.8])


def test_permuting_experts_permutes_the_scores(tiny: Tiny) -> None:
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    permuted = dataclasses.replace(
        tiny.statistics,
        layers={
            layer: {
                name: tensor[order] if name == "down_norm" else tensor[:, order]
                for name, tensor in tensors.items()
            }
            for layer, tensors in tiny.statistics.layers.items()
        },
    )
    scores = scoring.score(permuted)
    for layer in tiny.statistics.layers:
        torch.testing.assert_close(scores.experts[layer], tiny.scores.experts[layer][order])
        assert torch.equal(scores.neurons[layer], tiny.scores.neurons[layer][order])


def test_doubling_all_tokens_leaves_the_scores(tiny: Tiny) -> None:
    doubled = dataclasses.replace(
        tiny.statistics,
        layers={
            layer: {
                name: tensor if name in ("down_norm", "peak", "norm_max") else 2 * tensor
                for name, tensor in tensors.items()
            }
            for layer, tensors in tiny.statistics.layers.items()
        },
    )
    scores = scoring.score(doubled)
    for layer in tiny.statistics.layers:
        torch.testing.assert_close(scores.experts[layer], tiny.scores.experts[layer])
        torch.testing.assert_close(scores.neurons[layer], tiny.scores.neurons[layer])


def test_unknown_criteria_are_refused_with_the_known_ones(tiny: Tiny) -> None:
    with pytest.raises(
        InvalidArgument, match="neuron_criterion must be one of projection, .* got x"
    ):
        scoring.score(tiny.statistics, neuron_criterion="x")
    with pytest.raises(InvalidArgument, match="expert_criterion must be one of direction-change"):
        scoring.score(tiny.statistics, expert_criterion="x")


def test_random_scores_of_a_layer_are_its_own_alone_or_among_others(tiny: Tiny) -> None:
    def drawn(statistics: Statistics, seed: int = 0) -> dict[int, Tensor]:
        scores = scoring.score(statistics, "random", "random", seed=seed)
        return {
            n: torch.cat([scores.experts[n], scores.neurons[n].flatten()]) for n in scores.experts
        }

    together = drawn(tiny.statistics)
    for layer, sums in tiny.statistics.layers.items():
        alone = dataclasses.replace(tiny.statistics, layers={layer: sums})
        assert torch.equal(drawn(alone)[layer], together[layer])
        assert not torch.equal(drawn(alone, seed=1)[layer], together[layer])
    first, second, third = together.values()
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


@pytest.mark.parametrize("criterion", scoring.NEEDS_SECOND_PASS)
def test_pruning_collects_what_its_criterion_needs(
    tiny: Tiny, text_file: Path, criterion: str
) -> None:
    kind = "neuron_criterion" if criterion in scoring.NEURON_CRITERIA else "expert_criterion"
    pruned = tenp.prune(tiny.directory, [text_file], None, tenp.Budget(0.5), **{kind: criterion})
    assert criterion in pruned.plan.settings.values()


def test_every_criterion_has_a_function() -> None:
    experts = {*scoring.EXPERT_CRITERIA, *scoring.EXPERT_WEIGHTS_CRITERIA, "random"}
    neurons = {*scoring.NEURON_CRITERIA, *scoring.NEURON_WEIGHTS_CRITERIA, "random"}
    assert experts == {*get_args(scoring.ExpertCriterion)}
    assert neurons == {*get_args(scoring.NeuronCriterion)}


def test_a_weight_for_an_unknown_domain_is_refused(tiny: Tiny) -> None:
    with pytest.raises(InvalidArgument, match=r"must be for \['prose', 'code'\], got \['cod'\]"):
        scoring.score(tiny.statistics, domain_weights={"cod": 2.0})
