// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/expert_gemm/activation.cuh"
#include "cuda/expert_gemm/streaming_routing.cuh"

// The first launch of streaming.cuh.

namespace tenp::cuda {
namespace {

constexpr int kUnitNeurons = 16;
constexpr int kPassRows = 32;  // rows of one pass over a unit's weights, four 8-wide products
constexpr int kPassTiles = kPassRows / 8;

/// What a warp adds to the sums of a unit, in shared memory. Two rows lie 8 banks apart, so that
/// the lanes of a warp, which have 4 pairs of rows x 8 neurons, store to 32 different banks.
template <bool kGated>
using PartialSums = float[kGated ? 2 : 1][kPassRows][kUnitNeurons + 4];

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
    auto* partials = shared_memory<PartialSums<kGated>>();  // [warps]
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
                if (n == 0 || 8 * n < rows) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        partials[warp][matrix][8 * n + 2 * m + i % 2][g + i / 2 * 8] =
                            sums[matrix][n][i];
                    }
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

}  // namespace
}  // namespace tenp::cuda
