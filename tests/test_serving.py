# SPDX-License-Identifier: Apache-2.0
"""What the plugins for inference servers share: weights of one layer, cut and placed as servers do it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tenp.errors import CheckpointError, Unsupported
from tenp.serving.config import ServedConfig, decoder_layer
from tenp.serving.experts import ServedExperts

HIDDEN = 32
WIDTHS = [24, 0, 7, 16]
TOKENS = 9


def _matrices(widths: list[int] = WIDTHS) -> dict[tuple[int, str], Tensor]:
    """Every expert's matrices under the servers' names, in the shapes of a checkpoint."""
    generator = torch.Generator().manual_seed(0)
    return {
        (expert, shard): torch.randn(
            (HIDDEN, width) if shard == "w2" else (width, HIDDEN), generator=generator
        )
        for expert, width in enumerate(widths)
        for shard in ("w1", "w2", "w3")
    }


def _routing() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(TOKENS)])
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    return hidden, ids, torch.rand(TOKENS, 2, generator=generator)


def _expected(gated: bool = True) -> Tensor:
    hidden, ids, gates = _routing()
    matrices = _matrices()
    out = torch.zeros(TOKENS, HIDDEN)
    for token, slot in ((t, s) for t in range(TOKENS) for s in range(2)):
        w1, w2, w3 = (matrices[int(ids[token, slot]), name] for name in ("w1", "w2", "w3"))
        m = functional.silu(w1 @ hidden[token])
        out[token] += gates[token, slot] * (w2 @ (m * (w3 @ hidden[token]) if gated else m))
    return out


def _load(served: ServedExperts) -> nn.Module:
    """Do what a server does: make a layer, and hand every matrix to its parameters' loaders."""
    layer = nn.Module()
    served.create_parameters(layer, HIDDEN, torch.float32)
    for (expert, shard), matrix in _matrices().items():
        if shard == "w3" and not served._gated:
            continue
        parameter = _parameter(layer, shard)
        parameter.weight_loader(parameter, matrix, "name", shard_id=shard, expert_id=expert)
    served.require_loaded()
    return layer


def _parameter(layer: nn.Module, shard: str) -> nn.Parameter:
    return layer.w2_weight if shard == "w2" else layer.w13_weight


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_the_outputs_of_all_shares_add_up(shares: int) -> None:
    hidden, ids, gates = _routing()
    out = torch.zeros(TOKENS, HIDDEN)
    neurons = 0
    for rank in range(shares):
        served = ServedExperts("layer", WIDTHS, range(4), rank=rank, shares=shares)
        layer = _load(served)
        out += served.run(layer, hidden, ids, gates)
        neurons += int(layer.neuron_widths.sum())
        assert int(layer.neuron_widths.max()) <= -(-24 // shares)
    torch.testing.assert_close(out, _expected(), rtol=1e-5, atol=1e-4)
    assert neurons == sum(WIDTHS)


def test_experts_of_other_processes_add_nothing() -> None:
    hidden, ids, gates = _routing()
    # Once with the ids of all experts, once with ids of its own and -1 for the others'.
    first = ServedExperts("layer", WIDTHS, [0, 1, None, None])
    second = ServedExperts("layer", WIDTHS, [2, 3])
    local = torch.where(ids >= 2, ids - 2, -1)
    out = first.run(_load(first), hidden, ids, gates)
    out += second.run(_load(second), hidden, local, gates)
    torch.testing.assert_close(out, _expected(), rtol=1e-5, atol=1e-4)


def test_a_process_without_neurons_adds_nothing() -> None:
    served = ServedExperts("layer", WIDTHS, [None, 1, None, None])
    assert not served.run(_load(served), *_routing()).any()


def test_experts_without_a_gate() -> None:
    served = ServedExperts("layer", WIDTHS, range(4), gated=False)
    out = served.run(_load(served), *_routing())
    torch.testing.assert_close(out, _expected(gated=False), rtol=1e-5, atol=1e-4)


def test_a_layer_compiles_whole() -> None:
    served = ServedExperts("layer", WIDTHS, range(4))
    layer = _load(served)
    compiled = torch.compile(served.run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(layer, *_routing()), served.run(layer, *_routing()))


def test_a_matrix_that_did_not_come_is_refused() -> None:
    served = ServedExperts("model.layers.3.mlp.experts", WIDTHS, range(4))
    layer = nn.Module()
    served.create_parameters(layer, HIDDEN, torch.float32)
    for (expert, shard), matrix in _matrices().items():
        if (expert, shard) != (2, "w3"):
            assert served.load(_parameter(layer, shard), matrix, "name", shard, expert, True)
    with pytest.raises(CheckpointError, match="12 matrices .* 1 did not come, .* w3 of expert 2"):
        served.require_loaded()


def test_a_matrix_of_another_shape_is_refused() -> None:
    served = ServedExperts("layer", WIDTHS, range(4))
    layer = nn.Module()
    served.create_parameters(layer, HIDDEN, torch.float32)
    with pytest.raises(CheckpointError, match=r"7 neurons of size 32.* got \[8, 32\]"):
        served.load(layer.w2_weight, torch.zeros(HIDDEN, 8), "name", "w2", 2)


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(Unsupported, match="one of the activations .*, got swigluoai"):
        ServedExperts("layer", WIDTHS, range(4), activation="swigluoai")
    with pytest.raises(CheckpointError, match="must give 5 widths for layer, got 4"):
        ServedExperts("layer", WIDTHS, range(5))


def test_the_widths_of_a_config() -> None:
    config = {"quant_method": "tenp", "version": 1, "widths": {"3": "24,0,7,16"}}
    assert ServedConfig.from_config(config).widths == {3: WIDTHS}
    with pytest.raises(CheckpointError, match="format version 1, got 9"):
        ServedConfig.from_config({**config, "version": 9})
    with pytest.raises(Unsupported, match="floating-point weights to be served, got int8"):
        ServedConfig.from_config({**config, "version": 2, "weights": "int8"})


@pytest.mark.parametrize(
    ("prefix", "layer"),
    [
        ("model.layers.3.mlp.experts", 3),
        ("language_model.model.layers.12.mlp.experts", 12),
        ("mtp.layers.0.mlp.experts", None),
        ("lm_head", None),
    ],
)
def test_the_layer_is_read_from_the_path(prefix: str, layer: int | None) -> None:
    assert decoder_layer(prefix) == layer
