# SPDX-License-Identifier: Apache-2.0
"""neuron_offsets, pack and unpack: copies, so everything is exact."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.op_cases import FLOAT_DTYPES, HOSTILE_WIDTHS
from tenp.errors import InvalidArgument
from tenp.ops import neuron_offsets, pack, unpack

HIDDEN_SIZE = 7


def make_experts(
    widths: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    gate = [normal(width, HIDDEN_SIZE) for width in widths]
    up = [normal(width, HIDDEN_SIZE) for width in widths]
    down = [normal(HIDDEN_SIZE, width) for width in widths]
    return gate, up, down


@given(st.lists(st.integers(0, 5000), max_size=300))
def test_every_expert_is_padded_to_sixteen_rows(widths: list[int]) -> None:
    offsets = neuron_offsets(widths)
    assert offsets[0] == 0
    assert len(offsets) == len(widths) + 1
    for first, after, width in zip(offsets[:-1], offsets[1:], widths, strict=True):
        assert after - first == -(-width // 16) * 16


@pytest.mark.parametrize("width", [-1, -(2**40), 2**31 - 1, 2**31, 2**70])
def test_widths_outside_int32_are_refused(width: int) -> None:
    with pytest.raises(InvalidArgument, match="expert_layout: widths must be"):
        neuron_offsets([16, width])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("gated", [True, False])
def test_packed_rows_are_the_experts_neurons(gated: bool, dtype: torch.dtype) -> None:
    gate, up, down = make_experts(HOSTILE_WIDTHS, dtype)
    gate_up, packed_down = pack(gate if gated else None, up, down, HOSTILE_WIDTHS)
    offsets = neuron_offsets(HOSTILE_WIDTHS)
    num_rows = offsets[-1]
    assert gate_up.shape == (2 * num_rows if gated else num_rows, HIDDEN_SIZE)
    assert packed_down.shape == (num_rows, HIDDEN_SIZE)
    assert gate_up.dtype == packed_down.dtype == dtype
    assert gate_up.is_contiguous()
    assert packed_down.is_contiguous()

    is_padding = torch.ones(num_rows, dtype=torch.bool)
    first_up = num_rows if gated else 0
    for expert, width in enumerate(HOSTILE_WIDTHS):
        own = slice(offsets[expert], offsets[expert] + width)
        is_padding[own] = False
        if gated:
            assert torch.equal(gate_up[own], gate[expert])
        assert torch.equal(gate_up[first_up + own.start : first_up + own.stop], up[expert])
        assert torch.equal(packed_down[own], down[expert].T)
    assert (packed_down[is_padding] == 0).all()
    assert (gate_up.view(-1, num_rows, HIDDEN_SIZE)[:, is_padding] == 0).all()


@pytest.mark.parametrize("gated", [True, False])
def test_unpack_undoes_pack(gated: bool) -> None:
    gate, up, down = make_experts(HOSTILE_WIDTHS)
    packed = pack(gate if gated else None, up, down, HOSTILE_WIDTHS)
    got_gate, got_up, got_down = unpack(*packed, HOSTILE_WIDTHS, gated=gated)
    assert (got_gate is None) == (not gated)
    for got, wanted in [(got_gate or [], gate if gated else []), (got_up, up), (got_down, down)]:
        assert len(got) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_unpacked_experts_are_views() -> None:
    packed = pack(*make_experts((3, 20)), widths=(3, 20))
    gate, up, down = unpack(*packed, (3, 20))
    assert gate is not None
    for matrix in (*gate, *up, *down):
        matrix.zero_()
    assert all((array == 0).all() for array in packed)


def test_checkpoint_matrices_may_have_any_strides() -> None:
    gate, up, down = make_experts((5, 17))
    expected = pack(gate, up, down, (5, 17))
    gate, up, down = ([matrix.T.contiguous().T for matrix in group] for group in (gate, up, down))
    for got, wanted in zip(pack(gate, up, down, (5, 17)), expected, strict=True):
        assert torch.equal(got, wanted)


def test_shapes_are_known_on_the_meta_device() -> None:
    gate, up, down = ([matrix.to("meta") for matrix in group] for group in make_experts((0, 33)))
    gate_up, packed_down = pack(gate, up, down, (0, 33))
    assert gate_up.is_meta
    assert gate_up.shape == (96, HIDDEN_SIZE)
    assert packed_down.shape == (48, HIDDEN_SIZE)
    assert [tuple(matrix.shape) for matrix in unpack(gate_up, packed_down, (0, 33))[1]] == [
        (0, HIDDEN_SIZE),
        (33, HIDDEN_SIZE),
    ]


def test_a_layer_without_any_neuron_has_no_rows() -> None:
    gate_up, down = pack(*make_experts((0, 0)), widths=(0, 0))
    assert gate_up.shape == down.shape == (0, HIDDEN_SIZE)


def test_matrices_that_contradict_the_widths_are_refused() -> None:
    gate, up, down = make_experts((5, 17))
    with pytest.raises(InvalidArgument, match=r"up\[1\] must be \[16, 7\], got \[17, 7\]"):
        pack(gate, up, down, (5, 16))
    with pytest.raises(InvalidArgument, match=r"gate\[0\] must be \[5, 7\], got \[5, 6\]"):
        pack([gate[0][:, :6], gate[1]], up, down, (5, 17))
    with pytest.raises(InvalidArgument, match="up must be 3 matrices, got 2"):
        pack(gate, up, down, (5, 17, 0))
    with pytest.raises(InvalidArgument, match="down must be a matrix per expert"):
        pack(None, [], [], [])
    packed = pack(gate, up, down, (5, 17))
    with pytest.raises(InvalidArgument, match="gate_up must be"):
        unpack(*packed, (5, 17), gated=False)
