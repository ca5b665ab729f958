# SPDX-License-Identifier: Apache-2.0
"""The report is one page with everything in it."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from support.fixtures import Command, Tiny
from tenp import adapter, report, second_pass
from tenp.errors import DataError
from tenp.statistics import merge

pytest.importorskip("matplotlib")


def _row(method: str, share: float, kl: float, samples: int) -> dict[str, object]:
    domains = {"prose": {"kl": kl, "perplexity": 2.0, "agreement": 1.0, "tokens": 5}}
    return {"method": method, "share": share, "seed": 0, "samples": samples, "domains": domains}


def test_the_page_needs_no_other_file(
    tiny: Tiny, tmp_path: Path, command: Command, text_file: Path
) -> None:
    tiny.statistics.save(tmp_path / "statistics.safetensors")
    result = command(
        *("report", tiny.pruned, "--out", tmp_path / "report"),
        *("--statistics", tmp_path / "statistics.safetensors", "--data", text_file),
    )
    assert result.code == 0, result.err
    page = (tmp_path / "report" / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 3
    for name in ("widths", "frequency", "coverage"):
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for fact in (tiny.source.fingerprint, tiny.plan.statistics, "Provenance"):
        assert fact in page


def test_results_become_figures(tiny: Tiny) -> None:
    rows = [_row("TENP", s, 1 - s + 1 / n, n) for s in (0.6, 0.3) for n in (8, 16)]
    names = [figure.name for figure in report.figures(tiny.plan, results=rows)]
    assert names == ["widths", "calibration", "quality"]


def test_another_json_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(DataError, match="benchmarks/quality.py"):
        report.read_results(tmp_path / "other.json")


def test_every_token_chooses_k_experts(tiny: Tiny) -> None:
    counts = report.selection_counts(adapter.load_model(tiny.pruned), tiny.samples)
    tokens = sum(domain.tokens() for domain in tiny.samples)
    assert {int(c.sum()) for c in counts.values()} == {2 * tokens}
    dense = report.selection_counts(adapter.load_model(tiny.directory), tiny.samples)
    for layer, sums in tiny.statistics.layers.items():
        assert torch.equal(dense[layer], sums["counts"].sum(dim=0))


# ---- the second pass, which feeds HEAPr and EASY-EP ----


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
