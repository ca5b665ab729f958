// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "cuda/device/routing.cuh"
#include "cuda/expert_gemm/activation.cuh"
#include "cuda/expert_gemm/layer.h"
#include "cuda/launch.cuh"

// expert_gemm for few tokens, where reading the weights once is all the time there is: they go from
// memory to registers, 16 bytes a lane. Two launches. Both sort the slots by themselves, in shared
// memory, so that nothing comes before the first weights.

namespace tenp::cuda {
namespace {

constexpr int kMostTokens = 64;
constexpr int kMostSlots = 1024;
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

constexpr int kUnitNeurons = 16;
constexpr int kPassRows = 32;  // rows of one pass over a unit's weights, four 8-wide products
constexpr int kPassTiles = kPassRows / 8;
constexpr int kUnitColumns = 64;

// ---- kernels ------------------------------------------------------------------------------------

/// m = act(W_g x + b_g) * (W_u x + b_u), as activations_kernel, for few rows.
/// Grid: any number of blocks. Units of 16 neurons and up to 32 rows of an expert are cut into
/// equal shares, one a block; its 8 warps split the depth of a unit.
/// A lane reads 16 bytes of rows g and g + 8 of W and of row g of x: depth 8 m to 8 m + 7 of 32.
/// The order of the depth is free, so these bytes serve two products without an exchange.
/// Shared memory: the warps' parts of the sums, added in their order; the sorted slots.
/// Holds: rows of hidden, gate and up start at multiples of 16 bytes, H is a multiple of 8.
template <class T, bool kGated>
__global__ void __launch_bounds__(kThreads) stream_activations_kernel(
    Layer<T> layer, StreamBuffers buffers
) {
    constexpr int kMatrices = kGated ? 2 : 1;
    using PartialSums = float[kMatrices][kPassRows][kUnitNeurons];
    auto* partials = shared_memory<PartialSums>();  // [warps]
    SmallRouting routing(partials + kWarps, layer.experts, layer.tokens * layer.per_token);
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / 32;
    const int g = thread % 32 / 4;
    const int m = thread % 4;

    for (int i = static_cast<int>(blockIdx.x) * kThreads + thread; i < buffers.arrival_count;
         i += static_cast<int>(gridDim.x) * kThreads) {
        buffers.arrivals[i] = 0;
    }
    if (blockIdx.x == 0 && thread == 0) {
        *buffers.taken = 0;
    }
    routing.build(layer, [&](int expert) {
        const int rows = routing.offsets[expert + 1] - routing.offsets[expert];
        return (layer.width(expert) + kUnitNeurons - 1) / kUnitNeurons *
               ((rows + kPassRows - 1) / kPassRows);
    });
    allow_next_kernel();  // it reads weights before it waits for what this one writes

    const std::int64_t units = routing.units[layer.experts];
    const int first_unit = static_cast<int>(units * blockIdx.x / gridDim.x);
    const int last_unit = static_cast<int>(units * (blockIdx.x + 1) / gridDim.x);
    const int depth_groups = (layer.hidden_size + 31) / 32;
    const int first_depth = depth_groups * warp / kWarps * 32;
    const int last_depth = min(depth_groups * (warp + 1) / kWarps * 32, layer.hidden_size);

    for (int unit = first_unit; unit < last_unit; ++unit) {
        const int expert = routing.expert_of(unit, layer.experts);
        const int expert_rows = routing.offsets[expert + 1] - routing.offsets[expert];
        const int passes = (expert_rows + kPassRows - 1) / kPassRows;
        const int first_neuron = (unit - routing.units[expert]) / passes * kUnitNeurons;
        const int pass = (unit - routing.units[expert]) % passes * kPassRows;
        const int first_row = routing.offsets[expert] + pass;
        const int rows = min(kPassRows, expert_rows - pass);
        const int neurons = min(kUnitNeurons, layer.width(expert) - first_neuron);
        const T* weights[kMatrices][2];  // rows g and g + 8, or nullptr
#pragma unroll
        for (int matrix = 0; matrix < kMatrices; ++matrix) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int neuron = g + 8 * half;
                const T* first = kGated && matrix == 0 ? layer.gate : layer.up;
                weights[matrix][half] =
                    neuron < neurons ? first + layer.weight_offset(expert, first_neuron + neuron)
                                     : nullptr;
            }
        }
        const T* x[kPassTiles];
#pragma unroll
        for (int n = 0; n < kPassTiles; ++n) {
            const int row = 8 * n + g;
            x[n] = row < rows ? layer.hidden + routing.slots[first_row + row] / layer.per_token *
                                                   layer.hidden_stride
                              : nullptr;
        }
        float sums[kMatrices][kPassTiles][4] = {};
#pragma unroll 2
        for (int depth = first_depth; depth < last_depth; depth += 32) {
            const int k = depth + 8 * m;
            const bool is_inside = k < layer.hidden_size;
            uint4 w[kMatrices][2];
#pragma unroll
            for (int matrix = 0; matrix < kMatrices; ++matrix) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const T* row = weights[matrix][half];
                    w[matrix][half] = row != nullptr && is_inside ? load_streaming(row + k)
                                                                  : make_uint4(0, 0, 0, 0);
                }
            }
#pragma unroll
            for (int n = 0; n < kPassTiles; ++n) {
                if (n == 0 || 8 * n < rows) {
                    const uint4 values = x[n] != nullptr && is_inside
                                             ? *reinterpret_cast<const uint4*>(x[n] + k)
                                             : make_uint4(0, 0, 0, 0);
#pragma unroll
                    for (int matrix = 0; matrix < kMatrices; ++matrix) {
                        const uint4& low = w[matrix][0];
                        const uint4& high = w[matrix][1];
                        auto& c = sums[matrix][n];
                        multiply_add<T>(c, {low.x, high.x, low.y, high.y}, values.x, values.y);
                        multiply_add<T>(c, {low.z, high.z, low.w, high.w}, values.z, values.w);
                    }
                }
            }
        }
