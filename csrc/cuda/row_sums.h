// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "tenp/tensor.h"

// One number a row, then the sums over the rows of every expert.

namespace tenp::cuda {

/// norms[row] = |y| for the rows offsets[0]..offsets[E]-1 of `outputs` [S, H].
void row_norms(
    const TensorView& outputs,
    const std::int32_t* offsets,
    std::int64_t experts,
    double* norms,
    Stream stream
);

/// totals[e] += sum of values[row] over the rows of expert e.
void add_rows(
    const std::int32_t* offsets,
    std::int64_t experts,
    const double* values,
    double* totals,
    Stream stream
);

/// Arrays of add_expert_sums(); see activation_stats.h.
struct ExpertSums {
    const std::int32_t* offsets;  // [E+1]
    const float* gates;           // [S]
    const double* norms;          // [S]
    std::int64_t* counts;         // [E]
    double* gate_sum;             // [E]
    double* norm_sum;             // [E]
    double* gated_norm_sum;       // [E]
    double* norm_max;             // [E]
};

/// Adds every expert's rows to its sums.
void add_expert_sums(const ExpertSums& sums, std::int64_t experts, Stream stream);

}  // namespace tenp::cuda
