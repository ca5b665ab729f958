# SPDX-License-Identifier: Apache-2.0
"""The statistics of a pass are those of a plain computation on the model, however it is batched."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

import tenp
from support.fixtures import Tiny
from support.tiny_models import make_model, make_samples, save_model
from tenp import adapter, calibration, pruning
from tenp.checkpoint import Checkpoint
from tenp.errors import DataError
from tenp.samples import Samples
from tenp.statistics import STATISTICS, Statistics


def _collect(model, samples: list[Samples], source, batch_tokens: int = 100) -> Statistics:
    return calibration.collect(model, samples, source, batch_tokens=batch_tokens)


def _assert_close(ours: Statistics, theirs: Statistics, bound: float) -> None:
    """Equal counts; everything else within `bound` of the largest value of its kind."""
    for layer, tensors in theirs.layers.items():
        for name, expected in tensors.items():
            actual = ours.layers[layer][name]
            if name == "counts":
                assert torch.equal(actual, expected)
            else:
                difference = (actual - expected).abs().max() / expected.abs().max()
                assert difference <= bound, (layer, name, difference)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "auto"])
def test_the_dtype_is_float32_on_a_cpu_however_it_is_named(device: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tenp.Run(device=device).torch_dtype() == torch.float32


# ---- the oracle: every equation of docs/method.md, on what the experts really received ----


def _plain_statistics(model, samples: list[Samples], source) -> Statistics:
    layers = adapter.find_experts(model)
    shapes = {experts.layer: (experts.num_experts, experts.width) for experts in layers}
    domains = [calibration.Domain(s.domain, len(s.ids), s.tokens(), ()) for s in samples]
    statistics = Statistics.zeros(
        source, domains, shapes, {}, hidden=model.config.get_text_config().hidden_size
    )
    for row, domain in enumerate(samples):
        for ids in domain.ids:
            for experts, call in _calls(model, layers, ids):
                _add_plainly(experts, statistics.layers[experts.layer], row, *call)
    return statistics


def _calls(model, layers, ids: Tensor) -> Iterator[tuple[adapter.Experts, tuple[Tensor, ...]]]:
    """What every experts module is called with for one sample, without padding."""
    seen: list[tuple[adapter.Experts, tuple[Tensor, ...]]] = []
    hooks = [
        experts.module.register_forward_pre_hook(
            lambda module, args, experts=experts: seen.append((experts, args))
        )
        for experts in layers
    ]
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()
    yield from seen


def _add_plainly(experts, sums: dict[str, Tensor], row: int, hidden, index, weights) -> None:
    gate_rows, up_rows = (weight.double() for weight in experts.gate_and_up())
    down = experts.down.double()
    sums["down_norm"].copy_(down.norm(dim=1))
    for x, chosen, gates in zip(hidden.double(), index.tolist(), weights.double(), strict=True):
        for e, g in zip(chosen, gates, strict=True):
            m = F.silu(gate_rows[e] @ x) * (up_rows[e] @ x)
            y = down[e] @ m
            cosine = x @ y / (x.norm() * y.norm())
            sums["counts"][row, e] += 1
            sums["gate_sum"][row, e] += g
            sums["normalized_gate_sum"][row, e] += g / gates.sum()
            sums["input_energy"][row, e] += (g * x) ** 2
            sums["norm_sum"][row, e] += y.norm()
            sums["gated_norm_sum"][row, e] += g * y.norm()
            sums["norm_max"][row, e] = max(sums["norm_max"][row, e], y.norm())
            sums["direction_change"][row, e] += g * y.norm() * (1 - cosine)
            sums["projection"][row, e] += m * (down[e].T @ y) / y.norm()
            sums["magnitude"][row, e] += m.abs()
            sums["energy"][row, e] += (g * m) ** 2
            sums["peak"][row, e] = torch.maximum(sums["peak"][row, e], (g * m).abs())


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3"])
def test_statistics_are_those_of_a_plain_computation(tmp_path: Path, model_type: str) -> None:
    directory = save_model(tmp_path / "model", model_type)
    source = pruning.source_of(Checkpoint(directory))
    model = adapter.load_model(directory, torch.float32)
    samples = [make_samples("a", (9, 5, 12), 0), make_samples("b", (7, 3), 1)]
    # The pass works in float32 and pads; a few layers of it lose about five digits of seven.
    _assert_close(
        _collect(model, samples, source),
        _plain_statistics(model, samples, source),
        1e-5,
    )


def test_the_projections_of_an_expert_add_up_to_its_output_norm(tiny: Tiny) -> None:
    for tensors in tiny.statistics.layers.values():
        total = tensors["projection"].sum(dim=-1)
        torch.testing.assert_close(total, tensors["norm_sum"], rtol=1e-6, atol=1e-6)


def test_every_attended_token_reaches_k_experts(tiny: Tiny) -> None:
    for tensors in tiny.statistics.layers.values():
        assert tensors["counts"].sum(dim=1).tolist() == [2 * s.tokens() for s in tiny.samples]


@pytest.mark.parametrize("batch_tokens", [1, 64, 150, 100_000])
def test_batches_do_not_matter(tiny: Tiny, batch_tokens: int) -> None:
    model = adapter.load_model(tiny.directory)
    other = _collect(model, tiny.samples, tiny.source, batch_tokens)
    _assert_close(other, tiny.statistics, 1e-5)


def test_padding_does_not_count(tiny: Tiny) -> None:
    # One long sample forces 63 positions of padding on each of the short ones.
    model = adapter.load_model(tiny.directory)
    ids = (torch.arange(3, 67), *(torch.tensor([n]) for n in range(3, 20)))
    padded = _collect(model, [Samples("a", ids)], tiny.source, 10_000)
    alone = _collect(model, [Samples("a", ids)], tiny.source, 1)
    _assert_close(padded, alone, 1e-5)
    assert padded.layers[0]["counts"].sum() == 2 * (64 + 17)


def test_the_model_computes_what_it_would_without_the_pass(tiny: Tiny) -> None:
    model = adapter.load_model(tiny.directory)
    ids = tiny.samples[0].ids[0][None]
    with torch.no_grad():
        expected = model(ids).logits
        seen = []
        hook = model.base_model.register_forward_hook(lambda *call: seen.append(call[2][0]))
        _collect(model, [Samples("a", (ids[0],))], tiny.source)
        hook.remove()
        torch.testing.assert_close(model.lm_head(seen[0]), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(ids).logits, expected)  # and afterwards, everything is as before


def test_two_passes_give_the_same_bytes(tiny: Tiny) -> None:
    again = _collect(adapter.load_model(tiny.directory), tiny.samples, tiny.source)
    assert again._to_bytes() == tiny.statistics._to_bytes()


def test_a_pass_reports_every_token_once(tiny: Tiny) -> None:
    seen: dict[str, int] = {}

    def progress(domain: str, tokens: int) -> None:
        seen[domain] = seen.get(domain, 0) + tokens

    model = adapter.load_model(tiny.directory)
    calibration.collect(model, tiny.samples, tiny.source, {}, 50, progress)
    assert seen == {samples.domain: samples.tokens() for samples in tiny.samples}


def test_layers_on_disk_are_calibrated_like_others(tiny: Tiny, tmp_path: Path) -> None:
    where = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.norm": "cpu",
    }
    where |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.2": "cpu"}
    where["model.layers.1"] = "disk"
    model = AutoModelForCausalLM.from_pretrained(
        tiny.directory, device_map=where, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[1].mlp.experts.down_proj.is_meta
    offloaded = _collect(model, tiny.samples, tiny.source)
    _assert_close(offloaded, tiny.statistics, 1e-12)


def test_an_expert_without_tokens_has_only_zeros(tiny: Tiny) -> None:
    statistics = _collect(
        adapter.load_model(tiny.directory),
        [Samples("a", (torch.tensor([5]),))],
        tiny.source,
    )
    for tensors in statistics.layers.values():
        unused = tensors["counts"][0] == 0
        assert unused.sum() == 4
        for name, statistic in STATISTICS.items():
            if statistic.merge != "weights":
                assert not tensors[name][0, unused].any()


def test_activations_that_overflow_are_refused(tiny: Tiny) -> None:
    model = make_model()
    model.model.layers[1].mlp.experts.down_proj.data.mul_(1e38)
    with pytest.raises(
        DataError, match="layer 1 must be finite, got inf or nan: the model overflow"
    ):
        _collect(model, tiny.samples, tiny.source)
