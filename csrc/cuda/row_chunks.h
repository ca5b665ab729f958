// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cuda/workspace.h"
#include "tenp/tensor.h"

namespace tenp::cuda {

/// Rows whose sums are added up by one block. The cut depends on the expert's rows alone, so the
/// sums do not depend on the grid; 1024 makes 16 tiles, enough to hide the start of each.
inline constexpr int kChunkRows = 1024;

/// Every expert's rows, cut into chunks of kChunkRows from its first row on.
struct RowChunks {
    std::int32_t* first;    // [E+1]: chunks of the experts before e, then all
    std::int64_t capacity;  // chunks that any routing of the rows may need

    RowChunks(Workspace& workspace, std::int64_t rows, std::int64_t experts);

    /// Starts the kernel that counts them.
    void fill(const std::int32_t* offsets, std::int64_t experts, Stream stream) const;
};

}  // namespace tenp::cuda
