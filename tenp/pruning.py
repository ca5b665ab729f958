# SPDX-License-Identifier: Apache-2.0
"""Carries a plan out on a checkpoint, tensor by tensor; the whole model is never in memory.

The result is an ordinary Hugging Face directory. Experts of different widths are written under the
model's own per-expert names with `quantization_config.quant_method = "tenp"`; when all widths are
equal and the family has a config field for them, the result needs no tenp to load.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenp import adapter, auto_map
from tenp.adapter import Experts, ExpertTensor
from tenp.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, TensorEntry
from tenp.errors import CheckpointError, InvalidArgument, PlanError, Unsupported
from tenp.files import new_directory, partial_of, resumable_directory
from tenp.model_card import model_card, padded_card
from tenp.plan import Plan
from tenp.quantization import Int8, scale_name
from tenp.reading import Reader
from tenp.source import Source
from tenp.writing import write_shards

PLAN_FILE = "tenp_plan.json"

#: Shape and dtype per tensor name.
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def source_of(checkpoint: Checkpoint) -> Source:
    """Describe a checkpoint as statistics and plans refer to it.

    Raises:
        Unsupported: It has no routed experts that tenp knows.
        CheckpointError: It is pruned already, or the expert tensors are not complete.
    """
    quantized = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if quantized == "tenp":
        raise CheckpointError(
            f"{checkpoint.directory} is pruned already; prune the model it was made from"
        )
    if quantized is not None:
        raise Unsupported(
            f"{checkpoint.directory} must hold plain weights, got weights quantized by {quantized}; "
            "prune an unquantized copy, then quantize"
        )
    model = adapter.empty_model(adapter.load_config(checkpoint.directory))
    experts = adapter.find_experts(model)
    tensors = _expert_tensors(checkpoint, model)
    parameters = experts[0].neuron_parameters
    routed = next(iter(tensors))
    return Source(
        fingerprint=checkpoint.fingerprint,
        architecture=type(model).__name__,
        parameters=checkpoint.parameters,
        bytes=checkpoint.bytes,
        neuron_parameters=parameters,
        neuron_bytes=parameters * checkpoint.tensors[routed].dtype.itemsize,
    )


def apply(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    verify: Callable[[Path], None] | None = None,
    resume: bool = False,
    memory: int | None = None,
    progress: Callable[[str, int], None] | None = None,
    refit: Callable[[ExpertTensor, Tensor], Tensor] | None = None,
    int8: Int8 | None = None,
) -> None:
    """Write the pruned checkpoint.

    Args:
        checkpoint: The dense model.
        plan: What is kept; must be for this checkpoint.
        out: The new directory. It appears when everything is written and never before.
        verify: Called with the finished directory before it appears; what it raises stops that.
        resume: Keep finished shards when stopped, and go on from those that are there already.
        memory: Bytes that tensors in flight may take.
        progress: Called with (shard, source bytes) after every tensor.
        refit: Changes the tensors of experts before they are narrowed; `tenp.refitting.Refitting`.
        int8: Quantizes the experts' matrices after that; None leaves them in their dtype.

    Raises:
        PlanError: The plan is for another checkpoint or does not fit it.
        CheckpointError: The checkpoint is damaged, `out` exists, or the disk is full.
    """
    plan.validate(source_of(checkpoint))
    config = adapter.load_config(checkpoint.directory)
    model = adapter.empty_model(config)
    experts = {layer.name: layer for layer in adapter.find_experts(model)}
    tensors = _expert_tensors(checkpoint, model)
    _check_fit(plan, list(experts.values()))
    uniform = plan.uniform_width()
    # transformers knows no int8 experts.
    fields = adapter.config_of_width(config, uniform) if uniform and int8 is None else None
    if fields is not None:
        new_config = _with_fields(checkpoint.config, fields)
    else:
        widths = {
            str(layer): ",".join(map(str, layer_widths))
            for layer, layer_widths in plan.widths().items()
        }
        new_config = {
            **auto_map.added(checkpoint.config),
            "quantization_config": {
                "quant_method": "tenp",
                "version": 1,
                "widths": widths,
                **({} if int8 is None else {"version": 2, "weights": "int8"}),
            },
        }

    def quantized(name: str, tensor: Tensor, part: str) -> Iterator[tuple[str, Tensor]]:
        if int8 is None or name.endswith("bias"):
            yield name, tensor
            return
        neurons = 1 if part == "down" else 0
        q, scale = int8(tensor, neurons)
        yield name, q
        yield scale_name(name), scale.unsqueeze(1 - neurons)

    def pieces(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        if name not in tensors:
            yield name, tensor
            return
        part = tensors[name]
        keep = plan.keep[part.layer]
        tensor = part.turned(tensor)
        if refit is not None:
            tensor = refit(part, tensor)
        if part.expert is not None:
            yield from quantized(name, _narrow(tensor, part.part, keep[part.expert]), part.part)
        elif fields is not None:
            narrow = experts[part.experts].select_neurons(part.part, tensor, keep)
            yield name, part.turned(narrow)
        else:
            for new_name, projection, matrix in _split_fused(
                name, tensor, part, keep, experts[part.experts], model
            ):
                yield from quantized(new_name, matrix, projection)

    rewrite(
        checkpoint,
        out,
        new_config,
        pieces,
        extra_files={
            PLAN_FILE: plan._to_bytes(),
            "README.md": model_card(
                checkpoint, plan, needs_tenp=fields is None, is_int8=int8 is not None
            ).encode(),
            **({} if fields is not None else {auto_map.FILE: auto_map.CODE.encode()}),
        },
        verify=verify,
        resume=plan.digest() if resume else None,
        # Shards side by side would have each other's layers refitted again.
        memory=memory if refit is None else 1,
        progress=progress,
        copied=checkpoint.tensors.keys() - tensors.keys(),
    )


def drop_partial(out: Path, plan: str) -> None:
    """Remove what a stopped `apply` with `resume` left.

    Args:
        out: Its output.
        plan: The digest of its plan.
    """
    shutil.rmtree(partial_of(out, plan), ignore_errors=True)


def rewrite(
    checkpoint: Checkpoint,
    out: Path,
    config: Mapping[str, Any],
    pieces: Any,
    extra_files: Mapping[str, bytes],
    verify: Callable[[Path], None] | None = None,
    resume: str | None = None,
    memory: int | None = None,
    progress: Callable[[str, int], None] | None = None,
    copied: Container[str] = (),
) -> None:
    """Write a checkpoint whose tensors are functions of another's, shard by shard.

    Args:
        checkpoint: The source.
        out: The new directory.
        config: Its `config.json`.
        pieces: `pieces(name, tensor)` yields the (name, tensor) pairs that a source tensor becomes.
            It is called twice: with empty tensors on the meta device for the layout, then with data.
        extra_files: More files by name. All other files of the source that are no weights are copied.
        verify: As in `apply`.
        resume: What names the rewriting, if it is to be resumed when stopped.
        memory: As in `apply`.
        progress: As in `apply`.
        copied: Tensors that become themselves.
    """
    layouts: dict[str, Layout] = {shard: {} for shard in checkpoint.shards()}
    for name, entry in checkpoint.tensors.items():
        for new_name, piece in pieces(
            name, torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        ):
            layouts[entry.shard][new_name] = (piece.dtype, tuple(piece.shape))
    entries = {
        name: TensorEntry(shard, *what)
        for shard, layout in layouts.items()
        for name, what in layout.items()
    }
    total = sum(entry.bytes for entry in entries.values())
    room = total + (1 << 20)
    directory = resumable_directory(out, resume, room) if resume else new_directory(out, room)
    with directory as partial:
        reader = Reader(checkpoint)
        write_shards(reader, layouts, pieces, partial, memory, progress, copied)
        reader.close()
        if layouts.keys() != {SINGLE_FILE}:
            metadata = {
                "total_parameters": sum(entry.elements for entry in entries.values()),
                "total_size": total,
            }
            weight_map = {name: entry.shard for name, entry in sorted(entries.items())}
            _write_json(partial / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})
        for path in sorted(checkpoint.directory.iterdir()):
            if path.is_file() and not path.name.endswith(
                (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", auto_map.FILE)
            ):
                shutil.copyfile(path, partial / path.name)
        _write_json(partial / "config.json", config)
        for file_name, content in extra_files.items():
            (partial / file_name).write_bytes(content)
        if verify is not None:
            try:
                verify(partial)
            except CheckpointError:
                shutil.rmtree(partial)  # not to be resumed
                raise


def export_padded(checkpoint: Checkpoint, out: Path) -> None:
    """Write a stock checkpoint from a pruned one: every expert padded with zeros to the full width.

    It computes the same as the pruned model and saves nothing; it is for runtimes that know one
    width only.

    Raises:
        InvalidArgument: The checkpoint is not one of experts of different widths.
    """
    settings = checkpoint.config.get("quantization_config") or {}
    if settings.get("quant_method") != "tenp":
        raise InvalidArgument(
            f"export: {checkpoint.directory} must be a checkpoint pruned to different widths, got a stock one"
        )
    config = auto_map.removed(checkpoint.config)
    del config["quantization_config"]
    dense = adapter.load_config(checkpoint.directory)
    del dense.quantization_config
    model = adapter.empty_model(dense)
    experts = {layer.name: layer for layer in adapter.find_experts(model)}
    tensors = adapter.expert_tensors(model, checkpoint.tensors)
    reader = Reader(checkpoint)
    layers = {
        name: _PaddedLayer(experts[name], names, reader)
        for name, names in _names_by_layer(tensors).items()
    }

    def pieces(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        part = tensors.get(name)
        if part is None:
            yield name, tensor
        elif part.is_stock:
            yield name, _padded(tensor, part.part, experts[part.experts].width)
        elif name == layers[part.experts].first:
            parameters = layers[part.experts].parameters(tensor.device)
            yield from adapter.stock_tensors(model, name, part, parameters).items()

    card = checkpoint.directory / "README.md"
    cards = {card.name: padded_card(card.read_bytes().decode()).encode()} if card.exists() else {}
    # A layer's experts are in memory together when the Hub format has one tensor for all of them.
    memory = None if all(part.is_stock for part in tensors.values()) else 1
    try:
        rewrite(checkpoint, out, config, pieces, extra_files=cards, memory=memory)
    finally:
        reader.close()


class _PaddedLayer:
    """The experts of one layer, padded and put together as the family's module has them.

    Attributes:
        first: The name of the first of their tensors, in whose place all are written.

    Args:
        experts: The family's, of the full width.
        names: Per expert, what its tensors are to their names.
        reader: The pruned checkpoint.
    """

    def __init__(
        self, experts: Experts, names: Mapping[int | None, Mapping[str, str]], reader: Reader
    ) -> None:
        self._experts, self._names, self._reader = experts, names, reader
        self.first = next(name for name in next(iter(names.values())).values())

    def parameters(self, device: torch.device) -> dict[str, Tensor]:
        """Return the parameters by their names in the module; shapes alone on the meta device."""
        whole: dict[str, Tensor] = {}
        for expert in range(self._experts.num_experts):
            parts = {
                part: _padded(self._read(name, device), part, self._experts.width)
                for part, name in self._names[expert].items()
            }
            for name, one in self._experts.fuse(parts).items():
                if name not in whole:
                    whole[name] = one.new_empty((self._experts.num_experts, *one.shape[1:]))
                whole[name][expert] = one[0]
        return whole

    def _read(self, name: str, device: torch.device) -> Tensor:
        if device.type != "meta":
            return self._reader.read(name)
        entry = self._reader.checkpoint.tensors[name]
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


def _names_by_layer(
    tensors: Mapping[str, ExpertTensor],
) -> dict[str, dict[int | None, dict[str, str]]]:
    """Return, for every experts module and expert, what its tensors are to their names, in order."""
    names: dict[str, dict[int | None, dict[str, str]]] = {}
    for name, part in tensors.items():
        names.setdefault(part.experts, {}).setdefault(part.expert, {})[part.part] = name
    return names


def _padded(tensor: Tensor, part: str, width: int) -> Tensor:
    """Add zeros to the rows of a gate or up projection or its bias, to the columns of a down projection."""
    if part == "down_bias":
        return tensor
    axis = 1 if part == "down" else 0
    shape = list(tensor.shape)
    shape[axis] = width - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)


def _narrow(tensor: Tensor, part: str, keep: Tensor) -> Tensor:
    """Keep the rows of a gate or up projection `[I, H]`, the columns of a down projection `[H, I]`."""
    index = torch.nonzero(keep).flatten().to(tensor.device)
    return tensor.index_select(1 if part == "down" else 0, index)


def _split_fused(
    stored: str, tensor: Tensor, part: ExpertTensor, keep: Tensor, experts: Experts, model: Any
) -> Iterator[tuple[str, str, Tensor]]:
    """One tensor of all experts to (name, projection, matrix) per expert, as per-expert families have them."""
    kind = "bias" if part.part.endswith("_bias") else "weight"
    for projection, stacked in experts.projections(part.part, tensor):
        names = adapter.single_names(model, stored, part, projection, kind, len(stacked))
        for name, matrix, mask in zip(names, stacked, keep, strict=True):
            has_neurons = (projection, kind) != ("down", "bias")
            yield name, projection, _narrow(matrix, projection, mask) if has_neurons else matrix


def _expert_tensors(checkpoint: Checkpoint, model: Any) -> dict[str, ExpertTensor]:
    tensors = adapter.expert_tensors(model, checkpoint.tensors)
    for experts in adapter.find_experts(model):
        parts = {(t.expert, t.part) for t in tensors.values() if t.experts == experts.name}
        per_expert = {part for expert, part in parts if expert is not None}
        wanted = {(expert, part) for expert in range(experts.num_experts) for part in per_expert}
        if not parts or (per_expert and parts != wanted):
            missing = sorted(wanted - parts)[:1] or experts.name
            raise CheckpointError(
                f"{checkpoint.directory} must hold every expert of layer {experts.layer}, but {missing} is missing"
            )
    return tensors


def _check_fit(plan: Plan, experts: list[Experts]) -> None:
    have = {layer.layer: (layer.num_experts, layer.width) for layer in experts}
    planned = {layer: tuple(keep.shape) for layer, keep in plan.keep.items()}
    if have != planned:
        raise PlanError(f"the plan must have the experts and widths {have}, got {planned}")


def _with_fields(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Change fields of the text part of a config: a part of its own in larger models, else all of it."""
    part = config.get("text_config")
    if isinstance(part, Mapping):
        return {**config, "text_config": _with_fields(part, fields)}
    return {**config, **fields}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
