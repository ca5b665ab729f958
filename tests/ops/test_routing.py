# SPDX-License-Identifier: Apache-2.0
"""route and tile_table against the reference: integers, so everything is exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.op_cases import ROUTING_PATTERNS, TOKEN_COUNTS, guarded, make_expert_ids
from tenp import _C
from tenp.errors import InvalidArgument
from tenp.ops import Routing, reference, route, tile_table
from tenp.ops._binding import cuda_workspace


def assert_same(actual: Routing, expected: Routing) -> None:
    for name in Routing._fields:
        got, wanted = getattr(actual, name), getattr(expected, name)
        assert got.dtype == torch.int32
        assert got.shape == wanted.shape, name
        assert torch.equal(got.cpu(), wanted), name


@pytest.mark.parametrize("pattern", ROUTING_PATTERNS)
@pytest.mark.parametrize("tokens", TOKEN_COUNTS)
def test_rows_are_ordered_by_expert_then_token_then_slot(
    tokens: int, pattern: str, device: torch.device
) -> None:
    expert_ids = make_expert_ids(pattern, tokens, experts_per_token=3, num_experts=9)
    expected = reference.route(expert_ids, 9)
    assert_same(route(expert_ids.to(device), 9), expected)


@pytest.mark.parametrize(
    ("tokens", "experts_per_token", "num_experts"),
    [(5, 1, 1), (300, 8, 128), (40, 2, 1000), (3, 0, 4), (4, 2, 0), (20000, 2, 7)],
)
def test_shapes_at_the_edges(
    tokens: int, experts_per_token: int, num_experts: int, device: torch.device
) -> None:
    expert_ids = make_expert_ids("unnamed", tokens, experts_per_token, max(num_experts, 1))
    expected = reference.route(expert_ids, num_experts)
    assert_same(route(expert_ids.to(device), num_experts), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.int8, torch.uint8])
def test_ids_of_every_integer_dtype_are_accepted(dtype: torch.dtype, device: torch.device) -> None:
    expert_ids = make_expert_ids("uniform", 17, 2, 5)
    actual = route(expert_ids.to(device=device, dtype=dtype), 5)
    assert_same(actual, reference.route(expert_ids, 5))


def test_an_int64_id_that_would_wrap_to_an_expert_names_none(device: torch.device) -> None:
    ids = torch.tensor([[2**32 + 1, 1], [-(2**32), 2**31], [-(2**63), 2**63 - 1]], device=device)
    routing = route(ids, 3)
    assert routing.offsets.tolist() == [0, 0, 1, 1]
    assert routing.rows.tolist() == [[-1, 0], [-1, -1], [-1, -1]]


def test_non_contiguous_ids_give_the_same_routing(device: torch.device) -> None:
    expert_ids = make_expert_ids("unnamed", 21, 4, 5)
    wide = torch.stack([expert_ids, torch.full_like(expert_ids, 3)], dim=2).to(device)
    expected = reference.route(expert_ids, 5)
    assert_same(route(wide[:, :, 0], 5), expected)
    assert_same(route(expert_ids.to(device).T.contiguous().T, 5), expected)
    assert_same(route(wide[:, :, 0].long(), 5), expected)


@given(
    num_experts=st.integers(1, 12),
    experts_per_token=st.integers(1, 4),
    ids=st.lists(st.integers(-2, 13), max_size=100),
)
@settings(max_examples=200, deadline=None)
def test_routing_is_a_stable_partition_of_the_named_slots(
    num_experts: int, experts_per_token: int, ids: list[int]
) -> None:
    tokens = len(ids) // experts_per_token
    expert_ids = torch.tensor(ids[: tokens * experts_per_token], dtype=torch.int32)
    expert_ids = expert_ids.reshape(tokens, experts_per_token)
    routing = route(expert_ids, num_experts)
    assert_same(routing, reference.route(expert_ids, num_experts))

    flat = expert_ids.flatten().tolist()
    named = [slot for slot, expert in enumerate(flat) if 0 <= expert < num_experts]
    num_rows = int(routing.offsets[-1])
    slots = routing.slots.tolist()
    assert routing.offsets[0] == 0
    assert (routing.offsets.diff() >= 0).all()
    assert sorted(slots[:num_rows]) == named
    assert slots[num_rows:] == [-1] * (len(flat) - num_rows)
    for expert in range(num_experts):
        own = slots[routing.offsets[expert] : routing.offsets[expert + 1]]
        assert own == sorted(own)
        assert all(flat[slot] == expert for slot in own)
    rows = routing.rows.flatten().tolist()
    assert [slots[row] for row in rows if row >= 0] == named


def test_renaming_the_experts_moves_whole_segments(device: torch.device) -> None:
    expert_ids = make_expert_ids("uniform", 50, 3, 8).to(device)
    renaming = torch.randperm(8, generator=torch.Generator().manual_seed(3)).to(device)
    before, after = route(expert_ids, 8), route(renaming[expert_ids.long()], 8)

    def segment(routing: Routing, expert: int) -> list[int]:
        return routing.slots[routing.offsets[expert] : routing.offsets[expert + 1]].tolist()

    for expert in range(8):
        assert segment(before, expert) == segment(after, int(renaming[expert]))


def test_two_runs_agree(device: torch.device) -> None:
    expert_ids = make_expert_ids("skewed", 5000, 4, 60).to(device)
    assert_same(route(expert_ids, 60), Routing(*(t.cpu() for t in route(expert_ids, 60))))


def test_nothing_outside_the_outputs_is_written(device: torch.device) -> None:
    expert_ids = make_expert_ids("unnamed", 37, 3, 7).to(device)
    expected = reference.route(expert_ids.cpu(), 7)
    with (
        guarded((8,), torch.int32, device) as offsets,
        guarded((37 * 3,), torch.int32, device) as slots,
        guarded((37, 3), torch.int32, device) as rows,
    ):
        workspace = cuda_workspace("route", device, 37 * 3, 7).get("workspace")
        _C.route(expert_ids, offsets, slots, rows, workspace)
        assert_same(Routing(offsets, slots, rows), expected)


@pytest.mark.parametrize(
    ("expert_ids", "message"),
    [
        pytest.param(torch.zeros(3, dtype=torch.int32), "expert_ids must be", id="rank"),
        pytest.param(torch.tensor(3), "expert_ids must be 2-dimensional, got 0", id="scalar"),
        pytest.param(torch.zeros(3, 2), "expert_ids must be", id="dtype"),
    ],
)
def test_ids_that_are_no_matrix_of_integers_are_refused(expert_ids: Tensor, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        route(expert_ids, 4)


# ------------------------------------------------------------------------------------ tile table


TILE_CASES = [
    pytest.param([0, 3, 3, 5], [16, 64, 32], 2, 16, id="plain"),
    pytest.param([0, 0, 0], [16, 16], 8, 8, id="no-rows"),
    pytest.param([0, 7, 9], [0, 0], 8, 8, id="no-neurons"),
    pytest.param([0, 1, 65, 193], [16, 16, 16], 64, 16, id="equal-widths"),
    pytest.param([0, 129], [1408], 128, 64, id="one-expert"),
    pytest.param([0, 4, 8, 9, 9, 73], [1, 15, 17, 65, 64], 16, 16, id="odd-widths"),
    pytest.param([0], [], 16, 16, id="no-experts"),
]


@pytest.mark.parametrize(("offsets", "widths", "tile_rows", "tile_neurons"), TILE_CASES)
@pytest.mark.parametrize("bounds", ["read", "given", "loose"])
def test_tiles_are_those_of_the_reference_then_minus_one(
    offsets: list[int],
    widths: list[int],
    tile_rows: int,
    tile_neurons: int,
    bounds: str,
    device: torch.device,
) -> None:
    offsets_tensor = torch.tensor(offsets, dtype=torch.int32)
    widths_tensor = torch.tensor(widths, dtype=torch.int32)
    rows, max_width = offsets[-1], max(widths, default=0)
    keywords = {
        "read": {},
        "given": {"rows": rows, "max_width": max_width},
        "loose": {"rows": rows + 100, "max_width": max_width + 50},
    }[bounds]
    expected = reference.tile_table(offsets_tensor, widths_tensor, tile_rows, tile_neurons)
    tiles = tile_table(
        offsets_tensor.to(device), widths_tensor.to(device), tile_rows, tile_neurons, **keywords
    ).cpu()
    assert tiles.dtype == torch.int32
    assert torch.equal(tiles[: len(expected)], expected)
    assert (tiles[len(expected) :] == -1).all()


@given(
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    widths=st.data(),
    tile_rows=st.sampled_from([1, 3, 8, 16]),
    tile_neurons=st.sampled_from([1, 5, 16, 64]),
)
@settings(max_examples=100, deadline=None)
def test_tiles_cover_every_row_and_neuron_once(
    rows: list[int], widths: st.DataObject, tile_rows: int, tile_neurons: int
) -> None:
    num_experts = len(rows)
    drawn = widths.draw(
        st.lists(st.integers(0, 70), min_size=num_experts, max_size=num_experts), "widths"
    )
    offsets = torch.tensor([0, *rows]).cumsum(0).to(torch.int32)
    widths_tensor = torch.tensor(drawn, dtype=torch.int32)
    tiles = tile_table(offsets, widths_tensor, tile_rows, tile_neurons)
    assert torch.equal(
        tiles[tiles[:, 0] >= 0],
        reference.tile_table(offsets, widths_tensor, tile_rows, tile_neurons),
    )
    covered = torch.zeros(int(offsets[-1]), 70, dtype=torch.int32)
    for expert, first_row, num_rows, first_neuron in tiles[tiles[:, 0] >= 0].tolist():
        last_neuron = min(first_neuron + tile_neurons, drawn[expert])
        covered[first_row : first_row + num_rows, first_neuron:last_neuron] += 1
    row_widths = widths_tensor.repeat_interleave(torch.tensor(rows))
    assert torch.equal(covered, (torch.arange(70) < row_widths[:, None]).int())


def test_a_scalar_is_no_widths_and_no_offsets() -> None:
    offsets, widths = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    with pytest.raises(InvalidArgument, match="tile_table: widths must be"):
        tile_table(offsets, widths[0], 16, 16)
    with pytest.raises(InvalidArgument, match="tile_table: offsets must be"):
        tile_table(offsets[0], widths, 16, 16)


def test_a_tile_of_no_size_is_refused() -> None:
    offsets, widths = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    with pytest.raises(InvalidArgument, match="tile_rows must be"):
        tile_table(offsets, widths, 0, 16)
    with pytest.raises(InvalidArgument, match="tile_neurons must be"):
        tile_table(offsets, widths, 16, -1)
