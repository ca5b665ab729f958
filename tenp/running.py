# SPDX-License-Identifier: Apache-2.0
"""How text is read and the model is run: the options, and the calibration and samples they ask for."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
    devices,
    evaluation,
    execution,
    second_pass,
    streamed_evaluation,
)
from tenp.checkpoint import Checkpoint
from tenp.distributed import Group
from tenp.errors import CheckpointError, InvalidArgument, Unsupported
from tenp.evaluation import DomainEvaluation
from tenp.execution import Execution
from tenp.layerwise import LayerwiseModel
from tenp.reading import Reader
from tenp.samples import Samples, generate_answers, tokenize
from tenp.sequential import Narrowing
from tenp.source import Source
from tenp.statistics import Statistics
from tenp.streaming import Progress
from tenp.text import TextDomain
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
            is_cpu = torch.device(devices.resolve(self.device)).type == "cpu"
            return torch.float32 if is_cpu else "auto"
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise InvalidArgument(
                f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype}"
            )
        return getattr(torch, self.dtype)

    def dtype_of(self, config: PreTrainedConfig) -> torch.dtype:
        """Return the dtype to compute in, of a model with this config."""
        dtype = self.torch_dtype()
        return dtype if isinstance(dtype, torch.dtype) else adapter.stored_dtype(config)


def calibrate(
    checkpoint: Checkpoint,
    source: Source,
    domains: Sequence[TextDomain],
    run: Run,
    report: Reporter | None,
    group: Group,
    work: WorkDirectory | None,
    narrowing: Narrowing | None = None,
) -> Statistics:
    """Calibrate as `run` says: in memory or streamed, anew or from where a stopped run left off.

    Args:
        checkpoint: The dense model.
        source: What statistics say of it.
        domains: Calibration text.
        run: The options.
        report: Told of progress.
        group: The processes that share the work.
        work: Where finished layers are kept, or None.
        narrowing: Decides what every layer becomes before the next one is run; needs streaming.
    """
    device = devices.resolve(run.device)
    if device == "cuda" and group.size > 1:
        device = devices.resolve(f"cuda:{group.local_rank}")
    config = adapter.load_config(checkpoint.directory)
    dtype = run.dtype_of(config)
    settings = {
        "dtype": str(dtype).removeprefix("torch."),
        "max_length": _max_length(config, run),
        "batch_tokens": run.batch_tokens,
        "samples": run.samples,
        "seed": run.seed,
        "self_generate": run.self_generate,
    }
    if run.execution.is_streamed(group, checkpoint):
        reasons = " and ".join(run.execution.reasons(group, checkpoint))
        way_out = f", which cannot be with {reasons}; use" if reasons else "; use --stream none, or"
        if run.second_pass:
            raise Unsupported(
                f"gradients need the whole model in memory{way_out} criteria without a second pass"
            )
        if run.self_generate:
            raise Unsupported(
                f"answers need the whole model in memory{way_out} answers in a file of responses"
            )
        samples = samples_of(checkpoint, domains, run)
        return execution.calibrate_streamed(
            checkpoint,
            source,
            samples,
            settings,
            run.execution,
            dtype,
            device,
            group,
            work,
            functools.partial(_streaming_progress, report, checkpoint, samples),
            functools.partial(_announce, report),
            second_moments=run.second_moments,
            narrowing=narrowing,
        )
    answered = None if run.self_generate else samples_of(checkpoint, domains, run)
    if work is not None and answered is not None:
        measured = {"second_moments": run.second_moments, "second_pass": run.second_pass}
        known = execution.identity(source, answered, {**settings, **measured}, device, group)
        work.require(known)
        if (finished := execution.finished_statistics(work)) is not None:
            return finished
    model = adapter.load_model(checkpoint.directory, dtype, run.device)
    samples = _answers(checkpoint, model, domains, run) if answered is None else answered
    total = sum(domain.tokens() for domain in samples)
    progress = report("calibrate", total, "tokens") if report else None
    statistics = calibration.collect(
        model, samples, source, settings, run.batch_tokens, progress, run.second_moments
    )
    if run.second_pass:
        second_pass.collect(model, samples, statistics, run.batch_tokens, progress)
    if answered is not None:  # with answers, the directory does not say which run they are of
        execution.keep_finished(work, statistics)
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


def samples_of(checkpoint: Checkpoint, domains: Sequence[TextDomain], run: Run) -> list[Samples]:
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


def evaluate(
    checkpoint: Checkpoint,
    domains: Sequence[TextDomain],
    run: Run,
    reference: Checkpoint | None = None,
    report: Reporter | None = None,
) -> list[DomainEvaluation]:
    """Measure a checkpoint on text, and its distance from a reference, in memory or layer by layer."""
    samples = samples_of(checkpoint, domains, dataclasses.replace(run, samples=None))
    tokens = sum(domain.tokens() for domain in samples)
    if run.execution.is_streamed(Group(), checkpoint):
        return _evaluate_streamed(checkpoint, samples, tokens, run, reference, report)
    measured = adapter.load_model(checkpoint.directory, run.torch_dtype(), run.device)
    other = None
    if reference is not None:
        other = adapter.load_model(reference.directory, run.torch_dtype(), run.device)
        _require_vocabulary(measured, other)
    progress = report("evaluate", tokens, "tokens") if report else None
    return evaluation.evaluate(measured, samples, other, run.batch_tokens, progress)


def _evaluate_streamed(
    checkpoint: Checkpoint,
    samples: Sequence[Samples],
    tokens: int,
    run: Run,
    reference: Checkpoint | None,
    report: Reporter | None,
) -> list[DomainEvaluation]:
    models = []
    for each in (checkpoint, reference):
        if each is not None:
            dtype = run.dtype_of(adapter.load_config(each.directory))
            device = devices.resolve(run.device)
            models.append(LayerwiseModel(Reader(each), dtype, device))
            _require_vocabulary(models[0].model, models[-1].model)
    total = tokens * sum(map(len, models))
    progress = report("evaluate", total, "token-layers") if report else None
    return streamed_evaluation.evaluate(
        models[0],
        samples,
        models[1] if reference is not None else None,
        run.batch_tokens,
        run.execution.stream or ("layers" if run.execution.memory is None else "experts"),
        progress,
    )


def _require_vocabulary(measured: PreTrainedModel, reference: PreTrainedModel) -> None:
    if adapter.vocabulary(reference) != adapter.vocabulary(measured):
        raise InvalidArgument(
            f"evaluate: the reference must have the vocabulary of the model, {adapter.vocabulary(measured)}, "
            f"got {adapter.vocabulary(reference)}"
        )
