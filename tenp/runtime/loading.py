# SPDX-License-Identifier: Apache-2.0
"""Registers tenp with transformers, so that `from_pretrained` and `save_pretrained` know pruned models.

A pruned checkpoint holds per-expert tensors under the names of the model's own hub format, only
narrower, and `quantization_config.quant_method` is `tenp`. transformers hands such a checkpoint to
`TenpQuantizer`, which replaces the experts modules and the conversions of their weights. Without
`import tenp` the stock conversion tries to stack matrices of different shapes and fails loudly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from tenp import auto_map
from tenp.adapter import find_experts
from tenp.errors import CheckpointError
from tenp.ops import neuron_offsets
from tenp.quantization import scale_name
from tenp.runtime.experts import TenpExperts

FORMAT_VERSION = 1

#: Of checkpoints with int8 weights, which an older reader would take for large numbers.
INT8_FORMAT_VERSION = 2


@register_quantization_config("tenp")
class TenpConfig(QuantizationConfigMixin):
    """The `quantization_config` of a pruned checkpoint.

    Attributes:
        widths: Decoder layer index (as a string, JSON knows no other keys) to the widths of its
            experts, comma-separated in one string: an indented list would take a line a width.
        version: Format version of the checkpoint.
        weights: `int8` when the experts' weights are int8 with a scale per neuron, else None.
    """

    def __init__(
        self,
        widths: dict[str, str] | None = None,
        version: int = FORMAT_VERSION,
        weights: str | None = None,
        **extra: Any,
    ) -> None:
        """Take the fields as config.json has them; unknown ones are kept."""
        self.quant_method: Any = "tenp"
        self.version = version
        self.widths = widths or {}
        if weights is not None:
            self.weights = weights
        extra.pop("quant_method", None)
        for name, value in extra.items():
            setattr(self, name, value)

    @property
    def is_int8(self) -> bool:
        """Whether the experts' weights are int8."""
        return getattr(self, "weights", None) == "int8"

    def layer_widths(self) -> dict[int, list[int]]:
        """Return the widths per decoder layer.

        Raises:
            CheckpointError: The field holds something else, or the format has another version.
        """
        expected = INT8_FORMAT_VERSION if self.is_int8 else FORMAT_VERSION
        if self.version != expected:
            raise CheckpointError(
                f"the pruned checkpoint must have format version {expected}, "
                f"got {self.version}; load it with the version of tenp that wrote it"
            )
        try:
            return {
                int(layer): [int(width) for width in text.split(",")]
                for layer, text in self.widths.items()
            }
        except (AttributeError, ValueError):
            raise CheckpointError(
                f"widths of quantization_config must be numbers, got {self.widths}"
            ) from None


