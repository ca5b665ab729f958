# SPDX-License-Identifier: Apache-2.0
"""Calibrate, score, plan, prune, run: the five stages, each from one file to the next.

Every stage is a function here, and `prune` is all of them in a row.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tenp import (
    adapter,
    calibration,
    dern,
    dropping,
    evaluation,
    execution,
    planning,
    pruning,
    reconstruction,
    refitting,
    repair,
    scoring,
    second_pass,
    verification,
)
from tenp import report as reporting
from tenp.checkpoint import Checkpoint
from tenp.distributed import Group
from tenp.errors import CheckpointError, InvalidArgument, Unsupported
from tenp.evaluation import DomainEvaluation
from tenp.execution import Execution
from tenp.files import require_absent, require_space
from tenp.plan import Plan
from tenp.planning import Budget, UnderCovered
from tenp.reading import Reader
from tenp.reconstruction import Prediction
from tenp.refitting import Refitting
from tenp.samples import Samples, generate_answers, tokenize
from tenp.source import Source
from tenp.statistics import Statistics
from tenp.streaming import Progress
from tenp.text import TextDomain, read_domains
from tenp.workdir import WorkDirectory

#: Called with (stage, total amount, its unit) when a stage starts; returns what to call with what
#: is being done and how much of the amount was done since the last call.
Reporter = Callable[[str, int, str], Callable[[str, int], None]]


@dataclass(frozen=True)
class Run:
    """How text is read and the model is run.

    Attributes:
        samples: Samples per domain, chosen at random; None takes all. The paper uses 128.
        max_length: Tokens per sample at most; None is the model's own maximum, but 2048 at most.
        batch_tokens: Token positions per forward pass.
        seed: For every random choice.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: the checkpoint's own on a GPU and
            float32 on a CPU, where most machines have no fast 16-bit arithmetic.
        device: A torch device, or `auto` to spread the model over what there is.
        self_generate: Tokens that the model answers to every prompt first; 0 takes text as it is.
        execution: In memory or streamed, and what can be resumed.
        second_moments: Also collect what repair and the method best need.
        second_pass: Also run the model with gradients, for criteria that need it.
    """

    samples: int | None = 128
    max_length: int | None = None
    batch_tokens: int = 4096
    seed: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    self_generate: int = 0
    execution: Execution = field(default_factory=Execution)
    second_moments: bool = False
    second_pass: bool = False

    def torch_dtype(self) -> torch.dtype | str:
        """Return the dtype to load a model in."""
        if self.dtype == "auto":
            return torch.float32 if self.device == "cpu" else "auto"
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise InvalidArgument(
                f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype}"
            )
        return getattr(torch, self.dtype)


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
        return _calibrate(checkpoint, source, read_domains(sources), run, report, group, work)


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


def _calibrate(
    checkpoint: Checkpoint,
    source: Source,
    domains: Sequence[TextDomain],
    run: Run,
    report: Reporter | None,
    group: Group,
    work: WorkDirectory | None,
) -> Statistics:
    config = adapter.load_config(checkpoint.directory)
    settings = {
        "dtype": "",
        "max_length": _max_length(config, run),
        "batch_tokens": run.batch_tokens,
        "samples": run.samples,
        "seed": run.seed,
        "self_generate": run.self_generate,
    }
    if run.execution.is_streamed(group, checkpoint):
        if run.second_pass:
            raise Unsupported("a second pass needs the whole model in memory; use --stream none")
        if run.self_generate:
            raise Unsupported(
                "self_generate needs the whole model in memory; use --stream none, or calibrate on answers in a file"
            )
        samples = _samples(checkpoint, domains, run)
        dtype = run.torch_dtype()
        if not isinstance(dtype, torch.dtype):
            dtype = adapter.stored_dtype(config)
        settings["dtype"] = str(dtype).removeprefix("torch.")
        device = (
            f"cuda:{group.local_rank}" if run.device == "cuda" and group.size > 1 else run.device
        )
        return execution.calibrate_streamed(
            checkpoint,
            source,
            samples,
            settings,
            run.execution,
            dtype,
            "cpu" if device == "auto" and not torch.cuda.is_available() else device,
            group,
            work,
            functools.partial(_streaming_progress, report, checkpoint, samples),
            functools.partial(_announce, report),
            second_moments=run.second_moments,
        )
    answered = None if run.self_generate else _samples(checkpoint, domains, run)
    if work is not None and answered is not None:
        settings["dtype"] = run.dtype
        measured = {"second_moments": run.second_moments, "second_pass": run.second_pass}
        work.require(execution.identity(source, answered, {**settings, **measured}, group))
        if (finished := execution.finished_statistics(work)) is not None:
            return finished
    model = adapter.load_model(checkpoint.directory, run.torch_dtype(), run.device)
    settings["dtype"] = str(model.dtype).removeprefix("torch.")
    samples = _answers(checkpoint, model, domains, run) if answered is None else answered
    total = sum(domain.tokens() for domain in samples)
    progress = report("calibrate", total, "tokens") if report else None
    statistics = calibration.collect(
        model, samples, source, settings, run.batch_tokens, progress, run.second_moments
    )
    if run.second_pass:
        second_pass.collect(model, samples, statistics, run.batch_tokens, progress)
    execution.keep_statistics(work, statistics)
    return statistics


def _announce(report: Reporter | None, text: str) -> None:
    if report is not None:
        report(text, 0, "")


def _streaming_progress(
    report: Reporter | None,
    checkpoint: Checkpoint,
    samples: Sequence[Samples],
    reader: Reader,
) -> Progress | None:
    """Show layer, expert, bytes and their rate; the amount is tokens times layers."""
    if report is None:
        return None
    layers = adapter.empty_model(adapter.load_config(checkpoint.directory))
    count = max(experts.layer for experts in adapter.find_experts(layers)) + 1
    total = count * sum(domain.tokens() for domain in samples)
    advance = report("calibrate", total, "token-layers")
    begin = time.monotonic()

    def progress(label: str, tokens: int) -> None:
        rate = reader.bytes / max(time.monotonic() - begin, 1e-9)
        advance(
            f"{label}, {reader.bytes / 1e9:.2f} GB read at {rate / 1e9:.2f} GB/s",
            tokens,
        )

    return progress


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
        seed: For the criterion `random`.
        checkpoint: The model, for criteria that need weights.
        dern_options: For the method `dern`.
    """
    if budget.method == "best":
        return reconstruction.plan(statistics, budget, domain_weights, under_covered, worst_domain)
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
            **_criteria(budget, expert_criterion, neuron_criterion, dern_options),
            "domain_weights": dict(domain_weights or {}),
        },
    )
    return reconstruction.with_repair(decided, statistics, domain_weights) if refit else decided


