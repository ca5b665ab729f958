// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/expert_gemm/streaming_routing.cuh"

// The second launch of streaming.cuh.

namespace tenp::cuda {
namespace {

constexpr int kUnitColumns = 64;

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
    int activations_stride,
    int rows,
    int width
) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int warp = static_cast<int>(threadIdx.x / 32);
    const int column = lane % 8 * 8;
    const bool is_inside = column < columns;
    float sums[kRows][8] = {};
#pragma unroll(kRows > 4 ? 1 : 4)  // more rows, fewer loads ahead: 128 registers
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
/// Two blocks share a multiprocessor, and have 32 KiB of weights on their way when rows are few.
/// Holds: arrivals and taken start at 0; rows of down start at multiples of 16 bytes, H is a
/// multiple of 8. m and y come from other multiprocessors: nothing of them is cached before.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) stream_outputs_kernel(
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
                    partials, down, hidden_size, columns, m,
                    static_cast<int>(layer.activations_stride), rows, width
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

}  // namespace
}  // namespace tenp::cuda