@register_quantizer("tenp")
class TenpQuantizer(HfQuantizer):
    """Makes transformers load and save experts of different widths."""

    quantization_config: TenpConfig

    requires_calibration = True  # a TenpConfig passed for an unpruned model is refused

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if hasattr(model.config, "auto_map"):
            # The file that it names is not written when the model is saved again.
            model.config.auto_map = auto_map.without_code(model.config.auto_map)
        is_int8 = self.quantization_config.is_int8
        widths = self.quantization_config.layer_widths()
        layers = find_experts(model)
        if [experts.layer for experts in layers] != sorted(widths):
            raise CheckpointError(
                f"quantization_config must give widths for the layers {[experts.layer for experts in layers]}, "
                f"got {sorted(widths)}"
            )
        for experts in layers:
            if len(widths[experts.layer]) != experts.num_experts:
                raise CheckpointError(
                    f"quantization_config must give {experts.num_experts} widths for layer {experts.layer}, "
                    f"got {len(widths[experts.layer])}"
                )
            model.set_submodule(experts.name, TenpExperts(experts, widths[experts.layer], is_int8))

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        """Swap stacking for packing in the conversions of expert weights.

        transformers before 5.21 calls this without the model, which is not needed here.
        """
        ours: list[Any] = []
        packed: set[str] = set()
        for conversion in weight_conversions:
            if isinstance(conversion, WeightConverter) and _is_experts_conversion(conversion):
                if not any("*" in pattern for pattern in conversion._original_source_patterns):
                    continue  # of one tensor for all experts, which a pruned checkpoint has not
                conversion = _packing(conversion)
                packed.add(_leaf(conversion))
            ours.append(conversion)
        ours += [
            converter
            for leaf, converter in _fused_family_converters().items()
            if leaf not in packed
        ]
        if self.quantization_config.is_int8:
            ours += [
                _packing(conversion, scales=True)
                for conversion in ours
                if isinstance(conversion, WeightConverter) and _is_experts_conversion(conversion)
            ]
        return ours

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        for part in (model.config, model.config.get_text_config()):
            vars(part).pop("base_model_ep_plan", None)  # 5.17 would write it to config.json
        # Before 5.21, converted weights of a quantized checkpoint keep the dtype of the file.
        for name, module in model.named_modules():
            if isinstance(module, TenpExperts):
                module.to(model.dtype)
                stored, wanted = module.down_proj.shape, module.down_shape
                # Not every version of transformers compares converted weights with the module.
                if stored != wanted:
                    raise CheckpointError(
                        f"{name}.down_proj must be {tuple(wanted)}, as config.json says, got {tuple(stored)}"
                    )
        return model

    def update_parallel_plan(self, model: PreTrainedModel | None, plan: dict[str, str]) -> None:
        """Leave the packed experts whole: their rows belong to experts of different widths."""
        for name in list(plan):
            # A router of this kind sends a process the tokens of its own experts only.
            if "experts" in name or plan[name] == "ep_router":
                del plan[name]

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The same where transformers, as 5.17 does, asks before there is a model."""
        for part in (config, config.get_text_config()):
            for kind in ("base_model_tp_plan", "base_model_ep_plan"):
                if (shared := getattr(part, kind, None)) is not None:
                    plan = dict(shared)  # by all configs of the class
                    self.update_parallel_plan(None, plan)
                    setattr(part, kind, plan)
        return config

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` writes the per-expert tensors back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The weights are ordinary floating-point numbers, unless they are int8."""
        return not self.quantization_config.is_int8

    @property
    def is_compileable(self) -> bool:
        """`generate` may compile what runs in kernels on every device, which int8 does not."""
        return not self.quantization_config.is_int8

    @property
    def is_qat_trainable(self) -> bool:
        """All of them may be trained, not adapters alone; transformers asks by this name."""
        return True


class Pack(ConversionOps):
    """Per-expert matrices to one packed parameter.

    The sources are lists over experts, one list for each source pattern; the lists follow each
    other in the packed rows (gate, then up). Every matrix is padded to the row multiple.
    """

    def __init__(self, transposed: bool = False, scales: bool = False) -> None:
        """Take what the sources are.

        Args:
            transposed: Whether the matrices are `[H, W]` on disk, as down projections are.
            scales: Whether they are scales instead, `[W, 1]` or, transposed, `[1, W]`.
        """
        self.transposed, self.scales = transposed, scales

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pack; called by transformers with everything that one target needs."""
        lists = [input_dict[pattern] for pattern in source_patterns]
        parts = [_pack_rows([self._as_rows(matrix) for matrix in matrices]) for matrices in lists]
        return {target_patterns[0]: torch.cat(parts)}

    def _as_rows(self, matrix: Tensor) -> Tensor:
        if self.scales:
            return matrix.flatten()
        return matrix.t() if self.transposed else matrix

    @property
    def reverse_op(self) -> ConversionOps:
        """What `save_pretrained` applies."""
        return Unpack(self.transposed, self.scales)


class Unpack(ConversionOps):
    """One packed parameter to per-expert matrices."""

    def __init__(self, transposed: bool = False, scales: bool = False) -> None:
        """Take what the targets are, as `Pack` does."""
        self.transposed, self.scales = transposed, scales

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        model: Any = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Unpack; called by transformers with one parameter."""
        packed = next(iter(input_dict.values()))
        packed = packed[0] if isinstance(packed, list) else packed
        widths = _widths_of(model, full_layer_name)
        tensors: dict[str, Tensor] = {}
        for pattern, rows in zip(target_patterns, packed.chunk(len(target_patterns)), strict=True):
            for expert, matrix in enumerate(_unpack_rows(rows, widths)):
                if self.scales:
                    matrix = matrix[:, None]
                tensors[pattern.replace("*", str(expert))] = (
                    matrix.t() if self.transposed else matrix
                ).contiguous()
        return tensors

    @property
    def reverse_op(self) -> ConversionOps:
        """What `from_pretrained` applies."""
        return Pack(self.transposed, self.scales)


