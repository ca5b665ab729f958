// SPDX-License-Identifier: Apache-2.0
#include "cuda/routing.h"

#include <algorithm>
#include <string>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cuda/device/routing.cuh"
#include "cuda/launch.cuh"

namespace tenp::cuda {
namespace {

/// Slots of one block. 4096 leaves a histogram of E/4096 of the slots and fills an H200 at T*k =
/// 540000; fewer slots make smaller histograms per block, not fewer of them.
constexpr int kChunk = 4096;
constexpr std::size_t kMostShared = 48 << 10;

constexpr int kWarps = 8;

// ---- kernels ------------------------------------------------------------------------------------

/// Counts how many slots of each chunk name each expert.
/// Grid: one block a chunk of kChunk slots. A thread takes every 256th slot.
/// histogram[e, chunk] is overwritten.
/// Shared memory: E counters.
/// Holds: E * 4 bytes fit into shared memory.
__global__ void __launch_bounds__(32 * kWarps) count_kernel(Routing routing, int chunks) {
    auto* counters = shared_memory<int>();
    const int thread = static_cast<int>(threadIdx.x);
    const int chunk = static_cast<int>(blockIdx.x);
    for (int expert = thread; expert < routing.experts; expert += 32 * kWarps) {
        counters[expert] = 0;
    }
    __syncthreads();
    const int first = chunk * kChunk;
    const Piece piece(first, min(first + kChunk, routing.slot_count), thread / 32, kWarps);
    count_slots(routing.ids, piece, routing.experts, counters);
    __syncthreads();
    for (int expert = thread; expert < routing.experts; expert += 32 * kWarps) {
        routing.histogram[static_cast<std::int64_t>(expert) * chunks + chunk] = counters[expert];
    }
}

/// Turns the histogram into first rows: within each expert the exclusive sum over chunks, and
/// offsets[E+1] over the experts.
/// Grid: one block. A warp takes every 32nd expert, its lanes the chunks.
/// histogram is changed in place, offsets overwritten.
/// Shared memory: none.
/// Holds: the histogram comes from count_kernel.
__global__ void __launch_bounds__(1024) scan_kernel(Routing routing, int chunks) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int expert = static_cast<int>(threadIdx.x / 32); expert < routing.experts; expert += 32) {
        std::int32_t* counts = routing.histogram + static_cast<std::int64_t>(expert) * chunks;
        int before = 0;
        for (int first = 0; first < chunks; first += 32) {
            const int chunk = first + lane;
            const int mine = chunk < chunks ? counts[chunk] : 0;
            int inclusive = mine;
            for (int distance = 1; distance < 32; distance *= 2) {
                const int other = __shfl_up_sync(~0u, inclusive, distance);
                inclusive += lane >= distance ? other : 0;
            }
            if (chunk < chunks) {
                counts[chunk] = before + inclusive - mine;
            }
            before += __shfl_sync(~0u, inclusive, 31);
        }
        if (lane == 0) {
            routing.offsets[expert] = before;
        }
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        scan_by_one_warp(routing.offsets, routing.experts);
    }
}

/// Gives every slot of a chunk its row: the expert's first row, plus the slots of earlier chunks,
/// earlier warps and lower ranks in the warp.
/// Grid: one block a chunk. A warp owns a contiguous piece of the chunk.
/// rows[slot] and slots[row] are overwritten, slots also past the last row.
/// Shared memory: one counter per warp and expert.
/// Holds: histogram and offsets come from scan_kernel.
__global__ void __launch_bounds__(32 * kWarps) place_kernel(Routing routing, int chunks) {
    auto* counters = shared_memory<int>();
    const int threads = static_cast<int>(blockDim.x);
    const int warps = threads / 32;
    const int thread = static_cast<int>(threadIdx.x);
    const int chunk = static_cast<int>(blockIdx.x);
    const int experts = routing.experts;
    const int first = chunk * kChunk;
    const int last = min(first + kChunk, routing.slot_count);

    for (int i = thread; i < warps * experts; i += threads) {
        counters[i] = 0;
    }
    __syncthreads();
    const Piece piece(first, last, thread / 32, warps);
    int* mine = counters + thread / 32 * experts;
    count_slots(routing.ids, piece, experts, mine);
    __syncthreads();
    for (int expert = thread; expert < experts; expert += threads) {
        int next = routing.offsets[expert] +
                   routing.histogram[static_cast<std::int64_t>(expert) * chunks + chunk];
        for (int warp = 0; warp < warps; ++warp) {
            const int count = counters[warp * experts + expert];
            counters[warp * experts + expert] = next;
            next += count;
        }
    }
    __syncthreads();
    place_slots(routing.ids, piece, experts, mine, routing.slots, routing.rows);
    for (int i = max(first, routing.offsets[experts]) + thread; i < last; i += threads) {
        routing.slots[i] = -1;
    }
}

