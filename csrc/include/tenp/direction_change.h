// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "tenp/export.h"
#include "tenp/tensor.h"

// Expert importance of TENP (arXiv 2606.09885): how much, and in how different a direction, an
// expert answers the tokens that were routed to it,
//
//     I_e = sum over rows t of expert e of  g_t |y_t| (1 - cos(x_t, y_t)).

namespace tenp {

/// Arrays of accumulate_direction_change(). T tokens, S rows ordered by expert, H hidden, E
/// experts.
struct DirectionChangeArgs {
    TensorView hidden;   ///< [T, H] float32, bfloat16 or float16; x, what the expert receives
    TensorView outputs;  ///< [S, H] like `hidden`; y, before the gate
    TensorView tokens;   ///< [S] int32; row -> token
    TensorView gates;    ///< [S] float32; g
    TensorView offsets;  ///< [E+1] int32, from route()
    TensorView direction_change;  ///< [E] float64, added to; I_e
    TensorView workspace = {};    ///< bytes, direction_change_workspace_bytes() or more; CUDA alone
};

/// Adds I_e above to `direction_change`.
///
/// A row with y = 0 contributes 0; x = 0 counts as orthogonal to everything (cos = 0). `hidden` and
/// `outputs` may have any row stride, their rows are contiguous; all other arrays are contiguous.
/// All are on one device, and `direction_change` shares no memory with anything else. Rows outside
/// offsets[0]..offsets[E]-1 are never read.
///
/// Devices: CPU and CUDA. On a CUDA device the call is asynchronous on `stream`, never
/// synchronises, never allocates. Products and sums are float64, start from zero, run in an order
/// that the rows of the expert alone decide, and are added to the caller's array once, so they are
/// the same on every run and for any number of threads.
///
/// Throws InvalidArgument when an array does not fit the description above; on the CPU also when
/// `offsets` decreases or leaves 0..S, or a row in use names a token outside 0..T-1.
TENP_API void accumulate_direction_change(const DirectionChangeArgs& args, Stream stream = nullptr);

/// Bytes of workspace that accumulate_direction_change() needs on a CUDA device; 0 in a build
/// without CUDA.
///
/// Throws InvalidArgument when a size is negative or exceeds int32.
TENP_API std::size_t direction_change_workspace_bytes(std::int64_t rows, std::int64_t experts);

}  // namespace tenp
