# SPDX-License-Identifier: Apache-2.0
"""Calibrate, score, plan, prune, run: the five stages, each from one file to the next.

Every stage is a function here, and `prune` is all of them in a row.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenp import (
    adapter,
    applying,
    dern,
    output,
    planning,
    pruning,
    reconstruction,
    refitting,
    repair,
    running,
    scoring,
    sequential,
)
from tenp import report as reporting
from tenp.checkpoint import Checkpoint
from tenp.distributed import Group
from tenp.errors import PlanError, TenpError
from tenp.evaluation import DomainEvaluation
from tenp.execution import Execution
from tenp.files import require_absent, require_space, write_atomically
from tenp.model_card import Cost, model_card
from tenp.plan import Plan
from tenp.planning import Budget, UnderCovered
from tenp.reconstruction import Prediction
from tenp.running import Reporter, Run
from tenp.sequential import Narrowing
from tenp.statistics import Statistics, domain_weights_of
from tenp.text import read_domains
from tenp.workdir import WorkDirectory


def calibrate(
    checkpoint: Checkpoint,
    sources: Sequence[str | Path],
    run: Run,
    report: Reporter | None = None,
) -> Statistics:
    """Run the dense model over calibration text and return its statistics."""
    group = Group.from_environment()
    with run.execution.work(group) as work:
        source = pruning.source_of(checkpoint)
        return running.calibrate(
            checkpoint, source, read_domains(sources), run, report, group, work
        )


def save_statistics(statistics: Statistics, out: str | Path) -> None:
    """Save statistics, or find that an interrupted run of the same command had just done so.

    Raises:
        CheckpointError: There is another file at `out`.
    """
    path = Path(out)
    if not path.exists():
        statistics.save(path)
    elif path.is_dir() or Statistics.load(path).digest() != statistics.digest():
        require_absent(path)


def plan(
    statistics: Statistics,
    budget: Budget,
    neuron_criterion: str = "projection",
    domain_weights: Mapping[str, float] | None = None,
    under_covered: UnderCovered = "warn",
    expert_criterion: str | None = None,
    refit: bool = False,
    worst_domain: bool = False,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    dern_options: dern.Options | None = None,
) -> Plan:
    """Score the statistics and decide what is kept.

    Args:
        statistics: One calibration.
        budget: What is kept, and the method.
        neuron_criterion: How neurons are scored.
        domain_weights: Weight of each domain, 1 if not given.
        under_covered: What becomes of experts that saw little text.
        expert_criterion: How experts are scored; None is the method's own.
        refit: Also refit what is kept. The method `best` has no scores: it goes by what the
            experts' outputs lose, and always refits.
        worst_domain: For `best`: make the largest relative error of a domain smallest.
        seed: For the criterion `random`; the one for random centres is in `dern_options`.
        checkpoint: The model, for criteria that need weights.
        dern_options: For the method `dern`.
    """
    check(budget, neuron_criterion, under_covered, expert_criterion, refit, worst_domain)
    weighted = {"domain_weights": dict(domain_weights or {})}
    if budget.method == "best":
        best = reconstruction.plan(statistics, budget, domain_weights, under_covered, worst_domain)
        return dataclasses.replace(best, settings={**best.settings, **weighted})
    if expert_criterion is None:
        own = {"dern": "normalized-gating-score"}
        expert_criterion = own.get(budget.method, "direction-change")
    weights = None if checkpoint is None else refitting.reader_of_layers(checkpoint)
    scores = scoring.score(
        statistics, expert_criterion, neuron_criterion, domain_weights, seed, weights
    )
    decided = planning.plan(scores, statistics, budget, under_covered)
    decided = dataclasses.replace(
        decided,
        settings={
            **decided.settings,
            **_criteria(budget, expert_criterion, neuron_criterion, seed, dern_options),
            **weighted,
        },
    )
    return reconstruction.with_repair(decided, statistics, domain_weights) if refit else decided


def check(
    budget: Budget,
    neuron_criterion: str = "projection",
    under_covered: UnderCovered = "warn",
    expert_criterion: str | None = None,
    refit: bool = False,
    worst_domain: bool = False,
    **_: Any,
) -> None:
    """Refuse arguments of `plan` that fit no statistics at all.

    Raises:
        TenpError: An argument is out of range or not known, or two contradict each other.
    """
    planning.check_budget(budget)
    planning.check_under_covered(under_covered, budget.method)
    scoring.check(expert_criterion or "direction-change", neuron_criterion)
    if worst_domain and budget.method != "best":
        raise PlanError(f"worst_domain needs method best, got method {budget.method}")
    if refit and budget.method in ("drop", "dern"):
        raise PlanError(
            "a plan that drops whole experts cannot be repaired: the routers choose others instead, "
            f"got method {budget.method}"
        )


def _criteria(
    budget: Budget, experts: str, neurons: str, seed: int, dern_options: dern.Options | None
) -> dict[str, Any]:
    """What a plan records of how it was decided."""
    used: dict[str, Any] = {"experts": experts}
    if budget.method not in ("drop", "dern"):
        used["neurons"] = neurons
    if "random" in used.values():
        used["seed"] = seed
    if budget.method == "dern":
        used["dern"] = dataclasses.asdict(dern_options or dern.Options())
    return used


def frontier(
    statistics: Statistics,
    budgets: Sequence[Budget],
    domain_weights: Mapping[str, float] | None = None,
    under_covered: UnderCovered = "warn",
) -> list[Prediction]:
    """Predict what the method best gives for many budgets, without touching the model."""
    planning.check_under_covered(under_covered, "best")
    repair.require_moments(statistics)
    weights = repair.moment_weights(statistics, domain_weights)
    removals = reconstruction.eliminate(statistics, weights, under_covered)
    return [
        reconstruction.predict(reconstruction.cut(statistics, removals, budget, under_covered))
        for budget in budgets
    ]


def apply(
    checkpoint: Checkpoint,
    decided: Plan,
    out: str | Path,
    verify: bool = True,
    run: Run | None = None,
    report: Reporter | None = None,
    statistics: Statistics | None = None,
    weights: str | None = None,
) -> Mapping[str, float] | None:
    """Write the pruned checkpoint; with `verify`, reload it and compare it with the masked dense model.

    Args:
        checkpoint: The dense model.
        decided: What is kept.
        out: The new directory.
        verify: Whether to check what was written before it appears.
        run: Its memory budget, if any, is kept; with its work directory, shards that were finished
            before a stop are not written again.
        report: Told of progress.
        statistics: What the plan was made from; needed if it refits weights.
        weights: `int8` stores the experts' matrices in 8 bits with a scale per neuron; None, in the
            dtype of the checkpoint.

    Returns:
        For `int8`, by how much the weights changed: see `tenp.quantization.Int8.error`.
    """
    run = run or Run()
    int8 = applying.rounding_of(weights, decided.settings["method"])
    with run.execution.work(Group()) as work:
        applying.apply(checkpoint, decided, Path(out), verify, run, report, statistics, work, int8)
    return None if int8 is None else int8.error()


def report(
    directory: str | Path,
    out: str | Path,
    statistics: str | Path | None = None,
    data: Sequence[str | Path] = (),
    results: Sequence[str | Path] = (),
) -> Path:
    """Write the report of a pruned checkpoint, and return its page.

    Args:
        directory: The pruned checkpoint.
        out: The report's directory; must not exist.
        statistics: The file that its plan was made from.
        data: Text to count the pruned model's choices on.
        results: Files of `benchmarks/quality.py`.

    Raises:
        PlanError: The plan was made from other statistics.
        Unsupported: matplotlib is not installed.
    """
    require_absent(Path(out))
    reporting.require_matplotlib()
    decided = Plan.load(Path(directory) / pruning.PLAN_FILE)
    measured = None if statistics is None else Statistics.load(statistics)
    if measured is not None and measured.digest() != decided.statistics:
        raise PlanError(
            f"{statistics} must be the statistics of the plan, {decided.statistics[:12]}, got "
            f"{measured.digest()[:12]}; give the file that the plan was made from"
        )
    rows = [row for path in results for row in reporting.read_results(Path(path))]
    after = None
    if data:
        run, checkpoint = Run(), Checkpoint(directory)
        samples = running.samples_of(checkpoint, read_domains(data), run)
        after = reporting.selection_counts(
            adapter.load_model(checkpoint.directory, run.torch_dtype(), run.device), samples
        )
    drawn = reporting.figures(decided, measured, after, rows)
    return reporting.write(Path(out), decided, drawn, measured)


def evaluate(
    model: str | Path,
    sources: Sequence[str | Path],
    run: Run,
    reference: str | Path | None = None,
    report: Reporter | None = None,
) -> list[DomainEvaluation]:
    """Measure a checkpoint on text, and its distance from a reference."""
    return running.evaluate(
        Checkpoint.resolve(model),
        read_domains(sources),
        run,
        None if reference is None else Checkpoint.resolve(reference),
        report,
    )


@dataclass(frozen=True)
class Pruned:
    """What `prune` made.

    Attributes:
        plan: What was kept.
        statistics: What it was decided on.
        before: The dense model on the evaluation text.
        after: The pruned one.
        rounding: By how much int8 changed the weights: see `tenp.quantization.Int8.error`.
    """

    plan: Plan
    statistics: Statistics
    before: list[DomainEvaluation] = field(default_factory=list)
    after: list[DomainEvaluation] = field(default_factory=list)
    rounding: Mapping[str, float] | None = None


def _narrowing(
    first: Plan,
    dense: Statistics,
    options: sequential.Options,
    checkpoint: Checkpoint,
    plan_options: Mapping[str, Any],
) -> Narrowing:
    names = ("neuron_criterion", "domain_weights", "seed")
    given = {name: plan_options[name] for name in names if name in plan_options}
    weights = refitting.reader_of_layers(checkpoint)
    return Narrowing(first, dense, options, **given, weights=weights)


@contextmanager
def _work_of(
    work: WorkDirectory | None, first: Plan, group: Group
) -> Iterator[WorkDirectory | None]:
    """Yield the part of a work directory that belongs to the sequential run of a plan."""
    if work is None:
        yield None
        return
    path = work.path / f"sequential-{first.digest()[:16]}"
    with Execution(work_dir=path).work(group) as own:
        yield own


def prune(
    model: str | Path,
    sources: Sequence[str | Path],
    out: str | Path | None,
    budget: Budget,
    run: Run | None = None,
    evaluate_on: Sequence[str | Path] = (),
    report: Reporter | None = None,
    verify: bool = True,
    weights: str | None = None,
    **plan_options: Any,
) -> Pruned:
    """Do the whole job: calibrate, plan, write, verify, and measure what it cost.

    Args:
        model: A checkpoint directory, or a model name on the Hub.
        sources: Calibration text, one domain each.
        out: The new directory, or None to plan only.
        budget: What is kept.
        run: How the model is run.
        evaluate_on: Text to measure on before and after, one domain each.
        report: Told of progress.
        verify: Reload what was written and compare it with the masked dense model.
        weights: As in `apply`.
        plan_options: Further arguments of `plan`.

    Raises:
        TenpError: Something does not fit; nothing is left in `out`. What was calibrated without a
            work directory is then kept beside it.
    """
    run = run or Run()
    if budget.method == "best" or plan_options.get("refit"):
        run = dataclasses.replace(run, second_moments=True)
    criteria = {plan_options.get("expert_criterion"), plan_options.get("neuron_criterion")}
    if budget.pool == "model" or criteria & {*scoring.NEEDS_SECOND_PASS}:
        run = dataclasses.replace(run, second_pass=True)
    # What can be known to be wrong is found before the model is read, a misspelled option too.
    inspect.signature(plan).bind(None, budget, checkpoint=None, **plan_options)
    check(budget, **plan_options)
    kept, _ = planning.check_budget(budget)
    int8 = applying.rounding_of(weights, budget.method)
    if run.execution.sequential is not None:
        sequential.check(run.execution.sequential, budget.method, run.second_moments)
    run.torch_dtype()
    group = Group.from_environment()
    with run.execution.work(group) as work:
        if out is not None and not output.was_begun(work, Path(out)):
            require_absent(Path(out))
        domains = read_domains(sources)
        domain_weights_of([d.name for d in domains], plan_options.get("domain_weights") or {})
        measured_on = read_domains(evaluate_on) if evaluate_on else []
        checkpoint = Checkpoint.resolve(model)
        source = pruning.source_of(checkpoint)
        if out is not None and not Path(out).exists():
            # At least: only experts shrink, and float32 to a quarter in 8 bits.
            require_space(Path(out), int(kept * source.bytes / (1 if int8 is None else 4)))
        statistics = running.calibrate(checkpoint, source, domains, run, report, group, work)
        try:
            decided = plan(statistics, budget, checkpoint=checkpoint, **plan_options)
            if run.execution.sequential is not None:
                narrowing = _narrowing(
                    decided, statistics, run.execution.sequential, checkpoint, plan_options
                )
                with _work_of(work, decided, group) as own:
                    statistics = running.calibrate(
                        checkpoint, source, domains, run, report, group, own, narrowing
                    )
                decided = narrowing.plan(statistics)
            if out is None or group.rank > 0:
                return Pruned(decided, statistics)
            applying.apply(
                checkpoint, decided, Path(out), verify, run, report, statistics, work, int8
            )
        except TenpError as error:
            if out is None or group.rank > 0 or work is not None:
                raise
            raise output.keep_statistics(statistics, Path(out), error) from error
        changed = None if int8 is None else int8.error()
        if not measured_on:
            return Pruned(decided, statistics, rounding=changed)
        before = running.evaluate(checkpoint, measured_on, run, report=report)
        written = Checkpoint(out)
        after = running.evaluate(written, measured_on, run, checkpoint, report)
        card = _card_with_costs(checkpoint, written, decided, before, after)
        write_atomically(Path(out) / "README.md", card.encode())
        return Pruned(decided, statistics, before, after, changed)


def _card_with_costs(
    checkpoint: Checkpoint,
    written: Checkpoint,
    decided: Plan,
    before: Sequence[DomainEvaluation],
    after: Sequence[DomainEvaluation],
) -> str:
    costs = [
        Cost(dense.domain, dense.tokens, dense.perplexity, pruned.perplexity, pruned.divergence)
        for dense, pruned in zip(before, after, strict=True)
        if pruned.divergence is not None
    ]
    stored = written.config.get("quantization_config") or {}
    needs_tenp, is_int8 = stored.get("quant_method") == "tenp", stored.get("weights") == "int8"
    return model_card(checkpoint, decided, needs_tenp, costs, is_int8)