/// All of the above for at most kChunk slots.
/// Grid: one block.
/// offsets, slots and rows are overwritten.
/// Shared memory: one counter per warp and expert.
/// Holds: slot_count <= kChunk.
__global__ void __launch_bounds__(32 * kWarps) route_kernel(Routing routing) {
    route_in_one_block(
        routing.ids, routing.slot_count, routing.experts, shared_memory<int>(), routing.offsets,
        routing.slots, routing.rows
    );
}

/// Tiles of an expert, and where they start in the table: after those of all wider experts.
struct Extent {
    int row_tiles;
    int blocks;

    __device__ __forceinline__ Extent(const TileTable& table, int expert) {
        const int rows = table.offsets[expert + 1] - table.offsets[expert];
        const int columns = table.columns >= 0 ? table.columns : table.widths[expert];
        row_tiles = rows > 0 ? (rows - 1) / table.tile_rows + 1 : 0;
        blocks = columns > 0 ? (columns - 1) / table.tile_neurons + 1 : 0;
    }
    __device__ __forceinline__ std::int64_t tiles() const {
        return std::int64_t{row_tiles} * blocks;
    }
};

__device__ __forceinline__ void store_tile(
    std::int32_t* tile, int expert, int row, int rows, int neuron
) {
    tile[0] = expert;
    tile[1] = row;
    tile[2] = rows;
    tile[3] = neuron;
}

constexpr int kTableThreads = 128;

/// Lists the tiles of every expert: by descending width, then neuron blocks, then row tiles.
/// Grid: one block an expert, and one for the count and the unused tail.
/// A thread sums every 128th expert's tiles, then writes every 128th tile of its own.
/// Shared memory: one partial sum per warp.
/// Holds: tiles past `capacity` are left out (the caller's capacity covers every routing).
__global__ void __launch_bounds__(kTableThreads) tile_table_kernel(TileTable table) {
    auto* partial = shared_memory<long long>();
    const int thread = static_cast<int>(threadIdx.x);
    const int expert = static_cast<int>(blockIdx.x);
    const bool is_last = expert == table.experts;
    const auto width_of = [&](int e) { return table.widths == nullptr ? 0 : table.widths[e]; };
    const int width = is_last ? -1 : width_of(expert);

    long long before = 0;
    for (int other = thread; other < table.experts; other += kTableThreads) {
        const int other_width = width_of(other);
        if (other_width > width || (other_width == width && other < expert)) {
            before += Extent(table, other).tiles();
        }
    }
    for (int flip = 16; flip > 0; flip /= 2) {
        before += __shfl_xor_sync(~0u, before, flip);
    }
    if (thread % 32 == 0) {
        partial[thread / 32] = before;
    }
    __syncthreads();
    const std::int64_t first = partial[0] + partial[1] + partial[2] + partial[3];

    if (is_last) {
        for (std::int64_t i = first + thread; i < table.capacity; i += kTableThreads) {
            store_tile(table.tiles + 4 * i, -1, -1, -1, -1);
        }
        if (thread == 0) {
            *table.count = static_cast<std::int32_t>(min(first, std::int64_t{table.capacity}));
            if (table.cleared != nullptr) {
                *table.cleared = 0;
            }
        }
        return;
    }
    const Extent extent(table, expert);
    const int first_row = table.offsets[expert];
    const int rows = table.offsets[expert + 1] - first_row;
    // What no table can list is not counted either, so tiles are numbered in 32 bits.
    const auto tiles = static_cast<int>(min(extent.tiles(), table.capacity - first));
    for (int tile = thread; tile < tiles; tile += kTableThreads) {
        const int row = tile % extent.row_tiles * table.tile_rows;
        const int neuron = tile / extent.row_tiles * table.tile_neurons;
        store_tile(
            table.tiles + 4 * (first + tile), expert, first_row + row,
            min(table.tile_rows, rows - row), neuron
        );
    }
}

