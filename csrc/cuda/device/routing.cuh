// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cuda/device/ptx.cuh"

// A stable counting sort in two passes over the slots, with one counter per warp and expert. Warps
// own contiguous pieces of the slots, in order; inside a warp the rank of a slot is the number of
// lower lanes with its expert. Only counts are added atomically, so positions never depend on
// timing.

namespace tenp::cuda {

/// The part of the slots that a warp owns.
struct Piece {
    int first;
    int last;  // one past the end

    __device__ __forceinline__ Piece(int first_slot, int last_slot, int warp, int warps) {
        const int lines = (last_slot - first_slot + 31) / 32;  // of 32 slots
        const int per_warp = (lines + warps - 1) / warps;
        first = min(last_slot, first_slot + warp * per_warp * 32);
        last = min(last_slot, first + per_warp * 32);
    }
};

/// Counts the piece's slots of each expert into counters[E], which start at 0.
__device__ __forceinline__ void count_slots(
    const std::int32_t* ids, Piece piece, int experts, int* counters
) {
    for (int slot = piece.first + static_cast<int>(threadIdx.x % 32); slot < piece.last;
         slot += 32) {
        const int id = ids[slot];
        if (id >= 0 && id < experts) {
            atomicAdd(&counters[id], 1);
        }
    }
}

/// Gives the piece's slots their rows. counters[e] is the first row of the piece's first slot of
/// expert e, and ends one past its last.
__device__ __forceinline__ void place_slots(
    const std::int32_t* ids,
    Piece piece,
    int experts,
    int* counters,
    std::int32_t* slots,
    std::int32_t* rows
) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int line = piece.first; line < piece.last; line += 32) {
        const int slot = line + lane;
        const int id = slot < piece.last ? ids[slot] : -1;
        const bool is_named = id >= 0 && id < experts;
        const unsigned same = __match_any_sync(~0u, is_named ? id : -1);
        const int rank = __popc(same & ((1u << lane) - 1));
        const int row = is_named ? counters[id] + rank : -1;
        __syncwarp();
        if (is_named && rank == 0) {
            counters[id] += __popc(same);
        }
        __syncwarp();
        if (slot < piece.last) {
            rows[slot] = row;
        }
        if (is_named) {
            slots[row] = slot;
        }
    }
}

/// Turns totals[0..count-1] into their exclusive prefix sums, totals[count] into the sum. One warp.
__device__ __forceinline__ void scan_by_one_warp(std::int32_t* totals, int count) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    int before = 0;
    for (int first = 0; first < count; first += 32) {
        const int i = first + lane;
        const int mine = i < count ? totals[i] : 0;
        int inclusive = mine;
        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(~0u, inclusive, distance);
            inclusive += lane >= distance ? other : 0;
        }
        if (i < count) {
            totals[i] = before + inclusive - mine;
        }
        before += __shfl_sync(~0u, inclusive, 31);
    }
    if (lane == 0) {
        totals[count] = before;
    }
}

/// Sorts a few slots by one block. counters is [warps, E] of shared memory; offsets is [E+1],
/// anywhere. All threads of the block call it; on return all of them see the result.
__device__ __forceinline__ void route_in_one_block(
    const std::int32_t* ids,
    int slot_count,
    int experts,
    int* counters,
    std::int32_t* offsets,
    std::int32_t* slots,
    std::int32_t* rows
) {
    const int threads = static_cast<int>(blockDim.x);
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / 32;
    const int warps = threads / 32;
    for (int i = thread; i < warps * experts; i += threads) {
        counters[i] = 0;
    }
    __syncthreads();
    const Piece piece(0, slot_count, warp, warps);
    count_slots(ids, piece, experts, counters + warp * experts);
    __syncthreads();
    for (int expert = thread; expert < experts; expert += threads) {
        int total = 0;
        for (int w = 0; w < warps; ++w) {
            total += counters[w * experts + expert];
        }
        offsets[expert] = total;
    }
    __syncthreads();
    if (warp == 0) {
        scan_by_one_warp(offsets, experts);
    }
    __syncthreads();
    for (int expert = thread; expert < experts; expert += threads) {
        int next = offsets[expert];
        for (int w = 0; w < warps; ++w) {
            const int count = counters[w * experts + expert];
            counters[w * experts + expert] = next;
            next += count;
        }
    }
    __syncthreads();
    place_slots(ids, piece, experts, counters + warp * experts, slots, rows);
    for (int i = offsets[experts] + thread; i < slot_count; i += threads) {
        slots[i] = -1;
    }
    __syncthreads();
}

}  // namespace tenp::cuda
