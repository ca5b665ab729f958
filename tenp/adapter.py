# SPDX-License-Identifier: Apache-2.0
"""What tenp knows of transformers: the one module to read when a new version breaks something.

About 65 model families keep their routed experts in one kind of module: fused 3-D parameters, a
call `(hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k])`, and flags that describe the
layout. This module finds these modules, shows their weights in one orientation whatever the flags
say, takes their place during calibration, and tells which checkpoint tensor feeds which of them.
Written for transformers 5.17 to 5.23, and tested at both ends; no model family is named here.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tenp.checkpoint import TensorEntry
from tenp.errors import CheckpointError, InvalidArgument, TenpError, Unsupported

_CALIBRATION = "tenp_calibration"

#: Config attributes that set the width of the routed experts in some family.
_WIDTH_FIELDS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")

#: Config attributes that set how many routed experts' widths the shared expert of a layer has.
_SHARED_FIELDS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")

#: Config attributes that set the number of routed experts, and how many a token gets.
_COUNT_FIELDS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)
_TOP_K_FIELDS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k",
)

#: What `tenp.ops` calls the activations that need no parameter.
_PLAIN_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}

ExpertsFunction = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Experts:
    """The routed experts of one decoder layer, with weights in one orientation for all families.

    Attributes:
        layer: Decoder layer index.
        name: Path of the module in the model.
        module: The module of the model's own class.
    """

    layer: int
    name: str
    module: Any  # an nn.Module whose attributes its flags describe

    @property
    def has_gate(self) -> bool:
        """Whether a neuron has a gate row beside its up row."""
        return bool(getattr(self.module, "has_gate", True))

    @property
    def has_bias(self) -> bool:
        """Whether the projections have biases."""
        return bool(getattr(self.module, "has_bias", False))

    @property
    def down(self) -> Tensor:
        """`[E, H, I]`, a view of the down projections."""
        return self._oriented(self.module.down_proj)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.down.shape[0]

    @property
    def width(self) -> int:
        """I, the full width."""
        return self.down.shape[2]

    @property
    def neuron_parameters(self) -> int:
        """Parameters of one neuron: its rows, its column and its biases."""
        rows = 2 if self.has_gate else 1
        return rows * (self._up.shape[-1] + self.has_bias) + self.down.shape[1]

    def gate_and_up(self) -> tuple[Tensor | None, Tensor]:
        """Return views `[E, I, H]` of the gate projections (None without a gate) and the up projections."""
        return self._split(self._up, dim=1)

    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the biases of gate `[E, I]`, up `[E, I]` and down `[E, H]`, None where there are none."""
        if not self.has_bias:
            return None, None, None
        joined = self.module.gate_up_proj_bias if self.has_gate else self.module.up_proj_bias
        return *self._split(joined, dim=1), self.module.down_proj_bias

    def activations(self, expert: int, hidden: Tensor) -> Tensor:
        """Return m `[n, I]` of one expert for hidden states `[n, H]`, in the model's own arithmetic."""
        bias = None
        if self.has_bias:
            bias = (self.module.gate_up_proj_bias if self.has_gate else self.module.up_proj_bias)[
                expert
            ]
        projected = F.linear(hidden, self._up[expert], bias)
        return (
            self.module._apply_gate(projected) if self.has_gate else self.module.act_fn(projected)
        )

    def apply_gate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """Return m `[n, W]` for projections `[n, W]` of any width, by the family's own gate."""
        if gate is None:
            return self.module.act_fn(up)
        if self._is_concatenated:
            return self.module._apply_gate(torch.cat([gate, up], dim=-1))
        return self.module._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))

    @cached_property
    def kernel_activation(self) -> tuple[str, float, float] | None:
        """(activation, limit, alpha) with which `tenp.ops` computes this family's gate, if any does.

        Families differ by overridden methods, not by names one could trust, so the gate is asked:
        it is evaluated on a grid and compared with every activation that the kernels know.
        """
        grid = torch.linspace(-12.0, 12.0, 49, device="cpu")
        gate, up = (axis.flatten() for axis in torch.meshgrid(grid, grid, indexing="ij"))
        with torch.no_grad():
            asked = self.apply_gate(gate if self.has_gate else None, up)
        for name, function in _PLAIN_ACTIVATIONS.items():
            expected = function(gate) * up if self.has_gate else function(up)
            if torch.allclose(asked, expected, atol=1e-5):
                return name, 0.0, 0.0
        limit, alpha = (getattr(self.module, field, None) for field in ("limit", "alpha"))
        if self.has_gate and limit is not None and alpha is not None:
            glu = gate.clamp(max=limit)
            expected = (up.clamp(-limit, limit) + 1) * glu * torch.sigmoid(alpha * glu)
            if torch.allclose(asked, expected, atol=1e-5):
                return "swiglu_oai", float(limit), float(alpha)
        return None

    def projections(self, parameter: str, fused: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (`gate`, `up` or `down`, view) of a tensor of all experts, one view per projection.

        Args:
            parameter: Its name in the module, for example `gate_up_proj` or `down_proj_bias`.
            fused: The tensor in the family's own layout.

        Yields:
            Views `[E, I, H]` of gate and up, `[E, H, I]` of down; of biases `[E, I]` and `[E, H]`.
        """
        oriented = fused if parameter.endswith("_bias") else self._oriented(fused)
        if parameter.startswith("down"):
            yield "down", oriented
            return
        gate, up = self._split(oriented, dim=1)
        if gate is not None:
            yield "gate", gate
        yield "up", up

    def select_neurons(self, parameter: str, fused: Tensor, keep: Tensor) -> Tensor:
        """Return a tensor of all experts with some neurons only, in the family's own layout.

        Args:
            parameter: Its name in the module.
            fused: The tensor.
            keep: `[E, I]`, bool, equally many per expert.
        """
        if parameter == "down_proj_bias":
            return fused
        is_down, is_bias = parameter.startswith("down"), parameter.endswith("_bias")
        if not is_down and self.has_gate:
            keep = (
                torch.cat([keep, keep], 1)
                if self._is_concatenated
                else keep.repeat_interleave(2, 1)
            )
        # One expert's matrix counts neurons in the rows of up and the columns of down, or transposed.
        axis = 0 if is_bias else int(is_down != self._is_transposed)
        index = [torch.nonzero(row).flatten().to(fused.device) for row in keep]
        return torch.stack(
            [matrix.index_select(axis, at) for matrix, at in zip(fused, index, strict=True)]
        )

    def fuse(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters of one expert alone, `[1, ...]` in the family's own layout.

        Args:
            parts: `gate` `[W, H]` (if there is one), `up` `[W, H]`, `down` `[H, W]` of any width, and
                their biases as `gate_bias` `[W]`, `up_bias` `[W]`, `down_bias` `[H]`.
        """
        fused = {}
        for suffix in ("", "_bias"):
            if f"up{suffix}" not in parts:
                continue
            up, down = parts[f"up{suffix}"], parts[f"down{suffix}"]
            if self.has_gate:
                pair = [parts[f"gate{suffix}"], up]
                up = (
                    torch.cat(pair)
                    if self._is_concatenated
                    else torch.stack(pair, dim=1).flatten(0, 1)
                )
            if not suffix and self._is_transposed:
                up, down = up.t().contiguous(), down.t().contiguous()
            fused[f"{'gate_up' if self.has_gate else 'up'}_proj{suffix}"] = up[None]
            fused[f"down_proj{suffix}"] = down[None]
        return fused

    def with_parameters(self, parameters: Mapping[str, Tensor]) -> Experts:
        """Return experts that share all but the weights with these: their gate, limits and flags.

        Args:
            parameters: By name in the module, of any number of experts and any width.
        """
        shell = copy.copy(self.module)
        shell._parameters = dict(parameters)
        return Experts(self.layer, self.name, shell)

    @property
    def _is_transposed(self) -> bool:
        return bool(getattr(self.module, "is_transposed", False))

    @property
    def _is_concatenated(self) -> bool:
        return bool(getattr(self.module, "is_concatenated", True))

    @property
    def _up(self) -> Tensor:
        """`[E, 2I, H]` with a gate, in the family's order of rows, else `[E, I, H]`."""
        return self._oriented(self.module.gate_up_proj if self.has_gate else self.module.up_proj)

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2) if self._is_transposed else weight

    def _split(self, joined: Tensor, dim: int) -> tuple[Tensor | None, Tensor]:
        if not self.has_gate:
            return None, joined
        if self._is_concatenated:
            gate, up = joined.chunk(2, dim=dim)
        else:
            gate, up = joined.unflatten(dim, (-1, 2)).unbind(dim + 1)
        return gate, up


