// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/device/routing.cuh"
#include "cuda/expert_gemm/layer.h"

// What the two kernels of streaming.cuh share: the slots, sorted by each block for itself, and the
// counters by which blocks of the second find out what there is to do.

namespace tenp::cuda {
namespace {

constexpr int kMostTokens = 64;
constexpr int kMostPerToken = 32;
constexpr int kMostExperts = 512;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

/// The sorted slots in shared memory.
struct SmallRouting {
    int* counters;          // [warps, E]
    std::int32_t* offsets;  // [E+1]
    std::int32_t* units;    // [E+1]: units of work of the experts before e, then all
    std::int32_t* slots;    // [T*k]
    std::int32_t* rows;     // [T, k]

    static __host__ __device__ std::size_t bytes(int experts, int slot_count) {
        return sizeof(int) *
               static_cast<std::size_t>(kWarps * experts + 2 * (experts + 1) + 2 * slot_count);
    }

    __device__ __forceinline__ SmallRouting(void* memory, int experts, int slot_count)
        : counters(static_cast<int*>(memory)),
          offsets(counters + kWarps * experts),
          units(offsets + experts + 1),
          slots(units + experts + 1),
          rows(slots + slot_count) {}

    /// Sorts, and numbers the units of work: units_of(expert) each. All threads call it.
    template <class T, class F>
    __device__ __forceinline__ void build(const Layer<T>& layer, F units_of) {
        route_in_one_block(
            layer.expert_ids, layer.tokens * layer.per_token, layer.experts, counters, offsets,
            slots, rows
        );
        for (int expert = static_cast<int>(threadIdx.x); expert < layer.experts;
             expert += kThreads) {
            const bool is_active = offsets[expert + 1] > offsets[expert];
            units[expert] = is_active ? units_of(expert) : 0;
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            scan_by_one_warp(units, layer.experts);
        }
        __syncthreads();
    }

    /// The expert that owns a unit.
    __device__ __forceinline__ int expert_of(int unit, int experts) const {
        int low = 0;
        int high = experts;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (units[middle] <= unit ? low : high) = middle;
        }
        return low;
    }
};

/// What both kernels need beside the layer.
struct StreamBuffers {
    std::int32_t* taken;     // [1], units of the second kernel beyond one per block
    std::int32_t* arrivals;  // [T, column blocks]
    int arrival_count;
};

}  // namespace
}  // namespace tenp::cuda
