// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "tenp/expert_gemm.h"
#include "tenp/export.h"
#include "tenp/tensor.h"

// The neurons of a layer's routed experts, all experts at full width, with the weights as
// checkpoints have them:
//
//     m = act(W_g x + b_g) * (W_u x + b_u)        (gated; else m = act(W_u x + b_u)).
//
// It is the first half of a calibration's forward pass; expert_statistics() is the second.

namespace tenp {

/// Arrays of expert_activations(). T tokens, k slots a token, S rows ordered by expert, H hidden,
/// I neurons, E experts. "Float" is float32, bfloat16 or float16, the same for the whole call.
struct ExpertActivationsArgs {
    TensorView hidden;           ///< [T, H] Float; x
    TensorView offsets;          ///< [E+1] int32, from route()
    TensorView slots;            ///< [S] int32, from route()
    TensorView gate = {};        ///< [E, I, H] Float; absent (data == nullptr) when not gated
    TensorView up;               ///< [E, I, H] like `gate`, with its strides
    TensorView gate_bias = {};   ///< [E, I] Float; null data: none
    TensorView up_bias = {};     ///< [E, I] Float; null data: none
    std::int32_t per_token = 1;  ///< k
    Activation activation = Activation::kSilu;
    float limit = 0;            ///< kSwigluOai only, > 0
    float alpha = 0;            ///< kSwigluOai only
    TensorView activations;     ///< [S, I] Float, overwritten
    TensorView workspace = {};  ///< bytes, expert_activations_workspace_bytes() or more; CUDA alone
};

/// Computes m of every row; row r belongs to token slots[r] / k.
///
/// `hidden`, `activations`, `gate` and `up` may have any strides but along their last dimension,
/// which is contiguous; all other arrays are contiguous. All are on one device; `activations` and
/// `workspace` share no memory with anything else. Rows outside offsets[0]..offsets[E]-1 are
/// neither read nor written.
///
/// Devices: CPU and CUDA. On a CUDA device the call is asynchronous on `stream`, never
/// synchronises, never allocates. Sums are accumulated in float32 (products of float32 are exact),
/// m is rounded once. A row's result depends on nothing but the row, so it is the same on every
/// run. Cost: 4 H I floating-point operations a row (2 when not gated).
///
/// Throws InvalidArgument when an array does not fit the description above; on the CPU also when
/// `offsets` decreases or leaves 0..S, or a row in use names a token outside 0..T-1.
TENP_API void expert_activations(const ExpertActivationsArgs& args, Stream stream = nullptr);

/// Bytes of workspace that expert_activations() needs on a CUDA device; 0 in a build without CUDA.
///
/// Throws InvalidArgument when a size is negative or exceeds int32.
TENP_API std::size_t expert_activations_workspace_bytes(
    std::int64_t rows, std::int64_t experts, std::int64_t neurons
);

}  // namespace tenp
