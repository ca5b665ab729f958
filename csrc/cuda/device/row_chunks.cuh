// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cuda/device/ptx.cuh"
#include "cuda/row_chunks.h"

namespace tenp::cuda {

/// The rows of a chunk, and whose they are.
struct Chunk {
    int expert;
    int first_row;
    int last_row;  // one past the end

    __device__ __forceinline__
    Chunk(const std::int32_t* first_chunks, const std::int32_t* offsets, int experts, int chunk) {
        int low = 0;
        int high = experts;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (first_chunks[middle] <= chunk ? low : high) = middle;
        }
        expert = low;
        first_row = offsets[low] + (chunk - first_chunks[low]) * kChunkRows;
        last_row = min(first_row + kChunkRows, offsets[low + 1]);
    }
};

}  // namespace tenp::cuda
