# SPDX-License-Identifier: Apache-2.0
"""Named inputs for the op tests: small layers with everything that tends to break a kernel.

A case is a description; `make_*` turns it into tensors, the same ones every time. What an op must
not read is NaN (`POISON`), and what it must not write is checked by `guarded`.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tenp.ops import neuron_offsets, pack, reference
from tenp.quantization import quantize

POISON = math.nan
FLOAT_DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float16, id="float16"),
]
HOSTILE_WIDTHS = (0, 1, 15, 16, 17, 63, 64, 65, 96)
TOKEN_COUNTS = (0, 1, 2, 7, 63, 64, 65, 129)


# --------------------------------------------------------------------------------------- routing


def make_expert_ids(
    pattern: str, tokens: int, experts_per_token: int, num_experts: int, seed: int = 0
) -> Tensor:
    """`[T, k]`, int32, in one of these patterns.

    uniform: k different experts per token. one_takes_all: every slot names the last expert (so all
    are duplicates). one_token: only the first slot of the last token names an expert. none: no slot
    names one. unnamed: uniform, with a third of the ids out of range on either side. duplicates: a
    token may name an expert more than once. skewed: the first experts get most tokens, the last
    third none.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, experts_per_token)
    if pattern == "uniform":
        draws = torch.rand(tokens, num_experts, generator=generator)
        ids = draws.argsort(dim=1)[:, :experts_per_token]
    elif pattern == "one_takes_all":
        ids = torch.full(shape, num_experts - 1)
    elif pattern == "one_token":
        ids = torch.full(shape, -1)
        ids[-1:, :1] = 0
    elif pattern == "none":
        ids = torch.full(shape, -1)
    elif pattern == "unnamed":
        ids = torch.randint(0, num_experts, shape, generator=generator)
        outside = torch.tensor([-1, num_experts, -(2**31), 2**31 - 1])
        replaced = torch.rand(shape, generator=generator) < 1 / 3
        ids = torch.where(replaced, outside[torch.randint(0, 4, shape, generator=generator)], ids)
    elif pattern == "duplicates":
        ids = torch.randint(0, max(1, num_experts // 2), shape, generator=generator)
    elif pattern == "skewed":
        draws = torch.rand(shape, generator=generator)
        ids = (draws.square() * max(1, num_experts * 2 // 3)).long()
    else:
        raise ValueError(pattern)
    return ids.to(torch.int32).reshape(shape)


ROUTING_PATTERNS = (
    "uniform",
    "one_takes_all",
    "one_token",
    "none",
    "unnamed",
    "duplicates",
    "skewed",
)


# ------------------------------------------------------------------------------------ statistics


@dataclass(frozen=True)
class StatisticsCase:
    tokens: int = 33
    hidden_size: int = 48
    num_experts: int = 6
    width: int = 32
    experts_per_token: int = 2
    pattern: str = "skewed"
    dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass
class StatisticsInputs:
    """One layer's forward pass, kept: y = W_d m rounded once, so the checksum holds."""

    hidden: Tensor  # [T, H]
    activations: Tensor  # [S', I], NaN from row S on
    outputs: Tensor  # [S', H], NaN from row S on
    down: Tensor  # [E, H, I]
    gates: Tensor  # [S'], NaN from row S on
    tokens: Tensor  # [S'], int32, -1 from row S on
    offsets: Tensor  # [E+1], int32

    @property
    def hidden_size(self) -> int:
        return self.hidden.shape[1]

    @property
    def num_experts(self) -> int:
        return len(self.offsets) - 1

    @property
    def max_rows(self) -> int:
        return max(self.offsets.diff().tolist(), default=0)

    def to(self, device: torch.device) -> "StatisticsInputs":
        return StatisticsInputs(**{name: value.to(device) for name, value in vars(self).items()})

    def embedded(self, device: torch.device) -> "StatisticsInputs":
        return StatisticsInputs(**_all_embedded(vars(self), device))

    def with_experts(self, order: Tensor) -> "StatisticsInputs":
        """The same layer with expert order[e] in place e: segments of rows and weights move."""
        bounds = self.offsets.tolist()
        segments = [torch.arange(bounds[e], bounds[e + 1]) for e in order.tolist()]
        counts = torch.tensor([0, *map(len, segments)])
        rest = torch.arange(bounds[-1], len(self.gates))
        return self._with_rows(
            torch.cat([*segments, rest]), counts.cumsum(0), down=self.down[order].contiguous()
        )

    def doubled(self) -> "StatisticsInputs":
        """Every row twice, next to each other."""
        rows = torch.arange(int(self.offsets[-1])).repeat_interleave(2)
        return self._with_rows(rows, 2 * self.offsets, down=self.down)

    def split(self) -> tuple["StatisticsInputs", "StatisticsInputs"]:
        """The first half of every expert's rows, and the second."""
        halves: tuple[list[Tensor], list[Tensor]] = ([], [])
        for begin, end in itertools.pairwise(self.offsets.tolist()):
            middle = (begin + end) // 2
            halves[0].append(torch.arange(begin, middle))
            halves[1].append(torch.arange(middle, end))
        first, second = (
            self._with_rows(
                torch.cat(half), torch.tensor([0, *map(len, half)]).cumsum(0), down=self.down
            )
            for half in halves
        )
        return first, second

    def _with_rows(self, rows: Tensor, offsets: Tensor, down: Tensor) -> "StatisticsInputs":
        return StatisticsInputs(
            hidden=self.hidden,
            activations=self.activations[rows],
            outputs=self.outputs[rows],
            down=down,
            gates=self.gates[rows],
            tokens=self.tokens[rows],
            offsets=offsets.to(torch.int32),
        )

    def activation_stats_arguments(self) -> dict[str, Tensor]:
        return {"outputs": self.outputs, "gates": self.gates, "offsets": self.offsets}

    def direction_change_arguments(self) -> dict[str, Tensor]:
        return {"hidden": self.hidden, "tokens": self.tokens, **self.activation_stats_arguments()}

    def neuron_contribution_arguments(self) -> dict[str, Tensor]:
        return {
            "activations": self.activations,
            "down": self.down,
            **self.activation_stats_arguments(),
        }

    def zero_activation_stats(self) -> dict[str, Tensor]:
        names = ("gate_sum", "norm_sum", "gated_norm_sum", "norm_max")
        zeros = {name: self._zeros(self.num_experts) for name in names}
        return {"counts": self._zeros(self.num_experts).long(), **zeros}

    def zero_direction_change(self) -> dict[str, Tensor]:
        return {"direction_change": self._zeros(self.num_experts)}

    def zero_neuron_contribution(self) -> dict[str, Tensor]:
        names = ("projection", "magnitude", "energy", "peak")
        return {name: self._zeros(self.num_experts, self.down.shape[2]) for name in names}

    def second_moment_arguments(self) -> dict[str, Tensor]:
        return {
            "activations": self.activations,
            "gates": self.gates,
            "offsets": self.offsets,
        }

    def zero_second_moment(self, has_bias: bool = False) -> dict[str, Tensor]:
        size = self.down.shape[2] + has_bias
        return {"second_moment": self._zeros(self.num_experts, size * (size + 1) // 2)}

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.hidden.device)


def make_statistics(case: StatisticsCase) -> StatisticsInputs:
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    expert_ids = make_expert_ids(
        case.pattern, case.tokens, case.experts_per_token, case.num_experts, case.seed
    )
    offsets, slots, _ = reference.route(expert_ids, case.num_experts)
    num_rows, num_slots = int(offsets[-1]), len(slots)
    down = normal(case.num_experts, case.hidden_size, case.width) / math.sqrt(case.width)
    down = down.to(case.dtype)
    activations = torch.full((num_slots, case.width), POISON, dtype=case.dtype)
    outputs = torch.full((num_slots, case.hidden_size), POISON, dtype=case.dtype)
    gates = torch.full((num_slots,), POISON)
    activations[:num_rows] = normal(num_rows, case.width).to(case.dtype)
    gates[:num_rows] = torch.rand(num_rows, generator=generator)
    if num_rows > 2:  # rows that decide nothing: no output, no weight
        activations[1] = 0
        gates[2] = 0
    for expert in range(case.num_experts):
        rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
        y = activations[rows].double() @ down[expert].double().T
        outputs[rows] = y.to(case.dtype)
    hidden = normal(case.tokens, case.hidden_size).to(case.dtype)
    hidden[:1] = 0
    tokens = torch.where(slots >= 0, slots // case.experts_per_token, -1).to(torch.int32)
    return StatisticsInputs(hidden, activations, outputs, down, gates, tokens, offsets)


@dataclass
class BatchInputs:
    """One layer of a calibration. Weights and m are small integers, so y = W_d m is exact."""

    hidden: Tensor  # [T, H]
    activations: Tensor  # [T*k, I], NaN from row S on
    gate: Tensor | None  # [E, I, H]
    up: Tensor  # [E, I, H]
    gate_bias: Tensor | None  # [E, I]
    up_bias: Tensor | None  # [E, I]
    down: Tensor  # [E, H, I]
    down_bias: Tensor | None  # [E, H]
    offsets: Tensor  # [E+1], int32
    slots: Tensor  # [T*k], int32
    rows: Tensor  # [T, k], int32
    gates: Tensor  # [T, k], 0 where a slot names no expert

    def to(self, device: torch.device) -> "BatchInputs":
        moved = {n: v.to(device) if v is not None else v for n, v in vars(self).items()}
        return BatchInputs(**moved)

    def embedded(self, device: torch.device) -> "BatchInputs":
        return BatchInputs(**_all_embedded(vars(self), device))

    def activations_arguments(self) -> dict[str, Any]:
        names = ("hidden", "offsets", "slots", "gate", "up", "gate_bias", "up_bias")
        own = {name: getattr(self, name) for name in names}
        return {**own, "experts_per_token": self.rows.shape[1]}

    def statistics_arguments(self) -> dict[str, Any]:
        names = ("hidden", "activations", "down", "down_bias", "offsets", "slots", "rows", "gates")
        return {name: getattr(self, name) for name in names}

    def statistics(self) -> StatisticsInputs:
        """What the ops of single statistics would be given."""
        outputs = torch.full((len(self.slots), self.hidden.shape[1]), POISON)
        for expert, (begin, end) in enumerate(itertools.pairwise(self.offsets.tolist())):
            outputs[begin:end] = self.activations[begin:end].float() @ self.down[expert].float().T
        used = self.slots >= 0
        gates = torch.where(used, self.gates.flatten()[self.slots.long().clamp(min=0)], POISON)
        tokens = torch.where(used, self.slots // self.rows.shape[1], -1).to(torch.int32)
        rounded = outputs.to(self.hidden.dtype)
        assert torch.equal(rounded[used].float(), outputs[used]), "y must be exact"
        return StatisticsInputs(
            self.hidden, self.activations, rounded, self.down, gates, tokens, self.offsets
        )

    def zeros(self) -> dict[str, Tensor]:
        """What expert_statistics writes to."""
        num_experts, hidden_size, width = self.down.shape

        def of(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.hidden.device)

        per_expert = ("gate_sum", "normalized_gate_sum", "norm_sum", "gated_norm_sum", "norm_max")
        per_neuron = ("projection", "magnitude", "energy", "peak")
        return {
            "out": of(len(self.hidden), hidden_size, dtype=torch.float32),
            "counts": of(num_experts, dtype=torch.int64),
            **{name: of(num_experts) for name in (*per_expert, "direction_change")},
            "input_energy": of(num_experts, hidden_size),
            **{name: of(num_experts, width) for name in per_neuron},
        }


def make_batch(case: StatisticsCase, gated: bool = True, bias: bool = True) -> BatchInputs:
    generator = torch.Generator().manual_seed(case.seed)

    def integers(bound: int, *shape: int) -> Tensor:
        draws = torch.randint(-bound, bound + 1, shape, generator=generator)
        return draws.to(case.dtype)

    expert_ids = make_expert_ids(
        case.pattern, case.tokens, case.experts_per_token, case.num_experts, case.seed
    )
    offsets, slots, rows = reference.route(expert_ids, case.num_experts)
    num_rows = int(offsets[-1])
    activations = torch.full((len(slots), case.width), POISON, dtype=case.dtype)
    activations[:num_rows] = integers(2, num_rows, case.width)
    if num_rows > 1:
        activations[1] = 0  # a row without output
    into = (case.num_experts, case.width, case.hidden_size)
    hidden = torch.randn(case.tokens, case.hidden_size, generator=generator).to(case.dtype)
    hidden[:1] = 0
    gates = torch.rand(case.tokens, case.experts_per_token, generator=generator)
    return BatchInputs(
        hidden=hidden,
        activations=activations,
        gate=integers(2, *into) / 8 if gated else None,
        up=integers(2, *into) / 8,
        gate_bias=integers(2, *into[:2]) if gated and bias else None,
        up_bias=integers(2, *into[:2]) if bias else None,
        down=integers(1, case.num_experts, case.hidden_size, case.width),
        down_bias=integers(2, case.num_experts, case.hidden_size) if bias else None,
        offsets=offsets,
        slots=slots,
        rows=rows,
        gates=torch.where(rows >= 0, gates, 0.0),
    )


def _varied(base: Any, **axes: tuple[Any, ...]) -> list[Any]:
    """The base case, and one case per value of each axis. Not the product: it has no more bugs."""
    cases = [pytest.param(base, id="base")]
    for axis, values in axes.items():
        for value in values:
            label = value
            if isinstance(value, tuple):
                label = "-".join(map(str, value)) if len(value) < 10 else f"{len(value)}-experts"
            cases.append(pytest.param(replace(base, **{axis: value}), id=f"{axis}={label}"))
    return cases


STATISTICS_CASES = [
    *_varied(
        StatisticsCase(),
        tokens=TOKEN_COUNTS,
        hidden_size=(1, 7, 16, 33, 64, 257),
        width=(*HOSTILE_WIDTHS, 130),
        num_experts=(1, 64, 129),
        experts_per_token=(1, 6),
        pattern=ROUTING_PATTERNS,
    ),
    # Beyond any block of a kernel, in every direction, and a multiple of none.
    pytest.param(
        StatisticsCase(tokens=301, hidden_size=1030, num_experts=2, width=523), id="many-blocks"
    ),
    # More than the 1024 rows of an expert that one block of a CUDA kernel adds up.
    pytest.param(
        StatisticsCase(tokens=1000, hidden_size=16, width=17, pattern="one_takes_all"),
        id="many-rows",
    ),
]


# ----------------------------------------------------------------------------------- expert gemm


@dataclass(frozen=True)
class ExpertGemmCase:
    tokens: int = 33
    hidden_size: int = 48
    widths: tuple[int, ...] = HOSTILE_WIDTHS
    experts_per_token: int = 3
    pattern: str = "unnamed"
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    limit: float = 0.0
    alpha: float = 0.0
    int8: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass
class ExpertGemmInputs:
    hidden: Tensor  # [T, H]
    expert_ids: Tensor  # [T, k], int32
    gates: Tensor  # [T, k], float32
    gate_up: Tensor  # [2R, H] or [R, H]
    down: Tensor  # [R, H]
    widths: Tensor  # [E], int32
    neuron_offsets: Tensor  # [E+1], int32
    gate_up_bias: Tensor | None  # [2R] or [R]
    down_bias: Tensor | None  # [E, H]
    activation: str
    gated: bool
    limit: float
    alpha: float
    gate_up_scale: Tensor | None = None  # [2R] or [R], NaN for rows outside the widths
    down_scale: Tensor | None = None  # [R], the same

    def dequantized(self) -> "ExpertGemmInputs":
        """The same with float64 weights."""
        if self.gate_up_scale is None or self.down_scale is None:
            return self
        return replace(
            self,
            gate_up=self.gate_up.double() * self.gate_up_scale.double()[:, None],
            down=self.down.double() * self.down_scale.double()[:, None],
            gate_up_scale=None,
            down_scale=None,
        )

    def arguments(self) -> dict[str, Any]:
        # Scales come with int8 weights only.
        return {
            name: value
            for name, value in vars(self).items()
            if value is not None or not name.endswith("_scale")
        }

    def to(self, device: torch.device) -> "ExpertGemmInputs":
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return ExpertGemmInputs(**moved)

    def embedded(self, device: torch.device) -> "ExpertGemmInputs":
        return ExpertGemmInputs(**_all_embedded(vars(self), device))


def make_expert_gemm(case: ExpertGemmCase) -> ExpertGemmInputs:
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden_size, num_experts = case.hidden_size, len(case.widths)
    into_hidden = [normal(width, hidden_size) / math.sqrt(hidden_size) for width in case.widths]
    gate = [matrix.to(case.dtype) for matrix in into_hidden]
    up = [normal(*matrix.shape).to(case.dtype) / math.sqrt(hidden_size) for matrix in gate]
    down = [
        (normal(hidden_size, width) / math.sqrt(max(width, 1))).to(case.dtype)
        for width in case.widths
    ]
    gate_up, packed_down = pack(gate if case.gated else None, up, down, case.widths)
    gate_up_bias = down_bias = None
    if case.bias:
        # Packed like a matrix with one column; the padding neurons' biases are zero.
        column = [normal(width, 1).to(case.dtype) for width in case.widths]
        other = [normal(width, 1).to(case.dtype) for width in case.widths]
        packed, _ = pack(
            column if case.gated else None, other, [bias.T for bias in other], case.widths
        )
        gate_up_bias = packed[:, 0].contiguous()
        down_bias = normal(num_experts, hidden_size).to(case.dtype)
    expert_ids = make_expert_ids(
        case.pattern, case.tokens, case.experts_per_token, num_experts, case.seed
    )
    gates = normal(case.tokens, case.experts_per_token).softmax(dim=-1).float()
    gate_up_scale = down_scale = None
    if case.int8:
        gate_up, gate_up_scale = quantize(gate_up, neurons=0)
        packed_down, down_scale = quantize(packed_down, neurons=0)
        gate_up_scale[gate_up_scale == 0] = POISON
        down_scale[down_scale == 0] = POISON
    return ExpertGemmInputs(
        hidden=normal(case.tokens, hidden_size).to(case.dtype),
        expert_ids=expert_ids,
        gates=gates,
        gate_up=gate_up,
        down=packed_down,
        widths=torch.tensor(case.widths, dtype=torch.int32),
        neuron_offsets=torch.tensor(neuron_offsets(case.widths), dtype=torch.int32),
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        activation=case.activation,
        gated=case.gated,
        limit=case.limit,
        alpha=case.alpha,
        gate_up_scale=gate_up_scale,
        down_scale=down_scale,
    )


EXPERT_GEMM_CASES = [
    *_varied(
        ExpertGemmCase(),
        tokens=TOKEN_COUNTS,
        hidden_size=(1, 7, 16, 33, 64, 257),
        widths=((0,), (1,), (40,), (0, 0, 0), (64,) * 4, tuple(range(20)), (16,) * 129),
        experts_per_token=(1, 2, 8),
        pattern=ROUTING_PATTERNS,
    ),
    # Beyond any block of a kernel, in every direction, and a multiple of none.
    pytest.param(
        ExpertGemmCase(tokens=151, hidden_size=1030, widths=(333, 0, 779, 129)), id="many-blocks"
    ),
]

INT8_CASES = [
    *_varied(
        ExpertGemmCase(int8=True),
        tokens=TOKEN_COUNTS,
        hidden_size=(1, 33, 64),
        gated=(False,),
        bias=(True,),
    ),
    pytest.param(
        ExpertGemmCase(int8=True, tokens=151, hidden_size=1030, widths=(333, 0, 779)),
        id="many-blocks",
    ),
]

ACTIVATION_CASES = [
    pytest.param(
        ExpertGemmCase(
            activation=activation,
            gated=gated,
            bias=bias,
            limit=1.0 if activation == "swiglu_oai" else 0.0,
            alpha=1.702 if activation == "swiglu_oai" else 0.0,
        ),
        id=f"{activation}{'' if gated else '-ungated'}{'-bias' if bias else ''}",
    )
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai")
    for gated in (True, False)
    for bias in (False, True)
    if gated or activation != "swiglu_oai"
]


# ------------------------------------------------------------- what lies around an op's arrays


def _all_embedded(fields: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Every float array one element after the start of a buffer that is NaN around it.

    So it has the alignment of one element only, and reading past it spoils the result.
    """

    def embedded(array: Tensor) -> Tensor:
        flat = torch.full((array.numel() + 65,), POISON, dtype=array.dtype, device=device)
        inner = flat[1 : 1 + array.numel()].view(array.shape)
        return inner.copy_(array)

    return {
        name: value
        if not isinstance(value, Tensor)
        else embedded(value)
        if value.is_floating_point()
        else value.to(device)
        for name, value in fields.items()
    }


_GUARD_ROWS = 3


@contextmanager
def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Yield an array full of NaN (-77 for integers) inside a larger one of sentinels.

    On leaving, no sentinel before or after it may have changed.
    """
    sentinel = 42
    fill = POISON if dtype.is_floating_point else -77
    inner = math.prod(shape[1:])
    rows = shape[0]
    buffer = torch.full(((rows + 2 * _GUARD_ROWS) * inner,), sentinel, dtype=dtype, device=device)
    array = buffer[_GUARD_ROWS * inner : (_GUARD_ROWS + rows) * inner].view(shape)
    array.fill_(fill)
    yield array
    assert (buffer[: _GUARD_ROWS * inner] == sentinel).all(), "wrote before the array"
    assert (buffer[(_GUARD_ROWS + rows) * inner :] == sentinel).all(), "wrote after the array"
