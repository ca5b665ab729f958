# SPDX-License-Identifier: Apache-2.0
"""One HTML page, with its pictures inside, that shows what a pruned checkpoint is and what it cost.

Every figure is drawn of files only: the plan in the checkpoint, the statistics it was made from, the
choices of its routers on some text, and rows of `benchmarks/quality.py`. What is not given is left out.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tenp import repair
from tenp.errors import DataError, Unsupported
from tenp.files import write_atomically
from tenp.plan import Plan
from tenp.planning import MINIMUM_COVERAGE, under_covered_experts
from tenp.runtime.experts import TenpExperts
from tenp.samples import Samples
from tenp.statistics import Statistics


@dataclass(frozen=True)
class Figure:
    """One picture.

    Attributes:
        name: Of its PNG file, without the suffix.
        title: One line.
        text: What is to be seen.
        png: The picture.
    """

    name: str
    title: str
    text: str
    png: bytes


@torch.no_grad()
def selection_counts(
    model: PreTrainedModel, samples: Sequence[Samples], batch_tokens: int = 2048
) -> dict[int, Tensor]:
    """Count how many attended tokens choose every expert of a pruned model, `[E]` int64 per layer."""
    counts: dict[int, Tensor] = {}
    attended = torch.empty(0)

    def count(layer: int, experts: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            chosen = args[1][attended.to(args[1].device)].flatten()
            found = torch.bincount(chosen.cpu(), minlength=experts)
            counts[layer] = counts.get(layer, torch.zeros_like(found)) + found

        return hook

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, TenpExperts) or hasattr(module, "is_transposed"):
            layer = next(int(part) for part in name.split(".") if part.isdigit())
            total = int(getattr(module, "num_experts"))  # noqa: B009 - no attribute of nn.Module
            hooks.append(module.register_forward_pre_hook(count(layer, total)))
    for domain in samples:
        for ids, mask in domain.batches(batch_tokens, model.device):
            attended = mask.flatten().bool()
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return counts


def figures(
    plan: Plan,
    statistics: Statistics | None = None,
    after: Mapping[int, Tensor] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
) -> list[Figure]:
    """Draw all figures for which there is data.

    Args:
        plan: Of the checkpoint.
        statistics: That the plan was made from.
        after: `selection_counts` of the pruned model.
        results: Rows of `benchmarks/quality.py`.
    """
    drawn = [_widths(plan)]
    if statistics is not None:
        drawn.append(_frequency(statistics, after or {}))
        drawn.append(_coverage(statistics))
    if (errors := layer_errors(plan, statistics)) is not None:
        drawn.append(_errors(errors))
    rows = [row for row in results if "share" in row and "left_out" not in row]
    if len({row.get("samples") for row in rows}) > 1:
        drawn.append(_calibration_size(rows))
    if rows:
        # Methods are compared at one calibration size, the one that most rows have.
        ((usual, _),) = Counter(row.get("samples") for row in rows).most_common(1)
        drawn.append(_quality([row for row in rows if row.get("samples") == usual]))
    return drawn


def layer_errors(plan: Plan, statistics: Statistics | None) -> dict[int, dict[str, float]] | None:
    """Return the predicted error of every layer, from the plan or from second moments."""
    if plan.repair is not None:
        return plan.repair.errors
    if statistics is None or plan.experts is not None:
        return None
    if any("second_moment" not in sums for sums in statistics.layers.values()):
        return None
    weights = repair.moment_weights(statistics)
    errors = {}
    for layer, keep in plan.keep.items():
        known = repair.layer_moments(statistics, layer, weights)
        energy = float(repair.energy(known.gram, known.moment).sum()) or 1.0
        lost = sum(map(repair.masked_residual, known.gram, known.moment, known.with_bias(keep)))
        errors[layer] = {"masked": lost / energy}
    return errors


def write(
    directory: Path, plan: Plan, drawn: Sequence[Figure], statistics: Statistics | None = None
) -> Path:
    """Write `report.html` and one PNG a figure.

    Args:
        directory: Made if it does not exist.
        plan: Of the checkpoint.
        drawn: From `figures`.
        statistics: For coverage and provenance.

    Returns:
        The page.
    """
    for figure in drawn:
        write_atomically(directory / f"{figure.name}.png", figure.png)
    page = directory / "report.html"
    write_atomically(page, _page(plan, drawn, statistics).encode())
    return page


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file of `benchmarks/quality.py`.

    Raises:
        DataError: It is none.
    """
    try:
        rows = json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} must be a file of benchmarks/quality.py: {error}") from error
    return list(rows)


