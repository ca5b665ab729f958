# SPDX-License-Identifier: Apache-2.0
"""Calibration layer by layer, with weights read from the checkpoint when they are needed.

All batches go through layer 0, then all through layer 1, and so on. With `layers` one layer is in
memory at a time; with `experts` a layer without its routed experts, which are read one after
another, used for all tokens that chose them, and dropped. Batches, and the code that adds up the
statistics, are those of `tenp.calibration`, so the results are the same bits.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from tenp.adapter import Experts, experts_replaced
from tenp.calibration import (
    Routed,
    add_experts,
    begin,
    domain_sums,
    finish,
    note_weights,
    route,
    run_expert,
)
from tenp.distributed import Group
from tenp.errors import CheckpointError
from tenp.layerwise import LayerwiseModel
from tenp.samples import Samples
from tenp.source import Source
from tenp.statistics import ALL_STATISTICS, LayerStatistics, Statistics
from tenp.storage import Storage
from tenp.workdir import WorkDirectory

Stream = Literal["none", "layers", "experts"]
T = TypeVar("T")

#: Layer to a function that reads the parameters of one expert.
ExpertsReader = Callable[[int], Callable[[int], dict[str, Tensor]]]

#: Experts read ahead while one computes; more would not be faster, because reads are sequential.
READ_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """One batch of the run and the domain that it is of."""

    domain: int
    ids: Tensor  # [B, n]
    mask: Tensor  # [B, n]

    @property
    def attended(self) -> Tensor:
        """`[B n]`, bool."""
        return self.mask.flatten().bool()

    @property
    def tokens(self) -> int:
        """Attended tokens."""
        return int(self.mask.sum())


def make_batches(samples: Sequence[Samples], batch_tokens: int) -> list[Batch]:
    """Return the batches of all domains in the order in which calibration in memory runs them."""
    return [
        Batch(row, ids, mask)
        for row, domain in enumerate(samples)
        for ids, mask in domain.batches(batch_tokens)
    ]


class Progress(Protocol):
    """Told what has been done."""

    def __call__(self, label: str, tokens: int, /) -> None:
        """`label` says where the run is; `tokens` have passed one more layer since the last call."""


class _Recorded(Exception):
    """Ends a forward when the input of the experts is known."""


class StreamedCalibration:
    """One calibration, layer by layer.

    Args:
        model: The model.
        batches: What to run it on, all processes together.
        stream: `layers` or `experts`.
        storage: Room for activations.
        progress: Told of every batch or expert.
        group: The processes that share the work; this one alone if not given.
        pruned: Reads the experts of a pruned checkpoint. With it every layer is measured on what the
            pruned layers before it put out, dense as it is itself.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        batches: Sequence[Batch],
        stream: Stream,
        storage: Storage,
        progress: Progress | None = None,
        group: Group | None = None,
        pruned: ExpertsReader | None = None,
    ) -> None:
        self._pruned = pruned
        self._group = group or Group()
        stretch = self._group.stretch([batch.tokens for batch in batches])
        batches = batches[stretch.start : stretch.stop]
        self._contributions: list[tuple[int, LayerStatistics]] = []
        self._model, self._batches, self._stream = model, batches, stream
        self._storage, self._progress = storage, progress
        self._device = model.device
        self.hidden: list[Tensor] | None = None  # [B, n, H] of every batch: the next layer's input
        self.last_layer = max(model.experts)  # nothing after it is measured

    def resume(self, work: WorkDirectory, statistics: Statistics) -> int:
        """Take over the finished layers of a work directory, and return the first layer to run."""
        first = min(work.finished_layers(), self.last_layer + 1)
        for layer in range(first):
            finished = work.load_layer(layer)
            self._model.returned[layer] = finished.facts["returned"]
            sums = statistics.layers.get(layer, {})
            if sums.keys() != finished.tensors.keys():
                raise CheckpointError(
                    f"{work.path} must have the statistics {sorted(sums)} of layer {layer}, "
                    f"got {sorted(finished.tensors)}; remove it to start again"
                )
            for name, tensor in finished.tensors.items():
                sums[name].copy_(tensor)
            self._report(layer, " was finished before", sum(b.tokens for b in self._batches))
        if 0 < first <= self.last_layer:
            facts = finished.facts["hidden"][work.rank]
            self.hidden = self._room(getattr(torch, facts["dtype"]), facts["size"])
            work.load_hidden(first, facts, self.hidden)
        return first

    def save_layer(self, work: WorkDirectory, layer: int, sums: LayerStatistics | None) -> None:
        """Keep a layer that has just run: first the next layer's input, then what says it is there."""
        hidden = work.save_hidden(layer + 1, self.hidden) if self.hidden else None
        facts = {
            "returned": self._model.returned.get(layer, 0),
            "hidden": self._group.gather(hidden),
        }
        if self._group.rank == 0:
            work.save_layer(layer, sums or {}, facts)
        self._group.wait()
        work.drop_hidden(layer + 1)

    def run_layer(self, layer: int, sums: LayerStatistics | None) -> None:
        """Run all batches through a layer and add its statistics.

        Args:
            layer: The next layer.
            sums: The statistics of the layer, added to; None for a layer without routed experts.
        """
        model = self._model
        if layer == 0:
            model.set_embeddings(torch.cat([batch.ids.flatten() for batch in self._batches]))
        model.load(layer)
        is_last = layer == self.last_layer
        if sums is None:
            outputs = self._forward(layer, None)
        elif self._stream == "experts" or self._pruned is not None:
            outputs = self._run_experts_apart(layer, sums, is_last)
        else:
            model.load_experts(layer, model.expert_reader(layer))
            experts = model.experts[layer]
            note_weights(experts, sums)
            with model.cached(layer + 1):
                outputs = self._forward(layer, self._measuring(experts, sums))
            self._group.add_in_order(sums, self._take_contributions())
        if sums is not None:
            self._group.tell_all(sums)
        if is_last:
            outputs = []
        model.free(layer)
        if layer == 0:
            model.free_embeddings()
        self.hidden = outputs or None

    def _sums(self, sums: LayerStatistics, batch: Batch) -> LayerStatistics:
        """Return what a batch adds to: the sums, or numbers of its own that are added in order later."""
        mine = domain_sums(sums, batch.domain)
        if self._group.rank == 0:
            return mine
        mine = {name: torch.zeros_like(tensor) for name, tensor in mine.items()}
        self._contributions.append((batch.domain, mine))
        return mine

    def _take_contributions(self) -> list[tuple[int, LayerStatistics]]:
        taken, self._contributions = self._contributions, []
        return taken

    def _forward(
        self, layer: int, experts: Callable[[int], Callable[..., Tensor]] | None
    ) -> list[Tensor]:
        """Run all batches; `experts(batch)` gives the function that stands in for the experts."""
        outputs: list[Tensor] = []
        for number, batch in enumerate(self._batches):
            function = experts(number) if experts else _no_experts
            with experts_replaced(self._model.model, function):
                result = self._run(layer, number)
            if not outputs:
                outputs = self._room(result.dtype, result.shape[-1])
            outputs[number].copy_(result)
            self._report(layer, "", batch.tokens)
        return outputs

    def _run(self, layer: int, number: int) -> Tensor:
        batch = self._batches[number]
        hidden = None if self.hidden is None else self.hidden[number].to(self._device)
        return self._model.run(
            layer, batch.ids.to(self._device), batch.mask.to(self._device), hidden
        )

    def _measuring(
        self, experts: Experts, sums: LayerStatistics
    ) -> Callable[[int], Callable[..., Tensor]]:
        def of_batch(number: int) -> Callable[..., Tensor]:
            batch = self._batches[number]

            def compute(
                module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor
            ) -> Tensor:
                routed = route(experts, hidden, index, weights, batch.attended.to(hidden.device))
                out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
                add_experts(experts, routed, self._sums(sums, batch), out)
                return out.to(hidden.dtype)

            return compute

        return of_batch

    def _run_experts_apart(self, layer: int, sums: LayerStatistics, is_last: bool) -> list[Tensor]:
        """Run a layer up to its experts, the experts one by one, and then the whole layer."""
        experts = self._model.experts[layer]
        routed = self._record(layer, experts)
        results = self._storage.allocate([batch.hidden.shape for batch in routed], torch.float32)
        read = self._pair_reader(layer)
        count = experts.num_experts
        total = sum(batch.tokens for batch in self._batches)
        for expert, (parameters, of_pruned) in enumerate(read_ahead(read, count)):
            one = self._alone(experts, parameters)
            successor = None if of_pruned is None else self._alone(experts, of_pruned)
            note_weights(one, sums, first=expert)
            # Views, with the expert's axis after that of domains.
            of_one = {
                name: tensor[:, expert : expert + 1]
                for name, tensor in sums.items()
                if ALL_STATISTICS[name].merge != "weights"
            }
            for batch, rows, result in zip(self._batches, routed, results, strict=True):
                mine = self._sums(of_one, batch)
                rows = dataclasses.replace(rows, hidden=rows.hidden.to(self._device))
                out = result.to(self._device)
                if successor is None:
                    add_experts(one, rows, mine, out, first=expert)
                else:
                    add_experts(one, rows, mine, torch.zeros_like(out), first=expert)
                    run_expert(successor, rows, out, expert)
                if out is not result:
                    result.copy_(out)
            self._group.add_in_order(of_one, self._take_contributions())
            done = total * (expert + 1) // count - total * expert // count
            self._report(layer, f", expert {expert + 1} of {count}", done)
        del routed, rows
        if is_last:
            return []

        def returning(number: int) -> Callable[..., Tensor]:
            return lambda module, hidden, index, weights: (
                results[number].to(hidden.device).to(hidden.dtype)
            )

        outputs: list[Tensor] = []
        for number in range(len(self._batches)):
            with experts_replaced(self._model.model, returning(number)):
                output = self._run(layer, number)
            if not outputs:
                outputs = self._room(output.dtype, output.shape[-1])
            outputs[number].copy_(output)
        return outputs

    def _alone(self, experts: Experts, parameters: dict[str, Tensor]) -> Experts:
        return experts.with_parameters(
            {name: value.to(self._device) for name, value in parameters.items()}
        )

    def _pair_reader(
        self, layer: int
    ) -> Callable[[int], tuple[dict[str, Tensor], dict[str, Tensor] | None]]:
        """Read an expert, and what it has become in the pruned checkpoint if there is one."""
        dense = self._model.expert_reader(layer)
        pruned = self._pruned(layer) if self._pruned is not None else None
        return lambda expert: (dense(expert), pruned(expert) if pruned is not None else None)

    def _record(self, layer: int, experts: Experts) -> list[Routed]:
        """Run a layer up to its experts on all batches and return what they would get."""
        recorded: list[Routed] = []
        inputs: list[Tensor] = []
        for number in range(len(self._batches)):

            def record(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
                attended = self._batches[number].attended.to(hidden.device)  # noqa: B023
                recorded.append(route(experts, hidden, index, weights, attended))
                raise _Recorded

            try:
                with experts_replaced(self._model.model, record):
                    self._run(layer, number)
            except _Recorded:
                pass
            routed = recorded[number]
            if not inputs:
                shapes = [(b.ids.numel(), routed.hidden.shape[1]) for b in self._batches]
                inputs = self._storage.allocate(shapes, routed.hidden.dtype)
            inputs[number].copy_(routed.hidden)
            recorded[number] = dataclasses.replace(routed, hidden=inputs[number])
        return recorded

    def _room(self, dtype: torch.dtype, size: int) -> list[Tensor]:
        return self._storage.allocate([(*batch.ids.shape, size) for batch in self._batches], dtype)

    def _report(self, layer: int, where: str, tokens: int) -> None:
        if self._progress is not None:
            self._progress(f"layer {layer + 1} of {self.last_layer + 1}{where}", tokens)


def _no_experts(module: nn.Module, *_: Any) -> Tensor:
    raise AssertionError("a layer without routed experts called some")


def read_ahead(read: Callable[[int], T], count: int) -> Iterator[T]:
    """Yield `read(0)` to `read(count - 1)`, read in a thread of its own, `READ_AHEAD` at most waiting."""
    waiting: queue.Queue[T | Exception] = queue.Queue(READ_AHEAD)
    stopped = threading.Event()

    def put(item: T | Exception) -> None:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for number in range(count):
                if stopped.is_set():
                    return
                put(read(number))
        except Exception as error:
            put(error)

    thread = threading.Thread(target=work, name="tenp-read-ahead", daemon=True)
    thread.start()
    try:
        for _ in range(count):
            item = waiting.get()
            if isinstance(item, Exception):
                raise item
            yield item
            del item
    finally:
        stopped.set()
        thread.join()


@torch.no_grad()
def collect(
    model: LayerwiseModel,
    samples: Sequence[Samples],
    source: Source,
    settings: dict[str, Any] | None = None,
    batch_tokens: int = 4096,
    stream: Stream = "layers",
    storage: Storage | None = None,
    progress: Progress | None = None,
    work: WorkDirectory | None = None,
    group: Group | None = None,
    second_moments: bool = False,
    pruned: ExpertsReader | None = None,
) -> Statistics:
    """Calibrate like `tenp.calibration.collect`, with the weights read layer by layer.

    Args:
        model: The dense model.
        samples: One entry per domain.
        source: The checkpoint that `model` reads.
        settings: Recorded in the statistics.
        batch_tokens: Token positions per forward pass.
        stream: `layers` or `experts`.
        storage: Room for activations; in memory if not given.
        progress: Told of every batch or expert.
        work: Keeps finished layers; those that it has already are not run again.
        group: The processes that share the batches; this one alone if not given.
        second_moments: As in calibration in memory.
        pruned: As in `StreamedCalibration`.

    Returns:
        The same bits as calibration in memory with the same dtype and batches, in every process.

    Raises:
        CheckpointError: The checkpoint or the work directory is damaged, or a disk is full.
    """
    layers = list(model.experts.values())
    samples, statistics = begin(layers, samples, source, settings, second_moments)
    run = StreamedCalibration(
        model,
        make_batches(samples, batch_tokens),
        stream,
        storage or Storage(),
        progress,
        group,
        pruned,
    )
    first = run.resume(work, statistics) if work is not None else 0
    for layer in range(first, run.last_layer + 1):
        sums = statistics.layers.get(layer)
        if sums is not None:
            # One layer's at a time: a device may have no room for the second moments of all.
            sums.update({name: tensor.to(model.device) for name, tensor in sums.items()})
        run.run_layer(layer, sums)
        if sums is not None:
            sums.update({name: tensor.cpu() for name, tensor in sums.items()})
        if work is not None:
            run.save_layer(work, layer, sums)
    return finish(statistics)
