// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "tenp/export.h"
#include "tenp/tensor.h"

// How often, with which weight and how strongly each expert answers: the sums behind the frequency,
// gate, EAN and REAP (arXiv 2510.13999) criteria that TENP (arXiv 2606.09885) is compared with.
// All of them come from one pass and add up over tokens.

namespace tenp {

/// Arrays of accumulate_activation_stats(). S rows ordered by expert, H hidden, E experts.
struct ActivationStatsArgs {
    TensorView outputs;         ///< [S, H] float32, bfloat16 or float16; y, before the gate
    TensorView gates;           ///< [S] float32; g
    TensorView offsets;         ///< [E+1] int32, from route()
    TensorView counts;          ///< [E] int64, added to; rows
    TensorView gate_sum;        ///< [E] float64, added to; sum of g
    TensorView norm_sum;        ///< [E] float64, added to; sum of |y|
    TensorView gated_norm_sum;  ///< [E] float64, added to; sum of g |y|
    TensorView norm_max;        ///< [E] float64, raised to; largest |y|
    TensorView workspace = {};  ///< bytes, activation_stats_workspace_bytes() or more; CUDA alone
};

/// Adds each expert's rows to its counts, gate sums and output norms; |y| is the Euclidean norm.
///
/// `outputs` may have any row stride, its rows are contiguous; all other arrays are contiguous. All
/// are on one device, and what is written shares no memory with anything else. Rows outside
/// offsets[0]..offsets[E]-1 are never read.
///
/// Devices: CPU and CUDA. On a CUDA device the call is asynchronous on `stream`, never
/// synchronises, never allocates. Sums are float64, start from zero, run in an order that the rows
/// of the expert alone decide, and are added to the caller's arrays once, so they are the same on
/// every run and for any number of threads. NaN spreads into every sum and maximum of its expert
/// and nowhere else.
///
/// Throws InvalidArgument when an array does not fit the description above; on the CPU also when
/// `offsets` decreases or leaves 0..S.
TENP_API void accumulate_activation_stats(const ActivationStatsArgs& args, Stream stream = nullptr);

/// Bytes of workspace that accumulate_activation_stats() needs on a CUDA device; 0 in a build
/// without CUDA.
///
/// Throws InvalidArgument when a size is negative or exceeds int32.
TENP_API std::size_t activation_stats_workspace_bytes(std::int64_t rows, std::int64_t experts);

}  // namespace tenp
