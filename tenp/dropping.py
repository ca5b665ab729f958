# SPDX-License-Identifier: Apache-2.0
"""Carries out plans that drop whole experts: their weights go, and their rows in the routers.

The result is an ordinary smaller checkpoint of the family and needs no tenp. The experts that stay
and their rows in the routers may be given new weights on the way, as `tenp.dern` does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tenp import adapter, pruning
from tenp.adapter import Experts, ExpertTensor
from tenp.checkpoint import Checkpoint
from tenp.errors import CheckpointError, PlanError, Unsupported
from tenp.model_card import model_card
from tenp.plan import Plan
from tenp.refitting import reader_of_layers


@dataclass(frozen=True)
class Rebuilt:
    """What replaces the experts of a layer that stay.

    Attributes:
        experts: As many as stay, in their order, with weights.
        router: `[E', E]`, float64. The new rows of the routers as means of the old ones; each row of
            this sums up to 1.
    """

    experts: Experts
    router: Tensor


#: Layer to what replaces its experts that stay.
Rebuild = Callable[[int], Rebuilt]


def apply(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    rebuild: Rebuild | None = None,
    verify: bool = True,
    streamed: bool = False,
    resume: bool = False,
    memory: int | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Write the checkpoint of fewer experts.

    Args:
        checkpoint: The dense model.
        plan: With `experts`, equally many in every layer.
        out: The new directory.
        rebuild: Gives the experts that stay and their routers new weights; they keep them if None.
        verify: Load what was written with stock transformers and compare its weights.
        streamed: Compare layer by layer instead, and never have the whole model in memory.
        resume: Keep finished shards when stopped, and go on from those that are there already.
        memory: Bytes that tensors in flight may take.
        progress: Called with (shard, source bytes) after every tensor.

    Raises:
        PlanError: The plan is for another checkpoint, or keeps different numbers of experts.
        Unsupported: The family's config or routers cannot have fewer experts.
        CheckpointError: The checkpoint is damaged, or what was written is not what was planned.
    """
    plan.validate(pruning.source_of(checkpoint))
    assert plan.experts is not None
    stays = plan.experts
    counts = {len(experts) for experts in stays.values()}
    if len(counts) != 1:
        raise PlanError(f"every layer must keep equally many experts, got {sorted(counts)}")
    config = adapter.load_config(checkpoint.directory)
    _check_groups(adapter.expert_groups(config), plan)
    changed = adapter.config_of_experts(config, counts.pop())
    model = adapter.empty_model(config)
    if changed is None:
        raise Unsupported(
            f"{type(model).__name__} must have a config field for the number of experts that changes "
            "nothing but experts and routers, got none; narrow its experts instead"
        )
    fields, router_axes = changed
    tensors = adapter.expert_tensors(model, checkpoint.tensors)
    names = adapter.model_names(model, checkpoint.tensors)
    rebuilt = _Cache(rebuild) if rebuild is not None else None

    def pieces(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        part = tensors.get(name)
        if part is None:
            axis = router_axes.get(names[name])
            if axis is not None:
                tensor = _router_rows(tensor, axis, _layer_of(names[name], stays), stays, rebuilt)
            yield name, tensor
            return
        kept = stays[part.layer]
        if part.expert is not None and part.expert not in kept:
            return
        new = kept.index(part.expert) if part.expert is not None else None
        if tensor.is_meta or rebuilt is None:
            if new is None:
                tensor = tensor.index_select(0, torch.tensor(kept, device=tensor.device))
        else:
            tensor = _rebuilt_tensor(rebuilt(part.layer).experts, part, new).to(tensor.dtype)
        yield name if new is None else _renumbered(name, part, new), tensor

    def is_copied(name: str) -> bool:
        return name not in tensors and names[name] not in router_axes

    def check(written: Path) -> None:
        _verify(written, plan, checkpoint, rebuilt, streamed)

    pruning.rewrite(
        checkpoint,
        out,
        pruning._with_fields(checkpoint.config, fields),
        pieces,
        extra_files={
            pruning.PLAN_FILE: plan._to_bytes(),
            "README.md": model_card(checkpoint, plan, needs_tenp=False).encode(),
        },
        verify=check if verify else None,
        resume=plan.digest() if resume else None,
        # Shards side by side would have each other's layers rebuilt again.
        memory=memory if rebuild is None else 1,
        progress=progress,
        copied={name for name in checkpoint.tensors if is_copied(name)},
    )


class _Cache:
    """Rebuilds each layer once; tensors of a layer mostly follow each other."""

    def __init__(self, rebuild: Rebuild) -> None:
        self._rebuild = rebuild
        self._layers: dict[int, Rebuilt] = {}

    def __call__(self, layer: int) -> Rebuilt:
        if layer not in self._layers:
            self._layers.clear()
            self._layers[layer] = self._rebuild(layer)
        return self._layers[layer]


def _router_rows(
    tensor: Tensor,
    axis: int,
    layer: int,
    stays: dict[int, list[int]],
    rebuilt: _Cache | None,
) -> Tensor:
    """What a router's tensor becomes: the entries of the experts that stay, or means of all."""
    if tensor.is_meta or rebuilt is None:
        return tensor.index_select(axis, torch.tensor(stays[layer], device=tensor.device))
    mixed = torch.tensordot(rebuilt(layer).router, tensor.double(), dims=([1], [axis]))
    return mixed.movedim(0, axis).to(tensor.dtype).contiguous()


def _rebuilt_tensor(experts: Experts, part: ExpertTensor, expert: int | None) -> Tensor:
    """What a checkpoint tensor becomes, from experts in the family's own fused layout."""
    if expert is None:
        return part.turned(getattr(experts.module, part.part))
    gate, up = experts.gate_and_up()
    matrices = {"gate": gate, "up": up, "down": experts.down}
    matrix = matrices[part.part]
    assert matrix is not None
    return matrix[expert].contiguous()


def _renumbered(name: str, part: ExpertTensor, expert: int) -> str:
    return re.sub(rf"experts\.{part.expert}\.", f"experts.{expert}.", name, count=1)


def _layer_of(name: str, layers: dict[int, list[int]]) -> int:
    numbers = [int(number) for number in re.findall(r"\.(\d+)\.", name)]
    found = [number for number in numbers if number in layers]
    if not found:
        raise Unsupported(f"{name} must belong to one layer, but names none")
    return found[0]


def _check_groups(groups: int, plan: Plan) -> None:
    assert plan.experts is not None
    if groups == 1:
        return
    for layer, experts in plan.experts.items():
        size = plan.keep[layer].shape[0] // groups
        counts = {sum(expert // size == group for expert in experts) for group in range(groups)}
        if len(counts) != 1:
            raise Unsupported(
                f"the routers choose among {groups} groups of experts, so equally many of each group must "
                f"stay, got {sorted(counts)} in layer {layer}; narrow the experts instead"
            )


def _verify(
    written: Path, plan: Plan, checkpoint: Checkpoint, rebuilt: _Cache | None, streamed: bool
) -> None:
    """Load with stock transformers, or read layer by layer; every expert must be the one planned."""
    assert plan.experts is not None
    if streamed:
        read_written = reader_of_layers(Checkpoint(written))
    else:
        loaded = {e.layer: e for e in adapter.find_experts(adapter.load_model(written))}
        read_written = loaded.__getitem__
    read = reader_of_layers(checkpoint)
    for layer, kept in plan.experts.items():
        new = read_written(layer)
        if rebuilt is not None:
            expected = rebuilt(layer).experts
            at = torch.arange(len(kept))
        else:
            expected, at = read(layer), torch.tensor(kept)
        pairs = zip(
            (*new.gate_and_up(), new.down),
            (*expected.gate_and_up(), expected.down),
            strict=True,
        )
        for ours, theirs in pairs:
            if ours is None or theirs is None:
                continue
            if not torch.equal(ours, theirs[at].to(ours.dtype)):
                raise CheckpointError(
                    f"the written experts of layer {layer} must be the planned ones, got others; "
                    "nothing was kept"
                )
