# SPDX-License-Identifier: Apache-2.0
"""DERN on experts whose truth is known: permuted, perturbed copies of one expert."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from support.fixtures import Tiny
from support.tiny_models import save_model
from tenp import adapter, dern, dropping, pipeline, pruning
from tenp.adapter import Experts
from tenp.checkpoint import Checkpoint
from tenp.dern import Options
from tenp.errors import PlanError, Unsupported
from tenp.planning import Budget

_EXPERTS, _WIDTH, _HIDDEN, _CHOSEN = 8, 24, 32, 4


@dataclasses.dataclass(frozen=True)
class Planted:
    """Eight copies of one expert; the four that the router likes are perturbed less."""

    truth: Experts  # one expert
    experts: Experts
    importance: Tensor  # [E]
    inputs: Tensor  # [T, H]
    chosen: Tensor  # [T, k]
    gates: Tensor  # [T, k]

    def error(self, output: Tensor) -> float:
        """Mean squared distance from the truth, as a share of its size."""
        truth = _output(self.truth, 0, self.inputs)
        return float((output - truth).square().sum() / truth.square().sum())

    def dense_error(self) -> float:
        """What the model of all copies loses."""
        outputs = torch.stack([_output(self.experts, e, self.inputs) for e in range(_EXPERTS)], 1)
        picked = outputs.gather(1, self.chosen[..., None].expand(-1, -1, _HIDDEN))
        return self.error((picked * self.gates[..., None]).sum(dim=1))

    def rebuilt_error(self, options: Options) -> float:
        """What is lost when the expert that the router likes best stays alone."""
        rebuilt = dern.rebuild(self.experts, [0], self.importance, options)
        return self.error(_output(rebuilt, 0, self.inputs))

    def dropped_error(self) -> float:
        return self.error(_output(self.experts, 0, self.inputs))


def _output(experts: Experts, expert: int, x: Tensor) -> Tensor:
    return experts.activations(expert, x) @ experts.down[expert].T


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    model = adapter.load_model(save_model(tmp_path / "shell"), torch.float64)
    shell = adapter.find_experts(model)[0]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # Gate rows of equal largest element, so that the gain alone says whose gates are strongest.
    gate, up, down = (
        random(_WIDTH, _HIDDEN).sign() / 4,
        random(_WIDTH, _HIDDEN),
        random(_HIDDEN, _WIDTH),
    )
    noise = torch.tensor([0.2] * 4 + [0.5] * 4)
    importance = torch.tensor([0.23, 0.2, 0.2, 0.2, 0.05, 0.05, 0.05, 0.02], dtype=torch.float64)
    copies: dict[str, list[Tensor]] = {}
    for expert in range(_EXPERTS):
        order = torch.randperm(_WIDTH, generator=generator)
        parts = {
            "gate": gate[order] * (1.01 if expert == 0 else 1.0),
            "up": (up + noise[expert] * random(_WIDTH, _HIDDEN))[order],
            "down": (down + noise[expert] * random(_HIDDEN, _WIDTH))[:, order],
        }
        for name, tensor in shell.fuse(parts).items():
            copies.setdefault(name, []).append(tensor)
    experts = shell.with_parameters({name: torch.cat(each) for name, each in copies.items()})
    truth = shell.with_parameters(shell.fuse({"gate": gate, "up": up, "down": down}))
    logits = importance.log() + 0.3 * random(400, _EXPERTS)
    gates, chosen = logits.softmax(dim=1).topk(_CHOSEN)
    gates = gates / gates.sum(dim=1, keepdim=True)
    return Planted(truth, experts, importance, random(400, _HIDDEN), chosen, gates)


def test_it_recovers_what_dropping_loses(planted: Planted) -> None:
    dense, dropped = planted.dense_error(), planted.dropped_error()
    assert planted.rebuilt_error(Options()) <= dense
    assert dropped > 2 * dense


def test_random_centres_are_worse(planted: Planted) -> None:
    ours = planted.rebuilt_error(Options())
    for seed in range(3):
        assert planted.rebuilt_error(Options(init="random", seed=seed)) > 2 * ours


def test_without_weights_it_is_worse(planted: Planted) -> None:
    assert planted.rebuilt_error(Options(weighted=False)) > 1.2 * planted.rebuilt_error(Options())


def test_every_neuron_finds_its_copy(planted: Planted) -> None:
    guests, shares = dern.assign(dern._triples(planted.experts), [0], Options())
    assert len(guests[0]) == (_EXPERTS - 1) * _WIDTH
    assert shares[1:].sum() == pytest.approx(_EXPERTS - 1)


def test_above_the_threshold_nothing_moves_and_experts_stay_as_they_are(planted: Planted) -> None:
    rebuilt = dern.rebuild(planted.experts, [0, 3], planted.importance, Options(threshold=1.0))
    assert torch.equal(rebuilt.down, planted.experts.down[[0, 3]])


# ---- whole checkpoints ----


@pytest.mark.parametrize(
    "model_type", ["qwen2_moe", "mixtral", "olmoe", "deepseek_v2", "qwen3_moe"]
)
def test_fewer_experts_load_in_stock_transformers(tmp_path: Path, model_type: str) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "dense", model_type))
    experts = adapter.find_experts(adapter.empty_model(adapter.load_config(checkpoint.directory)))
    count = experts[0].num_experts
    stays = {layer.layer: [0, 2, 3, 5] for layer in experts}
    keep = {}
    for layer in experts:
        keep[layer.layer] = torch.zeros(count, layer.width, dtype=torch.bool)
        keep[layer.layer][stays[layer.layer]] = True
    plan = pipeline.Plan(
        pruning.source_of(checkpoint), "", {"method": "drop"}, keep, 1.0, experts=stays
    )
    dropping.apply(checkpoint, plan, tmp_path / "out")
    dense, pruned = (adapter.load_model(p) for p in (checkpoint.directory, tmp_path / "out"))
    for before, after in zip(
        adapter.find_experts(dense), adapter.find_experts(pruned), strict=True
    ):
        assert torch.equal(after.down, before.down[[0, 2, 3, 5]])
    assert pruned(torch.arange(10)[None]).logits.isfinite().all()


def test_keeping_every_expert_changes_no_logit(tiny: Tiny, tmp_path: Path) -> None:
    decided = pipeline.plan(tiny.statistics, Budget(1.0, "drop"))
    pipeline.apply(tiny.checkpoint, decided, tmp_path / "out")
    ids = torch.arange(20)[None]
    dense, same = (
        adapter.load_model(path)(ids).logits for path in (tiny.directory, tmp_path / "out")
    )
    assert torch.equal(dense, same)


def test_dern_writes_a_stock_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    options = Options(threshold=-1.0)  # the experts are random: everything moves
    decided = pipeline.plan(tiny.statistics, Budget(0.5, "dern"), dern_options=options)
    pipeline.apply(tiny.checkpoint, decided, tmp_path / "out", statistics=tiny.statistics)
    config = Checkpoint(tmp_path / "out").config
    assert config["num_experts"] == 3
    assert "quantization_config" not in config
    with pytest.raises(PlanError, match="with its statistics"):
        pipeline.apply(tiny.checkpoint, decided, tmp_path / "again")


def test_a_router_of_groups_keeps_equally_many_of_each(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "dense", "deepseek_v3"))
    experts = adapter.find_experts(adapter.empty_model(adapter.load_config(checkpoint.directory)))
    stays = {layer.layer: [0, 1, 2] for layer in experts}
    keep = {layer.layer: torch.ones(layer.num_experts, layer.width) > 0 for layer in experts}
    plan = pipeline.Plan(
        pruning.source_of(checkpoint), "", {"method": "drop"}, keep, 1.0, experts=stays
    )
    with pytest.raises(Unsupported, match="equally many of each group"):
        dropping.apply(checkpoint, plan, tmp_path / "out")
