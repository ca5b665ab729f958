# SPDX-License-Identifier: Apache-2.0
"""Layers that are decided one by one, each on what the pruned layers before it put out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tenp
from support.fixtures import Command, Tiny, files_of, write_text
from tenp import adapter, execution, repair, running, streaming
from tenp.errors import CheckpointError
from tenp.execution import Execution
from tenp.layerwise import LayerwiseModel
from tenp.planning import Budget
from tenp.reading import Reader
from tenp.repair import Target
from tenp.sequential import Options
from tenp.text import read_domains
from tenp.workdir import WorkDirectory

HOW = {"dense": None, "own": Options(), "against": Options(against_dense=True)}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def pruned(
    tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, tenp.Pruned]]:
    """The same budget with repair, decided in every way."""
    found = {}
    for name, options in HOW.items():
        out = tmp_path_factory.mktemp("pruned") / name
        run = tenp.Run(execution=Execution(sequential=options))
        verify = name == "against"
        budget = Budget(0.4)
        found[name] = (
            out,
            tenp.prune(tiny.directory, [text], out, budget, run, verify=verify, refit=True),
        )
    return found


def test_layers_are_measured_on_what_the_written_layers_before_put_out(
    tiny: Tiny, text: Path, pruned: dict[str, tuple[Path, tenp.Pruned]]
) -> None:
    """The checkpoint that was decided layer by layer, measured afterwards, gives the same sums."""
    out, result = pruned["own"]
    samples = running.samples_of(tiny.checkpoint, read_domains([text]), tenp.Run())
    model = LayerwiseModel(Reader(tiny.checkpoint), torch.float32)
    successors, _ = execution._pruned_experts(model, tiny.source, out)
    again = streaming.collect(
        model, samples, tiny.source, second_moments=True, successors=successors
    )
    for layer, sums in again.layers.items():
        for name, tensor in sums.items():
            torch.testing.assert_close(result.statistics.layers[layer][name], tensor)
    first, last = min(again.layers), max(again.layers)
    dense = pruned["dense"][1].statistics.layers
    assert torch.equal(result.statistics.layers[first]["energy"], dense[first]["energy"])
    assert not torch.allclose(again.layers[last]["energy"], dense[last]["energy"], rtol=1e-2)


def _lost(
    known: repair.LayerMoments, fitted_on: repair.LayerMoments, plan: tenp.Plan, layer: int
) -> float:
    """The squared error of a layer's experts when refitted on some moments and tested on others."""
    assert plan.repair is not None
    masks, ridges = known.with_bias(plan.keep[layer]), plan.repair.ridges[layer]
    total = 0.0
    for expert, (mask, ridge) in enumerate(zip(masks, ridges, strict=True)):
        transform = repair.refit(fitted_on.moment[expert], mask, ridge, fitted_on.target(expert))
        moment, target = known.moment[expert], known.target(expert)
        total += repair.residual(known.gram[expert], moment, mask, transform, target)
    return total


@pytest.mark.parametrize("name", ["own", "against"])
def test_the_last_layer_loses_less_than_when_refitted_on_the_dense_model(
    pruned: dict[str, tuple[Path, tenp.Pruned]], name: str
) -> None:
    plan, statistics = pruned[name][1].plan, pruned[name][1].statistics
    dense = pruned["dense"][1].statistics
    last = max(plan.keep)
    weights = repair.moment_weights(statistics)
    known = repair.layer_moments(statistics, last, weights)
    here = _lost(known, known, plan, last)
    assert here < _lost(known, repair.layer_moments(dense, last, weights), plan, last)
    assert plan.repair is not None
    predicted = plan.repair.errors[last]["repaired"] * known.fitted_energy()
    assert here == pytest.approx(predicted, rel=1e-9)