def _criteria(
    budget: Budget, experts: str, neurons: str, dern_options: dern.Options | None
) -> dict[str, Any]:
    """What a plan records of how it was decided."""
    if budget.method == "dern":
        return {"experts": experts, "dern": dataclasses.asdict(dern_options or dern.Options())}
    if budget.method == "drop":
        return {"experts": experts}
    return {"experts": experts, "neurons": neurons}


def frontier(
    statistics: Statistics,
    budgets: Sequence[Budget],
    domain_weights: Mapping[str, float] | None = None,
    under_covered: UnderCovered = "warn",
) -> list[Prediction]:
    """Predict what the method best gives for many budgets, without touching the model."""
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
    resume: bool = False,
    run: Run | None = None,
    report: Reporter | None = None,
    statistics: Statistics | None = None,
) -> None:
    """Write the pruned checkpoint; with `verify`, reload it and compare it with the masked dense model.

    Args:
        checkpoint: The dense model.
        decided: What is kept.
        out: The new directory.
        verify: Whether to check what was written before it appears.
        resume: Keep finished shards when the run is stopped, and go on from those that are there.
        run: Its memory budget, if any, is kept.
        report: Told of progress.
        statistics: What the plan was made from; needed if it refits weights.
    """
    run = run or Run()
    if decided.experts is not None:
        rebuild = dern.rebuilder(checkpoint, decided, statistics)
        dropping.apply(checkpoint, decided, Path(out), rebuild, verify)
        return
    refit = None if decided.repair is None else Refitting(checkpoint, decided, statistics)
    progress = report("write", checkpoint.bytes, "bytes") if report else None
    check = functools.partial(_check_equivalence, checkpoint, decided, refit) if verify else None
    if verify and run.execution.is_streamed(Group.from_environment(), checkpoint):
        seen = report("verify", checkpoint.bytes, "bytes") if report else None
        check = functools.partial(verification.verify, checkpoint, decided, refit, seen)
    memory = run.execution.memory
    pruning.apply(checkpoint, decided, Path(out), check, resume, memory, progress, refit)


