# SPDX-License-Identifier: Apache-2.0
"""The second pass, which feeds HEAPr and EASY-EP."""

import pytest
import torch
from torch import Tensor, nn

from support.fixtures import Tiny
from tenp import adapter, second_pass
from tenp.statistics import merge


def test_gradients_of_neurons_are_those_of_autograd(tiny: Tiny) -> None:
    statistics = merge([tiny.statistics])
    model = adapter.load_model(tiny.directory)
    second_pass.collect(model, tiny.samples, statistics, batch_tokens=100)
    activations, gradients = _energies_by_autograd(tiny)
    for layer, sums in statistics.layers.items():
        torch.testing.assert_close(sums["activation_energy"], activations[layer], rtol=1e-3, atol=0)
        torch.testing.assert_close(sums["gradient_energy"], gradients[layer], rtol=1e-3, atol=1e-12)
        assert sums["output_sensitivity"].gt(0).all()
        assert sums["residual_change"].ge(0).all()


def _energies_by_autograd(tiny: Tiny) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Sums of m^2 and (dL/dm)^2, `[D, E, I]` per layer, with every m kept by autograd itself."""
    model = adapter.load_model(tiny.directory)
    model.get_input_embeddings().weight.requires_grad_()
    layers = {experts.module: experts for experts in adapter.find_experts(model)}
    kept: list[tuple[int, int, Tensor]] = []

    def plain(module: nn.Module, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        experts, out = layers[module], torch.zeros_like(hidden)
        for expert in range(experts.num_experts):
            token, slot = torch.where(index == expert)
            m = experts.activations(expert, hidden[token])
            m.retain_grad()
            kept.append((experts.layer, expert, m))
            y = m @ experts.down[expert].T
            out = out.index_add(0, token, y * gates[token, slot, None])
        return out

    zeros = {n: torch.zeros_like(sums["energy"]) for n, sums in tiny.statistics.layers.items()}
    activations, gradients = zeros, {n: z.clone() for n, z in zeros.items()}
    with adapter.experts_replaced(model, plain), torch.enable_grad():
        for row, domain in enumerate(tiny.samples):
            for ids in domain.ids:
                logits = model(ids[None], use_cache=False).logits[0, :-1].float()
                nn.functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
                for layer, expert, m in kept:
                    assert m.grad is not None
                    activations[layer][row, expert] += m.detach().double().square().sum(0)
                    gradients[layer][row, expert] += m.grad.double().square().sum(0)
                kept.clear()
    return activations, gradients


def test_gradients_are_computed_by_deterministic_algorithms(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Those of attention on a GPU are not by default.
    model = adapter.load_model(tiny.directory)
    asked: list[bool] = []
    monkeypatch.setattr(
        Tensor,
        "backward",
        lambda loss: asked.append(torch.are_deterministic_algorithms_enabled()),
    )
    second_pass.collect(model, tiny.samples, merge([tiny.statistics]))
    assert asked
    assert all(asked)
    assert not torch.are_deterministic_algorithms_enabled()