#pragma unroll
        for (int matrix = 0; matrix < kMatrices; ++matrix) {
#pragma unroll
            for (int n = 0; n < kPassTiles; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    partials[warp][matrix][8 * n + 2 * m + i % 2][g + i / 2 * 8] =
                        sums[matrix][n][i];
                }
            }
        }
        __syncthreads();
        for (int i = thread; i < rows * kUnitNeurons; i += kThreads) {
            const int row = i / kUnitNeurons;
            const int neuron = i % kUnitNeurons;
            if (neuron < neurons) {
                float total[kMatrices] = {};
#pragma unroll
                for (int matrix = 0; matrix < kMatrices; ++matrix) {
#pragma unroll
                    for (int w = 0; w < kWarps; ++w) {
                        total[matrix] += partials[w][matrix][row][neuron];
                    }
                    const T* bias = kGated && matrix == 0 ? layer.gate_bias : layer.up_bias;
                    if (bias != nullptr) {
                        const std::int64_t bias_row = layer.first_bias_row(expert) + first_neuron;
                        total[matrix] += widen(bias[bias_row + neuron]);
                    }
                }
                float value;
                if constexpr (kGated) {
                    value = activate_gated(
                        layer.activation, layer.limit, layer.alpha, total[0], total[1]
                    );
                } else {
                    value = activate(layer.activation, total[0]);
                }
                layer.activations
                    [(first_row + row) * layer.activations_stride + first_neuron + neuron] =
                    narrow<T>(value);
            }
        }
        __syncthreads();
    }
}

/// Sums of kRows rows and a unit's columns over the neurons of an expert: lane 8 j + c has columns
/// 8 c to 8 c + 7 for every 32nd neuron, from 4 w + j on. Added over j in a fixed tree, then stored
/// per warp.
template <int kRows, class T>
__device__ __forceinline__ void add_neurons(
    float* partials,  // [warps, kRows, 64]
    const T* down,    // [W_e, H], from the unit's first column on
    int hidden_size,
    int columns,
    const T* activations,  // [kRows, W_e]
    std::int64_t activations_stride,
    int rows,
    int width
) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int warp = static_cast<int>(threadIdx.x / 32);
    const int column = lane % 8 * 8;
    const bool is_inside = column < columns;
    float sums[kRows][8] = {};
#pragma unroll(kRows > 4 ? 2 : 4)  // more rows, fewer loads ahead: 128 registers
    for (int neuron = 4 * warp + lane / 8; neuron < width; neuron += 4 * kWarps) {
        const uint4 bits = is_inside
                               ? load_streaming(down + std::int64_t{neuron} * hidden_size + column)
                               : make_uint4(0, 0, 0, 0);
        const std::uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
        float w[8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            w[2 * i] = widen(T{static_cast<std::uint16_t>(words[i] & 0xffffu)});
            w[2 * i + 1] = widen(T{static_cast<std::uint16_t>(words[i] >> 16)});
        }
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            // Rows that do not exist repeat the last one; their sums are dropped.
            const int existing = min(row, rows - 1);
            const float m = widen(activations[existing * activations_stride + neuron]);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                sums[row][i] += m * w[i];
            }
        }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float sum = sums[row][i];
            sum += __shfl_xor_sync(~0u, sum, 8);
            sum += __shfl_xor_sync(~0u, sum, 16);
            if (lane < 8) {
                partials[(warp * kRows + row) * kUnitColumns + column + i] = sum;
            }
        }
    }
}

