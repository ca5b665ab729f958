# SPDX-License-Identifier: Apache-2.0
"""expert_gemm against the reference."""

import contextlib
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from support.op_cases import (
    ACTIVATION_CASES,
    EXPERT_GEMM_CASES,
    FLOAT_DTYPES,
    HOSTILE_WIDTHS,
    INT8_CASES,
    POISON,
    ExpertGemmCase,
    ExpertGemmInputs,
    guarded,
    make_expert_gemm,
)
from support.tolerance import (
    assert_close,
    assert_rounded_once,
    assert_similar,
    expert_gemm_tolerance,
    expert_gemm_tolerance_of_the_whole,
)
from tenp import _C
from tenp.errors import InvalidArgument
from tenp.ops import expert_gemm, neuron_offsets, pack, reference, unpack
from tenp.ops.expert_gemm import _cpu_workspaces


def out_of(inputs: ExpertGemmInputs, device: torch.device) -> Tensor:
    # All bits set is NaN in every float dtype: nothing may be read before it is written.
    _cpu_workspaces.buffer.fill_(255)
    return expert_gemm(**inputs.to(device).arguments()).cpu()


def assert_matches_the_reference(
    case: ExpertGemmCase, inputs: ExpertGemmInputs, out: Tensor
) -> None:
    assert out.dtype == case.dtype
    assert out.is_contiguous()
    expected = reference.expert_gemm(**inputs.arguments())
    assert_close("out", out, expected, expert_gemm_tolerance(case, inputs, expected))
    assert_similar("out", out, expected, expert_gemm_tolerance_of_the_whole(case))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("case", EXPERT_GEMM_CASES)
def test_outputs_are_those_of_the_reference(
    case: ExpertGemmCase, dtype: torch.dtype, device: torch.device
) -> None:
    case = replace(case, dtype=dtype)
    inputs = make_expert_gemm(case)
    assert_matches_the_reference(case, inputs, out_of(inputs, device))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("case", INT8_CASES)
def test_int8_weights_are_multiplied_by_the_scales_of_their_rows(
    case: ExpertGemmCase, dtype: torch.dtype
) -> None:
    case = replace(case, dtype=dtype)
    inputs = make_expert_gemm(case)
    assert_matches_the_reference(case, inputs, out_of(inputs, torch.device("cpu")))


@pytest.mark.parametrize("first", [1, 7, 64])
def test_a_token_with_int8_weights_does_not_depend_on_its_neighbours(first: int) -> None:
    assert_halves_equal_the_whole(129, first, torch.bfloat16, torch.device("cpu"), int8=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_scale": None}, "down_scale must be"),
        ({"gate_up_scale": torch.ones(3)}, "gate_up_scale must be"),
        ({"down": torch.ones(384, 48)}, "gate_up must be"),
    ],
)
def test_int8_weights_need_scales(change: dict[str, Any], message: str) -> None:
    inputs = make_expert_gemm(ExpertGemmCase(int8=True))
    with pytest.raises(InvalidArgument, match=message):
        expert_gemm(**{**inputs.arguments(), **change})


def test_scales_are_for_int8_weights() -> None:
    inputs = make_expert_gemm(ExpertGemmCase())
    inputs.down_scale = torch.ones(len(inputs.down))
    with pytest.raises(InvalidArgument, match="down_scale must be absent"):
        expert_gemm(**inputs.arguments())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("case", ACTIVATION_CASES)
