// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "tenp/tensor.h"

namespace tenp::cuda {

/// norms[row] = |y| for the rows offsets[0]..offsets[E]-1 of `outputs` [S, H].
void row_norms(
    const TensorView& outputs,
    const std::int32_t* offsets,
    std::int64_t experts,
    double* norms,
    Stream stream
);

}  // namespace tenp::cuda