constexpr int kOutputRows = 8;  // of one pass over a unit's weights

/// y = W_d m + b_d, then, by whoever completes a token's columns, out = sum over slots of g y.
/// Grid: any number of blocks. A unit is 64 columns of an active expert. A block takes the unit of
/// its own number, then whatever is next; who computes a unit changes no result.
/// A lane owns 8 columns and every 32nd neuron (see add_neurons), 8 rows at a time.
/// Shared memory: the warps' parts of the sums, the tokens completed, the sorted slots.
/// Holds: arrivals and taken start at 0; rows of down start at multiples of 16 bytes, H is a
/// multiple of 8. m and y come from other multiprocessors: nothing of them is cached before.
template <class T>
__global__ void __launch_bounds__(kThreads) stream_outputs_kernel(
    Layer<T> layer, StreamBuffers buffers
) {
    auto* partials = shared_memory<float>();  // [warps, 8, 64]
    auto* completed =
        reinterpret_cast<int*>(partials + kWarps * kOutputRows * kUnitColumns);  // [64]
    int* next = completed + kMostTokens;
    int* completed_count = next + 1;
    SmallRouting routing(next + 2, layer.experts, layer.tokens * layer.per_token);
    const int thread = static_cast<int>(threadIdx.x);
    const int hidden_size = layer.hidden_size;
    const int column_blocks = (hidden_size + kUnitColumns - 1) / kUnitColumns;

    routing.build(layer, [&](int) { return column_blocks; });
    const int units = routing.units[layer.experts];
    int unit = static_cast<int>(blockIdx.x);
    if (unit < units) {
        const int expert = routing.expert_of(unit, layer.experts);
        const int column = (unit - routing.units[expert]) * kUnitColumns;
        const T* down =
            layer.down + std::int64_t{layer.neuron_offsets[expert]} * hidden_size + column;
        for (int neuron = thread; neuron < layer.width(expert); neuron += kThreads) {
            prefetch(down + std::int64_t{neuron} * hidden_size);
        }
    }
    wait_for_previous_kernel();

    while (unit < units) {
        const int expert = routing.expert_of(unit, layer.experts);
        const int block = unit - routing.units[expert];
        const int first_column = block * kUnitColumns;
        const int columns = min(kUnitColumns, hidden_size - first_column);
        const int first_row = routing.offsets[expert];
        const int expert_rows = routing.offsets[expert + 1] - first_row;
        const T* down =
            layer.down + std::int64_t{layer.neuron_offsets[expert]} * hidden_size + first_column;

        for (int pass = 0; pass < expert_rows; pass += kOutputRows) {
            const int rows = min(kOutputRows, expert_rows - pass);
            const T* m = layer.activations + (first_row + pass) * layer.activations_stride;
            const int width = layer.width(expert);
            const auto add = [&]<int kRows>() {
                add_neurons<kRows>(
                    partials, down, hidden_size, columns, m, layer.activations_stride, rows, width
                );
            };
            const int stored_rows = rows == 1 ? 1 : rows == 2 ? 2 : rows <= 4 ? 4 : 8;
            switch (stored_rows) {
                case 1: add.template operator()<1>(); break;
                case 2: add.template operator()<2>(); break;
                case 4: add.template operator()<4>(); break;
                default: add.template operator()<8>(); break;
            }
            __syncthreads();
            for (int i = thread; i < rows * kUnitColumns; i += kThreads) {
                const int row = i / kUnitColumns;
                const int column = i % kUnitColumns;
                if (column < columns) {
                    float y = 0;
                    for (int warp = 0; warp < kWarps; ++warp) {
                        y += partials[(warp * stored_rows + row) * kUnitColumns + column];
                    }
                    if (layer.down_bias != nullptr) {
                        y +=
                            widen(layer.down_bias
                                      [std::int64_t{expert} * hidden_size + first_column + column]);
                    }
                    layer.outputs
                        [std::int64_t{first_row + pass + row} * hidden_size + first_column +
                         column] = y;
                }
            }
            __syncthreads();
        }

        // Tell each row's token; the last to do so for these columns adds its slots up.
        if (thread == 0) {
            *completed_count = 0;
        }
        __threadfence();
        __syncthreads();
        for (int row = first_row + thread; row < first_row + expert_rows; row += kThreads) {
            const int token = routing.slots[row] / layer.per_token;
            int expected = 0;
            for (int j = 0; j < layer.per_token; ++j) {
                expected += routing.rows[token * layer.per_token + j] >= 0;
            }
            const int before = atomicAdd(&buffers.arrivals[token * column_blocks + block], 1);
            if (before + 1 == expected) {
                completed[atomicAdd(completed_count, 1)] = token;
            }
        }
        __threadfence();
        __syncthreads();
        const int count = *completed_count;
        for (int i = thread; i < count * kUnitColumns; i += kThreads) {
            const int token = completed[i / kUnitColumns];
            const int column = i % kUnitColumns;
            if (column < columns) {
                float sum = 0;
                for (int j = 0; j < layer.per_token; ++j) {
                    const int slot = token * layer.per_token + j;
                    const std::int64_t row = routing.rows[slot];
                    if (row >= 0) {
                        const float* y = layer.outputs + row * hidden_size + first_column + column;
                        sum += layer.gates[slot] * __ldcg(y);
                    }
                }
                layer.out[token * layer.out_stride + first_column + column] = narrow<T>(sum);
            }
        }
        if (thread == 0) {
            *next = static_cast<int>(gridDim.x) + atomicAdd(buffers.taken, 1);
        }
        __syncthreads();
        unit = *next;
        __syncthreads();
    }

    for (int token = static_cast<int>(blockIdx.x); token < layer.tokens;
         token += static_cast<int>(gridDim.x)) {
        bool is_named = false;
        for (int j = 0; j < layer.per_token; ++j) {
            is_named = is_named || routing.rows[token * layer.per_token + j] >= 0;
        }
        for (int column = thread; !is_named && column < hidden_size; column += kThreads) {
            layer.out[token * layer.out_stride + column] = narrow<T>(0);
        }
    }
}