def test_every_activation_is_the_one_of_the_reference(
    case: ExpertGemmCase, dtype: torch.dtype, device: torch.device
) -> None:
    case = replace(case, dtype=dtype)
    inputs = make_expert_gemm(case)
    assert_matches_the_reference(case, inputs, out_of(inputs, device))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_activations_saturate_where_their_argument_is_large(
    activation: str, device: torch.device
) -> None:
    case = ExpertGemmCase(activation=activation, hidden_size=1, pattern="uniform")
    inputs = make_expert_gemm(case)
    inputs.hidden = torch.linspace(-120, 120, case.tokens)[:, None]
    inputs.gate_up[: len(inputs.down)].clamp_(min=0.5)
    out = out_of(inputs, device)
    assert out.isfinite().all()
    assert_matches_the_reference(case, inputs, out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_less_accurate_than_torch_in_the_same_dtype(
    dtype: torch.dtype, device: torch.device
) -> None:
    case = ExpertGemmCase(tokens=129, hidden_size=192, widths=(96,) * 4, dtype=dtype)
    inputs = make_expert_gemm(case)
    expected = reference.expert_gemm(**inputs.arguments())
    by_torch = torch.zeros_like(inputs.hidden)
    gate, up, down = unpack(inputs.gate_up, inputs.down, case.widths)
    assert gate is not None
    for expert in range(4):
        token, slot = (inputs.expert_ids == expert).nonzero(as_tuple=True)
        x = inputs.hidden[token]
        m = torch.nn.functional.silu(x @ gate[expert].T) * (x @ up[expert].T)
        y = (m @ down[expert].T) * inputs.gates[token, slot, None].to(dtype)
        by_torch.index_add_(0, token, y)
    error_of_torch = (by_torch.double() - expected).abs().max()
    assert (out_of(inputs, device).double() - expected).abs().max() <= 2 * error_of_torch


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_nothing_but_m_and_the_output_is_rounded_to_the_dtype(
    activation: str, device: torch.device
) -> None:
    case = ExpertGemmCase(
        tokens=129,
        hidden_size=96,
        widths=(96, 64, 32),
        activation=activation,
        dtype=torch.bfloat16,
    )
    inputs = make_expert_gemm(case)
    expected = reference.expert_gemm(**inputs.arguments())
    assert_rounded_once(case, inputs, out_of(inputs, device), expected)


def test_a_token_without_an_expert_gets_zero(device: torch.device) -> None:
    inputs = make_expert_gemm(ExpertGemmCase(pattern="one_token", bias=True))
    out = out_of(inputs, device)
    assert (out[:-1] == 0).all()
    assert (out[-1] != 0).any()


def test_an_expert_without_neurons_gives_its_bias(device: torch.device) -> None:
    case = ExpertGemmCase(widths=(0, 16), experts_per_token=1, bias=True)
    inputs = make_expert_gemm(case)
    inputs.expert_ids.zero_()
    assert inputs.down_bias is not None
    expected = inputs.gates * inputs.down_bias[0]
    assert torch.equal(out_of(inputs, device), expected)


def test_no_experts_at_all_give_zero(device: torch.device) -> None:
    out = expert_gemm(
        torch.ones(3, 8, device=device),
        torch.zeros(3, 2, dtype=torch.int32, device=device),
        torch.ones(3, 2, device=device),
        torch.empty(0, 8, device=device),
        torch.empty(0, 8, device=device),
        torch.empty(0, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )
    assert torch.equal(out.cpu(), torch.zeros(3, 8))


def test_no_slots_give_zero(device: torch.device) -> None:
    inputs = make_expert_gemm(ExpertGemmCase(experts_per_token=1))
    inputs.expert_ids, inputs.gates = inputs.expert_ids[:, :0], inputs.gates[:, :0]
    assert (out_of(inputs, device) == 0).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_weights_outside_the_widths_are_never_multiplied(
    dtype: torch.dtype, device: torch.device
) -> None:
    case = ExpertGemmCase(bias=True, dtype=dtype)
    inputs = make_expert_gemm(case)
    expected = out_of(inputs, device)
    neuron = torch.ones(len(inputs.down), dtype=torch.bool)
    for first, width in zip(inputs.neuron_offsets.tolist(), case.widths, strict=False):
        neuron[first : first + width] = False
    assert inputs.gate_up_bias is not None
    for poisoned in (inputs.gate_up, inputs.gate_up_bias):
        poisoned[neuron.repeat(2)] = POISON
    inputs.down[neuron] = POISON
    assert torch.equal(out_of(inputs, device), expected)


def test_gates_of_slots_without_an_expert_are_not_multiplied(device: torch.device) -> None:
    inputs = make_expert_gemm(ExpertGemmCase(pattern="unnamed"))
    expected = out_of(inputs, device)
    is_named = (inputs.expert_ids >= 0) & (inputs.expert_ids < len(inputs.widths))
    inputs.gates[~is_named] = POISON
    assert torch.equal(out_of(inputs, device), expected)


def test_a_nan_stays_in_its_token(device: torch.device) -> None:
    inputs = make_expert_gemm(ExpertGemmCase(pattern="uniform"))
    expected = out_of(inputs, device)
    inputs.hidden[5, 7] = POISON
    out = out_of(inputs, device)
    others = torch.arange(len(out)) != 5
    assert out[5].isnan().all()
    assert torch.equal(out[others], expected[others])


def assert_halves_equal_the_whole(
    tokens: int,
    first: int,
    dtype: torch.dtype,
    device: torch.device,
    int8: bool = False,
    experts_per_token: int = 2,
) -> None:
    has_tiles = device.type == "cpu" and dtype == torch.bfloat16 and _C.cpu_isa() == "amx"
    if has_tiles and not int8:
        pytest.skip("tiles add in another order than the vectors that few rows are for")
    case = ExpertGemmCase(
        tokens=tokens,
        pattern="skewed",
        dtype=dtype,
        int8=int8,
        experts_per_token=experts_per_token,
    )
    whole = make_expert_gemm(case)
    expected = out_of(whole, device)
    for rows in (slice(0, first), slice(first, None)):
        part = replace(
            whole,
            hidden=whole.hidden[rows],
            expert_ids=whole.expert_ids[rows],
            gates=whole.gates[rows],
        )
        assert torch.equal(out_of(part, device), expected[rows])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("first", [1, 7, 64])
def test_a_token_does_not_depend_on_its_neighbours(first: int, dtype: torch.dtype) -> None:
    assert_halves_equal_the_whole(129, first, dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("tokens", "first"), [(64, 1), (64, 7), (64, 32), (193, 65), (193, 128)])
def test_a_token_does_not_depend_on_its_neighbours_of_the_same_path(
    tokens: int, first: int, dtype: torch.dtype, device: torch.device
) -> None:
    # CUDA has a path of its own for up to 64 tokens.
    assert_halves_equal_the_whole(tokens, first, dtype, device)


def test_the_path_does_not_depend_on_the_slots_of_a_call(device: torch.device) -> None:
    assert_halves_equal_the_whole(47, 1, torch.bfloat16, device, experts_per_token=22)


def test_one_row_may_have_any_stride(device: torch.device) -> None:
    case = ExpertGemmCase(
        tokens=1,
        hidden_size=1024,
        widths=(200, 300, 130),
        pattern="uniform",
        dtype=torch.bfloat16,
    )
    inputs = make_expert_gemm(case).to(device)
    expected = out_of(inputs, device)
    inputs.hidden = inputs.hidden.as_strided((1, 1024), (1, 1))
    assert torch.equal(out_of(inputs, device), expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_the_order_of_the_experts_does_not_matter(dtype: torch.dtype, device: torch.device) -> None:
    case = ExpertGemmCase(pattern="duplicates", dtype=dtype)
    inputs = make_expert_gemm(case)
    order = torch.randperm(len(case.widths), generator=torch.Generator().manual_seed(0)).tolist()
    gate, up, down = unpack(inputs.gate_up, inputs.down, case.widths)
    assert gate is not None
    widths = [case.widths[expert] for expert in order]
    moved_gate_up, moved_down = pack(
        [gate[expert] for expert in order],
        [up[expert] for expert in order],
        [down[expert] for expert in order],
        widths,
    )
    position = torch.tensor(order).argsort()
    moved = replace(
        inputs,
        expert_ids=position[inputs.expert_ids.long()].int(),
        gate_up=moved_gate_up,
        down=moved_down,
        widths=torch.tensor(widths, dtype=torch.int32),
        neuron_offsets=torch.tensor(neuron_offsets(widths), dtype=torch.int32),
    )
    assert torch.equal(out_of(moved, device), out_of(inputs, device))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_ragged_equals_padded_to_the_largest_width(
    dtype: torch.dtype, device: torch.device
) -> None:
    case = ExpertGemmCase(dtype=dtype)
    inputs = make_expert_gemm(case)
    gate, up, down = unpack(inputs.gate_up, inputs.down, case.widths)
    assert gate is not None
    widest = max(case.widths)

    def padded(matrix: Tensor, dim: int) -> Tensor:
        missing = widest - matrix.shape[dim]
        return torch.nn.functional.pad(matrix, (0, missing) if dim == 1 else (0, 0, 0, missing))

    widths = [widest] * len(case.widths)
    wide_gate_up, wide_down = pack(
        [padded(matrix, 0) for matrix in gate],
        [padded(matrix, 0) for matrix in up],
        [padded(matrix, 1) for matrix in down],
        widths,
    )
    wide = replace(
        inputs,
        gate_up=wide_gate_up,
        down=wide_down,
        widths=torch.tensor(widths, dtype=torch.int32),
        neuron_offsets=torch.tensor(neuron_offsets(widths), dtype=torch.int32),
    )
    # Adding zeros is exact, but where blocks of neurons end may depend on the width.
    expected = out_of(inputs, device).double()
    tolerance = expert_gemm_tolerance(case, inputs, expected)
    assert_close("out", out_of(wide, device), expected, tolerance)


def test_the_order_of_the_neurons_does_not_matter(device: torch.device) -> None:
    case = ExpertGemmCase(widths=(96,), experts_per_token=1, pattern="uniform")
    inputs = make_expert_gemm(case)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    expected = reference.expert_gemm(**inputs.arguments())
    inputs.gate_up = inputs.gate_up[torch.cat([order, order + 96])].contiguous()
    inputs.down = inputs.down[order].contiguous()
    tolerance = expert_gemm_tolerance(case, inputs, expected)
    assert_close("out", out_of(inputs, device), expected, tolerance)


def test_hidden_rows_of_any_stride_give_the_same_bits(device: torch.device) -> None:
    inputs = make_expert_gemm(ExpertGemmCase())
    expected = out_of(inputs, device)
    hidden = inputs.hidden
    inputs.hidden = torch.cat([hidden, torch.full_like(hidden, POISON)], dim=1)[:, :48]
    assert torch.equal(out_of(inputs, device), expected)
    inputs.hidden = torch.stack([hidden, torch.full_like(hidden, POISON)], dim=1)[:, 0]
    assert torch.equal(out_of(inputs, device), expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("tokens", [1, 33])
def test_arrays_may_start_at_any_element(
    tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    case = ExpertGemmCase(tokens=tokens, hidden_size=37, bias=True, dtype=dtype)
    inputs = make_expert_gemm(case).to(device)
    out = expert_gemm(**inputs.embedded(device).arguments())
    assert torch.equal(out, expert_gemm(**inputs.arguments()))


def test_hidden_whose_rows_are_not_contiguous_is_refused() -> None:
    inputs = make_expert_gemm(ExpertGemmCase())
    inputs.hidden = inputs.hidden.T.contiguous().T
    with pytest.raises(InvalidArgument, match="expert_gemm: hidden must be"):
        expert_gemm(**inputs.arguments())


def test_ids_and_gates_may_have_any_strides_and_dtype(device: torch.device) -> None:
    inputs = make_expert_gemm(ExpertGemmCase())
    expected = out_of(inputs, device)
    other_order = replace(
        inputs,
        expert_ids=inputs.expert_ids.long().T.contiguous().T,
        gates=inputs.gates.double().T.contiguous().T,
    )
    assert torch.equal(out_of(other_order, device), expected)


def test_an_int64_id_that_would_wrap_to_an_expert_names_none(device: torch.device) -> None:
    inputs = make_expert_gemm(ExpertGemmCase(pattern="uniform"))
    inputs.expert_ids = inputs.expert_ids.long() + 2**32
    assert (out_of(inputs, device) == 0).all()


def test_a_given_max_width_gives_the_same_bits(device: torch.device) -> None:
    inputs = make_expert_gemm(ExpertGemmCase())
    moved = inputs.to(device).arguments()
    out = expert_gemm(**moved, max_width=max(HOSTILE_WIDTHS))
    assert torch.equal(out.cpu(), out_of(inputs, device))


def test_a_max_width_whose_workspace_is_too_small_is_refused() -> None:
    inputs = make_expert_gemm(ExpertGemmCase(tokens=129))
    sizes = [
        _C.expert_gemm_workspace_bytes(129, 3, 48, len(HOSTILE_WIDTHS), width, "float32")
        for width in (1, max(HOSTILE_WIDTHS))
    ]
    _cpu_workspaces.buffer = torch.empty(0, dtype=torch.uint8)
    is_too_small = sizes[0] < sizes[1]
    refused = pytest.raises(InvalidArgument, match="workspace must be")
    with refused if is_too_small else contextlib.nullcontext():
        expert_gemm(**inputs.arguments(), max_width=1)


def test_inputs_are_left_as_they_were(device: torch.device) -> None:
    inputs = make_expert_gemm(ExpertGemmCase(bias=True)).to(device)
    before = {
        name: value.clone() for name, value in inputs.arguments().items() if torch.is_tensor(value)
    }
    expert_gemm(**inputs.arguments())
    for name, value in before.items():
        assert torch.equal(value, inputs.arguments()[name]), name


@pytest.mark.parametrize("tokens", [1, 5, 64, 129])
def test_nothing_outside_the_output_and_the_workspace_is_written(
    tokens: int, device: torch.device
) -> None:
    case = ExpertGemmCase(tokens=tokens, hidden_size=33)
    inputs = make_expert_gemm(case)
    num_bytes = _C.expert_gemm_workspace_bytes(
        tokens, case.experts_per_token, 33, len(case.widths), max(case.widths), "float32"
    )
    with (
        guarded((tokens, 33), torch.float32, device) as out,
        guarded((num_bytes,), torch.uint8, device) as workspace,
    ):
        workspace.fill_(255)
        _C.expert_gemm(
            **inputs.to(device).arguments(),
            gate_up_scale=None,
            down_scale=None,
            out=out,
            workspace=workspace,
            max_width=max(case.widths),
        )
        assert_matches_the_reference(case, inputs, out.cpu())


@pytest.mark.parametrize("gated", [True, False])
def test_tf32_errs_by_no_more_than_its_rounding(gated: bool, device: torch.device) -> None:
    case = ExpertGemmCase(tokens=70, hidden_size=200, gated=gated)
    inputs = make_expert_gemm(case)
    out = torch.full((70, 200), POISON, device=device)
    workspace = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    _C.expert_gemm(
        **inputs.to(device).arguments(),
        gate_up_scale=None,
        down_scale=None,
        out=out,
        workspace=workspace,
        max_width=max(case.widths),
        allow_tf32=True,
    )
    expected = reference.expert_gemm(**inputs.arguments())
    assert (out.cpu().double() - expected).norm() <= 6e-4 * expected.norm()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_many_tokens_of_many_experts(dtype: torch.dtype, device: torch.device) -> None:
    widths = tuple((expert * 37 % 5) * 17 for expert in range(256))
    case = ExpertGemmCase(tokens=1000, hidden_size=72, widths=widths, dtype=dtype, bias=True)
    inputs = make_expert_gemm(case)
    assert_matches_the_reference(case, inputs, out_of(inputs, device))


@pytest.mark.parametrize(("experts", "per_token"), [(512, 32), (513, 32), (512, 33)])
def test_the_largest_routing_of_few_tokens_and_the_next(
    experts: int, per_token: int, device: torch.device
) -> None:
    # CUDA sorts up to 32 slots a token of 512 experts inside the kernels that stream the weights.
    case = ExpertGemmCase(
        tokens=64,
        hidden_size=8,
        widths=(1,) * experts,
        experts_per_token=per_token,
        dtype=torch.bfloat16,
    )
    inputs = make_expert_gemm(case)
    assert_matches_the_reference(case, inputs, out_of(inputs, device))


def test_an_output_with_gaps_between_its_rows_keeps_the_gaps(device: torch.device) -> None:
    case = ExpertGemmCase()
    inputs = make_expert_gemm(case)
    wide = torch.full((case.tokens, 60), 42.0, device=device)
    workspace = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    _C.expert_gemm(
        **inputs.to(device).arguments(),
        gate_up_scale=None,
        down_scale=None,
        out=wide[:, 6:54],
        workspace=workspace,
        max_width=max(case.widths),
    )
    assert (wide[:, :6] == 42).all()
    assert (wide[:, 54:] == 42).all()
    assert torch.equal(wide[:, 6:54].cpu(), out_of(inputs, device))


def test_calls_from_two_threads_do_not_share_a_workspace() -> None:
    cases = [ExpertGemmCase(seed=seed, tokens=65) for seed in range(4)]
    inputs = [make_expert_gemm(case) for case in cases]
    expected = [expert_gemm(**each.arguments()) for each in inputs]
    results: list[list[Tensor]] = [[] for _ in inputs]

    def work(index: int) -> None:
        for _ in range(20):
            results[index].append(expert_gemm(**inputs[index].arguments()))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outs, wanted in zip(results, expected, strict=True):
        assert len(outs) == 20
        assert all(torch.equal(out, wanted) for out in outs)


def test_the_workspace_is_kept_and_only_grows() -> None:
    small, large = (make_expert_gemm(ExpertGemmCase(tokens=tokens)) for tokens in (2, 129))
    _cpu_workspaces.buffer = torch.empty(0, dtype=torch.uint8)
    expert_gemm(**large.arguments())
    kept = _cpu_workspaces.buffer.data_ptr()
    expert_gemm(**small.arguments())
    expert_gemm(**large.arguments())
    assert _cpu_workspaces.buffer.data_ptr() == kept


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_inside_autocast_hidden_states_get_the_dtype_of_the_weights(
    dtype: torch.dtype, compiled: bool, device: torch.device
) -> None:
    arguments = make_expert_gemm(ExpertGemmCase(dtype=dtype)).to(device).arguments()
    expected = expert_gemm(**arguments)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    hidden = arguments["hidden"].to(other)
    if dtype == torch.float32:
        expected = expert_gemm(**{**arguments, "hidden": hidden.float()})
    op = torch.compile(expert_gemm, backend="eager", fullgraph=True) if compiled else expert_gemm
    with torch.autocast(device.type, torch.bfloat16):
        out = op(**{**arguments, "hidden": hidden})
    assert out.dtype == other
    assert torch.equal(out, expected.to(other))


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"expert_ids": torch.zeros(33, 3)}, "expert_ids must be", id="ids-dtype"),
        pytest.param({"gates": torch.zeros(33, 4)}, "gates must be", id="gates-shape"),
        pytest.param({"gate_up": torch.zeros(16, 48)}, "gate_up must be", id="gate-up-shape"),
        pytest.param({"gated": False}, "gate_up must be", id="gated"),
        pytest.param({"down": torch.zeros(400, 47)}, "down must be|gate_up must be", id="down"),
        pytest.param({"widths": torch.full((9,), 97).int()}, "widths must be", id="widths"),
        pytest.param({"activation": "tanh"}, "activation must be", id="activation"),
        pytest.param(
            {"activation": "swiglu_oai", "limit": 0.0}, "limit must be positive", id="limit"
        ),
        pytest.param({"down_bias": torch.zeros(9, 47)}, "down_bias must be", id="down-bias"),
        pytest.param({"gate_up_bias": torch.zeros(3)}, "gate_up_bias must be", id="gate-up-bias"),
        pytest.param(
            {"hidden": torch.zeros(33, 48).double()}, "hidden must be float32", id="dtype"
        ),
        pytest.param({"hidden": torch.tensor(1.0)}, "hidden must be 2-dim", id="hidden-rank"),
        pytest.param({"expert_ids": torch.tensor(1)}, "expert_ids must be 2-dim", id="ids-rank"),
        pytest.param({"widths": torch.tensor(1)}, "widths must be 1-dim", id="widths-rank"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    inputs = make_expert_gemm(ExpertGemmCase())
    with pytest.raises(InvalidArgument, match=f"^expert_gemm: ({message})"):
        expert_gemm(**{**inputs.arguments(), **change})
