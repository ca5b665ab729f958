# SPDX-License-Identifier: Apache-2.0
"""Calibration layer by layer, with weights read from the checkpoint when they are needed.

All batches go through layer 0, then all through layer 1, and so on. With `layers` one layer is in
memory at a time; with `experts` a layer without its routed experts, which are read one after
another, used for all tokens that chose them, and dropped. Batches, and the code that adds up the
statistics, are those of `tenp.calibration`, so the results are the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tenp.adapter import Experts, experts_replaced
from tenp.calibration import (
    Routed,
    add_cross_moments,
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
from tenp.reading import read_ahead
from tenp.samples import Samples
from tenp.source import Source
from tenp.statistics import ALL_STATISTICS, LayerStatistics, Statistics
from tenp.storage import Storage
from tenp.workdir import WorkDirectory

Stream = Literal["none", "layers", "experts"]

#: A layer and its statistics to a function that reads what one of its experts becomes.
Successors = Callable[[int, LayerStatistics], Callable[[int], dict[str, Tensor]]]


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


def run_batch(model: LayerwiseModel, layer: int, batch: Batch, hidden: Tensor | None) -> Tensor:
    """Run a loaded layer on one batch, wherever the batch and its hidden states are kept."""
    device = model.device
    before = None if hidden is None else hidden.to(device)
    return model.run(layer, batch.ids.to(device), batch.mask.to(device), before)


def run_to_experts(
    model: LayerwiseModel, layer: int, batch: Batch, hidden: Tensor | None
) -> Routed:
    """Run a layer on one batch as `run_batch` does, up to its experts, and return what they would get."""
    recorded: list[Routed] = []

    def record(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        attended = batch.attended.to(x.device)
        recorded.append(route(model.experts[layer], x, index, weights, attended))
        raise _Recorded

    with suppress(_Recorded), experts_replaced(model.model, record):
        run_batch(model, layer, batch, hidden)
    return recorded[0]


class StreamedRun:
    """All batches through the layers of a model, one after another.

    Args:
        model: The model.
        batches: What to run it on, all processes together.
        stream: `layers` or `experts`.
        storage: Room for activations.
        progress: Told of every batch or expert.
        group: The processes that share the work; this one alone if not given.
        successors: Reads what experts become. With it every layer is measured, dense as it is itself,
            on what the layers before it put out with their experts' successors.
        against_dense: Also run the dense model, and add up how its neurons relate to those measured.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        batches: Sequence[Batch],
        stream: Stream,
        storage: Storage,
        progress: Progress | None = None,
        group: Group | None = None,
        successors: Successors | None = None,
        against_dense: bool = False,
    ) -> None:
        self._successors, self._against_dense = successors, against_dense
        self._group = group or Group()
        stretch = self._group.stretch([batch.tokens for batch in batches])
        batches = batches[stretch.start : stretch.stop]
        self._contributions: list[tuple[int, LayerStatistics]] = []
        self._model, self._batches, self._stream = model, batches, stream
        self._storage, self._progress = storage, progress
        self._device = model.device
        # [B, n, H] of every batch: the next layer's input.
        self.hidden: list[Tensor] | None = None
        # The same in the dense model, once it is another.
        self.dense: list[Tensor] | None = None
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
            dtype, size = getattr(torch, facts["dtype"]), facts["size"]
            self.hidden = self._room(dtype, size)
            if facts["tensors"] > len(self.hidden):
                self.dense = self._room(dtype, size)
            work.load_hidden(first, facts, [*self.hidden, *(self.dense or [])])
        return first

    def save_layer(self, work: WorkDirectory, layer: int, sums: LayerStatistics | None) -> None:
        """Keep a layer that has just run: first the next layer's input, then what says it is there."""
        states = [*(self.hidden or []), *(self.dense or [])]
        hidden = work.save_hidden(layer + 1, states) if states else None
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
        self._load(layer)
        is_last = layer == self.last_layer
        dense: list[Tensor] = []
        if sums is None:
            outputs = self._forward(layer, self.hidden)
            if self.dense is not None:
                dense = self._forward(layer, self.dense)
        elif self._stream == "experts" or self._successors is not None:
            outputs, dense = self._run_experts_apart(layer, sums, is_last)
        else:
            model.load_experts(layer, model.expert_reader(layer))
            experts = model.experts[layer]
            note_weights(experts, sums)
            with model.cached(layer + 1):
                add = functools.partial(self._add_measured, experts, sums)
                outputs = self._forward(layer, self.hidden, self._standing_in(experts, add))
            self._group.add_in_order(sums, self._take_contributions())
        if sums is not None:
            self._group.tell_all(sums)
        if is_last:
            outputs, dense = [], []
        self._free(layer)
        self.hidden, self.dense = outputs or None, dense or None

    def pass_layer(self, layer: int) -> None:
        """Run all batches through a layer, whose experts may have any width, and measure nothing."""
        self._load(layer)
        if layer not in self._model.experts:
            outputs = self._forward(layer, self.hidden)
        else:
            experts, read = self._model.experts[layer], self._model.expert_reader(layer)
            if self._stream == "experts":
                routed = self._record(layer, experts, self.hidden)
                results = self._room_for_results(routed)
                self._run_experts(experts, read, routed, results)
                del routed
                outputs = self._forward(layer, self.hidden, _returning(results))
            else:
                apart = [self._alone(experts, read(e)) for e in range(experts.num_experts)]

                def add(batch: Batch, routed: Routed, out: Tensor) -> None:
                    for expert, one in enumerate(apart):
                        run_expert(one, routed, out, expert)

                with self._model.cached(layer + 1):
                    outputs = self._forward(layer, self.hidden, self._standing_in(experts, add))
        self._free(layer)
        self.hidden = outputs

    def _load(self, layer: int) -> None:
        if layer == 0:
            self._model.set_embeddings(torch.cat([batch.ids.flatten() for batch in self._batches]))
        self._model.load(layer)

    def _free(self, layer: int) -> None:
        self._model.free(layer)
        if layer == 0:
            self._model.free_embeddings()

    @contextmanager
    def _sums(self, sums: LayerStatistics, batch: Batch) -> Iterator[LayerStatistics]:
        """Yield what a batch adds to: the sums, or numbers of its own that are added in order later."""
        mine = domain_sums(sums, batch.domain)
        if self._group.rank == 0:
            yield mine
            return
        mine = {name: torch.zeros_like(tensor) for name, tensor in mine.items()}
        yield mine
        # Those of all batches wait on the CPU: a device may have no room for them.
        apart = {name: tensor.cpu() for name, tensor in mine.items()}
        self._contributions.append((batch.domain, apart))

    def _take_contributions(self) -> list[tuple[int, LayerStatistics]]:
        taken, self._contributions = self._contributions, []
        return taken

    def _forward(
        self,
        layer: int,
        hidden: list[Tensor] | None,
        experts: Callable[[int], Callable[..., Tensor]] | None = None,
        reports: bool = True,
    ) -> list[Tensor]:
        """Run all batches; `experts(batch)` gives the function that stands in for the experts."""
        outputs: list[Tensor] = []
        for number, batch in enumerate(self._batches):
            function = experts(number) if experts else _no_experts
            with experts_replaced(self._model.model, function):
                result = run_batch(
                    self._model, layer, batch, None if hidden is None else hidden[number]
                )
            if not outputs:
                outputs = self._room(result.dtype, result.shape[-1])
            outputs[number].copy_(result)
            if reports:
                self._report(layer, "", batch.tokens)
        return outputs

    def _standing_in(
        self, experts: Experts, add: Callable[[Batch, Routed, Tensor], None]
    ) -> Callable[[int], Callable[..., Tensor]]:
        """Batch to a function that stands in for the experts; `add` adds what they put out."""

        def of_batch(number: int) -> Callable[..., Tensor]:
            batch = self._batches[number]

            def compute(
                module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor
            ) -> Tensor:
                routed = route(experts, hidden, index, weights, batch.attended.to(hidden.device))
                out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
                add(batch, routed, out)
                return out.to(hidden.dtype)

            return compute

        return of_batch

    def _add_measured(
        self, experts: Experts, sums: LayerStatistics, batch: Batch, routed: Routed, out: Tensor
    ) -> None:
        with self._sums(sums, batch) as mine:
            add_experts(experts, routed, mine, out)

    def _run_experts_apart(
        self, layer: int, sums: LayerStatistics, is_last: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run a layer up to its experts, the experts one by one, and then the whole layer.

        Returns:
            What the layer puts out, and what it does in the dense model if that is wanted.
        """
        experts = self._model.experts[layer]
        routed = self._record(layer, experts, self.hidden)
        dense: list[Routed] = []
        if self._against_dense:
            dense = routed if self.dense is None else self._record(layer, experts, self.dense)
        results = self._room_for_results(routed)
        dense_results = self._room_for_results(dense)
        self._measure(layer, sums, routed, None if self._successors else results, dense)
        if self._successors is not None:
            self._group.tell_all(sums)
            if not is_last:
                self._run_experts(experts, self._successors(layer, sums), routed, results)
                if dense:
                    read = self._model.expert_reader(layer)
                    self._run_experts(experts, read, dense, dense_results)
        del routed
        if is_last:
            return [], []
        outputs = self._forward(layer, self.hidden, _returning(results), reports=False)
        if not dense:
            return outputs, []
        before = self.hidden if self.dense is None else self.dense
        return outputs, self._forward(layer, before, _returning(dense_results), reports=False)

    def _measure(
        self,
        layer: int,
        sums: LayerStatistics,
        routed: Sequence[Routed],
        results: list[Tensor] | None,
        dense: Sequence[Routed],
    ) -> None:
        """Read every expert, add its statistics, and its output to the results if these are wanted."""
        experts = self._model.experts[layer]
        count = experts.num_experts
        total = sum(batch.tokens for batch in self._batches)
        for expert, parameters in enumerate(read_ahead(self._model.expert_reader(layer), count)):
            one = self._alone(experts, parameters)
            note_weights(one, sums, first=expert)
            # Views, with the expert's axis after that of domains.
            of_one = {
                name: tensor[:, expert : expert + 1]
                for name, tensor in sums.items()
                if ALL_STATISTICS[name].merge != "weights"
            }
            for number, (batch, rows) in enumerate(zip(self._batches, routed, strict=True)):
                if results is None:
                    out = torch.zeros(rows.hidden.shape, device=self._device)
                else:
                    out = results[number].to(self._device)
                with self._sums(of_one, batch) as mine:
                    add_experts(one, rows, mine, out, first=expert)
                    if dense:
                        add_cross_moments(one, rows, dense[number], mine, expert)
                if results is not None and out is not results[number]:
                    results[number].copy_(out)
            self._group.add_in_order(of_one, self._take_contributions())
            done = total * (expert + 1) // count - total * expert // count
            self._report(layer, f", expert {expert + 1} of {count}", done)

    def _run_experts(
        self,
        experts: Experts,
        read: Callable[[int], dict[str, Tensor]],
        routed: Sequence[Routed],
        results: list[Tensor],
    ) -> None:
        """Add what every expert, read one by one, puts out."""
        for expert, parameters in enumerate(read_ahead(read, experts.num_experts)):
            one = self._alone(experts, parameters)
            for rows, result in zip(routed, results, strict=True):
                out = result.to(self._device)
                run_expert(one, rows, out, expert)
                if out is not result:
                    result.copy_(out)

    def _room_for_results(self, routed: Sequence[Routed]) -> list[Tensor]:
        return self._storage.allocate([rows.hidden.shape for rows in routed], torch.float32)

    def _alone(self, experts: Experts, parameters: dict[str, Tensor]) -> Experts:
        return experts.with_parameters(
            {name: value.to(self._device) for name, value in parameters.items()}
        )

    def _record(self, layer: int, experts: Experts, hidden: list[Tensor] | None) -> list[Routed]:
        """Run a layer up to its experts on all batches and return what they would get."""
        recorded: list[Routed] = []
        inputs: list[Tensor] = []
        for number, batch in enumerate(self._batches):
            before = None if hidden is None else hidden[number]
            routed = run_to_experts(self._model, layer, batch, before)
            if not inputs:
                shapes = [(b.ids.numel(), routed.hidden.shape[1]) for b in self._batches]
                inputs = self._storage.allocate(shapes, routed.hidden.dtype)
            inputs[number].copy_(routed.hidden)
            recorded.append(dataclasses.replace(routed, hidden=inputs[number]))
        return recorded

    def _room(self, dtype: torch.dtype, size: int) -> list[Tensor]:
        return self._storage.allocate([(*batch.ids.shape, size) for batch in self._batches], dtype)

    def _report(self, layer: int, where: str, tokens: int) -> None:
        if self._progress is not None:
            self._progress(f"layer {layer + 1} of {self.last_layer + 1}{where}", tokens)


def _no_experts(module: nn.Module, *_: Any) -> Tensor:
    raise AssertionError("a layer without routed experts called some")


def _returning(results: list[Tensor]) -> Callable[[int], Callable[..., Tensor]]:
    """Batch to a function that stands in for the experts with what they have put out."""

    def of_batch(number: int) -> Callable[..., Tensor]:
        return lambda module, hidden, index, weights: (
            results[number].to(hidden.device).to(hidden.dtype)
        )

    return of_batch


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
    successors: Successors | None = None,
    against_dense: bool = False,
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
        successors: As in `StreamedRun`.
        against_dense: As in `StreamedRun`; needs `second_moments`.

    Returns:
        The same bits as calibration in memory with the same dtype and batches, in every process.

    Raises:
        CheckpointError: The checkpoint or the work directory is damaged, or a disk is full.
    """
    layers = list(model.experts.values())
    samples, statistics = begin(layers, samples, source, settings, second_moments, against_dense)
    run = StreamedRun(
        model,
        make_batches(samples, batch_tokens),
        stream,
        storage or Storage(),
        progress,
        group,
        successors,
        against_dense,
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
