# SPDX-License-Identifier: Apache-2.0
"""How a calibration is carried out.

In memory or streamed, within a stated memory, by one process or several, with or without a work
directory to go on from.

None of this changes the statistics, apart from the batch size when a memory budget forces smaller
batches, which changes rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import tenp
from tenp import adapter, memory
from tenp.checkpoint import Checkpoint
from tenp.distributed import Group
from tenp.errors import InvalidArgument
from tenp.layerwise import LayerwiseModel, expert_reader
from tenp.memory import Setup
from tenp.plan import Plan
from tenp.pruning import PLAN_FILE
from tenp.reading import Reader
from tenp.samples import Samples
from tenp.sequential import Narrowing, Options
from tenp.source import Source
from tenp.statistics import Statistics
from tenp.storage import Offload, Storage
from tenp.streaming import Progress, Stream, Successors, collect
from tenp.workdir import WorkDirectory

_STATISTICS_FILE = "statistics.safetensors"


@dataclass(frozen=True)
class Execution:
    """How a calibration is carried out.

    Attributes:
        stream: `none` holds the whole model, `layers` one layer, `experts` one layer without its
            routed experts. None is what fits `memory` if that is stated, `layers` in several processes or
            for a checkpoint in float8, else `none`.
        memory: Bytes that each process may hold, or None.
        offload: Where hidden states stay between layers; None is a file if `memory` asks for it,
            without `memory` a GPU that has room for them, else memory.
        work_dir: Where finished layers are kept, so that the same run can go on after it was stopped.
        pruned: A checkpoint that was pruned from the model: every layer is then calibrated on what the
            pruned layers before it put out. None calibrates on the dense model's, as the paper does.
        sequential: Decide every layer on what the layers before it put out as they are decided; None
            decides all on the dense model, as the paper does.
    """

    stream: Stream | None = None
    memory: int | None = None
    offload: Offload | None = None
    work_dir: Path | None = None
    pruned: Path | None = None
    sequential: Options | None = None

    def is_streamed(self, group: Group, checkpoint: Checkpoint) -> bool:
        """Whether weights are read layer by layer.

        Args:
            group: The processes of the run.
            checkpoint: The model. Only streaming reads float8 weights as this package does.

        Raises:
            InvalidArgument: The options contradict each other.
        """
        reasons = self.reasons(group, checkpoint)
        if self.stream == "none" and reasons:
            raise InvalidArgument(
                f"--stream must be layers or experts with {' and '.join(reasons)}, got none"
            )
        return self.stream in ("layers", "experts") or (self.stream is None and bool(reasons))

    def reasons(self, group: Group, checkpoint: Checkpoint) -> list[str]:
        """Return what keeps a run from having the whole model in memory, apart from `stream`.

        Args:
            group: As in `is_streamed`.
            checkpoint: As in `is_streamed`.
        """
        reasons = {
            "--memory": self.memory is not None,
            f"{group.size} processes": group.size > 1,
            "a checkpoint in float8": checkpoint.block is not None,
            "--pruned": self.pruned is not None,
            "--sequential": self.sequential is not None,
        }
        return [name for name, holds in reasons.items() if holds]

    @contextmanager
    def work(self, group: Group) -> Iterator[WorkDirectory | None]:
        """Yield the work directory, locked, or None if there is none.

        Raises:
            CheckpointError: Another run uses it.
        """
        if self.work_dir is None:
            yield None
            return
        if group.rank > 0:
            group.wait()  # until rank 0 has it
        with WorkDirectory(self.work_dir, group.rank) as work:
            if group.rank == 0:
                group.wait()
            yield work


def identity(
    source: Source,
    samples: Sequence[Samples],
    settings: Mapping[str, Any],
    device: str,
    group: Group,
) -> dict[str, Any]:
    """Return what makes two runs the same: what their statistics depend on, bit for bit."""
    return {
        "tenp": tenp.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": source.fingerprint,
        "data": [[domain.domain, domain.digest()] for domain in samples],
        "settings": dict(settings),
        "device": torch.device(device).type,
        "processes": group.size,
    }


def finished_statistics(work: WorkDirectory | None) -> Statistics | None:
    """Return the statistics that a work directory holds already, or None."""
    path = work.path / _STATISTICS_FILE if work is not None else None
    return Statistics.load(path) if path is not None and path.exists() else None


def keep_finished(work: WorkDirectory | None, statistics: Statistics) -> None:
    """Keep finished statistics in the work directory."""
    if work is not None and work.rank == 0:
        statistics.save(work.path / _STATISTICS_FILE)


def calibrate_streamed(
    checkpoint: Checkpoint,
    source: Source,
    samples: Sequence[Samples],
    settings: dict[str, Any],
    execution: Execution,
    dtype: torch.dtype,
    device: str,
    group: Group,
    work: WorkDirectory | None,
    progress: Callable[[Reader], Progress | None],
    announce: Callable[[str], None],
    second_moments: bool = False,
    narrowing: Narrowing | None = None,
) -> Statistics:
    """Calibrate layer by layer.

    Args:
        checkpoint: The dense model.
        source: The checkpoint as statistics refer to it.
        samples: One entry per domain.
        settings: Recorded; `batch_tokens` is the most that a batch may have, and is lowered if the
            memory budget needs it.
        execution: How.
        dtype: To compute in.
        device: To compute on.
        group: The processes that share the work.
        work: Keeps finished layers.
        progress: Makes what is told of progress, for a reader that counts its bytes.
        announce: Told the forecast.
        second_moments: Also add them up.
        narrowing: Decides what every layer becomes before the next one is run.
    """
    reader = Reader(checkpoint)
    model = LayerwiseModel(reader, dtype, device)
    # What is measured and what runs on are different experts, so they are read one by one.
    is_apart = execution.pruned is not None or narrowing is not None
    stream = "experts" if is_apart else execution.stream
    against_dense = narrowing is not None and narrowing.options.against_dense
    if execution.memory is not None:
        memory.return_freed()
        found = memory.choose(
            model,
            samples,
            execution.memory,
            stream,
            execution.offload,
            settings["batch_tokens"],
            group.size,
            second_moments,
            against_dense,
        )
    else:
        way, tokens = stream or "layers", settings["batch_tokens"]
        shared = (group.size, second_moments, against_dense)
        offload = execution.offload or memory.default_offload(model, samples, way, tokens, *shared)
        found = memory.forecast(model, samples, Setup(way, offload, tokens), *shared)
    setup = found.setup
    announce(f"forecast: {found}")
    settings = {**settings, "batch_tokens": setup.batch_tokens}
    successors: Successors | None = None
    if narrowing is not None:
        successors = narrowing.successors(model, adapter.stored_dtype(model.model.config))
        settings["sequential"] = narrowing.settings()
    elif execution.pruned is not None:
        successors, settings["pruned"] = _pruned_experts(model, source, execution.pruned)
    if work is not None:
        measured = {"second_moments": second_moments, "second_pass": False}
        work.require(identity(source, samples, {**settings, **measured}, device, group))
        if (finished := finished_statistics(work)) is not None:
            return finished
    storage = Storage(setup.offload, device, work.path if work is not None else None)
    try:
        statistics = collect(
            model,
            samples,
            source,
            settings,
            setup.batch_tokens,
            setup.stream,
            storage,
            progress(reader),
            work,
            group,
            second_moments,
            successors,
            against_dense,
        )
    finally:
        storage.close()
        reader.close()
    keep_finished(work, statistics)
    return statistics


def _pruned_experts(
    model: LayerwiseModel, source: Source, directory: Path
) -> tuple[Successors, str]:
    """Return a reader of a pruned checkpoint's experts, and the digest of its plan.

    Raises:
        PlanError: It was pruned from another model.
    """
    pruned = Checkpoint(directory)
    plan = Plan.load(directory / PLAN_FILE)
    plan.validate(source)
    reader = Reader(pruned)
    tensors = adapter.expert_tensors(model.model, pruned.tensors)
    return (
        lambda layer, sums: expert_reader(model.experts[layer], tensors, reader, model.dtype),
        plan.digest(),
    )
