# SPDX-License-Identifier: Apache-2.0
"""How much memory a streamed calibration will hold, and how to run it within a stated budget.

Counted is anonymous memory: what the process holds and the system cannot drop. Pages of files,
mapped or cached, are not. The forecast is an upper estimate from the shapes in the checkpoint's
headers, made before any weight is read, and depends on nothing but the run: the same command
plans the same way again.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

import torch

from tenp import adapter, devices, moments
from tenp.errors import InvalidArgument
from tenp.layerwise import LayerwiseModel
from tenp.reading import READ_AHEAD
from tenp.samples import Samples
from tenp.storage import Offload
from tenp.streaming import Stream

#: Python, torch and transformers hold 260 MiB once they have computed; the rest is what an
#: allocator keeps of freed blocks.
_PROGRAM = 450 << 20

_M_MMAP_THRESHOLD = -3

_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def return_freed() -> None:
    """Let the C library give freed blocks of a tensor's size back to the system at once.

    glibc keeps blocks of up to 32 MB for later and, before 2.38, often does not find them again for
    the aligned blocks that torch asks for: a process then holds gigabytes more than it uses.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def parse_bytes(text: str) -> int:
    """Read an amount like `4GiB`, `4G`, `512MiB` or `1.5GiB`; all units are powers of 1024.

    Raises:
        InvalidArgument: It is not one.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if found is None or float(found[1]) == 0:
        raise InvalidArgument(f"--memory must be an amount like 4GiB or 800MiB, got {text}")
    return int(float(found[1]) * (1 << _UNITS[found[2]]))


@dataclass(frozen=True)
class Setup:
    """How a calibration is streamed.

    Attributes:
        stream: `layers` or `experts`.
        offload: Where hidden states stay between layers.
        batch_tokens: Token positions per forward pass.
    """

    stream: Stream
    offload: Offload
    batch_tokens: int


@dataclass(frozen=True)
class Forecast:
    """What a setup will hold, in bytes, at the worst moment.

    Attributes:
        setup: The setup.
        program: Python and the libraries.
        weights: The layer, or its part that is in memory, and what is being read.
        batch: Activations of one batch.
        between: Activations of all batches, between layers.
        statistics: The sums.
        reads: Bytes to be read from the checkpoint.
    """

    setup: Setup
    program: int
    weights: int
    batch: int
    between: int
    statistics: int
    reads: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.program + self.weights + self.batch + self.between + self.statistics

    def __str__(self) -> str:
        """One sentence for people."""
        parts = ", ".join(
            f"{name} {value / 2**30:.2f}"
            for name, value in (
                ("program", self.program),
                ("weights", self.weights),
                ("batch", self.batch),
                ("between layers", self.between),
                ("statistics", self.statistics),
            )
        )
        where = {"ram": "in memory", "disk": "in a file", "device": "on the device"}
        return (
            f"stream {self.setup.stream}, hidden states {where[self.setup.offload]}, "
            f"{self.setup.batch_tokens} tokens a batch: {self.total / 2**30:.2f} GiB ({parts}), "
            f"{self.reads / 1e9:.1f} GB to read"
        )


def forecast(
    model: LayerwiseModel,
    samples: Sequence[Samples],
    setup: Setup,
    processes: int = 1,
    second_moments: bool = False,
    cross_moments: bool = False,
) -> Forecast:
    """Estimate what a setup holds.

    Args:
        model: The model, without weights.
        samples: What it will run on.
        setup: How.
        processes: That share the batches.
        second_moments: Whether they are added up.
        cross_moments: Whether the dense model runs beside the pruned one, and how they relate is added up.
    """
    size = model.dtype.itemsize
    hidden = next(iter(model.experts.values())).down.shape[1]
    last = max(model.experts)
    longest = max(len(ids) for domain in samples for ids in domain.ids)
    positions = ceil(
        sum(ids.numel() for domain in samples for ids, _ in domain.batches(setup.batch_tokens))
        / processes
    )
    batch = max(setup.batch_tokens, longest)
    known = len(torch.unique(torch.cat([ids for domain in samples for ids in domain.ids]))) + 1

    weights = [0]
    widest = 0
    for layer in range(last + 1):
        own = _own_parameters(model, layer)
        held = sum(parameter.numel() for parameter in own) * size
        held += max(_loaded(model, layer, experts=False), default=0)  # one tensor being converted
        widest = max(widest, sum(p.shape[0] for p in own if p.ndim == 2))
        if layer == 0:
            held += known * hidden * size
        if layer in model.experts:
            experts = model.experts[layer]
            one = sum(p[0].numel() for p in experts.module.parameters()) * size
            # Of the expert in the making there are, for a moment, the parts and the whole.
            count = READ_AHEAD + 3 if setup.stream == "experts" else experts.num_experts + 2
            held += count * one + max(_loaded(model, layer, experts=True), default=0)
        weights.append(held)
    between = 0
    if setup.offload != "disk":
        # Input and output of a layer; apart from their experts also what goes into these, in float32.
        between = positions * hidden * (2 * size + (4 if setup.stream == "experts" else 0))
        between *= 2 if cross_moments else 1
    rest = sum(p.numel() for p in model.model.parameters() if not p.is_meta) * size
    return Forecast(
        setup,
        program=_PROGRAM,
        weights=max(weights) + rest,
        batch=_batch_bytes(model, setup, batch, longest, widest),
        between=between,
        statistics=_statistics_bytes(model, len(samples), second_moments, cross_moments)
        + _contribution_bytes(model, samples, setup, processes, second_moments, cross_moments),
        reads=sum(
            model.checkpoint.tensors[name].stored_bytes
            for layer in range(last + 1)
            for experts in (False, True)
            for name in model.names(layer, experts)
        ),
    )


def _own_parameters(model: LayerwiseModel, layer: int) -> list[torch.Tensor]:
    routed = set(model.experts[layer].module.parameters()) if layer in model.experts else set()
    return [p for p in model.layers[layer].parameters() if p not in routed]


def _loaded(model: LayerwiseModel, layer: int, experts: bool) -> Iterable[int]:
    """Bytes that reading takes for each of a layer's tensors, or for one expert's part of it."""
    for name in model.names(layer, experts):
        # Float8 becomes float32 before it becomes bfloat16.
        yield model.loaded_bytes(name) * (3 if model.checkpoint.tensors[name].scales else 1)


def _batch_bytes(model: LayerwiseModel, setup: Setup, batch: int, longest: int, widest: int) -> int:
    """Activations of one batch: of the layer's own matrices, or of its routed experts."""
    size = model.dtype.itemsize
    experts = max(model.experts.values(), key=lambda experts: experts.width)
    hidden, width = experts.down.shape[1], experts.width
    own = batch * (2 * widest + 4 * hidden) * size + batch * longest * 4  # the mask is [n, n]
    # Attention that is not fused holds all scores: before, in and after softmax, and which are masked.
    heads = adapter.attention_heads(model.model.config)
    own += batch * longest * heads * (3 * size + 1)
    # One expert may get every token: gate, up, m, x and y, and x and its square in float64.
    one = batch * ((3 * width + 3 * hidden) * size + 16 * hidden)
    routed = one + batch * hidden * 8  # the sum of outputs, and its copy in the model's dtype
    if setup.stream == "layers":
        chosen = adapter.experts_per_token(model.model.config)
        routed += batch * chosen * (width + hidden) * size
    return max(own, routed + 4 * batch * hidden * size)


