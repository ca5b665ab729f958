// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tenp/export.h"
#include "tenp/tensor.h"

// How experts of different widths lie in memory. A neuron is one row of every packed matrix: row
// offsets()[e] + j of the gate, up and (transposed) down projection is neuron j of expert e. So an
// expert is one contiguous block of each matrix, and to prune is to leave rows out.

namespace tenp {

/// First packed row of every expert, from the experts' widths.
class TENP_API ExpertLayout {
 public:
    /// Each expert is padded with zero rows to a multiple of this, so that a matrix instruction
    /// that takes 16 neurons at a time never multiplies a neighbour's.
    static constexpr std::int32_t kRowMultiple = 16;

    /// Throws InvalidArgument when a width is negative or the rows exceed int32.
    explicit ExpertLayout(std::span<const std::int32_t> widths);

    /// Neurons of each expert; E values.
    std::span<const std::int32_t> widths() const noexcept { return widths_; }

    /// First packed row of each expert, then rows(); E+1 values, the `neuron_offsets` of
    /// expert_gemm.
    std::span<const std::int32_t> offsets() const noexcept { return offsets_; }

    /// R: packed rows of one matrix, padding included.
    std::int32_t rows() const noexcept { return offsets_.back(); }

 private:
    std::vector<std::int32_t> widths_;
    std::vector<std::int32_t> offsets_;
};

/// Arrays of pack_expert(). W width of the expert, H hidden, R packed rows.
struct PackExpertArgs {
    TensorView gate = {};  ///< [W, H], any strides; absent (data == nullptr) when not gated
    TensorView up;         ///< [W, H] like `gate`, any strides
    TensorView down;       ///< [H, W] like `gate`, any strides
    TensorView gate_up;    ///< [2R, H] contiguous, gate rows first; [R, H] when not gated; written
    TensorView packed_down;  ///< [R, H] contiguous; written
    bool gated = true;       ///< whether there is a gate projection
};

/// Copies one expert from the layout of checkpoints into the packed matrices.
///
/// Writes the expert's own rows, its zero padding rows included, and nothing else. All arrays share
/// one dtype (float32, bfloat16 or float16) and are on the CPU.
///
/// Throws InvalidArgument when an array does not fit the description above or `expert` is outside
/// 0..E-1, Unsupported for CUDA arrays.
TENP_API void pack_expert(
    const ExpertLayout& layout, std::int64_t expert, const PackExpertArgs& args
);

}  // namespace tenp
