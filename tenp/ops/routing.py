# SPDX-License-Identifier: Apache-2.0
"""Which rows belong to which expert, and how they are cut into tiles.

The router names k experts per token. Everything after it works expert by expert, so the (token,
expert) pairs, the *rows*, are ordered by expert, then token, then slot. No atomics decide a
position: the order is the same in every run.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tenp import _C
from tenp.ops._binding import as_expert_ids, call, cuda_workspace, extent, register


class Routing(NamedTuple):
    """The rows of one MoE layer, ordered by expert."""

    offsets: Tensor
    """`[E+1]`, int32. Expert e has rows `offsets[e]` to `offsets[e+1] - 1`; `offsets[E]` is S."""
    slots: Tensor
    """`[T*k]`, int32. Row to slot: row r is slot `slots[r] = t*k + j`; -1 from row S on."""
    rows: Tensor
    """`[T, k]`, int32. Slot to row, the inverse of `slots`; -1 where the slot names no expert."""


def route(expert_ids: Tensor, num_experts: int) -> Routing:
    """Order the (token, expert) pairs by expert, then token, then slot.

    Args:
        expert_ids: `[T, k]`, int8 to int64 or uint8. Experts of each token; an id outside
            `0..num_experts-1` names no expert.
        num_experts: E.

    Returns:
        `Routing`, three new int32 tensors on the device of `expert_ids`.

    Raises:
        InvalidArgument: `expert_ids` is not a matrix of these integers.
        Unsupported: More than 12288 experts on CUDA.

    Note:
        A counting sort: O(T k + E) time, no synchronisation. The result is the same in every run.

    Example:
        >>> expert_ids = torch.tensor([[1, 0], [1, -1]])
        >>> offsets, slots, rows = route(expert_ids, num_experts=3)
        >>> offsets.tolist()  # one row for expert 0, two for expert 1, none for expert 2
        [0, 1, 3, 3]
        >>> slots.tolist()  # row 0 is slot 1; rows 1 and 2 are slots 0 and 2
        [1, 0, 2, -1]
        >>> rows.tolist()
        [[1, 0], [2, -1]]
    """
    return Routing(*_ROUTE(expert_ids, num_experts))


def tile_table(
    offsets: Tensor,
    widths: Tensor,
    tile_rows: int,
    tile_neurons: int,
    *,
    rows: int | None = None,
    max_width: int | None = None,
) -> Tensor:
    """Cut every expert's rows x neurons rectangle into tiles, the list of work of a grouped GEMM.

    Experts come by descending width, so that the largest pieces start first; equal widths by lower
    index. Within an expert the blocks of neurons are outer and the row tiles inner, so that a block
    of weights is read once. An expert without rows or without neurons has no tile.

    Args:
        offsets: `[E+1]`, int32. From `route`.
        widths: `[E]`, int32. Neurons of each expert, W_e.
        tile_rows: Rows of a full tile.
        tile_neurons: Neurons of a full tile.
        rows: An upper bound of S, such as T*k. None reads `offsets[E]`, which synchronises on CUDA.
        max_width: An upper bound of the widths. None reads the largest, which synchronises on CUDA.

    Returns:
        `[n, 4]`, int32: expert, first row, rows in the tile, first neuron. n is what any routing of
        `rows` rows may need; after the last tile all entries are -1.

    Raises:
        InvalidArgument: A shape, dtype, tile size or bound that cannot be right.

    Example:
        >>> offsets = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
        >>> widths = torch.tensor([16, 64, 32], dtype=torch.int32)
        >>> tiles = tile_table(offsets, widths, tile_rows=2, tile_neurons=16)
        >>> tiles[tiles[:, 0] >= 0].tolist()
        [[2, 3, 2, 0], [2, 3, 2, 16], [0, 0, 2, 0], [0, 2, 1, 0]]
    """
    tiles: Tensor = _TILE_TABLE(offsets, widths, tile_rows, tile_neurons, rows, max_width)
    return tiles


def _route(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    offsets, slots, rows = _fake_route(expert_ids, num_experts)
    call(
        _C.route,
        expert_ids.device,
        expert_ids=as_expert_ids(expert_ids, num_experts),
        offsets=offsets,
        slots=slots,
        rows=rows,
        **cuda_workspace("route", expert_ids.device, expert_ids.numel(), num_experts),
    )
    return offsets, slots, rows


def _fake_route(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    offsets = expert_ids.new_empty((num_experts + 1,), dtype=torch.int32)
    slots = expert_ids.new_empty((expert_ids.numel(),), dtype=torch.int32)
    rows = expert_ids.new_empty(expert_ids.shape, dtype=torch.int32)
    return offsets, slots, rows


def _tile_table(
    offsets: Tensor,
    widths: Tensor,
    tile_rows: int,
    tile_neurons: int,
    rows: int | None,
    max_width: int | None,
) -> Tensor:
    if rows is None:
        rows = int(offsets[-1]) if extent(offsets, 0) else 0
    if max_width is None:
        max_width = int(widths.max()) if widths.numel() else 0
    capacity = _C.tile_capacity(rows, extent(widths, 0), max_width, tile_rows, tile_neurons)
    tiles = offsets.new_empty((capacity, 4), dtype=torch.int32)
    call(
        _C.tile_table,
        offsets.device,
        offsets=offsets,
        widths=widths,
        tiles=tiles,
        count=offsets.new_empty((1,), dtype=torch.int32),
        tile_rows=tile_rows,
        tile_neurons=tile_neurons,
    )
    return tiles


def _fake_tile_table(
    offsets: Tensor,
    widths: Tensor,
    tile_rows: int,
    tile_neurons: int,
    rows: int | None,
    max_width: int | None,
) -> Tensor:
    capacity: int | torch.SymInt
    if rows is None or max_width is None:
        capacity = torch.library.get_ctx().new_dynamic_size()
    else:
        capacity = _C.tile_capacity(
            int(rows), int(widths.shape[0]), int(max_width), int(tile_rows), int(tile_neurons)
        )
    return offsets.new_empty((capacity, 4), dtype=torch.int32)


_ROUTE = register(
    "route(Tensor expert_ids, SymInt num_experts) -> (Tensor, Tensor, Tensor)", _route, _fake_route
)
_TILE_TABLE = register(
    "tile_table(Tensor offsets, Tensor widths, SymInt tile_rows, SymInt tile_neurons, "
    "SymInt? rows, SymInt? max_width) -> Tensor",
    _tile_table,
    _fake_tile_table,
)