def test_the_predicted_error_against_the_dense_model_is_the_measured_one(
    tiny: Tiny, text: Path, pruned: dict[str, tuple[Path, tenp.Pruned]]
) -> None:
    out, result = pruned["against"]
    layer = max(result.plan.keep)
    samples = running.samples_of(tiny.checkpoint, read_domains([text]), tenp.Run())
    models: dict[str, Any] = {"dense": tiny.directory, "pruned": out}
    received: dict[str, Any] = {}
    for name, directory in models.items():
        model = adapter.load_model(directory)
        module = model.model.layers[layer].mlp.experts
        module.register_forward_pre_hook(
            lambda _, args, name=name: received.update({name: args[0], f"{name} choice": args[1:]})
        )
        with torch.no_grad():
            for ids, mask in samples[0].batches(4096):
                model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
                attended = mask.flatten().bool()
        models[name] = model
    index, weight = (value[attended] for value in received["pruned choice"])
    inputs = {name: received[name][attended] for name in models}
    dense = adapter.find_experts(models["dense"])[-1]
    mine = models["pruned"].model.layers[layer].mlp.experts
    error = 0.0
    for expert in range(dense.num_experts):
        tokens, slots = torch.nonzero(index == expert, as_tuple=True)
        x = inputs["dense"][tokens]
        wanted = dense.activations(expert, x) @ dense.down[expert].T
        alone = torch.zeros_like(index[tokens][:, :1]).fill_(expert)
        got = mine(inputs["pruned"][tokens], alone, torch.ones_like(alone).float())
        lost = (wanted - got).double().square().sum(1)
        error += float((weight[tokens, slots].double().square() * lost).sum())
    known = repair.layer_moments(result.statistics, layer, {"text": 1.0})
    assert result.plan.repair is not None
    predicted = result.plan.repair.errors[layer]["repaired"] * known.fitted_energy()
    assert error == pytest.approx(predicted, rel=1e-3)


def test_a_target_is_fitted_by_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    down, m, theirs = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((12, 20), (90, 20), (90, 20))
    )
    keep = torch.arange(20) % 2 == 0
    target = Target(theirs.T @ m, float((theirs @ down.T).square().sum()))
    transform = repair.refit(m.T @ m, keep, 1e-13, target)
    expected = torch.linalg.lstsq(m[:, keep], theirs @ down.T).solution
    torch.testing.assert_close((down @ transform).T, expected, rtol=1e-7, atol=1e-7)
    measured = (theirs @ down.T - m[:, keep] @ expected).square().sum()
    error = repair.residual(down.T @ down, m.T @ m, keep, transform, target)
    assert error == pytest.approx(float(measured), rel=1e-9)


def test_a_stopped_run_goes_on(
    tiny: Tiny,
    text: Path,
    pruned: dict[str, tuple[Path, tenp.Pruned]],
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prune = ["prune", tiny.directory, "--calibration", text, "--keep", 0.4, "--repair", "ls"]
    prune += ["--sequential", "--against-dense", "--no-verify", "--quiet"]
    prune += ["--work-dir", tmp_path / "work", "--out", tmp_path / "out"]
    save = WorkDirectory.save_layer

    def stop(self: WorkDirectory, layer: int, *args: object) -> None:
        save(self, layer, *args)  # type: ignore[arg-type]
        if layer == 1 and "sequential" in self.path.name:
            raise CheckpointError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(WorkDirectory, "save_layer", stop)
        assert "stopped" in command(*prune).err
    assert command(*prune).code == 0
    assert files_of(tmp_path / "out") == files_of(pruned["against"][0])
    assert "--sequential --against-dense" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sequential", "--method", "drop"], "--sequential needs a method that chooses neurons"),
        (["--sequential", "--against-dense"], "--against-dense needs --repair ls or --method best"),
        (["--against-dense"], "--against-dense needs --sequential"),
        (
            ["--sequential", "--stream", "none", "--memory", "4GiB"],
            "--stream must be layers or experts with --memory and --sequential, got none",
        ),
        (
            ["--sequential", "--neurons", "heapr"],
            "which cannot be with --sequential; use criteria without a second pass",
        ),
        (
            ["--sequential", "--self-generate", "4"],
            "which cannot be with --sequential; use answers in a file",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    tiny: Tiny, text: Path, command: Command, tmp_path: Path, options: list[str], message: str
) -> None:
    arguments = ["prune", tiny.directory, "--calibration", text, "--keep", 0.4]
    result = command(*arguments, *options, "--out", tmp_path / "out")
    assert result.code == 2
    assert message in result.err


@pytest.mark.parametrize("method", ["enp", "best"])
def test_every_method_that_chooses_neurons_can_be_sequential(
    tiny: Tiny, text: Path, method: str
) -> None:
    run = tenp.Run(samples=6, execution=Execution(sequential=Options()))
    plan = tenp.prune(tiny.directory, [text], None, Budget(0.4, method=method), run).plan
    assert plan.settings["sequential"] == {"against_dense": False}
    assert 0.3 < plan.static_share() <= 0.4