def find_experts(model: nn.Module) -> list[Experts]:
    """Return the routed experts of a model, shallow to deep.

    Raises:
        Unsupported: It has none of the kind that tenp knows; the message says what was looked for.
    """
    found = [
        Experts(_layer_index(name), name, module)
        for name, module in model.named_modules()
        if hasattr(module, "_apply_gate")
        and hasattr(module, "is_transposed")
        and isinstance(getattr(module, "down_proj", None), nn.Parameter)
    ]
    kind = type(model).__name__
    if not found:
        raise Unsupported(f"{kind} must have routed experts to prune, got {_what_it_has(model)}")
    names: dict[int, str] = {}
    for experts in found:
        if getattr(experts.module, "has_post_expert_norm", False):
            raise Unsupported(
                f"{kind}: {experts.name} normalises each expert's output, which pruning would change"
            )
        if experts.layer in names:
            raise Unsupported(
                f"{kind} must have one set of routed experts in a layer, got {names[experts.layer]} and {experts.name}"
            )
        names[experts.layer] = experts.name
    return sorted(found, key=lambda experts: experts.layer)


def _what_it_has(model: nn.Module) -> str:
    """Say of a model without the experts that tenp knows what it has in their place."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch."):
            continue
        matrices = {
            key for key, tensor in module.named_parameters(recurse=False) if tensor.ndim == 3
        }
        if not matrices and not name.endswith(".experts"):
            continue
        what = f"{name} ({type(module).__name__})"
        call = list(inspect.signature(module.forward).parameters)
        if len(call) != 3:
            return (
                f"{what}, whose call is ({', '.join(call)}) and not "
                "(hidden_states, top_k_index, top_k_weights)"
            )
        if "down_proj" not in matrices:
            return f"{what} without a 3-D down_proj for all of them"
        with_up = {len(getattr(module, key)) for key in matrices}
        if len(with_up) != 1:
            return f"{what}, of which some have no weights: its parameters are of {sorted(with_up)} experts"
        return f"{what}, which is without transformers' @use_experts_implementation and cannot be stood in for"
    return (
        "a dense model: looked for modules with a 3-D down_proj and transformers' "
        "@use_experts_implementation"
    )


def _layer_index(name: str) -> int:
    """The first number in a path like `model.layers.3.mlp.experts`."""
    return next(int(part) for part in name.split(".") if part.isdigit())


@contextmanager
def experts_replaced(model: PreTrainedModel, function: ExpertsFunction) -> Iterator[None]:
    """Let `function(module, hidden, top_k_index, top_k_weights)` stand in for all routed experts."""
    before = model.get_experts_implementation()
    ALL_EXPERTS_FUNCTIONS.register(_CALIBRATION, function)
    model.set_experts_implementation(_CALIBRATION)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def load_config(directory: Path) -> PreTrainedConfig:
    """Read `config.json`.

    Raises:
        Unsupported: This version of transformers does not know the architecture.
        CheckpointError: The file cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(directory)
    except (ValueError, KeyError) as error:
        raise Unsupported(
            f"{directory / 'config.json'} must describe a model that transformers {transformers.__version__} knows: "
            f"looked for its model_type; {_first_line(error)}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{directory}: {_first_line(error)}") from error


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype that a checkpoint's config names; float32 if it names none."""
    dtype = getattr(config.get_text_config(), "dtype", None) or config.dtype
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype or "float32"))


