// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "tenp/export.h"
#include "tenp/tensor.h"

// The second moment of an expert's neurons, C = sum over rows t of g_t^2 m_t m_t^T. Everything that
// removing or refitting neurons costs is a quadratic form in it.

namespace tenp {

/// Arrays of accumulate_second_moment(). S rows ordered by expert, I neurons, E experts.
struct SecondMomentArgs {
    TensorView activations;    ///< [S, I] float32, bfloat16 or float16; m
    TensorView gates;          ///< [S] float32; g
    TensorView offsets;        ///< [E+1] int32, from route()
    TensorView second_moment;  ///< [E, n (n+1) / 2] float64, added to; upper triangle row by row
    /// Whether there is one more neuron, the last, of activation 1: the expert's down bias.
    bool has_bias = false;
};

/// Adds C of every expert to `second_moment`; n is I, or I + 1 with a bias.
///
/// `activations` may have any row stride, its rows are contiguous; all other arrays are contiguous.
/// All are on one device, and `second_moment` shares no memory with anything else. Rows outside
/// offsets[0]..offsets[E]-1 are never read.
///
/// Devices: CPU and CUDA. On the CPU g m and the sums are float64; on a CUDA device the call is
/// asynchronous on `stream`, never synchronises, never allocates; g m is rounded to float32, and so
/// are sums of up to 64 rows, which are then added up in float64. Sums start from zero, run in row
/// order and are added to the caller's array once, so they are the same on every run and for any
/// number of threads. Cost: n^2 floating-point operations a row, half of what the full matrix would
/// take.
///
/// Throws InvalidArgument when an array does not fit the description above; on the CPU also when
/// `offsets` decreases or leaves 0..S.
TENP_API void accumulate_second_moment(const SecondMomentArgs& args, Stream stream = nullptr);

}  // namespace tenp
