# SPDX-License-Identifier: Apache-2.0
"""What commands show: tables and progress for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from tenp.evaluation import DomainEvaluation
from tenp.plan import Plan
from tenp.planning import MINIMUM_COVERAGE, under_covered_experts
from tenp.reconstruction import Prediction
from tenp.running import Reporter
from tenp.statistics import Statistics

_BAR = 32


@contextmanager
def progress(quiet: bool, as_json: bool = False) -> Iterator[Reporter | None]:
    """Yield a reporter that shows how far every stage is, on stderr.

    Args:
        quiet: Yield None.
        as_json: A line of JSON per event instead of a bar per stage.
    """
    if quiet:
        yield None
        return
    if as_json:
        yield _report_events
        return
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(show_speed=True),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # In a log file a bar is noise, and even an empty one leaves a blank line.
    is_hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=is_hidden) as bars:

        def report(stage: str, total: int, unit: str) -> Callable[[str, int], None]:
            if not total:
                bars.console.print(stage, highlight=False, style="dim")
                return lambda what, amount: None
            task = bars.add_task(stage, total=total, amount="")
            done = 0

            def advance(what: str, amount: int) -> None:
                nonlocal done
                done += amount
                bars.update(
                    task,
                    advance=amount,
                    description=f"{stage} {what}",
                    amount=_amount(done, total, unit),
                )

            return advance

        yield report


def _amount(done: int, total: int, unit: str) -> str:
    if unit == "bytes":
        return f"{done / 1e9:,.2f}/{total / 1e9:,.2f} GB"
    return f"{done:,}/{total:,} {unit}"


def _report_events(stage: str, total: int, unit: str) -> Callable[[str, int], None]:
    """One JSON object a line: a program that starts tenp can show the progress in its own way."""
    begin, done = time.monotonic(), 0
    lock = threading.Lock()

    def say(**event: Any) -> None:
        with lock:
            print(json.dumps(event), file=sys.stderr, flush=True)

    if not total:
        say(event="note", text=stage)
        return lambda what, amount: None
    say(event="begin", stage=stage, total=total, unit=unit)

    def advance(what: str, amount: int) -> None:
        nonlocal done
        done += amount
        seconds = time.monotonic() - begin
        say(
            event="progress",
            stage=stage,
            what=what,
            done=done,
            total=total,
            unit=unit,
            seconds=round(seconds, 3),
            seconds_left=round(seconds * (total - done) / done, 1) if done else None,
        )

    return advance


def print_json(content: Any) -> None:
    """Print JSON on stdout."""
    print(json.dumps(content, indent=2))


def plan_summary(plan: Plan) -> dict[str, Any]:
    """Return the figures of a plan."""
    repair = {}
    if plan.repair is not None:
        repair = {
            "predicted_errors": plan.repair.errors,
            "singular_experts": plan.repair.singular,
        }
    return {
        **repair,
        "settings": plan.settings,
        "static_share": plan.static_share(),
        "activated_share": plan.activated_share,
        "parameters": {
            "before": plan.source.parameters,
            "after": plan.total_parameters(),
        },
        "bytes": {"before": plan.source.bytes, "after": plan.total_bytes()},
        "widths": {str(layer): widths for layer, widths in plan.widths().items()},
    }


def print_plan(plan: Plan) -> None:
    """Draw the trapezoid: for every layer the whole experts, and how much is kept."""
    table = Table(title="kept neurons per layer", box=None, title_justify="left", pad_edge=False)
    for heading in ("layer", "whole", "narrow", "width", "kept"):
        table.add_column(heading, justify="right")
    table.add_column("█ whole experts  ▒ kept neurons of narrow ones", justify="left")
    for layer, widths in plan.widths().items():
        full = plan.keep[layer].shape[1]
        narrow = [width for width in widths if width < full]
        whole = len(widths) - len(narrow)
        spread = (
            "-"
            if not narrow
            else f"{min(narrow)}"
            if min(narrow) == max(narrow)
            else f"{min(narrow)}-{max(narrow)}"
        )
        solid = round(_BAR * whole / len(widths))
        shaded = round(_BAR * sum(widths) / (full * len(widths))) - solid
        bar = "█" * solid + "▒" * shaded + "·" * (_BAR - solid - shaded)
        kept = sum(widths) / (full * len(widths))
        table.add_row(
            str(layer),
            str(whole),
            str(len(narrow)),
            f"{spread} of {full}",
            f"{kept:.1%}",
            bar,
        )
    console = Console()
    console.print(table)
    source = plan.source
    console.print(
        f"routed parameters kept {plan.static_share():.2%}, activated {plan.activated_share:.2%}\n"
        f"parameters {source.parameters:,} → {plan.total_parameters():,}, "
        f"{source.bytes / 2**20:,.1f} → {plan.total_bytes() / 2**20:,.1f} MiB",
        highlight=False,
    )
    if plan.repair is not None:
        errors = plan.repair.errors.values()
        figures = (
            f"{sum(error[name] for error in errors) / len(errors):.4f} {what}"
            for name, what in (
                ("repaired", "repaired"),
                ("masked", "without repair"),
                ("crossed", "on the half not fitted on"),
            )
        )
        console.print(
            f"predicted error of the experts' outputs {', '.join(figures)}",
            highlight=False,
        )
        singular = [(layer, e) for layer, es in plan.repair.singular.items() for e in es]
        if singular:
            console.print(
                f"{len(singular)} experts saw fewer tokens than they have neurons (layer/expert "
                f"{_some(singular)}); a ridge makes their second moments regular",
                highlight=False,
            )


def warn_of_coverage(measured: Statistics) -> None:
    """Say on stderr which experts saw too little text."""
    experts = under_covered_experts(measured)
    if experts:
        Console(stderr=True).print(
            f"[yellow]warning:[/] {len(experts)} experts saw fewer than {MINIMUM_COVERAGE} calibration tokens "
            f"(layer/expert {_some(experts)}); their neurons are chosen on little evidence, see --under-covered",
            highlight=False,
        )


def _some(experts: Sequence[tuple[int, int]]) -> str:
    """The first few of a list of experts."""
    return ", ".join(f"{layer}/{expert}" for layer, expert in experts[:8]) + (
        ", …" if len(experts) > 8 else ""
    )


def evaluation_rows(evaluations: Sequence[DomainEvaluation]) -> list[dict[str, Any]]:
    """Return evaluations as JSON objects; JSON knows no infinity, so a figure beyond it is null."""
    return [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(evaluation).items()
        }
        for evaluation in evaluations
    ]


def print_evaluations(
    after: Sequence[DomainEvaluation], before: Sequence[DomainEvaluation] = ()
) -> None:
    """Show one row a domain and their mean; with `before`, the dense model beside."""
    table = Table(box=None, pad_edge=False)
    for heading in (
        "domain",
        "tokens",
        *(["perplexity before"] if before else []),
        "perplexity",
    ):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    has_reference = all(evaluation.divergence is not None for evaluation in after)
    if has_reference:
        table.add_column("KL from dense, nats", justify="right")
        table.add_column("same top token", justify="right")

    def row(name: str, tokens: int, values: Sequence[float]) -> None:
        cells = [f"{value:.3f}" for value in values[: 2 if before else 1]]
        if has_reference:
            cells += [f"{values[-2]:.4f}", f"{values[-1]:.1%}"]
        table.add_row(name, f"{tokens:,}", *cells)

    lines: list[list[float]] = []
    for position, evaluation in enumerate(after):
        line = [before[position].perplexity] if before else []
        line.append(evaluation.perplexity)
        if evaluation.divergence is not None and evaluation.agreement is not None:
            line += [evaluation.divergence, evaluation.agreement]
        lines.append(line)
        row(evaluation.domain, evaluation.tokens, line)
    if len(lines) > 1:
        perplexities = 2 if before else 1
        means = [
            # Perplexities are compared by ratio, so their mean is the geometric one.
            statistics.geometric_mean(column) if at < perplexities else statistics.mean(column)
            for at, column in enumerate(zip(*lines, strict=True))
        ]
        row("mean", sum(evaluation.tokens for evaluation in after), means)
    Console().print(table)


def show_frontier(predictions: Sequence[Prediction], as_json: bool) -> None:
    """Print what budgets would give."""
    if as_json:
        print_json([dataclasses.asdict(prediction) for prediction in predictions])
        return
    table = Table(box=None, pad_edge=False)
    for heading in (
        "keep",
        "kept",
        "activated",
        "parameters",
        "MiB",
        "error",
        "on other half",
    ):
        table.add_column(heading, justify="right")
    for prediction in predictions:
        table.add_row(
            f"{prediction.keep:g}",
            f"{prediction.static_share:.1%}",
            f"{prediction.activated_share:.1%}",
            f"{prediction.parameters:,}",
            f"{prediction.bytes / 2**20:,.1f}",
            f"{prediction.error:.4f}",
            f"{prediction.crossed:.4f}",
        )
    console = Console()
    console.print(table)
    console.print(
        "error: squared change of the experts' outputs over their squared output, mean over layers; on other "
        "half: of the samples, when fitted on the first",
        style="dim",
        highlight=False,
    )


def show_plan(plan: Plan, as_json: bool) -> None:
    """Print a plan for people or programs."""
    if as_json:
        print_json(plan_summary(plan))
    else:
        print_plan(plan)


def show_applied(
    plan: Plan, rounding: Mapping[str, float] | None, out: Path, as_json: bool
) -> None:
    """Print a plan that was carried out, and what int8 changed in the weights, if it did."""
    if as_json:
        print_json(applied_summary(plan, rounding, out))
        return
    print_plan(plan)
    print_rounding(rounding, out)


def applied_summary(
    plan: Plan, rounding: Mapping[str, float] | None, out: Path | None
) -> dict[str, Any]:
    """Return the figures of a plan that was carried out."""
    summary = plan_summary(plan)
    if rounding is None or out is None:
        return summary
    sizes = {"before": summary["bytes"]["before"], "after": _stored(out)}
    return {**summary, "bytes": sizes, "weights": {"dtype": "int8", **rounding}}


def print_rounding(rounding: Mapping[str, float] | None, out: Path | None) -> None:
    """Print what int8 changed in the weights, if it did."""
    if rounding is None or out is None:
        return
    print(
        f"int8 weights: {_stored(out) / 2**20:,.1f} MiB stored; they differ from the kept ones by "
        f"{rounding['relative_error']:.2%} (root mean square), at most {rounding['largest_error_in_steps']:.2f} "
        "of a neuron's step"
    )


def _stored(out: Path) -> int:
    return sum(path.stat().st_size for path in out.glob("*.safetensors"))


def show_statistics(measured: Statistics, as_json: bool) -> None:
    """Print what statistics were taken of, and how well the experts are covered."""
    coverage = {layer: tensors["counts"].sum(dim=0) for layer, tensors in measured.layers.items()}
    if as_json:
        print_json(
            {
                "source": dataclasses.asdict(measured.source),
                "settings": measured.settings,
                "domains": [dataclasses.asdict(domain) for domain in measured.domains],
                "tokens_per_expert": {
                    str(layer): counts.tolist() for layer, counts in coverage.items()
                },
            }
        )
        return
    console = Console()
    domains = Table("domain", "samples", "tokens", box=None, pad_edge=False)
    for domain in measured.domains:
        domains.add_row(domain.name, f"{domain.samples:,}", f"{domain.tokens:,}")
    console.print(domains)
    layers = Table("layer", "experts", "fewest tokens", "median", "most", box=None, pad_edge=False)
    for layer, counts in coverage.items():
        figures = (f"{int(value):,}" for value in (counts.min(), counts.median(), counts.max()))
        layers.add_row(str(layer), str(len(counts)), *figures)
    console.print(layers)
