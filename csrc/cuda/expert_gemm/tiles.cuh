// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/device/block_product.cuh"
#include "cuda/device/tiles.cuh"
#include "cuda/expert_gemm/activation.cuh"
#include "cuda/expert_gemm/layer.h"
#include "cuda/launch.cuh"
#include "cuda/routing.h"
#include "cuda/tile_work.h"

// expert_gemm for many tokens: two grouped products over tile tables, then the sum over slots.
// Blocks stay and take tiles until none is left; which block computes a tile changes no result.

namespace tenp::cuda {
namespace {

/// Rows that go through the layer at a time. It bounds the workspace (y alone is 4 H bytes a row);
/// at this size an expert of 128 still has 512 rows, so that reading its weights again does not
/// show.
constexpr std::int64_t kRowsAtOnce = 65536;

/// Columns of a tile of the second product: two groups.
constexpr int kTileHidden = 2 * kGroupNeurons;

// ---- kernels ------------------------------------------------------------------------------------

/// m = act(W_g x + b_g) * (W_u x + b_u) for tiles of 64 rows and 128 neurons.
/// Grid: any number of blocks, a block takes tiles; the product's loads gather the rows of x.
/// A thread has gate and up of the same 2 neurons x 16 rows (see Sums): m is made in registers.
/// Shared memory: the product's stages, reused for the tile of m on its way out; the next tile.
/// Holds: offsets and slots come from route().
template <class T, class Math, bool kGated>
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks) activations_kernel(
    Layer<T> layer, Work work
) {
    constexpr int kGroups = kGated ? 2 : 1;
    using Product = BlockProduct<T, Math, kGroups, false>;
    constexpr int kVector = 16 / static_cast<int>(sizeof(T));
    constexpr int kOutStride = kGroupNeurons + kVector;  // of a tile's row in shared memory
    static_assert(kBlockRows * kOutStride * sizeof(T) <= Product::kSharedBytes);
    auto* shared = shared_memory<unsigned char>();
    auto* out = reinterpret_cast<T*>(shared);
    const int thread = static_cast<int>(threadIdx.x);

    Tiles tile(work, reinterpret_cast<int*>(shared + Product::kSharedBytes));
    for (; !tile.is_done(); tile.advance()) {
        const int expert = tile.expert();
        const int rows = tile.rows();
        const int first_neuron = tile.first_column();
        const int neurons = min(kGroupNeurons, layer.width(expert) - first_neuron);
        const std::int64_t weights = layer.weight_offset(expert, first_neuron);

        typename Product::Left left;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            const T* first = kGated && group == 0 ? layer.gate : layer.up;
            left.first[group] = first + weights;
            left.count[group] = neurons;
        }
        left.stride = layer.weight_stride;
        const T* x = nullptr;
        if (const int mine = Product::right_row_index(); mine < rows) {
            const int token = layer.slots[tile.first_row() + mine] / layer.per_token;
            x = layer.hidden + token * layer.hidden_stride;
        }
        Sums<kGroups> sums;
        clear<kGroups>(sums);
        Product::add(sums, shared, left, x, rows, layer.hidden_size, layer.is_aligned);

#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int neuron = neuron_of(2 * half);
            float gate_bias = 0;
            float up_bias = 0;
            if (neuron < neurons) {
                const std::int64_t bias_row = layer.first_bias_row(expert) + first_neuron + neuron;
                if (kGated && layer.gate_bias != nullptr) {
                    gate_bias = widen(layer.gate_bias[bias_row]);
                }
                if (layer.up_bias != nullptr) {
                    up_bias = widen(layer.up_bias[bias_row]);
                }
            }
#pragma unroll
            for (int n = 0; n < kTileColumns; ++n) {
#pragma unroll
                for (int column = 0; column < 2; ++column) {
                    const int i = 2 * half + column;
                    float m;
                    if constexpr (kGated) {
                        m = activate_gated(
                            layer.activation, layer.limit, layer.alpha, sums[0][n][i] + gate_bias,
                            sums[1][n][i] + up_bias
                        );
                    } else {
                        m = activate(layer.activation, sums[0][n][i] + up_bias);
                    }
                    out[row_of(n, i) * kOutStride + neuron] = narrow<T>(m);
                }
            }
        }
        __syncthreads();
        constexpr int kRowVectors = kGroupNeurons / kVector;
        for (int i = thread; i < rows * kRowVectors; i += kBlockThreads) {
            const int row = i / kRowVectors;
            const int neuron = i % kRowVectors * kVector;
            const T* from = out + row * kOutStride + neuron;
            T* m = layer.activations + (tile.first_row() + row) * layer.activations_stride +
                   first_neuron + neuron;
            if (layer.activations_are_aligned && neuron + kVector <= neurons) {
                *reinterpret_cast<uint4*>(m) = *reinterpret_cast<const uint4*>(from);
            } else {
                for (int j = 0; j < min(kVector, neurons - neuron); ++j) {
                    m[j] = from[j];
                }
            }
        }
    }
}

