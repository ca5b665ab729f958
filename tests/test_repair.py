# SPDX-License-Identifier: Apache-2.0
"""Repair is least squares, and its error is known before any forward pass."""

import dataclasses
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from support.fixtures import Command, Tiny, of_other_text
from support.tiny_models import make_samples
from tenp import adapter, calibration, devices, moments, pipeline, planning, reconstruction, repair
from tenp.cli import display
from tenp.errors import InvalidArgument, PlanError, Unsupported
from tenp.plan import Plan
from tenp.planning import Budget
from tenp.refitting import Refitting
from tenp.statistics import Statistics, merge, select

_H, _N, _TOKENS = 12, 20, 90


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _case(tokens: int = _TOKENS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W `[H, n]`, g m `[T, n]` of correlated neurons, C, and a keep mask of half the neurons."""
    down = _random(_H, _N)
    activations = _random(tokens, _N, seed=1) @ _random(_N, _N, seed=2)
    keep = torch.arange(_N) % 2 == 0
    return down, activations, activations.T @ activations, keep


def test_without_a_ridge_repair_is_least_squares() -> None:
    down, m, moment, keep = _case()
    columns = down @ repair.refit(moment, keep, 1e-13)
    expected = torch.linalg.lstsq(m[:, keep], m @ down.T).solution.T
    torch.testing.assert_close(columns, expected, rtol=1e-7, atol=1e-7)


def test_the_ridge_solution_has_no_gradient() -> None:
    # |W m - W~ m_S|^2 + r |W~ - W_S|^2 is smallest where its derivative is zero.
    down, m, moment, keep = _case()
    ridge = 0.1 * moment[keep][:, keep].diagonal().mean()
    columns = down @ repair.refit(moment, keep, 0.1)
    gradient = (columns @ m[:, keep].T - down @ m.T) @ m[:, keep] + ridge * (
        columns - down[:, keep]
    )
    assert gradient.abs().max() < 1e-9 * (down @ moment).abs().max()


@pytest.mark.parametrize("ridge", [1e-5, 1e-2, 1.0])
def test_the_trace_formula_is_the_squared_error(ridge: float) -> None:
    down, m, moment, keep = _case()
    transform = repair.refit(moment, keep, ridge)
    measured = (m @ down.T - m[:, keep] @ (down @ transform).T).square().sum()
    predicted = repair.residual(down.T @ down, moment, keep, transform)
    assert predicted == pytest.approx(float(measured), rel=1e-10)


def test_the_trace_formula_predicts_tokens_that_were_not_fitted_on() -> None:
    down, _, moment, keep = _case()
    transform = repair.refit(moment, keep, 1e-3)
    others = _random(50, _N, seed=7) @ _random(_N, _N, seed=8)
    measured = (others @ down.T - others[:, keep] @ (down @ transform).T).square().sum()
    predicted = repair.residual(down.T @ down, others.T @ others, keep, transform)
    assert predicted == pytest.approx(float(measured), rel=1e-10)


def test_the_residual_of_least_squares_is_the_schur_complement() -> None:
    down, _, moment, keep = _case()
    pruned, kept = ~keep, keep
    cross = moment[pruned][:, kept]
    schur = moment[pruned][:, pruned] - cross @ torch.linalg.solve(moment[kept][:, kept], cross.T)
    expected = torch.trace(down[:, pruned] @ schur @ down[:, pruned].T)
    transform = repair.refit(moment, keep, 1e-13)
    error = repair.residual(down.T @ down, moment, keep, transform)
    assert error == pytest.approx(float(expected), rel=1e-7)


def test_without_repair_the_error_is_that_of_the_missing_neurons() -> None:
    down, m, moment, keep = _case()
    measured = (m[:, ~keep] @ down[:, ~keep].T).square().sum()
    assert repair.masked_residual(down.T @ down, moment, keep) == pytest.approx(float(measured))


def test_fewer_tokens_than_neurons_give_numbers() -> None:
    down, _, moment, keep = _case(tokens=5)
    for ridge in repair.RIDGES:
        assert repair.refit(moment, keep, ridge).isfinite().all()
    folds = torch.stack([moment, moment])
    found = repair.fit(down.T @ down, folds.unbind(), keep)
    assert 0 <= found.error <= found.masked


def test_an_expert_without_tokens_keeps_its_columns() -> None:
    keep = torch.arange(_N) < 5
    transform = repair.refit(torch.zeros(_N, _N, dtype=torch.float64), keep, 1e-3)
    assert torch.equal(transform, torch.eye(_N, dtype=torch.float64)[:, keep])


def test_noise_chooses_a_larger_ridge() -> None:
    # The halves share no structure, so a small ridge fits one and fails on the other.
    down = _random(_H, _N)
    halves = [_random(_N // 2, _N, seed=s) for s in (1, 2)]
    keep = torch.arange(_N) % 2 == 0
    noisy = repair.fit(down.T @ down, [m.T @ m for m in halves], keep)
    m = _case()[1]
    clean = repair.fit(down.T @ down, [m[::2].T @ m[::2], m[1::2].T @ m[1::2]], keep)
    assert noisy.ridge > clean.ridge


def test_a_down_bias_takes_the_mean_of_what_is_pruned() -> None:
    # Neurons that are always 2 can be replaced by the bias exactly.
    down, bias = _random(_H, 4), _random(_H, seed=3)
    m = torch.cat([_random(30, 2, seed=4), torch.full((30, 2), 2.0, dtype=torch.float64)], dim=1)
    gates = torch.rand(30, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    augmented = gates[:, None] * torch.cat([m, torch.ones(30, 1, dtype=torch.float64)], dim=1)
    keep = torch.tensor([True, True, False, False, True])
    columns, new_bias = repair.refitted_down(down, bias, augmented.T @ augmented, keep, 1e-12)
    assert new_bias is not None
    torch.testing.assert_close(columns, down[:, :2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(new_bias, bias + 2 * down[:, 2:].sum(1), rtol=1e-6, atol=1e-6)


# ---- second moments ----


def test_packing_keeps_every_number() -> None:
    matrices = _random(2, 3, 7, 7)
    matrices = matrices + matrices.mT
    packed = moments.pack(matrices)
    assert packed.shape == (2, 3, moments.packed_size(7))
    assert torch.equal(moments.unpack(packed), matrices)


@pytest.fixture(scope="module")
def with_moments(tiny: Tiny) -> Statistics:
    model = adapter.load_model(tiny.directory)
    return calibration.collect(
        model, tiny.samples, tiny.source, batch_tokens=100, second_moments=True
    )


def test_the_diagonal_of_the_second_moments_is_the_energy(with_moments: Statistics) -> None:
    for sums in with_moments.layers.values():
        total = moments.unpack(sums["second_moment"]).unflatten(0, (2, 2)).sum(dim=1)
        diagonal = total.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(diagonal, sums["energy"], rtol=1e-5, atol=1e-12)


def test_halves_are_joined_to_the_same_sums(tiny: Tiny, with_moments: Statistics) -> None:
    assert [d.name for d in with_moments.domains] == [d.name for d in tiny.statistics.domains]
    assert with_moments.tokens() == tiny.statistics.tokens()
    for layer, sums in tiny.statistics.layers.items():
        for name, tensor in sums.items():
            torch.testing.assert_close(
                with_moments.layers[layer][name], tensor, rtol=1e-4, atol=1e-5
            )


def test_second_moments_survive_the_file_and_merging(
    with_moments: Statistics, tmp_path: Path
) -> None:
    with_moments.save(tmp_path / "statistics.safetensors")
    loaded = Statistics.load(tmp_path / "statistics.safetensors")
    assert loaded.digest() == with_moments.digest()
    doubled = merge([loaded, of_other_text(loaded)])
    for layer, sums in loaded.layers.items():
        assert torch.equal(doubled.layers[layer]["second_moment"], 2 * sums["second_moment"])
        assert torch.equal(doubled.layers[layer]["down_gram"], sums["down_gram"])


def test_what_will_not_fit_is_refused_with_the_number(tiny: Tiny, monkeypatch) -> None:
    layers = adapter.find_experts(adapter.load_model(tiny.directory))
    needed = moments.required_bytes(layers, 2)
    size = moments.packed_size(layers[0].width)
    assert needed == len(layers) * 8 * (2 * 2 + 1) * layers[0].num_experts * size
    monkeypatch.setattr(moments, "available_bytes", lambda: needed)
    moments.check_memory(layers, 2)
    monkeypatch.setattr(moments, "available_bytes", lambda: needed - 1)
    with pytest.raises(Unsupported, match=f"{needed / 2**30:.2f} GiB of memory"):
        moments.check_memory(layers, 2)


class _OnGpu:
    """Experts of 3 neurons with a down bias, whose weights are on a GPU."""

    layer, num_experts, width = 0, 2, 3
    down = SimpleNamespace(is_cuda=True, device=torch.device("cuda:1"))

    def biases(self) -> tuple[None, None, Tensor]:
        return None, None, torch.zeros(2, 8)


def test_what_will_not_fit_on_the_gpu_beside_the_model_is_refused(monkeypatch) -> None:
    layers = [_OnGpu(), _OnGpu()]
    needed = 2 * 8 * (2 * 3 + 1) * 2 * moments.packed_size(4)
    assert moments.required_bytes(layers, 3) == needed
    monkeypatch.setattr(moments, "available_bytes", lambda: 1 << 40)
    monkeypatch.setattr(devices, "free_bytes", lambda device: needed)
    moments.check_memory(layers, 3)
    monkeypatch.setattr(devices, "free_bytes", lambda device: needed - 1)
    with pytest.raises(Unsupported, match="GiB of cuda:1, but .* are free; use --stream layers"):
        moments.check_memory(layers, 3)


# ---- whole plans ----


@pytest.mark.parametrize("method", ["tenp", "enp", "best"])
def test_a_repaired_checkpoint_is_verified(
    tiny: Tiny, with_moments: Statistics, tmp_path: Path, method: str
) -> None:
    decided = pipeline.plan(with_moments, Budget(0.5, method), refit=True)
    assert decided.repair is not None
    pipeline.apply(tiny.checkpoint, decided, tmp_path / "out", statistics=with_moments)
    decided.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").digest() == decided.digest()


def test_a_layer_is_refitted_once(
    tiny: Tiny, with_moments: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided = pipeline.plan(with_moments, Budget(0.5), refit=True)
    compute, computed = Refitting._compute, []

    def counted(self: Refitting, layer: int) -> Any:
        computed.append(layer)
        time.sleep(0.05)  # time enough for another shard to need another layer
        return compute(self, layer)

    monkeypatch.setattr(Refitting, "_compute", counted)
    pipeline.apply(
        tiny.checkpoint, decided, tmp_path / "out", verify=False, statistics=with_moments
    )
    assert computed == sorted(decided.keep)


def test_a_repaired_plan_needs_its_statistics(
    tiny: Tiny, with_moments: Statistics, tmp_path: Path
) -> None:
    decided = pipeline.plan(with_moments, Budget(0.5), refit=True)
    for other in (None, tiny.statistics):
        with pytest.raises(PlanError, match="with its statistics"):
            pipeline.apply(tiny.checkpoint, decided, tmp_path / "out", statistics=other)


def test_repair_needs_second_moments(tiny: Tiny) -> None:
    with pytest.raises(InvalidArgument, match="--second-moments"):
        pipeline.plan(tiny.statistics, Budget(0.5, "best"))


def test_predicted_errors_are_the_measured_ones(tiny: Tiny, with_moments: Statistics) -> None:
    """Per layer, sum_e sum_t g^2 |y - y~|^2 of the dense inputs, in float64.

    `repaired` is that of the calibration tokens; `crossed` that of each half of the samples when the
    columns are fitted on the other half.
    """
    decided = pipeline.plan(with_moments, Budget(0.5, "best"))
    assert decided.repair is not None
    model = adapter.load_model(tiny.directory, torch.float64)
    model.set_experts_implementation("eager")  # the others know no float64
    layers = {experts.layer: experts for experts in adapter.find_experts(model)}
    repaired, crossed, whole = (dict.fromkeys(layers, 0.0) for _ in range(3))
    fitted: dict[int, list[list[Tensor]]] = {}  # on the halves, and on both
    for index, experts in layers.items():
        known = repair.layer_moments(with_moments, index, decided.repair.weights)
        keeps, ridges = decided.keep[index], decided.repair.ridges[index]
        fitted[index] = [
            [
                repair.refitted_down(down, None, moments[e], keeps[e], ridges[e])[0]
                for e, down in enumerate(experts.down)
            ]
            for moments in (*known.folds, known.moment)
        ]
    for domain in tiny.samples:
        weight = decided.repair.weights[domain.domain]
        for sample, ids in enumerate(domain.ids):
            for experts, hidden, index, gates in _calls(model, layers, ids):
                layer, keep = experts.layer, decided.keep[experts.layer]
                for expert in range(experts.num_experts):
                    token, slot = torch.where(index == expert)
                    m = experts.activations(expert, hidden[token]) * gates[token, slot, None]
                    y = m @ experts.down[expert].T
                    lost = [
                        weight * float((y - m[:, keep[expert]] @ down[expert].T).square().sum())
                        for down in fitted[layer]
                    ]
                    crossed[layer] += lost[1 - sample % 2]
                    repaired[layer] += lost[2]
                    whole[layer] += weight * float(y.square().sum())
    for layer, errors in decided.repair.errors.items():
        assert errors["repaired"] == pytest.approx(repaired[layer] / whole[layer], rel=1e-5)
        assert errors["crossed"] == pytest.approx(crossed[layer] / whole[layer], rel=1e-5)
        assert errors["repaired"] <= errors["crossed"] <= errors["masked"]


def _calls(model, layers, ids):
    seen = []
    hooks = [
        experts.module.register_forward_pre_hook(
            lambda module, args, experts=experts: seen.append((experts, *args))
        )
        for experts in layers.values()
    ]
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()
    return seen


def test_layers_that_the_loss_feels_more_keep_more_of_a_common_pool(
    with_moments: Statistics, tmp_path: Path, command: Command
) -> None:
    pooled = Budget(0.5, "best", pool="model", floor=0.25)
    with pytest.raises(InvalidArgument, match="with output_sensitivity, got some without"):
        pipeline.plan(with_moments, pooled)
    first, *others = with_moments.layers
    felt = dict.fromkeys(others, 1.0) | {first: 1e9}
    layers = {
        layer: {**sums, "output_sensitivity": torch.full((2,), felt[layer], dtype=torch.float64)}
        for layer, sums in with_moments.layers.items()
    }
    measured = dataclasses.replace(with_moments, layers=layers)
    kept = {n: float(k.double().mean()) for n, k in pipeline.plan(measured, pooled).keep.items()}
    assert kept[first] == 1.0
    # A block is 1/24 of a width, and what follows a safe block of an expert is safe.
    assert all(0.25 - 1 / 24 <= kept[layer] < 0.5 for layer in others)
    measured.save(tmp_path / "s.safetensors")
    options = ("--keep", "0.5", "--method", "best", "--pool", "model", "--floor", "0.25")
    result = command("plan", tmp_path / "s.safetensors", *options, "--dry-run", "--json")
    assert result.json()["settings"]["pool"] == "model"
    assert sum(result.json()["widths"][str(first)]) == layers[first]["down_norm"].numel()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "tenp", "pool": "model"}, "pool needs method best, got model with method tenp"),
        ({"method": "best", "floor": 0.1}, "needs widths pooled over the model"),
        ({"method": "best", "pool": "model", "floor": 0.6}, "between 0 and keep, 0.5, got 0.6"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        planning.check_budget(Budget(0.5, **fields))  # type: ignore[arg-type]


def test_experts_with_fewer_tokens_than_neurons_are_refitted_and_named(
    tiny: Tiny, tmp_path: Path
) -> None:
    # 13 tokens in all: every expert of 24 neurons has a singular C, some have none at all.
    few = [make_samples("few", (7, 6))]
    model = adapter.load_model(tiny.directory)
    statistics = calibration.collect(model, few, tiny.source, second_moments=True)
    decided = pipeline.plan(statistics, Budget(0.5, "best"))
    decided.save(tmp_path / "plan.json")
    assert decided.repair is not None
    everyone = {layer: list(range(len(keep))) for layer, keep in decided.keep.items()}
    assert Plan.load(tmp_path / "plan.json").repair == decided.repair
    assert decided.repair.singular == everyone
    assert display.plan_summary(decided)["singular_experts"] == everyone
    assert all(math.isfinite(v) for e in decided.repair.errors.values() for v in e.values())
    pipeline.apply(tiny.checkpoint, decided, tmp_path / "out", statistics=statistics)
    assert adapter.load_model(tmp_path / "out")(few[0].ids[0][None]).logits.isfinite().all()


def test_experts_with_tokens_enough_are_not_called_singular(with_moments: Statistics) -> None:
    doubled = with_moments
    while min(int(sums["counts"].sum(0).min()) for sums in doubled.layers.values()) < 24:
        doubled = merge([doubled, of_other_text(doubled)])
    assert not repair.singular_experts(doubled)


@pytest.mark.parametrize("method", ["tenp", "best"])
@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_domain_weight_that_is_none_is_refused(
    with_moments: Statistics, method: str, weight: float
) -> None:
    for weights in ({"prose": weight}, {"prose": 0.0, "code": 0.0}):
        with pytest.raises(InvalidArgument, match="must be 0 or more and not all 0, got"):
            pipeline.plan(with_moments, Budget(0.5, method), domain_weights=weights)
    with pytest.raises(InvalidArgument, match=r"for \['prose', 'code'\], got \['cod'\]"):
        pipeline.plan(with_moments, Budget(0.5, method), domain_weights={"cod": 1.0})


def test_the_worst_domain_gets_better(with_moments: Statistics) -> None:
    plain = pipeline.plan(with_moments, Budget(0.4, "best"))
    fair = pipeline.plan(with_moments, Budget(0.4, "best"), worst_domain=True)
    worst = [max(reconstruction.domain_errors(with_moments, p).values()) for p in (plain, fair)]
    assert worst[1] <= worst[0]


def test_the_method_best_records_what_it_uses(with_moments: Statistics) -> None:
    settings = pipeline.plan(with_moments, Budget(0.5, "best", width_multiple=2)).settings
    used = {"keep": 0.5, "method": "best", "width_multiple": 2, "under_covered": "warn"}
    assert settings == {**used, "domain_weights": {}}


def test_the_method_best_can_refuse_thin_coverage(with_moments: Statistics) -> None:
    counts = with_moments.layers[1]["counts"].clone()
    counts[:, 2] = torch.tensor([3, 2])
    layers = {**with_moments.layers, 1: {**with_moments.layers[1], "counts": counts}}
    thin = dataclasses.replace(with_moments, layers=layers)
    assert pipeline.plan(with_moments, Budget(0.5, "best"), under_covered="fail").repair
    with pytest.raises(PlanError, match="must see 32 calibration tokens, got 5 for layer 1 expert"):
        pipeline.plan(thin, Budget(0.5, "best"), under_covered="fail")
    kept = pipeline.plan(thin, Budget(0.5, "best"), under_covered="keep").keep[1]
    assert kept[2].all()
    for plan in (pipeline.plan, lambda s, b, **more: pipeline.frontier(s, [b], **more)):
        with pytest.raises(PlanError, match="under_covered must be one of warn, keep, fail"):
            plan(with_moments, Budget(0.5, "best"), under_covered="kepp")


def test_only_the_method_best_knows_a_worst_domain(with_moments: Statistics) -> None:
    with pytest.raises(PlanError, match="worst_domain needs method best, got method tenp"):
        pipeline.plan(with_moments, Budget(0.5), worst_domain=True)


def test_the_frontier_falls_as_more_is_kept(with_moments: Statistics) -> None:
    budgets = [Budget(keep, "best") for keep in (0.8, 0.5, 0.2)]
    errors = [prediction.error for prediction in pipeline.frontier(with_moments, budgets)]
    assert errors == sorted(errors)


def test_a_plan_that_drops_experts_is_not_repaired(tiny: Tiny, with_moments: Statistics) -> None:
    with pytest.raises(PlanError, match="cannot be repaired"):
        pipeline.plan(with_moments, Budget(0.5, "drop"), refit=True)


def test_plans_without_repair_are_the_files_they_were(tiny: Tiny) -> None:
    assert b"repair" not in dataclasses.replace(tiny.plan, repair=None)._to_bytes()


def test_domains_can_be_taken_out_afterwards(tiny: Tiny, with_moments: Statistics) -> None:
    model = adapter.load_model(tiny.directory)
    alone = calibration.collect(
        model, tiny.samples[1:], tiny.source, batch_tokens=100, second_moments=True
    )
    taken = select(with_moments, ["code"])
    for layer, sums in alone.layers.items():
        for name, tensor in sums.items():
            assert torch.equal(taken.layers[layer][name], tensor), name