def report(
    directory: str | Path,
    out: str | Path,
    statistics: str | Path | None = None,
    data: Sequence[str | Path] = (),
    results: Sequence[str | Path] = (),
    run: Run | None = None,
) -> Path:
    """Write the report of a pruned checkpoint, and return its page.

    Args:
        directory: The pruned checkpoint.
        out: The report's directory; must not exist.
        statistics: The file that its plan was made from.
        data: Text to count the pruned model's choices on.
        results: Files of `benchmarks/quality.py`.
        run: How the model is run.
    """
    require_absent(Path(out))
    decided = Plan.load(Path(directory) / pruning.PLAN_FILE)
    measured = None if statistics is None else Statistics.load(statistics)
    after = None
    if data:
        run = run or Run()
        checkpoint = Checkpoint(directory)
        samples = _samples(checkpoint, read_domains(data), run)
        after = reporting.selection_counts(
            adapter.load_model(checkpoint.directory, run.torch_dtype(), run.device), samples
        )
    rows = [row for path in results for row in reporting.read_results(Path(path))]
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
    return _evaluate(
        Checkpoint.resolve(model),
        read_domains(sources),
        run,
        None if reference is None else Checkpoint.resolve(reference),
        report,
    )


def _evaluate(
    checkpoint: Checkpoint,
    domains: Sequence[TextDomain],
    run: Run,
    reference: Checkpoint | None = None,
    report: Reporter | None = None,
) -> list[DomainEvaluation]:
    samples = _samples(checkpoint, domains, dataclasses.replace(run, samples=None))
    measured = adapter.load_model(checkpoint.directory, run.torch_dtype(), run.device)
    other = None
    if reference is not None:
        other = adapter.load_model(reference.directory, run.torch_dtype(), run.device)
        if adapter.vocabulary(other) != adapter.vocabulary(measured):
            raise InvalidArgument(
                f"evaluate: the reference must have the vocabulary of the model, {adapter.vocabulary(measured)}, "
                f"got {adapter.vocabulary(other)}"
            )
    progress = (
        report("evaluate", sum(domain.tokens() for domain in samples), "tokens") if report else None
    )
    return evaluation.evaluate(measured, samples, other, run.batch_tokens, progress)


@dataclass(frozen=True)
class Pruned:
    """What `prune` made.

    Attributes:
        plan: What was kept.
        statistics: What it was decided on.
        before: The dense model on the evaluation text.
        after: The pruned one.
    """

    plan: Plan
    statistics: Statistics
    before: list[DomainEvaluation] = field(default_factory=list)
    after: list[DomainEvaluation] = field(default_factory=list)