class Stack(ConversionOps):
    """Per-expert vectors of one length to a matrix: the down biases."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Stack; called by transformers with everything that one target needs."""
        return {target_patterns[0]: torch.stack(list(input_dict[source_patterns[0]]))}

    @property
    def reverse_op(self) -> ConversionOps:
        """What `save_pretrained` applies."""
        return Unstack()


class Unstack(ConversionOps):
    """The matrix of down biases to per-expert vectors."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Unstack; called by transformers with one parameter."""
        stacked = next(iter(input_dict.values()))
        stacked = stacked[0] if isinstance(stacked, list) else stacked
        return {
            target_patterns[0].replace("*", str(expert)): row.clone()
            for expert, row in enumerate(stacked)
        }

    @property
    def reverse_op(self) -> ConversionOps:
        """What `from_pretrained` applies."""
        return Stack()


def _pack_rows(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices `[W_e, ...]` to `[R, ...]`, each padded with zeros to the row multiple."""
    offsets = neuron_offsets([len(matrix) for matrix in matrices])
    packed = matrices[0].new_zeros(offsets[-1], *matrices[0].shape[1:])
    for begin, matrix in zip(offsets, matrices, strict=False):
        packed[begin : begin + len(matrix)] = matrix
    return packed


def _unpack_rows(packed: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Views `[W_e, ...]` of `[R, ...]`, without the padding."""
    return [
        packed[begin : begin + width]
        for begin, width in zip(neuron_offsets(widths), widths, strict=False)
    ]


def _leaf(conversion: WeightConverter) -> str:
    return conversion._original_target_patterns[0].rpartition(".")[2]


def _is_experts_conversion(conversion: WeightConverter) -> bool:
    targets = conversion._original_target_patterns
    return (
        len(targets) == 1
        and "experts" in targets[0]
        and _leaf(conversion) in ("gate_up_proj", "up_proj", "down_proj")
    )


def _packing(conversion: WeightConverter, scales: bool = False) -> WeightConverter:
    """The same patterns and scope with our operation, or those of the scales beside the weights.

    Built by hand: `copy` exists from 5.21 only.
    """
    sources = list(conversion._original_source_patterns)
    targets = list(conversion._original_target_patterns)
    if scales:
        sources = [scale_name(source) for source in sources]
        targets = [f"{target}_scale" for target in targets]
    ours = WeightConverter(
        sources,
        targets,
        operations=[Pack(transposed=_leaf(conversion) == "down_proj", scales=scales)],
    )
    for scope in ("scope_prefix", "base_model_prefix"):
        if hasattr(conversion, scope):
            setattr(ours, scope, getattr(conversion, scope))
    return ours


def _fused_family_converters() -> dict[str, WeightConverter]:
    """Converters for families whose hub format is fused; a pruned one has these per-expert names.

    The patterns are regular expressions: an unescaped dot would take `shared_experts` as well.
    """

    def joined(kind: str, target: str) -> WeightConverter:
        sources = [rf"\.experts.*.{part}_proj.{kind}" for part in ("gate", "up")]
        return WeightConverter(sources, rf"\.experts.{target}", operations=[Pack()])

    def single(source: str, target: str, operation: ConversionOps) -> WeightConverter:
        return WeightConverter(
            rf"\.experts.*.{source}", rf"\.experts.{target}", operations=[operation]
        )

    return {
        "gate_up_proj": joined("weight", "gate_up_proj"),
        "gate_up_proj_bias": joined("bias", "gate_up_proj_bias"),
        "down_proj": single("down_proj.weight", "down_proj", Pack(transposed=True)),
        "down_proj_bias": single("down_proj.bias", "down_proj_bias", Stack()),
    }


def _widths_of(model: PreTrainedModel, name: str) -> list[int]:
    """The widths of the layer that a weight belongs to, whose path may be the hub's or the module's."""
    layer = re.search(r"\.(\d+)\.", name)
    assert layer is not None, name
    widths: list[list[int]] = [
        module.widths
        for path, module in model.named_modules()
        if isinstance(module, TenpExperts) and layer[0] in path
    ]
    return widths[0]