def load_model(
    directory: Path, dtype: torch.dtype | str = "auto", device: str = "cpu"
) -> PreTrainedModel:
    """Load a language model for inference.

    Args:
        directory: A local checkpoint.
        dtype: `auto` is the checkpoint's own.
        device: A torch device, or `auto` to spread the model over what there is.

    Raises:
        Unsupported: The architecture is not known or is no language model, or the device is not
            there.
        CheckpointError: The weights do not fit the config.
    """
    _require_device(device)
    config = load_config(directory)
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and stored.get("quant_method") == "mxfp4":
        # Where there are kernels for MXFP4, its experts would be modules of another kind.
        config.quantization_config = {**stored, "dequantize": True}
    try:
        loaded: Any = _auto_class(config).from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            device_map=device,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
        )
    except TenpError:
        raise
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{directory} cannot be loaded: {_first_line(error)}") from error
    except ValueError as error:
        raise Unsupported(f"{directory}: {_first_line(error)}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{directory} must hold {missing[0]}, but {len(missing)} weights are missing"
        )
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise CheckpointError(
            f"{directory}: {name} must be {tuple(wanted)}, as config.json says, got {tuple(stored)}"
        )
    return model.eval().requires_grad_(False)


def _require_device(device: str) -> None:
    if device == "auto":
        return
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise InvalidArgument(
            f"device must be auto or a torch device such as cpu or cuda:0, got {device}"
        ) from None
    count = torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= count:
        raise Unsupported(f"device {device} must be there, but torch sees {count} CUDA devices")


