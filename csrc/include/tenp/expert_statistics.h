// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "tenp/export.h"
#include "tenp/tensor.h"

// The second half of a calibration's forward pass: what a layer's routed experts put out, and from
// the same pass every sum of activation_stats.h, direction_change.h and neuron_contribution.h, and
// two of their inputs:
//
//     y     = W_d m                                     rounded to the element type once
//     out_t = sum over the rows of token t of  g (y + b_d)
//     input_energy_h      = sum over rows of  g^2 x_h^2
//     normalized_gate_sum = sum over rows of  g / (sum of the token's gates).

namespace tenp {

/// Arrays of expert_statistics(). T tokens, k slots a token, S rows ordered by expert, H hidden,
/// I neurons, E experts. "Float" is float32, bfloat16 or float16, the same for the whole call.
struct ExpertStatisticsArgs {
    TensorView hidden;          ///< [T, H] Float; x, what the experts receive
    TensorView activations;     ///< [S, I] Float; m, from expert_activations()
    TensorView down;            ///< [E, H, I] Float; W_d, H or I contiguous
    TensorView down_bias = {};  ///< [E, H] Float; null data: none
    TensorView offsets;         ///< [E+1] int32, from route()
    TensorView slots;           ///< [S] int32, from route()
    TensorView rows;            ///< [T, k] int32, from route(); rows of other experts are skipped
    TensorView gates;           ///< [T, k] float32; g, 0 where a slot names no expert
    TensorView out;             ///< [T, H] float32, added to

    TensorView counts;               ///< [E] int64, added to
    TensorView gate_sum;             ///< [E] float64, added to
    TensorView normalized_gate_sum;  ///< [E] float64, added to
    TensorView norm_sum;             ///< [E] float64, added to
    TensorView gated_norm_sum;       ///< [E] float64, added to
    TensorView norm_max;             ///< [E] float64, raised to
    TensorView direction_change;     ///< [E] float64, added to
    TensorView input_energy;         ///< [E, H] float64, added to
    TensorView projection;           ///< [E, I] float64, added to
    TensorView magnitude;            ///< [E, I] float64, added to
    TensorView energy;               ///< [E, I] float64, added to
    TensorView peak;                 ///< [E, I] float64, raised to

    TensorView workspace;  ///< contiguous, any dtype, expert_statistics_workspace_bytes() or more
};

/// Adds one batch to `out` and to the sums.
///
/// `hidden` and `activations` may have any row stride, their rows are contiguous; `down` is
/// contiguous along H or I; all other arrays are contiguous. All are on one device; what is
/// written shares no memory with anything else. Rows outside offsets[0]..offsets[E]-1 are never
/// read. An entry of `rows` outside that range is another call's: experts may come in several
/// calls, and if they come in ascending order `out` and the sums are the same bits as of one call.
///
/// Devices: CPU and CUDA. On a CUDA device the call is asynchronous on `stream`, never
/// synchronises, never allocates; |y|^2, <x, y> and |x|^2 are taken while y is still on the chip.
/// `out` is added up in float32, by ascending row. The sums are float64, start from zero, run in an
/// order that the rows of the expert alone decide, and are added to the caller's arrays once. So
/// everything is the same on every run and for any number of threads. Cost: 4 H I floating-point
/// operations a row.
///
/// Throws InvalidArgument when an array does not fit the description above; on the CPU also when
/// `offsets` decreases or leaves 0..S, or a row in use names a slot outside 0..T*k-1.
TENP_API void expert_statistics(const ExpertStatisticsArgs& args, Stream stream = nullptr);

/// Bytes of workspace that expert_statistics() needs on any device.
///
/// Throws InvalidArgument when a size is negative or exceeds int32 or `dtype` is not a Float.
TENP_API std::size_t expert_statistics_workspace_bytes(
    std::int64_t rows,
    std::int64_t experts,
    std::int64_t hidden_size,
    std::int64_t neurons,
    DType dtype
);

}  // namespace tenp
