# SPDX-License-Identifier: Apache-2.0
"""What torch is told about the ops: schemas, shapes, mutation, and that compiling works."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.op_cases import (
    FLOAT_DTYPES,
    ExpertGemmCase,
    StatisticsCase,
    make_batch,
    make_expert_gemm,
    make_statistics,
)
from tenp.ops import (
    accumulate_activation_stats,
    accumulate_direction_change,
    accumulate_neuron_contribution,
    expert_gemm,
    route,
    tile_table,
)

OPS = torch.ops.tenp

#: The schema has no defaults.
NO_SCALES = {"gate_up_scale": None, "down_scale": None}


def statistics_arguments(name: str, dtype: torch.dtype) -> dict[str, Any]:
    inputs = make_statistics(StatisticsCase(dtype=dtype))
    return {
        **getattr(inputs, f"{name}_arguments")(),
        **getattr(inputs, f"zero_{name}")(),
    }


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    "name", ["activation_stats", "direction_change", "neuron_contribution", "second_moment"]
)
def test_opcheck_of_the_statistics(name: str, dtype: torch.dtype) -> None:
    op = getattr(OPS, f"accumulate_{name}").default
    arguments = statistics_arguments(name, dtype)
    if name == "second_moment":
        arguments["has_bias"] = False
    torch.library.opcheck(op, (), arguments)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_of_a_calibration_pass(bias: bool) -> None:
    inputs = make_batch(StatisticsCase(), bias=bias)
    first = {**inputs.activations_arguments(), "activation": "silu", "limit": 0.0, "alpha": 0.0}
    # A row that is in use nowhere is not written, so two runs may differ there.
    first["slots"] = inputs.slots[: inputs.offsets[-1]].contiguous()
    torch.library.opcheck(OPS.expert_activations.default, (), first)
    second = {**inputs.statistics_arguments(), **inputs.zeros()}
    torch.library.opcheck(OPS.expert_statistics.default, (), second)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("bias", "max_width"), [(False, None), (True, 96)])
def test_opcheck_of_expert_gemm(bias: bool, max_width: int | None, dtype: torch.dtype) -> None:
    inputs = make_expert_gemm(ExpertGemmCase(tokens=7, bias=bias, dtype=dtype))
    arguments = {**inputs.arguments(), **NO_SCALES, "max_width": max_width, "allow_tf32": False}
    torch.library.opcheck(OPS.expert_gemm.default, (), arguments)


def test_opcheck_of_the_gradient_of_expert_gemm() -> None:
    inputs = make_expert_gemm(ExpertGemmCase(tokens=7, bias=True))
    wanted = [True, False, True, False, True, True]
    of_out = torch.ones_like(inputs.hidden)
    arguments = {**inputs.arguments(), "wanted": wanted}
    torch.library.opcheck(OPS.expert_gemm_backward.default, (of_out,), arguments)
    for tensor in (inputs.hidden, inputs.gates, inputs.gate_up, inputs.down):
        tensor.requires_grad_()
    arguments = {**inputs.arguments(), **NO_SCALES, "max_width": 96, "allow_tf32": False}
    torch.library.opcheck(OPS.expert_gemm.default, (), arguments)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_opcheck_of_route(dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, 2], [1, -1], [2, 2]], dtype=dtype)
    torch.library.opcheck(OPS.route.default, (ids, 4))


@pytest.mark.parametrize("bounds", [(None, None), (6, 64)], ids=["read", "given"])
def test_opcheck_of_tile_table(bounds: tuple[int | None, int | None]) -> None:
    offsets = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    widths = torch.tensor([16, 64, 32], dtype=torch.int32)
    torch.library.opcheck(OPS.tile_table.default, (offsets, widths, 2, 16, *bounds))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_expert_gemm_compiles_into_one_graph(dtype: torch.dtype, device: torch.device) -> None:
    inputs = make_expert_gemm(ExpertGemmCase(tokens=7, dtype=dtype)).to(device)

    def layer(hidden: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        arguments = {**inputs.arguments(), "hidden": 2 * hidden, "gates": gates}
        return expert_gemm(**arguments) + hidden

    expected = layer(inputs.hidden, inputs.gates)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs.hidden, inputs.gates), expected)


def test_statistics_compile_with_their_mutation(device: torch.device) -> None:
    inputs = make_statistics(StatisticsCase()).to(device)
    expected = inputs.zero_neuron_contribution()
    accumulate_neuron_contribution(**inputs.neuron_contribution_arguments(), **expected)

    def doubled_gates(sums: dict[str, torch.Tensor]) -> None:
        accumulate_neuron_contribution(**inputs.neuron_contribution_arguments(), **sums)

    sums = inputs.zero_neuron_contribution()
    torch.compile(doubled_gates, fullgraph=True, backend="aot_eager")(sums)
    for name, value in expected.items():
        assert torch.equal(sums[name], value), name


def test_shapes_are_known_on_the_meta_device() -> None:
    ids = torch.zeros(5, 2, dtype=torch.int64, device="meta")
    routing = route(ids, 7)
    assert [tuple(tensor.shape) for tensor in routing] == [(8,), (10,), (5, 2)]
    widths = torch.zeros(7, dtype=torch.int32, device="meta")
    tiles = tile_table(routing.offsets, widths, 4, 16, rows=10, max_width=64)
    assert tiles.shape[1] == 4
    inputs = make_expert_gemm(ExpertGemmCase(tokens=5)).to(torch.device("meta"))
    out = expert_gemm(**inputs.arguments())
    assert out.is_meta
    assert out.shape == inputs.hidden.shape


def test_statistics_of_a_model_in_training_track_no_gradient() -> None:
    inputs = make_statistics(StatisticsCase())
    sums = {
        **inputs.zero_activation_stats(),
        **inputs.zero_direction_change(),
        **inputs.zero_neuron_contribution(),
    }
    for tensor in (inputs.hidden, inputs.activations, inputs.outputs, inputs.down, inputs.gates):
        tensor.requires_grad_()
    accumulators: dict[str, Callable[..., None]] = {
        "activation_stats": accumulate_activation_stats,
        "direction_change": accumulate_direction_change,
        "neuron_contribution": accumulate_neuron_contribution,
    }
    for name, accumulate in accumulators.items():
        own = {key: sums[key] for key in getattr(inputs, f"zero_{name}")()}
        accumulate(**getattr(inputs, f"{name}_arguments")(), **own)
    for name, value in sums.items():
        assert not value.requires_grad, name