def vocabulary(model: PreTrainedModel) -> int:
    """Return how many token embeddings the model has."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.num_embeddings)


def model_of_config(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """Return the model of a config with weights of no meaning.

    Raises:
        Unsupported: The architecture is no language model.
    """
    try:
        return _auto_class(config).from_config(config, **options)
    except ValueError as error:
        raise Unsupported(f"{config.model_type}: {_first_line(error)}") from error


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of a config with weights on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        return model_of_config(config)


def _auto_class(config: PreTrainedConfig) -> Any:
    """What makes a model of a config: of text alone if there is such a class, else of text and more."""
    for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
        if type(config) in auto._model_mapping:
            return auto
    raise Unsupported(
        f"{config.model_type} must be a language model that predicts next tokens, but transformers has no such "
        "class for it"
    )


@dataclass(frozen=True)
class ExpertTensor:
    """What a checkpoint tensor is to the routed experts.

    Attributes:
        experts: Path of the experts module.
        layer: Decoder layer index.
        expert: The expert, or None for a tensor that holds all experts of the layer.
        part: `gate`, `up` or `down` of one expert, `gate_bias` and so on of its biases; the
            parameter's own name in a tensor of all.
        is_stock: Whether the family's Hub format has such tensors. If not, it has one for all experts
            of a layer, and this is one of those that pruning makes of it.
        is_transposed: Whether it is stored the other way round than the model has it.
    """

    experts: str
    layer: int
    expert: int | None
    part: str
    is_stock: bool = True
    is_transposed: bool = False

    def turned(self, tensor: Tensor) -> Tensor:
        """Return a stored tensor as the model has it, or one of the model as it is stored."""
        return tensor.transpose(1, 2) if self.is_transposed else tensor


def expert_tensors(
    model: PreTrainedModel, stored: Mapping[str, TensorEntry]
) -> dict[str, ExpertTensor]:
    """Tell which checkpoint tensors hold routed experts, by transformers' own weight conversions.

    Args:
        model: The model, on any device.
        stored: All tensors of its checkpoint, or of one pruned from it.

    Raises:
        Unsupported: The experts are stored in an order that transformers changes while loading.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    parameters = model.state_dict()
    layers = {experts.name: experts for experts in find_experts(model)}
    found: dict[str, ExpertTensor] = {}
    for name, entry in stored.items():
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, parameters
        )
        single = _SINGLE.fullmatch(target)
        if pattern is None and single is not None and single[1] in layers:
            part = single[3] + ("_bias" if single[4] == "bias" else "")
            layer = layers[single[1]].layer
            found[name] = ExpertTensor(single[1], layer, int(single[2]), part, is_stock=False)
            continue
        module, _, parameter = target.rpartition(".")
        if module not in layers:
            continue
        layer = layers[module].layer
        if pattern is None:
            found[name] = ExpertTensor(module, layer, None, parameter)
            continue
        number = re.search(r"experts\.(\d+)\.", name)
        if number is None and _is_transposing(pattern, converters):
            turned = tuple(parameters[target].shape) != entry.shape
            found[name] = ExpertTensor(module, layer, None, parameter, is_transposed=turned)
            continue
        if number is None:
            raise Unsupported(
                f"{name} must hold one expert, or all experts as the model does, but transformers rearranges it while "
                "loading; load the model and save it with save_original_format=False first"
            )
        found[name] = ExpertTensor(
            module, layer, int(number[1]), _part(parameter, pattern, converters)
        )
    return found