def prune(
    model: str | Path,
    sources: Sequence[str | Path],
    out: str | Path | None,
    budget: Budget,
    run: Run | None = None,
    evaluate_on: Sequence[str | Path] = (),
    report: Reporter | None = None,
    verify: bool = True,
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
        plan_options: Further arguments of `plan`.

    Raises:
        TenpError: Something does not fit; nothing is left in `out`.
    """
    run = run or Run()
    if budget.method == "best" or plan_options.get("refit"):
        run = dataclasses.replace(run, second_moments=True)
    # Everything that can be known to be wrong is found before the model is read.
    kept, _ = planning.check_budget(budget)
    run.torch_dtype()
    group = Group.from_environment()
    with run.execution.work(group) as work:
        if out is not None and not _was_begun(work, Path(out)):
            require_absent(Path(out))
        domains = read_domains(sources)
        scoring.weights_of([d.name for d in domains], plan_options.get("domain_weights") or {})
        measured_on = read_domains(evaluate_on) if evaluate_on else []
        checkpoint = Checkpoint.resolve(model)
        source = pruning.source_of(checkpoint)
        if out is not None and not Path(out).exists():
            require_space(Path(out), int(kept * source.bytes))  # at least: only experts shrink
        statistics = _calibrate(checkpoint, source, domains, run, report, group, work)
        decided = plan(statistics, budget, checkpoint=checkpoint, **plan_options)
        if out is None or group.rank > 0:
            return Pruned(decided, statistics)
        if not _is_finished(work, Path(out), decided):
            _note_output(work, Path(out), decided)
            apply(
                checkpoint,
                decided,
                out,
                verify,
                work is not None,
                run,
                report,
                statistics,
            )
        if not measured_on:
            return Pruned(decided, statistics)
        before = _evaluate(checkpoint, measured_on, run, report=report)
        after = _evaluate(Checkpoint(out), measured_on, run, checkpoint, report)
        return Pruned(decided, statistics, before, after)


def _was_begun(work: WorkDirectory | None, out: Path) -> bool:
    """Whether an earlier run with this work directory was going to write `out`."""
    note = work.read_note("output") if work is not None else None
    return note is not None and note["path"] == str(out.resolve())


def _is_finished(work: WorkDirectory | None, out: Path, decided: Plan) -> bool:
    """Whether an earlier run had written all of `out` and was stopped after that.

    Raises:
        CheckpointError: `out` is there, but is of another plan.
    """
    if not out.exists():
        return False
    note = work.read_note("output") if work is not None else None
    if note is None or note["plan"] != decided.digest():
        require_absent(out)
    return True


def _note_output(work: WorkDirectory | None, out: Path, decided: Plan) -> None:
    """Remember what is going to be written where: an output appears whole, so it then is this."""
    if work is None:
        return
    before = work.read_note("output")
    if before is not None and before["plan"] != decided.digest():
        pruning.drop_partial(Path(before["path"]), before["plan"])
    work.write_note("output", {"path": str(out.resolve()), "plan": decided.digest()})


#: float32 sums in another order differ by about 1e-6 of the largest logit in models of some layers.
_EQUIVALENCE_BOUND = 1e-5


#: Of the routers' choices; rounding changes far fewer, a wrong router far more.
_CHANGED_CHOICES_BOUND = 0.01


def _check_equivalence(
    checkpoint: Checkpoint, decided: Plan, refit: Refitting | None, written: Path
) -> None:
    """Compare a written checkpoint with the dense model, its pruned neurons silenced, others refitted."""
    dense = adapter.load_model(checkpoint.directory, torch.float32)
    if refit is not None:
        for experts in adapter.find_experts(dense):
            refit.fill(experts)
    evaluation.mask_neurons(dense, decided)
    vocabulary = adapter.vocabulary(dense)
    ids = torch.randint(vocabulary, (2, 64), generator=torch.Generator().manual_seed(0))
    recording = evaluation.record(dense, ids)
    del dense  # one model at a time in memory
    pruned = adapter.load_model(written, torch.float32)
    difference, changed = evaluation.compare(pruned, ids, recording)
    if not difference <= _EQUIVALENCE_BOUND or changed > _CHANGED_CHOICES_BOUND:
        raise CheckpointError(
            f"the written checkpoint must compute what the masked dense model does to {_EQUIVALENCE_BOUND}, "
            f"got a difference of {difference:.2e} of the largest logit and {changed:.2%} other choices of the "
            "routers; nothing was kept"
        )


def _samples(checkpoint: Checkpoint, domains: Sequence[TextDomain], run: Run) -> list[Samples]:
    """Tokenize; needs no weights, so it comes before the model is loaded."""
    model = adapter.empty_model(adapter.load_config(checkpoint.directory))
    tokenizer, length = _tokenizer(checkpoint), _max_length(model.config, run)
    vocabulary = adapter.vocabulary(model)
    return [tokenize(d, tokenizer, length, run.samples, run.seed, vocabulary) for d in domains]


def _answers(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    domains: Sequence[TextDomain],
    run: Run,
) -> list[Samples]:
    tokenizer, length = _tokenizer(checkpoint), _max_length(model.config, run)
    return [
        generate_answers(d, model, tokenizer, length, run.self_generate, run.samples, run.seed)
        for d in domains
    ]


def _tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
        # Without its files some families give a tokenizer that knows no text at all.
        if not tokenizer("text", add_special_tokens=False)["input_ids"]:
            raise ValueError("its vocabulary is empty")
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise CheckpointError(
            f"{checkpoint.directory} must hold a tokenizer, but it cannot be loaded: {error}"
        ) from error
    return tokenizer


def _max_length(config: PreTrainedConfig, run: Run) -> int:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 2048
    if run.max_length is not None and not 1 <= run.max_length <= limit:
        raise InvalidArgument(
            f"max_length must be between 1 and the model's {limit}, got {run.max_length}"
        )
    return run.max_length or min(limit, 2048)
