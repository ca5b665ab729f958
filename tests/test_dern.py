# SPDX-License-Identifier: Apache-2.0
"""DERN on a model whose truth is known: its experts are permuted, perturbed copies of a few."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from support.fixtures import Tiny
from support.tiny_models import make_model, make_samples, save_model
from tenp import adapter, calibration, dern, dropping, pipeline, pruning
from tenp.adapter import Experts
from tenp.checkpoint import Checkpoint
from tenp.dern import Options
from tenp.dropping import Rebuilt
from tenp.errors import PlanError, Unsupported
from tenp.plan import Plan
from tenp.planning import Budget

_EXPERTS, _CHOSEN, _WIDTH, _HIDDEN = 8, 4, 48, 64


@dataclass(frozen=True)
class Planted:
    """Losses in nats per token above the entropy of the true model's text, which it is the loss of.

    In every layer the true model has four copies of each of two experts, one neuron order each. The
    dense model is the true one with noise on the copies, more on those that are seldom chosen.
    """

    dense: float
    dropped: float
    rebuilt: Mapping[str, float]
    same_routers: float  # rebuilt, but with the routers' rows as they were
    experts: Experts  # of the first layer of the dense model
    importance: Tensor  # [E]


def _plant(generator: torch.Generator) -> torch.nn.Module:
    model = make_model(
        "mixtral",
        num_local_experts=_EXPERTS,
        num_experts_per_tok=_CHOSEN,
        num_hidden_layers=2,
        hidden_size=_HIDDEN,
    )
    model.lm_head.weight.mul_(3)  # a text of little entropy
    for experts in adapter.find_experts(model):
        router = model.get_submodule(experts.name.rpartition(".")[0]).gate.weight
        gate, up = (0.15 * torch.randn(2, _WIDTH, _HIDDEN, generator=generator) for _ in range(2))
        down = 0.15 * torch.randn(2, _HIDDEN, _WIDTH, generator=generator)
        likes = 0.4 * torch.randn(2, _HIDDEN, generator=generator)
        for expert in range(_EXPERTS):
            of, order = expert % 2, torch.randperm(_WIDTH, generator=generator)
            parts = {"gate": gate[of][order], "up": up[of][order], "down": down[of][:, order]}
            for name, fused in experts.fuse(parts).items():
                getattr(experts.module, name)[expert] = fused[0]
            size = 0.5 if expert < _EXPERTS // 2 else 0.3  # the first half is chosen more often
            router[expert] = likes[of] + size * torch.randn(_HIDDEN, generator=generator)
    return model


def _perturb(experts: Experts, importance: Tensor, generator: torch.Generator) -> None:
    up = experts.gate_and_up()[1]
    for rank, expert in enumerate(importance.argsort(descending=True).tolist()):
        noise = 0.03 if rank < _EXPERTS // 2 else 0.075  # of weights of 0.15
        for matrix in (up[expert], experts.down[expert]):
            matrix += noise * torch.randn(matrix.shape, generator=generator)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    root, generator = tmp_path_factory.mktemp("planted"), torch.Generator().manual_seed(0)
    text, heldout = ([make_samples("a", (120,) * 8, seed=seed)] for seed in (0, 5))
    ids = torch.stack(heldout[0].ids)

    def statistics(name: str) -> tuple[Checkpoint, pipeline.Statistics]:
        model.save_pretrained(root / name)
        checkpoint = Checkpoint(root / name)
        return checkpoint, calibration.collect(model, text, pruning.source_of(checkpoint))

    with torch.no_grad():
        model = _plant(generator)
        true = model(ids).logits.log_softmax(-1)
        _, of_truth = statistics("true")
        for experts in adapter.find_experts(model):
            _perturb(experts, dern.importance(of_truth, experts.layer), generator)
        dense, known = statistics("dense")

        def loss(measured: torch.nn.Module) -> float:
            ours = measured(ids).logits.log_softmax(-1)
            return float((true.exp() * (true - ours)).sum(-1).mean())

        def planned(budget: Budget, options: Options | None = None) -> Plan:
            return pipeline.plan(
                known,
                budget,
                expert_criterion="normalized-gating-score",
                dern_options=options,
            )

        def pruned(name: str, budget: Budget, options: Options | None = None) -> float:
            decided = planned(budget, options)
            pipeline.apply(dense, decided, root / name, verify=False, statistics=known)
            return loss(adapter.load_model(root / name, torch.float32))

        def rebuilt_with_the_same_routers() -> float:
            decided = planned(Budget(0.5, "dern"), Options())
            rebuild, stays = dern.rebuilder(dense, decided, known), decided.experts
            assert rebuild is not None and stays is not None

            def rows_stay(layer: int) -> Rebuilt:
                rows = torch.eye(_EXPERTS, dtype=torch.float64)[stays[layer]]
                return Rebuilt(rebuild(layer).experts, rows)

            dropping.apply(dense, decided, root / "rows", rows_stay, verify=False)
            return loss(adapter.load_model(root / "rows", torch.float32))

        options = {
            "dern": Options(),
            "random": Options(init="random"),
            "without weights": Options(weighted=False),
        }
        return Planted(
            loss(model),
            pruned("drop", Budget(0.5, "drop")),
            {name: pruned(name, Budget(0.5, "dern"), each) for name, each in options.items()},
            rebuilt_with_the_same_routers(),
            adapter.find_experts(model)[0],
            dern.importance(known, 0),
        )


def test_it_recovers_the_loss_that_dropping_the_same_experts_does_not(planted: Planted) -> None:
    assert planted.rebuilt["dern"] <= planted.dense
    assert planted.dropped > 1.2 * planted.dense


def test_random_centres_are_worse(planted: Planted) -> None:
    assert planted.rebuilt["random"] > 2 * planted.rebuilt["dern"]


def test_without_weights_it_is_worse(planted: Planted) -> None:
    assert planted.rebuilt["without weights"] > 1.1 * planted.rebuilt["dern"]


def test_with_the_same_routers_it_is_worse(planted: Planted) -> None:
    assert planted.same_routers > 1.2 * planted.rebuilt["dern"]


def test_every_neuron_finds_a_copy_of_itself(planted: Planted) -> None:
    stays = [0, 1]  # one copy of each of the two
    homes = dern.assign(dern._triples(planted.experts), stays, Options())
    assert torch.equal(homes, (torch.arange(_EXPERTS) % 2)[:, None].expand(-1, _WIDTH))


def test_router_rows_are_means_by_what_the_neurons_bring(planted: Planted) -> None:
    mass = planted.importance
    rebuilt = dern.rebuild(planted.experts, [0, 1], mass, Options())
    mine = torch.arange(_EXPERTS) % 2 == torch.arange(2)[:, None]
    expected = torch.where(mine, mass, 0.0)
    torch.testing.assert_close(rebuilt.router, expected / expected.sum(dim=1, keepdim=True))


def test_where_nothing_moves_it_is_its_dropping_step(planted: Planted) -> None:
    options = Options(threshold=1.0)
    rebuilt = dern.rebuild(planted.experts, [0, 3], planted.importance, options)
    assert torch.equal(rebuilt.experts.down, planted.experts.down[[0, 3]])
    assert torch.equal(rebuilt.router, torch.eye(_EXPERTS, dtype=torch.float64)[[0, 3]])


def test_one_guest_does_not_take_the_place_of_a_neuron_of_its_host() -> None:
    # Two neurons of the host are alike; so is a guest, with the largest gate, to a third one.
    own = torch.randn(6, 3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own[1] = own[0] + 0.7 * own[1]
    guest = 3 * (own[2] + 0.5 * own[3])
    mass = torch.tensor([1.0] * 6 + [1 / 600], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    found = dern.cluster(torch.cat([own, guest[None]]), mass, 6, Options(), generator)
    nearest = torch.cdist(own.flatten(1), found.flatten(1)).min(dim=1)
    assert nearest.indices.unique().numel() == 6
    assert nearest.values.max() < 0.01 * own.flatten(1).norm(dim=1).min()


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


def test_settings_that_are_not_known_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    decided = pipeline.plan(tiny.statistics, Budget(0.5, "dern"))
    decided.settings["dern"]["with_gate"] = False
    with pytest.raises(PlanError, match=r"settings of dern that this version .*; plan again"):
        pipeline.apply(tiny.checkpoint, decided, tmp_path / "out", statistics=tiny.statistics)


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