def _is_transposing(pattern: str, converters: Iterable[WeightConverter]) -> bool:
    """Whether what transformers does with a tensor while loading is to turn it round, where shapes differ."""
    used = next(c for c in converters if pattern in c.source_patterns)
    return [type(step) for step in used.operations] == [Transpose]


#: What pruning calls the tensors of one expert where the Hub format has one for all of them.
_SINGLE = re.compile(r"(.+)\.(\d+)\.(gate|up|down)_proj\.(weight|bias)")


def single_names(
    model: PreTrainedModel, stored: str, part: ExpertTensor, projection: str, kind: str, count: int
) -> list[str]:
    """Return the names of the tensors of single experts, made of one that holds all of a layer.

    Args:
        model: The model, on any device.
        stored: The name of that one in the checkpoint. Its path to the layer, which may differ from
            the model's, is kept.
        part: What it is.
        projection: `gate`, `up` or `down`.
        kind: `weight` or `bias`.
        count: Experts in the layer.
    """
    # `save_pretrained` gives all names those of the Hub, so these have to get them now.
    name = f"{part.experts}.0.{projection}_proj.{kind}"
    [renamed] = revert_weight_conversion(model, {name: torch.empty(0)})
    before, _, after = _with_path_of(stored, renamed, part.layer).rpartition(".0.")
    return [f"{before}.{expert}.{after}" for expert in range(count)]