def _statistics_bytes(
    model: LayerwiseModel, domains: int, second_moments: bool, cross_moments: bool
) -> int:
    total = 0
    for experts in model.experts.values():
        per_neuron, per_expert, per_input = 4 * domains + 1, 8 * domains, domains
        total += (
            8
            * experts.num_experts
            * (per_neuron * experts.width + per_expert + per_input * experts.down.shape[1])
        )
    if second_moments:
        layers = list(model.experts.values())
        total = 2 * total + moments.required_bytes(layers, domains, cross_moments)
    return total


def _contribution_bytes(
    model: LayerwiseModel,
    samples: Sequence[Samples],
    setup: Setup,
    processes: int,
    second_moments: bool,
    cross_moments: bool,
) -> int:
    """What batches of one process wait with until the sums of the processes before arrive."""
    if processes == 1:
        return 0
    experts = max(model.experts.values(), key=lambda experts: experts.num_experts)
    count = 1 if setup.stream == "experts" else experts.num_experts
    numbers = 4 * experts.width + 8 + experts.down.shape[1]
    if second_moments:
        samples = moments.halves(samples)  # of which every batch is of one
        n = moments.variables(experts)
        numbers += moments.packed_size(n) + (n * n + 1) * cross_moments
    batches = sum(1 for domain in samples for _ in domain.batches(setup.batch_tokens))
    return ceil(batches / processes) * 8 * count * numbers