def require_matplotlib() -> None:
    """Check that figures can be drawn.

    Raises:
        Unsupported: They cannot.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise Unsupported("a report needs matplotlib, got none; install tenp[report]") from None


def _plot(width: float = 8.0, height: float = 3.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width, height), dpi=120, layout="constrained")
    return canvas, canvas.add_subplot()


def _finish(canvas: Any, name: str, title: str, text: str) -> Figure:
    buffer = io.BytesIO()
    # Without the version of matplotlib: equal data gives equal bytes.
    canvas.savefig(buffer, format="png", metadata={"Software": None})
    return Figure(name, title, text, buffer.getvalue())


def _widths(plan: Plan) -> Figure:
    canvas, axes = _plot(height=1.2 + 0.25 * len(plan.keep))
    shares = [
        sorted((w / k.shape[1] for w in ws), reverse=True)
        for (ws, k) in zip(plan.widths().values(), plan.keep.values(), strict=True)
    ]
    longest = max(map(len, shares))
    grid = [row + [float("nan")] * (longest - len(row)) for row in shares]
    image = axes.imshow(
        grid, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest"
    )
    axes.set_yticks(range(len(plan.keep)), [str(layer) for layer in plan.keep])
    axes.set_ylabel("layer")
    axes.set_xlabel("experts of the layer, widest first")
    canvas.colorbar(image, ax=axes, label="kept share of the width")
    return _finish(
        canvas,
        "widths",
        "Kept width of every expert",
        "One row a layer, its experts from the widest to the narrowest: the brighter, the more stays.",
    )


def _frequency(statistics: Statistics, after: Mapping[int, Tensor]) -> Figure:
    canvas, axes = _plot()
    for index, (layer, sums) in enumerate(statistics.layers.items()):
        counts = sums["counts"].sum(dim=0).double()
        order = counts.argsort(descending=True)
        shade = 0.25 + 0.7 * index / max(len(statistics.layers) - 1, 1)
        axes.plot(counts[order] / counts.sum(), color=(0.1, 0.3, shade), lw=1)
        new = after.get(layer)
        if new is not None and len(new) == len(counts):
            axes.plot(new.double()[order] / new.sum(), ".", ms=3, color=(0.9, 0.4, 1 - shade))
    axes.set_xlabel("experts of a layer, most chosen first (before)")
    axes.set_ylabel("share of choices")
    text = "One line a layer, darker is shallower: how often the routers choose every expert of the dense model"
    text += "; dots: of the pruned one, on the given text." if after else "."
    return _finish(canvas, "frequency", "Expert selection", text)


def _coverage(statistics: Statistics) -> Figure:
    canvas, axes = _plot()
    layers = list(statistics.layers)
    counts = [sums["counts"].sum(dim=0) for sums in statistics.layers.values()]
    for name, values in (
        ("most", [c.max() for c in counts]),
        ("median", [c.median() for c in counts]),
        ("fewest", [c.min() for c in counts]),
    ):
        axes.plot(layers, [int(v) for v in values], marker="o", ms=3, label=name)
    axes.axhline(MINIMUM_COVERAGE, color="red", lw=0.8, ls="--", label=f"{MINIMUM_COVERAGE} tokens")
    axes.set_yscale("symlog")
    axes.set_xlabel("layer")
    axes.set_ylabel("calibration tokens of an expert")
    axes.legend()
    few = len(under_covered_experts(statistics))
    return _finish(
        canvas, "coverage", "Coverage", f"{few} experts saw fewer than {MINIMUM_COVERAGE} tokens."
    )


def _errors(errors: Mapping[int, Mapping[str, float]]) -> Figure:
    canvas, axes = _plot()
    labels = {
        "masked": "without repair",
        "crossed": "repaired, on the half not fitted on",
        "repaired": "repaired, on all samples",
    }
    for name, label in labels.items():
        if all(name in layer for layer in errors.values()):
            axes.plot(
                list(errors),
                [layer[name] for layer in errors.values()],
                marker="o",
                ms=3,
                label=label,
            )
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("squared error / squared output")
    axes.legend()
    return _finish(
        canvas,
        "errors",
        "Error per layer",
        "Predicted change of the experts' outputs, by the trace formula: no forward pass.",
    )


def _kl(row: Mapping[str, Any]) -> float:
    values = [domain["kl"] for domain in row["domains"].values()]
    return sum(values) / len(values)


def _calibration_size(rows: Sequence[Mapping[str, Any]]) -> Figure:
    canvas, axes = _plot()
    for method, share in sorted({(row["method"], row["share"]) for row in rows}):
        mine = [row for row in rows if (row["method"], row["share"]) == (method, share)]
        sizes = sorted({row["samples"] for row in mine if row.get("samples")})
        if len(sizes) > 1:
            means = []
            for size in sizes:
                kls = [_kl(row) for row in mine if row.get("samples") == size]
                means.append(sum(kls) / len(kls))
            axes.plot(sizes, means, marker="o", ms=3, label=f"{method}, {share:g}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("calibration samples per domain")
    axes.set_ylabel("KL from dense, nats per token")
    axes.legend(fontsize=7)
    return _finish(
        canvas, "calibration", "Effect of the calibration size", "Means over seeds and domains."
    )


def _quality(rows: Sequence[Mapping[str, Any]]) -> Figure:
    canvas, axes = _plot(9, 5)
    # Ten colours in four styles tell forty methods apart.
    styles = itertools.cycle(("-", "--", ":", "-."))
    style = next(styles)
    for index, method in enumerate(sorted({row["method"] for row in rows})):
        style = next(styles) if index and index % 10 == 0 else style
        shares = sorted({row["share"] for row in rows if row["method"] == method})
        means = []
        for share in shares:
            kls = [_kl(row) for row in rows if (row["method"], row["share"]) == (method, share)]
            means.append(sum(kls) / len(kls))
        axes.plot([1 - share for share in shares], means, style, marker="o", ms=3, label=method)
    axes.set_yscale("log")
    axes.set_xlabel("sparsity: removed share of the routed parameters")
    axes.set_ylabel("KL from dense, nats per token")
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return _finish(
        canvas,
        "quality",
        "Quality against sparsity",
        "Means over seeds and domains; lower is better.",
    )


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "img{max-width:100%}td,th{padding:.1rem .8rem .1rem 0;text-align:left}code{word-break:break-all}"
)


def _page(plan: Plan, drawn: Sequence[Figure], statistics: Statistics | None) -> str:
    source = plan.source
    facts = [
        ("architecture", source.architecture),
        ("method", str(plan.settings.get("method"))),
        ("parameters", f"{source.parameters:,} → {plan.total_parameters():,}"),
        ("bytes", f"{source.bytes:,} → {plan.total_bytes():,}"),
        ("routed parameters kept", f"{plan.static_share():.2%}"),
        ("activated routed parameters kept", f"{plan.activated_share:.2%}"),
    ]
    provenance = [
        ("checkpoint", source.fingerprint),
        ("statistics", plan.statistics),
        ("plan", plan.digest()),
        ("settings", json.dumps(plan.settings, sort_keys=True)),
    ]
    if statistics is not None:
        provenance.append(("calibration", json.dumps(statistics.settings, sort_keys=True)))
        for domain in statistics.domains:
            provenance.append(
                (f"domain {domain.name}", f"{domain.samples:,} samples, {domain.tokens:,} tokens")
            )
    pictures = "".join(
        f"<h2>{html.escape(figure.title)}</h2><p>{html.escape(figure.text)}</p>"
        f'<img alt="{html.escape(figure.title)}" '
        f'src="data:image/png;base64,{base64.b64encode(figure.png).decode()}">'
        for figure in drawn
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>tenp report</title><style>{_STYLE}</style>'
        f"<h1>{html.escape(source.architecture)}, pruned to {plan.static_share():.1%}</h1>{_rows(facts)}{pictures}"
        f"<h2>Provenance</h2>{_rows(provenance)}</html>\n"
    )


def _rows(pairs: Sequence[tuple[str, str]]) -> str:
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td><code>{html.escape(value)}</code></td></tr>"
        for name, value in pairs
    )
    return f"<table>{cells}</table>"