/// y = W_d m + b_d for tiles of 64 rows and 256 hidden dimensions, in float32.
/// Grid: any number of blocks, a block takes tiles.
/// A thread has 4 hidden dimensions x 16 rows (see Sums).
/// Shared memory: the product's stages, the next tile.
/// Holds: m comes from activations_kernel. Nothing beyond an expert's width is multiplied: the
/// product replaces it by zeros, in both operands.
template <class T, class Math>
__global__ void __launch_bounds__(
    kBlockThreads, sizeof(T) == 4 ? 1 : kResidentBlocks
) outputs_kernel(Layer<T> layer, Work work) {
    using Product = BlockProduct<T, Math, 2, true>;
    auto* shared = shared_memory<unsigned char>();

    Tiles tile(work, reinterpret_cast<int*>(shared + Product::kSharedBytes));
    for (; !tile.is_done(); tile.advance()) {
        const int expert = tile.expert();
        const int rows = tile.rows();
        const int first_column = tile.first_column();
        const int hidden_size = layer.hidden_size;

        typename Product::Left left;
        left.first[0] =
            layer.down + std::int64_t{layer.neuron_offsets[expert]} * hidden_size + first_column;
        left.first[1] = left.first[0] + kGroupNeurons;
        left.count[0] = hidden_size - first_column;
        left.count[1] = left.count[0] - kGroupNeurons;
        left.stride = hidden_size;
        const T* m = nullptr;
        if (const int mine = Product::right_row_index(); mine < rows) {
            m = layer.activations + (tile.first_row() + mine) * layer.activations_stride;
        }
        Sums<2> sums;
        clear<2>(sums);
        Product::add(sums, shared, left, m, rows, layer.width(expert), layer.is_aligned);

        float* y = layer.outputs + std::int64_t{tile.first_row()} * hidden_size;
#pragma unroll
        for (int group = 0; group < 2; ++group) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int column = first_column + group * kGroupNeurons + neuron_of(2 * half);
                if (column < hidden_size) {
                    float bias = 0;
                    if (layer.down_bias != nullptr) {
                        bias = widen(layer.down_bias[std::int64_t{expert} * hidden_size + column]);
                    }
#pragma unroll
                    for (int n = 0; n < kTileColumns; ++n) {
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            const int row = row_of(n, i);
                            if (row < rows) {
                                y[std::int64_t{row} * hidden_size + column] =
                                    sums[group][n][2 * half + i] + bias;
                            }
                        }
                    }
                }
            }
        }
    }
}

/// out_t = sum over the slots of token t, in slot order, of g y.
/// Grid: one block for 256 * kVector hidden dimensions of one token.
/// A thread owns kVector neighbouring dimensions.
/// Shared memory: none.
/// Holds: kVector is 1, or divides H with the rows of y and out starting at multiples of kVector.
template <class T, int kVector>
__global__ void __launch_bounds__(kBlockThreads) combine_kernel(Layer<T> layer) {
    struct alignas(kVector * sizeof(float)) Floats {
        float values[kVector];
    };
    struct alignas(kVector * sizeof(T)) Elements {
        T values[kVector];
    };
    constexpr int kBlockColumns = kBlockThreads * kVector;
    const int blocks = (layer.hidden_size + kBlockColumns - 1) / kBlockColumns;
    const auto token = static_cast<std::int64_t>(blockIdx.x) / blocks;
    const int column = static_cast<int>(blockIdx.x) % blocks * kBlockColumns +
                       static_cast<int>(threadIdx.x) * kVector;
    if (column >= layer.hidden_size) {
        return;
    }
    float sums[kVector] = {};
    for (int j = 0; j < layer.per_token; ++j) {
        const std::int64_t slot = token * layer.per_token + j;
        const std::int64_t row = layer.rows[slot];
        if (row >= 0) {
            const float gate = layer.gates[slot];
            const Floats y =
                *reinterpret_cast<const Floats*>(layer.outputs + row * layer.hidden_size + column);
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                sums[i] += gate * y.values[i];
            }
        }
    }
    Elements out;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        out.values[i] = narrow<T>(sums[i]);
    }
    *reinterpret_cast<Elements*>(layer.out + token * layer.out_stride + column) = out;
}

// ---- launchers ----------------------------------------------------------------------------------

/// What this path needs beside the layer's own arrays.
struct TileBuffers {
    std::int32_t* histogram;
    TileWork activations;
    TileWork outputs;

    TileBuffers(Workspace& workspace, std::int64_t rows, int experts, int max_width, int hidden)
        : histogram(take_histogram(workspace, rows, experts)),
          activations(workspace, rows, experts, max_width, kBlockRows, kGroupNeurons),
          outputs(workspace, rows, experts, hidden, kBlockRows, kTileHidden) {}
};

inline std::int64_t tokens_at_once(std::int64_t tokens, std::int64_t per_token) {
    return std::min(
        tokens, std::max<std::int64_t>(1, kRowsAtOnce / std::max<std::int64_t>(1, per_token))
    );
}