def default_offload(
    model: LayerwiseModel,
    samples: Sequence[Samples],
    stream: Stream,
    batch_tokens: int,
    processes: int = 1,
    second_moments: bool = False,
    cross_moments: bool = False,
) -> Offload:
    """Return where hidden states stay if nobody says: on a GPU that has room for them beside a layer.

    From memory and back they would go over the bus once an expert, which takes longer than computing.

    Args:
        model: The model, without weights.
        samples: What it will run on.
        stream: `layers` or `experts`.
        batch_tokens: Token positions per forward pass.
        processes: That share the batches, each with a GPU of its own.
        second_moments: As in `forecast`.
        cross_moments: As in `forecast`.
    """
    if model.device.type != "cuda":
        return "ram"
    setup = Setup(stream, "device", batch_tokens)
    found = forecast(model, samples, setup, processes, second_moments, cross_moments)
    # Of the statistics one layer's are on the device.
    held = found.weights + found.batch + found.between + found.statistics // len(model.experts)
    return "device" if held <= devices.free_bytes(model.device) else "ram"


def choose(
    model: LayerwiseModel,
    samples: Sequence[Samples],
    memory: int,
    stream: Stream | None,
    offload: Offload | None,
    batch_tokens: int,
    processes: int = 1,
    second_moments: bool = False,
    cross_moments: bool = False,
) -> Forecast:
    """Return the first setup that fits: whole layers if they do, large batches, states in memory.

    Args:
        model: The model, without weights.
        samples: What it will run on.
        memory: Bytes that may be held.
        stream: Only this way, or None for any.
        offload: Only there, or None for memory or a file.
        batch_tokens: At most.
        processes: That share the batches, each with so much memory.
        second_moments: Whether they are added up.
        cross_moments: As in `forecast`.

    Raises:
        InvalidArgument: Nothing fits; the message says what would.
    """
    longest = max(len(ids) for domain in samples for ids in domain.ids)
    sizes = [batch_tokens]
    while sizes[-1] > longest:
        sizes.append(max(sizes[-1] // 2, longest))
    streams: Sequence[Stream] = [stream] if stream else ["layers", "experts"]
    places: Sequence[Offload] = [offload] if offload else ["ram", "disk"]
    tried = []
    for way in streams:
        for size in sizes:
            for place in places:
                setup = Setup(way, place, size)
                candidate = forecast(
                    model, samples, setup, processes, second_moments, cross_moments
                )
                if candidate.total <= memory:
                    return candidate
                tried.append(candidate)
    least = min(tried, key=lambda candidate: candidate.total)
    raise InvalidArgument(
        f"--memory must be at least {_rounded_up(least.total)} for this model and text, "
        f"got {memory / 2**30:.2f} GiB; the least that was found is {least}"
    )


def _rounded_up(bytes_: int) -> str:
    return f"{ceil(bytes_ / 2**30 * 100) / 100:.2f}GiB"
