// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/tile_work.h"

namespace tenp::cuda {

/// The tiles of one block: its own number first, then whatever is next.
class Tiles {
 public:
    __device__ __forceinline__ Tiles(const Work& work, int* shared)
        : work_(work),
          shared_(shared),
          tile_(static_cast<int>(blockIdx.x)) {}

    __device__ __forceinline__ bool is_done() const { return tile_ >= *work_.count; }
    __device__ __forceinline__ int expert() const { return work_.tiles[4 * tile_]; }
    __device__ __forceinline__ int first_row() const { return work_.tiles[4 * tile_ + 1]; }
    __device__ __forceinline__ int rows() const { return work_.tiles[4 * tile_ + 2]; }
    __device__ __forceinline__ int first_column() const { return work_.tiles[4 * tile_ + 3]; }

    /// All threads of the block call it.
    __device__ __forceinline__ void advance() {
        __syncthreads();
        if (threadIdx.x == 0) {
            *shared_ = static_cast<int>(gridDim.x) + atomicAdd(work_.taken, 1);
        }
        __syncthreads();
        tile_ = *shared_;
    }

 private:
    const Work& work_;
    int* shared_;
    int tile_;
};

}  // namespace tenp::cuda