// ---- launchers ----------------------------------------------------------------------------------

std::int64_t chunks_of(std::int64_t slot_count) {
    return (slot_count + kChunk - 1) / kChunk;
}

}  // namespace

std::int32_t* take_histogram(Workspace& workspace, std::int64_t slot_count, std::int64_t experts) {
    const std::int64_t chunks = chunks_of(slot_count);
    return workspace.take<std::int32_t>(chunks > 1 ? chunks * experts : 0);
}

void route(const Routing& routing, Stream stream) {
    const std::size_t per_warp = sizeof(int) * static_cast<std::size_t>(routing.experts);
    if (per_warp > kMostShared) {
        throw Unsupported(
            "route: offsets must be of " + std::to_string(kMostShared / sizeof(int)) +
            " experts or fewer on CUDA, got " + std::to_string(routing.experts)
        );
    }
    const std::size_t warps =
        per_warp == 0 ? kWarps : std::min<std::size_t>(kWarps, kMostShared / per_warp);
    const LaunchShape place{
        .threads = static_cast<int>(32 * warps), .shared_bytes = warps * per_warp
    };
    const std::int64_t chunks = chunks_of(routing.slot_count);
    if (chunks <= 1) {
        launch(route_kernel, place, stream, routing);
        return;
    }
    const int chunk_count = static_cast<int>(chunks);
    launch(
        count_kernel, {.blocks = chunks, .threads = 32 * kWarps, .shared_bytes = per_warp}, stream,
        routing, chunk_count
    );
    launch(scan_kernel, {.blocks = 1, .threads = 1024}, stream, routing, chunk_count);
    LaunchShape by_chunk = place;
    by_chunk.blocks = chunks;
    launch(place_kernel, by_chunk, stream, routing, chunk_count);
}

void tile_table(const TileTable& table, Stream stream) {
    launch(
        tile_table_kernel,
        {.blocks = std::int64_t{table.experts} + 1,
         .threads = kTableThreads,
         .shared_bytes = kTableThreads / 32 * sizeof(long long)},
        stream, table
    );
}

std::size_t route_workspace_bytes(std::int64_t slot_count, std::int64_t experts) {
    if (chunks_of(slot_count) <= 1) {
        return 0;
    }
    Workspace workspace;
    take_histogram(workspace, slot_count, experts);
    return workspace.bytes();
}

void route(const RoutingArgs& args, Stream stream) {
    Workspace workspace(args.workspace.data);
    const std::int64_t slot_count = args.slots.shape[0];
    const std::int64_t experts = args.offsets.shape[0] - 1;
    route(
        {
            .ids = data<const std::int32_t>(args.expert_ids),
            .slot_count = static_cast<std::int32_t>(slot_count),
            .experts = static_cast<std::int32_t>(experts),
            .offsets = data<std::int32_t>(args.offsets),
            .slots = data<std::int32_t>(args.slots),
            .rows = data<std::int32_t>(args.rows),
            .histogram = take_histogram(workspace, slot_count, experts),
        },
        stream
    );
}

void tile_table(const TileTableArgs& args, Stream stream) {
    tile_table(
        {
            .offsets = data<const std::int32_t>(args.offsets),
            .widths = data<const std::int32_t>(args.widths),
            .experts = static_cast<std::int32_t>(args.widths.shape[0]),
            .tile_rows = args.tile_rows,
            .tile_neurons = args.tile_neurons,
            .capacity = static_cast<std::int32_t>(args.tiles.shape[0]),
            .tiles = data<std::int32_t>(args.tiles),
            .count = data<std::int32_t>(args.count),
        },
        stream
    );
}

}  // namespace tenp::cuda
