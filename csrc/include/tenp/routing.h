// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "tenp/export.h"
#include "tenp/tensor.h"

// From a router's choice to rows sorted by expert, and from rows to the tiles of a grouped matrix
// product whose experts differ in width.
//
// A *row* is one (token, expert) pair. Rows are ordered by expert, then token, then slot, so that
// every expert owns a contiguous range and every sum over rows has one order.

namespace tenp {

/// Arrays of route(). T tokens, k slots a token, E experts (E is the length of `offsets` less one).
struct RoutingArgs {
    TensorView expert_ids;  ///< [T, k] int32; an id outside 0..E-1 names no expert
    TensorView offsets;  ///< [E+1] int32, overwritten; expert e has rows offsets[e]..offsets[e+1]-1
    TensorView slots;    ///< [T*k] int32, overwritten; row -> slot t*k + j, tail -1
    TensorView rows;     ///< [T, k] int32, overwritten; slot -> row, or -1 when it names no expert
    TensorView workspace = {};  ///< bytes, route_workspace_bytes() or more; needed on CUDA alone
};

/// Sorts the slots of a router's choice by expert.
///
/// Overwrites `offsets`, `slots` and `rows`. All arrays are contiguous and on one device; the
/// outputs share no memory with `expert_ids` or each other. A token may name one expert twice: that
/// is two rows.
///
/// Devices: CPU and CUDA. On a CUDA device the call is asynchronous on `stream`, never
/// synchronises, never allocates. The result is the same on every run.
///
/// Throws InvalidArgument when an array does not fit the description above or T*k exceeds int32,
/// Unsupported for more than 12288 experts on CUDA.
TENP_API void route(const RoutingArgs& args, Stream stream = nullptr);

/// Bytes of workspace that route() needs on a CUDA device; 0 in a build without CUDA.
///
/// Throws InvalidArgument when a size is negative or exceeds int32.
TENP_API std::size_t route_workspace_bytes(std::int64_t slots, std::int64_t experts);

/// Arrays of tile_table(). E experts.
struct TileTableArgs {
    TensorView offsets;             ///< [E+1] int32, from route()
    TensorView widths;              ///< [E] int32, neurons of each expert
    TensorView tiles;               ///< [capacity, 4] int32, overwritten; see tile_table(), tail -1
    TensorView count;               ///< [1] int32, overwritten; tiles in use
    std::int32_t tile_rows = 0;     ///< rows of a tile at most, > 0
    std::int32_t tile_neurons = 0;  ///< neurons of a tile at most, > 0
};

/// Lists the (rows x neurons) tiles of a grouped product with one width per expert.
///
/// A tile is {expert, first row, rows in the tile, first neuron of the expert}. Experts come by
/// descending width (ties: the lower index), so that the largest work starts first; within an
/// expert neuron blocks are the outer loop and row tiles the inner one, so that neighbours share
/// weights. An expert without rows or without neurons has no tile.
///
/// Overwrites `tiles` and `count`. All arrays are contiguous and on one device.
///
/// Devices: CPU and CUDA. On a CUDA device the call is asynchronous on `stream`, never
/// synchronises, never allocates. The result is the same on every run.
///
/// Throws InvalidArgument when an array does not fit the description above; on the CPU also when
/// `offsets` decreases, a width is negative or `tiles` is too short. (tile_capacity() is enough.)
TENP_API void tile_table(const TileTableArgs& args, Stream stream = nullptr);

/// Tiles that `rows` rows over `experts` experts of at most `max_width` neurons can need, whatever
/// the routing.
///
/// Throws InvalidArgument when a size is negative or a tile extent is not positive.
TENP_API std::int64_t tile_capacity(
    std::int64_t rows,
    std::int64_t experts,
    std::int64_t max_width,
    std::int32_t tile_rows,
    std::int32_t tile_neurons
);

}  // namespace tenp
