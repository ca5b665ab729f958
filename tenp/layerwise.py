# SPDX-License-Identifier: Apache-2.0
"""A model of which one decoder layer at a time has weights, run by its own forward.

The model is built without weights. To run layer l on a batch, the model's own forward is called:
the layers before l hand on what they get, layer l computes on the hidden states at hand and then
stops the forward. So every layer gets the masks and position embeddings that the model makes for
it, whatever the family, and no weights but those of one layer are needed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    convert_and_load_state_dict_in_model,
)
from transformers.modeling_utils import LoadStateDictConfig

from tenp import adapter
from tenp.adapter import Experts, ExpertTensor
from tenp.checkpoint import Checkpoint
from tenp.errors import CheckpointError, Unsupported
from tenp.reading import LazyTensor, Reader

_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"


class _LargeOnMeta(TorchFunctionMode):
    """Makes large tensors on the meta device.

    `init_empty_weights` moves every parameter there, but only when it has been made: the experts of
    one layer may be more than the machine has. Buffers, which are small, must be made in earnest.
    """

    _FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand})
    _LARGE = 1 << 20  # elements

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._FACTORIES:
            size = kwargs.get("size", args[0] if len(args) == 1 else args)
            if torch.Size([size] if isinstance(size, int) else size).numel() >= self._LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _Computed(Exception):
    """Ends a forward when its layer has computed."""


class LayerwiseModel:
    """A causal language model, layer by layer.

    Attributes:
        model: The model; only loaded layers have weights.
        layers: Its decoder layers.
        experts: Decoder layer index to its routed experts, for the layers that have some.
        dtype: To compute in.
        device: To compute on.
        returned: Layer to the number of values that it returns, 0 for no tuple; of the layers run so far,
            here or in the run that this one goes on from.

    Args:
        reader: The checkpoint.
        dtype: To compute in.
        device: To compute on.

    Raises:
        Unsupported: The family cannot run layer by layer.
    """

    def __init__(
        self, reader: Reader, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self._reader, self.dtype, self.device = reader, dtype, torch.device(device)
        config = adapter.load_config(reader.checkpoint.directory)
        with _LargeOnMeta(), init_empty_weights(include_buffers=False):
            self.model: PreTrainedModel = adapter.model_of_config(config, dtype=dtype)
        self.model.eval().requires_grad_(False)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)
        found = adapter.find_experts(self.model)
        self.experts: dict[int, Experts] = {experts.layer: experts for experts in found}
        # "model.layers" of "model.layers.3.mlp.experts"
        self._path = found[0].name.split(f".{found[0].layer}.")[0]
        self.layers: Any = self.model.get_submodule(self._path)
        self._targets = adapter.model_names(self.model, reader.checkpoint.tensors)
        self._expert_names = adapter.expert_tensors(self.model, reader.checkpoint.tensors)
        self.returned: dict[int, int] = {}
        self._load_rest()

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def checkpoint(self) -> Checkpoint:
        """Where the weights are read from."""
        return self._reader.checkpoint

    def loaded_bytes(self, name: str) -> int:
        """Return the bytes of a tensor when it is read; of one expert's part if it holds all."""
        entry = self._reader.checkpoint.tensors[name]
        part = self._expert_names.get(name)
        return entry.bytes // (entry.shape[0] if part and part.expert is None else 1)

    def names(self, layer: int, experts: bool) -> list[str]:
        """Return the checkpoint's names of a layer's tensors: its routed experts, or all others."""
        prefix = f"{self._path}.{layer}."
        return [
            name
            for name, target in self._targets.items()
            if target.startswith(prefix) and (name in self._expert_names) == experts
        ]

    def load(self, layer: int) -> None:
        """Give a layer its weights, all but those of the routed experts.

        Raises:
            CheckpointError: A tensor is missing or cannot be read.
        """
        self._load(self.names(layer, experts=False))
        routed = f"{self.experts[layer].name}." if layer in self.experts else " "
        for name, parameter in self.layers[layer].named_parameters():
            full_name = f"{self._path}.{layer}.{name}"
            if parameter.is_meta and not full_name.startswith(routed):
                raise CheckpointError(
                    f"{self._reader.checkpoint.directory} must hold {full_name}, but it is missing"
                )

    def free(self, layer: int) -> None:
        """Take a layer's weights away again."""
        for module in self.layers[layer].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(
                        parameter.to("meta"), requires_grad=False
                    )

    def load_experts(self, layer: int, read: Callable[[int], dict[str, Tensor]]) -> None:
        """Give a layer its routed experts, one by one into their place.

        Args:
            layer: A layer with experts.
            read: Returns the parameters of one expert, `[1, ...]`.
        """
        experts = self.experts[layer]
        parameters = experts.module._parameters
        for name, parameter in parameters.items():
            if parameter is not None:
                parameters[name] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=self.dtype, device=self.device),
                    requires_grad=False,
                )
        for expert in range(parameters["down_proj"].shape[0]):
            for name, value in read(expert).items():
                parameters[name][expert].copy_(value[0])

    @contextmanager
    def cached(self, layer: int) -> Iterator[None]:
        """Meanwhile bring a layer's tensors into the page cache, as far as time and memory allow."""
        names = [*self.names(layer, experts=False), *self.names(layer, experts=True)]
        stop = threading.Event()
        thread = threading.Thread(target=self._reader.touch, args=(names, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def set_embeddings(self, ids: Tensor) -> None:
        """Load the rows of the input embeddings that some tokens need.

        Args:
            ids: Every token id that layer 0 will be run on.
        """
        embedding: Any = self.model.get_input_embeddings()
        source = self._input_embeddings()
        known = torch.unique(ids)
        rows = [self._reader.read(source, first=row, count=1) for row in known.tolist()]
        table = torch.cat(rows).to(self.dtype).to(self.device)
        embedding.weight = nn.Parameter(table, requires_grad=False)
        embedding.padding_idx = None  # matters to gradients only, and names a row of the full table
        known = known.to(self.device)
        self._embedding_hook = embedding.register_forward_pre_hook(
            lambda _, args: (torch.searchsorted(known, args[0]), *args[1:])
        )

    def free_embeddings(self) -> None:
        """Let the embeddings go; from layer 1 on the hidden states stand in for them."""
        embedding: Any = self.model.get_input_embeddings()
        self._embedding_hook.remove()
        embedding.weight = nn.Parameter(
            torch.empty(embedding.weight.shape, device="meta"), requires_grad=False
        )

    def _input_embeddings(self) -> str:
        """Return the checkpoint's name of the input embeddings."""
        embedding = self.model.get_input_embeddings()
        path = next(name for name, module in self.model.named_modules() if module is embedding)
        source = [name for name, target in self._targets.items() if target == f"{path}.weight"]
        if len(source) != 1:
            raise CheckpointError(
                f"{self._reader.checkpoint.directory} must hold {path}.weight, got {source}"
            )
        return source[0]

    def load_head(self) -> None:
        """Give the output embeddings their weights; some models share those of the input.

        Raises:
            CheckpointError: They are missing or cannot be read.
        """
        head: Any = self.model.get_output_embeddings()
        path = next(name for name, module in self.model.named_modules() if module is head)
        names = [name for name, target in self._targets.items() if target.startswith(f"{path}.")]
        if names:
            self._load(names)
        else:
            table = self._reader.read(self._input_embeddings()).to(self.dtype).to(self.device)
            head.weight = nn.Parameter(table, requires_grad=False)
        if any(parameter.is_meta for parameter in head.parameters()):
            raise CheckpointError(
                f"{self._reader.checkpoint.directory} must hold {path}.weight, but it is missing"
            )

    @torch.no_grad()
    def run(self, layer: int, ids: Tensor, mask: Tensor, hidden: Tensor | None) -> Tensor:
        """Run one layer on one batch.

        Args:
            layer: A loaded layer.
            ids: `[B, n]`, token ids.
            mask: `[B, n]`, 1 for attended tokens.
            hidden: `[B, n, H]`, what the layer before returned; None for layer 0.

        Returns:
            `[B, n, H]`.

        Raises:
            Unsupported: The family's layers hand each other more than hidden states.
        """
        result: list[Tensor] = []
        embedding: Any = self.model.get_input_embeddings()

        def compute(*args: Any, **kwargs: Any) -> Any:
            if hidden is not None:
                if args:
                    args = (hidden, *args[1:])
                else:
                    kwargs["hidden_states"] = hidden
            result.append(self._note(layer, own_forward(*args, **kwargs)))
            raise _Computed

        own_forward = self.layers[layer].forward
        self.layers[layer].forward = compute
        for before in range(layer):
            self.layers[before].forward = self._handing_on(before)
        if layer > 0:
            assert hidden is not None
            embedding.forward = lambda *args, **kwargs: hidden
        try:
            self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        except _Computed:
            return result[0]
        except (TypeError, KeyError, AttributeError, IndexError) as error:
            raise Unsupported(
                f"{type(self.model).__name__} cannot run layer by layer: layer {layer} needs more than hidden "
                f"states of the layer before ({type(error).__name__}: {error}); use --stream none"
            ) from error
        finally:
            for module in (*self.layers[: layer + 1], embedding):
                module.__dict__.pop("forward", None)
        raise Unsupported(
            f"{type(self.model).__name__} cannot run layer by layer: it does not call layer {layer}; use --stream none"
        )

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Run what comes after the layers; all of them must have been run, and the head be loaded.

        Args:
            hidden: `[n, H]`, what the last layer returned for some tokens.

        Returns:
            `[n, V]`.
        """
        embedding: Any = self.model.get_input_embeddings()
        rows = hidden.to(self.device)[:, None]  # a sequence each, because nothing attends any more
        last = len(self) - 1
        for layer in range(last):
            self.layers[layer].forward = self._handing_on(layer)
        # Not what it gets: some models scale their embeddings before the first layer.
        self.layers[last].forward = lambda *args, **kwargs: self._handing_on(last)(rows)
        embedding.forward = lambda *args, **kwargs: rows
        try:
            ids = torch.zeros(rows.shape[:2], dtype=torch.int64, device=self.device)
            output: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return output[:, 0]
        finally:
            for module in (*self.layers, embedding):
                module.__dict__.pop("forward", None)

    def expert_reader(self, layer: int) -> Callable[[int], dict[str, Tensor]]:
        """Return a function that reads the parameters of one expert of a layer; any thread may call it."""
        return expert_reader(self.experts[layer], self._expert_names, self._reader, self.dtype)

    def _note(self, layer: int, output: Any) -> Tensor:
        if isinstance(output, Tensor):
            self.returned[layer] = 0
            return output
        if any(value is not None for value in output[1:]):
            raise Unsupported(
                f"{type(self.model).__name__} cannot run layer by layer: layer {layer} returns more than hidden "
                "states; use --stream none"
            )
        self.returned[layer] = len(output)
        return output[0]

    def _handing_on(self, layer: int) -> Callable[..., Any]:
        values = self.returned[layer]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *[None] * (values - 1)) if values else hidden

        return forward

    def _load_rest(self) -> None:
        """Load what is outside the layers, but no embeddings and no head."""
        embeddings = (
            self.model.get_input_embeddings(),
            self.model.get_output_embeddings(),
        )
        skipped = tuple(
            f"{name}." for name, module in self.model.named_modules() if module in embeddings
        )
        known = self.model.state_dict().keys()
        self._load(
            name
            for name, target in self._targets.items()
            if target in known and not target.startswith((f"{self._path}.", *skipped))
        )

    def _load(self, names: Iterable[str]) -> None:
        lazy: dict[str, Any] = {name: LazyTensor(self._reader, name) for name in names}
        if not lazy:
            return
        plan_of: Any = getattr(self.model, "_get_dtype_plan", lambda dtype: {})
        config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=plan_of(self.dtype),
            device_map={"": self.device},
            # Fresh ones every time, because they remember that they were used.
            weight_mapping=list(get_model_conversion_mapping(self.model)),  # type: ignore[arg-type]
        )
        # One tensor after another: the loader's own threads would hold several at once.
        before = os.environ.get(_NO_THREADS)
        os.environ[_NO_THREADS] = "1"
        try:
            report, _ = convert_and_load_state_dict_in_model(self.model, lazy, config)
        finally:
            os.environ.pop(_NO_THREADS)
            if before is not None:
                os.environ[_NO_THREADS] = before
        if self._reader.error is not None:
            raise self._reader.error
        problems = [
            *report.conversion_errors.items(),
            *report.mismatched_keys,
            *report.unexpected_keys,
        ]
        if problems:
            raise CheckpointError(
                f"{self._reader.checkpoint.directory} must fit its config, but {problems[0]} does not"
            )


def expert_reader(
    experts: Experts,
    tensors: dict[str, ExpertTensor],
    reader: Reader,
    dtype: torch.dtype,
    change: Callable[[ExpertTensor, Tensor], Tensor] | None = None,
) -> Callable[[int], dict[str, Tensor]]:
    """Return a function that reads one expert's parameters, `[1, ...]` in the family's own layout.

    Args:
        experts: Of one layer.
        tensors: What the checkpoint's tensors are to the experts.
        reader: The checkpoint.
        dtype: To convert to.
        change: Applied to every tensor of the checkpoint before it is converted.
    """
    names: dict[int | None, dict[str, str]] = {}
    for name, part in tensors.items():
        if part.experts == experts.name:
            names.setdefault(part.expert, {})[part.part] = name

    def one_of_all(name: str, expert: int) -> Tensor:
        part = tensors[name]
        if change is None:  # the rows of one expert are contiguous
            return part.turned(reader.read(name, first=expert, count=1))
        return change(part, part.turned(reader.read(name)))[expert : expert + 1]

    def one(name: str) -> Tensor:
        tensor = reader.read(name)
        return tensor if change is None else change(tensors[name], tensor)

    def read(expert: int) -> dict[str, Tensor]:
        stacked = {
            part: one_of_all(name, expert).to(dtype) for part, name in names.get(None, {}).items()
        }
        single = {part: one(name).to(dtype) for part, name in names.get(expert, {}).items()}
        return {**stacked, **(experts.fuse(single) if single else {})}

    return read
