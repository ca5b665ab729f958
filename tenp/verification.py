# SPDX-License-Identifier: Apache-2.0
"""Checks a written checkpoint against the one it was made from, one expert at a time.

All that pruning leaves alone must be the same bytes. Every expert must compute what the dense one
does with its pruned neurons silenced, on hidden states of a few tokens that go through the dense
model layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenp import adapter
from tenp.adapter import Experts, ExpertTensor, experts_replaced
from tenp.calibration import Routed
from tenp.checkpoint import Checkpoint
from tenp.errors import CheckpointError
from tenp.layerwise import LayerwiseModel, expert_reader
from tenp.plan import Plan
from tenp.reading import Reader, read_ahead
from tenp.streaming import Batch, run_batch, run_to_experts

#: float32 sums over fewer terms differ by about 1e-6 of the largest output.
_BOUND = 1e-5

#: Tokens that stand in for an expert to which the router sends none.
_SUBSTITUTES = 8

#: Bytes that are compared at once.
_BLOCK = 1 << 22

Refit = Callable[[ExpertTensor, Tensor], Tensor]


@torch.no_grad()
def verify(
    checkpoint: Checkpoint,
    plan: Plan,
    refit: Refit | None,
    progress: Callable[[str, int], None] | None,
    written: Path,
) -> None:
    """Compare a pruned checkpoint with its source.

    Args:
        checkpoint: The dense one.
        plan: What was kept.
        refit: What else was changed in the tensors of experts.
        progress: Called with (where, source bytes).
        written: The pruned one.

    Raises:
        CheckpointError: They differ.
    """
    source, result = Reader(checkpoint), Reader(Checkpoint(written))
    model = LayerwiseModel(source, torch.float32)
    tensors = adapter.expert_tensors(model.model, checkpoint.tensors)
    pruned = adapter.expert_tensors(model.model, result.checkpoint.tensors)
    for name, entry in checkpoint.tensors.items():
        if name in tensors:
            continue
        if not _is_copied(name, source, result):
            raise _mismatch(f"{name} is not the same")
        if progress is not None:
            progress("copied tensors", entry.bytes)
    vocabulary = adapter.vocabulary(model.model)
    ids = torch.randint(vocabulary, (2, 64), generator=torch.Generator().manual_seed(0))
    batch = Batch(0, ids, torch.ones_like(ids))
    model.set_embeddings(ids)
    hidden: Tensor | None = None
    for layer in range(max(model.experts) + 1):
        model.load(layer)
        if layer not in model.experts:
            hidden = run_batch(model, layer, batch, hidden)
            model.free(layer)
            continue
        experts = model.experts[layer]
        routed = run_to_experts(model, layer, batch, hidden)
        dense = _dense_reader(experts, tensors, source, plan.keep[layer], refit)
        narrow = expert_reader(experts, pruned, result, torch.float32)
        pairs = read_ahead(
            lambda expert, dense=dense, narrow=narrow: (dense(expert), narrow(expert)),  # type: ignore[misc]
            experts.num_experts,
        )
        out = _compare(layer, experts, routed, pairs, plan.widths()[layer])
        if progress is not None:
            read = sum(
                checkpoint.tensors[name].bytes
                for name, part in tensors.items()
                if part.layer == layer
            )
            progress(f"layer {layer}", read)
        if layer < max(model.experts):
            with experts_replaced(model.model, lambda *_, out=out: out):
                hidden = run_batch(model, layer, batch, hidden)
        model.free(layer)
    source.close()
    result.close()


def _compare(layer: int, experts: Experts, routed: Routed, pairs: Any, widths: list[int]) -> Tensor:
    """Compare every expert, and return the layer's routed output of the dense ones, `[T, H]`."""
    out = torch.zeros_like(routed.hidden)
    for expert, (dense, narrow) in enumerate(pairs):
        tokens, gates = routed.of_expert(expert)
        x = routed.hidden[tokens if len(tokens) else slice(_SUBSTITUTES)]
        expected = _output(experts.with_parameters(dense), x)
        one = experts.with_parameters(narrow)
        if one.width != widths[expert]:
            raise _mismatch(
                f"expert {expert} of layer {layer} has width {one.width}, not {widths[expert]}"
            )
        difference = (_output(one, x) - expected).abs().max()
        if not difference <= _BOUND * expected.abs().max():
            raise _mismatch(
                f"expert {expert} of layer {layer} differs by {difference / expected.abs().max():.1e} "
                "of its largest output"
            )
        if len(tokens):
            out.index_add_(0, tokens, expected * gates[:, None])
    return out


def _output(one: Experts, x: Tensor) -> Tensor:
    """What one expert computes, `[n, H]`."""
    output = one.activations(0, x) @ one.down[0].t()
    bias = one.biases()[2]
    return output if bias is None else output + bias[0]


def _dense_reader(
    experts: Experts,
    tensors: dict[str, ExpertTensor],
    reader: Reader,
    keep: Tensor,
    refit: Refit | None,
) -> Callable[[int], dict[str, Tensor]]:
    """Return a function that reads one dense expert and silences its pruned neurons."""
    read = expert_reader(experts, tensors, reader, torch.float32, refit)

    def masked(expert: int) -> dict[str, Tensor]:
        parameters = read(expert)
        one = experts.with_parameters(parameters)
        one.down.mul_(keep[expert])
        return parameters

    return masked


def _is_copied(name: str, source: Reader, result: Reader) -> bool:
    """Compare bytes, because NaN is not equal to itself."""
    theirs = result.checkpoint.tensors.get(name)
    ours = source.checkpoint.tensors[name]
    if theirs is None or (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    pairs = zip(_blocks(source, name), _blocks(result, name), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _blocks(reader: Reader, name: str) -> Iterator[Tensor]:
    if reader.checkpoint.tensors[name].scales is not None:  # read at once, unlike its copy
        yield from reader.read(name).reshape(-1).view(torch.uint8).split(_BLOCK)
        return
    rest = torch.empty(0, dtype=torch.uint8)
    for chunk in reader.chunks(name):
        rest = torch.cat([rest, chunk.reshape(-1).view(torch.uint8)])
        while len(rest) >= _BLOCK:
            yield rest[:_BLOCK]
            rest = rest[_BLOCK:]
    if len(rest):
        yield rest


def _mismatch(what: str) -> CheckpointError:
    return CheckpointError(
        f"the written checkpoint must compute what the masked dense model does, but {what}; nothing was kept"
    )