def stock_tensors(
    model: PreTrainedModel, stored: str, part: ExpertTensor, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the experts of a layer as the family's Hub format has them, by transformers' conversions.

    Args:
        model: The model, on any device.
        stored: The checkpoint's name of one of their tensors, whose path to the layer is kept.
        part: What that one is.
        parameters: All experts of the layer, by the parameters' names in the module.
    """
    state = {f"{part.experts}.{name}": tensor for name, tensor in parameters.items()}
    return {
        _with_path_of(stored, name, part.layer): tensor
        for name, tensor in revert_weight_conversion(model, state).items()
    }


def _with_path_of(stored: str, name: str, layer: int) -> str:
    """Give a name in the model the path to the layers that a name in the checkpoint has."""
    number = f".{layer}."
    return stored.partition(number)[0] + number + name.partition(number)[2]


def _part(parameter: str, pattern: str, converters: Iterable[WeightConverter]) -> str:
    """Gate comes before up in every converter that concatenates the two."""
    if parameter == "gate_up_proj":
        sources = next(c.source_patterns for c in converters if pattern in c.source_patterns)
        return ("gate", "up")[sources.index(pattern)]
    return parameter.removesuffix("_proj")


def config_of_width(config: PreTrainedConfig, width: int) -> dict[str, Any] | None:
    """Return the config fields that give all routed experts one width, and nothing else another shape.

    Every candidate field is tried on an empty model. In DeepSeek's families, for example, the field of
    the routed experts also sets the shared expert, as so many times that width; there the number of
    times is changed too, if the full width is a multiple of the new one.

    Args:
        config: The unpruned model's.
        width: The new width.

    Returns:
        Fields to change in the (text) config, or None when no such fields were found.
    """
    before = empty_model(config)
    others, full = _other_shapes(before), find_experts(before)[0].width
    # As the file has them: an attribute may be another's alias.
    text = config.get_text_config().to_dict()
    shared: list[dict[str, int]] = [{}] + [
        {field: text[field] * full // width}
        for field in _SHARED_FIELDS
        if isinstance(text.get(field), int) and text[field] * full % width == 0
    ]
    for field, times in itertools.product(_WIDTH_FIELDS, shared):
        if not isinstance(text.get(field), int):
            continue
        fields = {field: width, **times}
        changed = type(config).from_dict(config.to_dict())
        for name, value in fields.items():
            setattr(changed.get_text_config(), name, value)
        model = empty_model(changed)
        if (
            all(experts.width == width for experts in find_experts(model))
            and _other_shapes(model) == others
        ):
            return fields
    return None


def config_of_experts(
    config: PreTrainedConfig, count: int
) -> tuple[dict[str, Any], dict[str, int]] | None:
    """Return the config fields that give every layer fewer experts, and the router weights that shrink.

    Every candidate field is tried on an empty model; what changes its shape besides the experts
    belongs to the router.

    Args:
        config: The unpruned model's.
        count: The new number of experts.

    Returns:
        Fields to change in the (text) config, and the names of weights of the model outside the
        experts to the axis that counts experts; or None when the family has no such field.
    """
    before = empty_model(config)
    others, experts = _other_shapes(before), find_experts(before)
    # As the file has them: an attribute may be another's alias.
    text = config.get_text_config().to_dict()
    for field in _COUNT_FIELDS:
        full = text.get(field)
        if not isinstance(full, int) or any(layer.num_experts != full for layer in experts):
            continue
        fields: dict[str, Any] = {field: count}
        for top_k in _TOP_K_FIELDS:
            chosen = text.get(top_k)
            if isinstance(chosen, int) and chosen > count:
                fields[top_k] = count
        changed = type(config).from_dict(config.to_dict())
        for name, value in fields.items():
            setattr(changed.get_text_config(), name, value)
        model = empty_model(changed)
        if any(layer.num_experts != count for layer in find_experts(model)):
            continue
        axes = {}
        for name, shape in _other_shapes(model).items():
            differs = [
                at
                for at, sizes in enumerate(zip(others[name], shape, strict=True))
                if sizes[0] != sizes[1]
            ]
            if differs and [(others[name][at], shape[at]) for at in differs] != [(full, count)]:
                return None
            if differs:
                axes[name] = differs[0]
        return fields, axes
    return None


def model_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Return the name in the model of every checkpoint tensor, by transformers' own conversions."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    return {
        name: rename_source_key(name, renamings, converters, prefix, parameters)[0]
        for name in names
    }


def expert_groups(config: PreTrainedConfig) -> int:
    """Return how many groups of equal size the routers divide the experts into; 1 for none."""
    text = config.get_text_config()
    groups = getattr(text, "n_group", None) or 1
    return groups if groups > 1 and (getattr(text, "topk_group", None) or groups) < groups else 1


def _other_shapes(model: PreTrainedModel) -> Mapping[str, torch.Size]:
    """Shapes of all weights but those of the routed experts."""
    routed = tuple(f"{experts.name}." for experts in find_experts(model))
    return {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if not name.startswith(routed)
    }


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
