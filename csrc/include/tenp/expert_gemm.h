// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "tenp/export.h"
#include "tenp/tensor.h"

// The routed experts of one MoE layer when every expert has a width of its own, as TENP
// (arXiv 2606.09885) leaves them:
//
//     m = act(W_g x + b_g) * (W_u x + b_u)        (gated; else m = act(W_u x + b_u))
//     y = W_d m + b_d
//     out_t = sum over the slots of token t, in slot order, of  g y.

namespace tenp {

/// act() above, and for kSwigluOai the whole m.
enum class Activation : std::uint8_t {
    kSilu,       ///< z sigmoid(z)
    kGelu,       ///< z (1 + erf(z / sqrt 2)) / 2
    kGeluTanh,   ///< the tanh form of the same
    kRelu,       ///< max(z, 0)
    kRelu2,      ///< max(z, 0)^2
    kSwigluOai,  ///< g = min(gate, limit), u = clamp(up, +-limit): m = (u + 1) g sigmoid(alpha g)
};

/// Arrays of expert_gemm(). T tokens, k slots a token, E experts, H hidden, R packed rows.
/// "Float" is float32, bfloat16 or float16, the same for the whole call.
struct ExpertGemmArgs {
    TensorView hidden;          ///< [T, H] Float; x
    TensorView expert_ids;      ///< [T, k] int32; an id outside 0..E-1 names no expert
    TensorView gates;           ///< [T, k] float32; g
    TensorView gate_up;         ///< [2R, H] Float or int8, gate rows first; [R, H] when not gated
    TensorView down;            ///< [R, H] Float or int8, as `gate_up`; a row is a neuron
    TensorView widths;          ///< [E] int32; neurons of each expert, 0 allowed
    TensorView neuron_offsets;  ///< [E+1] int32; ExpertLayout::offsets()
    TensorView gate_up_bias = {};  ///< [2R] or [R] Float, as rows of `gate_up`; null data: none
    TensorView down_bias = {};     ///< [E, H] Float; null data: none
    /// [2R] or [R] Float, and [R] Float: what the rows of int8 weights are multiplied by. For int8
    /// only.
    TensorView gate_up_scale = {};
    TensorView down_scale = {};
    Activation activation = Activation::kSilu;
    bool gated = true;  ///< whether `gate_up` has gate rows
    float limit = 0;    ///< kSwigluOai only, > 0
    float alpha = 0;    ///< kSwigluOai only
    /// Largest of `widths`, or more. Read from `widths` when negative, which only the CPU can do.
    std::int64_t max_width = -1;
    /// Whether products of float32 on CUDA may round their factors to 11 significant bits (tf32).
    bool allow_tf32 = false;
    TensorView out;        ///< [T, H] Float, overwritten
    TensorView workspace;  ///< contiguous, any dtype, expert_gemm_workspace_bytes() bytes or more
};

/// Computes the routed experts' output of one layer; see the equations above.
///
/// Overwrites `out`; what `workspace` holds before and after means nothing. `hidden` and `out` may
/// have any row stride, their rows are contiguous; all other arrays are contiguous. All are on one
/// device; `out` and `workspace` share no memory with anything else. A token none of whose slots
/// names an expert gets 0. An expert of width 0 gives y = b_d. Weights outside the first widths[e]
/// rows of an expert, and gates of slots that name no expert, never reach a result.
///
/// Devices: CPU; with weights that are no int8 also CUDA. On a CUDA device the call is asynchronous
/// on `stream`, never synchronises, never allocates. Sums are accumulated in float32; m is rounded
/// to Float once, y stays float32, out is rounded once. The result is the same on every run and for
/// any number of threads, and a token's result does not depend on the tokens that it shares the
/// call with (on CUDA: as long as both calls have more than 64 tokens, or both have not, and their
/// rows start at multiples of 16 bytes, or do not). Cost: 6 H W_e floating-point operations a row
/// (4 when not gated).
///
/// Throws InvalidArgument when an array does not fit the description above; on the CPU also when
/// `widths` and `neuron_offsets` contradict each other or R. Throws Unsupported on CUDA for int8
/// and for more than 12288 experts.
TENP_API void expert_gemm(const ExpertGemmArgs& args, Stream stream = nullptr);

/// Bytes of workspace that expert_gemm() needs on any device.
///
/// Throws InvalidArgument when a size is negative, T*k exceeds int32 or `dtype` is not a Float.
TENP_API std::size_t expert_gemm_workspace_bytes(
    std::int64_t tokens,
    std::int64_t experts_per_token,
    std::int64_t hidden_size,
    std::int64_t num_experts,
    std::int64_t max_width,
    DType dtype
);

}  // namespace tenp
