# SPDX-License-Identifier: Apache-2.0
"""The report is one page with everything in it."""

import re
from pathlib import Path

import pytest
import torch

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
    loss, change = _finite_difference(tiny)
    sums = statistics.layers[2]
    # d loss / d scale of a neuron's contribution = sum_t m_k dL/dm_k, bounded by Cauchy-Schwarz.
    bound = (sums["activation_energy"] * sums["gradient_energy"])[:, 0].sum(dim=0).sqrt()
    assert loss > 0
    assert (change.abs() <= 1.5 * bound + 1e-2).all()
    for tensors in statistics.layers.values():
        assert tensors["output_sensitivity"].gt(0).all()
        assert tensors["residual_change"].ge(0).all()


def _finite_difference(tiny: Tiny) -> tuple[float, torch.Tensor]:
    """Loss, and its change per relative change of the first four neurons of expert 0, layer 2."""
    model = adapter.load_model(tiny.directory)
    experts = adapter.find_experts(model)[2]

    def loss() -> float:
        total = 0.0
        for domain in tiny.samples:
            for ids in domain.ids:
                logits = model(ids[None]).logits[0, :-1].double()
                total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        return total

    before, step, changes = loss(), 1e-2, []
    with torch.no_grad():
        for neuron in range(experts.width):
            if neuron >= 4:
                changes.append(0.0)
                continue
            column = experts.down[0][:, neuron]
            kept = column.clone()
            column.mul_(1 + step)
            changes.append((loss() - before) / step)
            column.copy_(kept)
    return before, torch.tensor(changes)
