// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "tenp/export.h"
#include "tenp/tensor.h"

// Neuron importance of TENP (arXiv 2606.09885): the part of the expert's output that a neuron
// provides along the output's own direction,
//
//     projection_k = sum over rows t of  m_tk <w_k, y_t> / |y_t|,
//
// and, from the same pass, the sums other criteria need. w_k is column k of the down projection.
// The inner products are the matrix Q = Y W_d, taken block by block; the K x T x H tensor of the
// paper's Algorithm 1 is never built. Check: the projections of an expert add up to the sum of
// |y_t| when y = W_d m.

namespace tenp {

/// Arrays of accumulate_neuron_contribution(). S rows ordered by expert, H hidden, I neurons,
/// E experts.
struct NeuronContributionArgs {
    TensorView activations;     ///< [S, I] float32, bfloat16 or float16; m
    TensorView outputs;         ///< [S, H] like `activations`; y, before the gate and the down bias
    TensorView down;            ///< [E, H, I] like `activations`; W_d, H or I contiguous
    TensorView gates;           ///< [S] float32; g
    TensorView offsets;         ///< [E+1] int32, from route()
    TensorView projection;      ///< [E, I] float64, added to; see above, signed
    TensorView magnitude;       ///< [E, I] float64, added to; sum of |m|
    TensorView energy;          ///< [E, I] float64, added to; sum of (g m)^2
    TensorView peak;            ///< [E, I] float64, raised to; largest |g m|
    TensorView workspace = {};  ///< neuron_contribution_workspace_bytes() or more; CUDA alone
};

/// Adds each expert's rows to its neurons' projection, magnitude, energy and peak.
///
/// A row with y = 0 contributes 0 to the projection. `activations` and `outputs` may have any row
/// stride, their rows are contiguous; `down` may have any strides as long as one of its last two is
/// 1; all other arrays are contiguous. All are on one device, and what is written shares no memory
/// with anything else. Rows outside offsets[0]..offsets[E]-1 are never read.
///
/// Devices: CPU and CUDA. On a CUDA device the call is asynchronous on `stream`, never
/// synchronises, never allocates. Inner products are accumulated in float32; sums over rows are
/// float64, start from zero, run in an order that the rows of the expert alone decide, and are
/// added to the caller's arrays once, so they are the same on every run and for any number of
/// threads. Cost: 2 S H I floating-point operations.
///
/// Throws InvalidArgument when an array does not fit the description above; on the CPU also when
/// `offsets` decreases or leaves 0..S.
TENP_API void accumulate_neuron_contribution(
    const NeuronContributionArgs& args, Stream stream = nullptr
);

/// Bytes of workspace that accumulate_neuron_contribution() needs on a CUDA device; 0 in a build
/// without CUDA.
///
/// Throws InvalidArgument when a size is negative or exceeds int32.
TENP_API std::size_t neuron_contribution_workspace_bytes(
    std::int64_t rows, std::int64_t experts, std::int64_t neurons
);

}  // namespace tenp