// ---- launchers ----------------------------------------------------------------------------------

template <class T>
StreamBuffers take_stream_buffers(Workspace& workspace, const Layer<T>& layer) {
    const int blocks = (layer.hidden_size + kUnitColumns - 1) / kUnitColumns;
    StreamBuffers buffers;
    buffers.taken = workspace.take<std::int32_t>(1);
    buffers.arrival_count = layer.tokens * blocks;
    buffers.arrivals = workspace.take<std::int32_t>(buffers.arrival_count);
    return buffers;
}

template <class T, bool kGated>
void launch_streams(const Layer<T>& layer, const StreamBuffers& buffers, Stream stream) {
    const int slots = layer.tokens * layer.per_token;
    const std::size_t routing_bytes = SmallRouting::bytes(layer.experts, slots);
    const std::int64_t active = std::min<std::int64_t>(layer.experts, slots);
    // Rows beyond an expert's first pass add at most slots / kPassRows passes in all.
    const std::int64_t neuron_units =
        (active + slots / kPassRows) * ((layer.max_width + kUnitNeurons - 1) / kUnitNeurons);
    const std::int64_t column_units =
        active * ((layer.hidden_size + kUnitColumns - 1) / kUnitColumns);
    constexpr std::size_t kPartials =
        sizeof(float) * kWarps * (kGated ? 2 : 1) * kPassRows * kUnitNeurons;
    launch_persistent(
        stream_activations_kernel<T, kGated>, neuron_units,
        {.threads = kThreads, .shared_bytes = kPartials + routing_bytes}, stream, layer, buffers
    );
    launch_persistent(
        stream_outputs_kernel<T>, column_units,
        {.threads = kThreads,
         .shared_bytes = sizeof(float) * kWarps * kOutputRows * kUnitColumns +
                         sizeof(int) * (kMostTokens + 2) + routing_bytes,
         .overlap_previous = true},
        stream, layer, buffers
    );
}

}  // namespace

template <class T>
bool may_stream(const Layer<T>& layer) {
    const std::int64_t slots = std::int64_t{layer.tokens} * layer.per_token;
    return layer.tokens <= kMostTokens && slots <= kMostSlots && layer.experts <= kMostExperts;
}

template <class T>
std::size_t streaming_workspace_bytes(Layer<T> layer) {
    Workspace workspace;
    take_layer(workspace, layer, std::int64_t{layer.tokens} * layer.per_token);
    take_stream_buffers(workspace, layer);
    return workspace.bytes();
}

template <class T>
void run_by_streaming(Layer<T> layer, bool is_gated, void* memory, Stream stream) {
    Workspace workspace(memory);
    take_layer(workspace, layer, std::int64_t{layer.tokens} * layer.per_token);
    const StreamBuffers buffers = take_stream_buffers(workspace, layer);
    if (is_gated) {
        launch_streams<T, true>(layer, buffers, stream);
    } else {
        launch_streams<T, false>(layer, buffers, stream);
    }
}

}  // namespace tenp::cuda