template <class T, class Math, bool kGated>
void launch_activations(const Layer<T>& layer, const TileWork& work, Stream stream) {
    constexpr int kGroups = kGated ? 2 : 1;
    if (work.capacity > 0) {
        launch_persistent(
            activations_kernel<T, Math, kGated>, work.capacity,
            {.threads = kBlockThreads,
             .shared_bytes = BlockProduct<T, Math, kGroups, false>::kSharedBytes + sizeof(int)},
            stream, layer, work.work
        );
    }
}

template <class T, class Math>
void launch_activations(const Layer<T>& layer, bool is_gated, const TileWork& work, Stream stream) {
    if (is_gated) {
        launch_activations<T, Math, true>(layer, work, stream);
    } else {
        launch_activations<T, Math, false>(layer, work, stream);
    }
}

template <class T, class Math>
void launch_outputs(const Layer<T>& layer, const TileWork& work, Stream stream) {
    if (work.capacity > 0) {
        launch_persistent(
            outputs_kernel<T, Math>, work.capacity,
            {.threads = kBlockThreads,
             .shared_bytes = BlockProduct<T, Math, 2, true>::kSharedBytes + sizeof(int)},
            stream, layer, work.work
        );
    }
}

template <class T, class Math>
void launch_products(
    const Layer<T>& layer, bool is_gated, const TileBuffers& buffers, Stream stream
) {
    launch_activations<T, Math>(layer, is_gated, buffers.activations, stream);
    launch_outputs<T, Math>(layer, buffers.outputs, stream);
}

template <class T>
void launch_combine(const Layer<T>& layer, Stream stream) {
    const auto shape = [&](int vector) {
        const std::int64_t columns = std::int64_t{kBlockThreads} * vector;
        return LaunchShape{.blocks = layer.tokens * ((layer.hidden_size + columns - 1) / columns)};
    };
    const bool by_fours = layer.hidden_size % 4 == 0 && layer.out_stride % 4 == 0 &&
                          reinterpret_cast<std::uintptr_t>(layer.out) % (4 * sizeof(T)) == 0;
    if (by_fours) {
        launch(combine_kernel<T, 4>, shape(4), stream, layer);
    } else {
        launch(combine_kernel<T, 1>, shape(1), stream, layer);
    }
}

}  // namespace

template <class T>
std::size_t tiles_workspace_bytes(Layer<T> layer) {
    Workspace workspace;
    const std::int64_t rows = tokens_at_once(layer.tokens, layer.per_token) * layer.per_token;
    take_layer(workspace, layer, rows);
    const TileBuffers buffers(workspace, rows, layer.experts, layer.max_width, layer.hidden_size);
    return workspace.bytes();
}

template <class T>
void run_by_tiles(Layer<T> layer, bool is_gated, bool allow_tf32, void* memory, Stream stream) {
    Workspace workspace(memory);
    const std::int64_t tokens = layer.tokens;
    const std::int64_t at_once = tokens_at_once(tokens, layer.per_token);
    take_layer(workspace, layer, at_once * layer.per_token);
    const TileBuffers buffers(
        workspace, at_once * layer.per_token, layer.experts, layer.max_width, layer.hidden_size
    );
    for (std::int64_t first = 0; first < tokens; first += at_once) {
        layer.tokens = static_cast<int>(std::min(at_once, tokens - first));
        route(
            Routing{
                .ids = layer.expert_ids,
                .slot_count = layer.tokens * layer.per_token,
                .experts = layer.experts,
                .offsets = layer.offsets,
                .slots = layer.slots,
                .rows = layer.rows,
                .histogram = buffers.histogram,
            },
            stream
        );
        buffers.activations.fill(layer.offsets, layer.widths, layer.experts, -1, stream);
        buffers.outputs.fill(layer.offsets, layer.widths, layer.experts, layer.hidden_size, stream);

        if constexpr (std::is_same_v<T, float>) {
            if (allow_tf32) {
                launch_products<T, Tf32>(layer, is_gated, buffers, stream);
            } else {
                launch_products<T, Exact>(layer, is_gated, buffers, stream);
            }
        } else {
            launch_products<T, T>(layer, is_gated, buffers, stream);
        }
        launch_combine(layer, stream);

        layer.expert_ids += layer.tokens * layer.per_token;
        layer.gates += layer.tokens * layer.per_token;
        layer.hidden += layer.tokens * layer.hidden_stride;
        layer.out += layer.tokens * layer.out_stride;
    }
}

template <class T>
std::size_t activations_workspace_bytes(const Layer<T>& layer, std::int64_t rows) {
    Workspace workspace;
    const TileWork work(workspace, rows, layer.experts, layer.max_width, kBlockRows, kGroupNeurons);
    return workspace.bytes();
}

template <class T>
void run_activations(
    const Layer<T>& layer, std::int64_t rows, bool is_gated, void* memory, Stream stream
) {
    Workspace workspace(memory);
    const TileWork work(workspace, rows, layer.experts, layer.max_width, kBlockRows, kGroupNeurons);
    work.fill(layer.offsets, layer.widths, layer.experts, layer.max_width, stream);
    launch_activations<T, MathOf<T>>(layer, is_gated, work, stream);
}

}  // namespace tenp::cuda
