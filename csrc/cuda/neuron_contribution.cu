// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cuda/alignment.h"
#include "cuda/device/block_product.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/routing.cuh"
#include "cuda/device/row_chunks.cuh"
#include "cuda/launch.cuh"
#include "cuda/neuron_contribution.h"
#include "cuda/row_sums.h"

namespace tenp::cuda {
namespace {

/// projection, magnitude, energy, peak
constexpr int kSumKinds = 4;

/// In the place of 1 / |y| where y is 0. Where y is infinite that is 0, and the projection NaN.
constexpr double kNoDirection = -1;

template <class T>
struct Contribution {
    const T* activations;  // [S, I]
    std::int64_t activations_stride;
    const T* outputs;  // [S, H]
    std::int64_t outputs_stride;
    const T* down;  // [E, H, I]
    std::int64_t down_expert_stride;
    std::int64_t down_stride;          // of the one of H and I that is not contiguous
    const float* gates;                // [S]
    const std::int32_t* offsets;       // [E+1]
    const double* norms;               // [S]
    const std::int32_t* first_chunks;  // [E+1]
    double* partials;                  // [chunks, 4, I]
    int experts;
    int hidden_size;
    int neurons;
    bool is_aligned;
};

// ---- kernels ------------------------------------------------------------------------------------

/// first_chunks[e] = chunks of the experts before e; first_chunks[E] = all chunks.
/// Grid: one block.
/// A thread takes every 256th expert, warp 0 adds up.
/// Shared memory: none.
/// Holds: nothing.
__global__ void __launch_bounds__(256) chunks_kernel(
    const std::int32_t* offsets, int experts, std::int32_t* first_chunks
) {
    for (int expert = static_cast<int>(threadIdx.x); expert < experts; expert += 256) {
        const int rows = offsets[expert + 1] - offsets[expert];
        first_chunks[expert] = (rows + kChunkRows - 1) / kChunkRows;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        scan_by_one_warp(first_chunks, experts);
    }
}

/// partials[chunk] = over the chunk's rows t, for neurons k: sum of m_tk <w_k, y_t> / |y_t|, sum of
/// |m_tk|, sum of (g m_tk)^2 and the largest |g m_tk|.
/// Grid: any number of blocks. A block takes every n-th (chunk, 128 neurons) and walks over its
/// rows in tiles of 64; the inner products of a tile are one block product of depth H.
/// A thread owns 2 neurons and 2 of every 8 rows; the 4 lanes of a neuron are added at the end.
/// Shared memory: the block product's stages, then 1/|y| and g of a tile's rows.
/// Holds: norms are those of `outputs`; a row with |y| = 0 adds nothing to the projection.
template <class T, bool kNeuronsContiguous>
__global__ void __launch_bounds__(kBlockThreads, kResidentBlocks) contribution_kernel(
    Contribution<T> args
) {
    using Product = BlockProduct<T, MathOf<T>, 1, kNeuronsContiguous>;
    auto* shared = shared_memory<unsigned char>();
    auto* inverse_norms = reinterpret_cast<double*>(shared + Product::kSharedBytes);  // [64]
    auto* gates = reinterpret_cast<float*>(inverse_norms + kBlockRows);               // [64]
    const int thread = static_cast<int>(threadIdx.x);
    const int blocks = (args.neurons + kGroupNeurons - 1) / kGroupNeurons;
    const std::int64_t items = std::int64_t{args.first_chunks[args.experts]} * blocks;

    for (std::int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const int chunk = static_cast<int>(item / blocks);
        const int first_neuron = static_cast<int>(item % blocks) * kGroupNeurons;
        const auto [expert, first_row, last_row] =
            Chunk(args.first_chunks, args.offsets, args.experts, chunk);
        const T* down = args.down + expert * args.down_expert_stride +
                        first_neuron * (kNeuronsContiguous ? 1 : args.down_stride);

        double totals[kSumKinds][2] = {};
        for (int tile_row = first_row; tile_row < last_row; tile_row += kBlockRows) {
            const int rows = min(kBlockRows, last_row - tile_row);
            if (thread < rows) {
                const double norm = args.norms[tile_row + thread];
                inverse_norms[thread] = norm == 0 ? kNoDirection : 1 / norm;
                gates[thread] = args.gates[tile_row + thread];
            }
            Sums<1> products;
            clear<1>(products);
            const int mine = Product::right_row_index();
            Product::add(
                products, shared, {{down}, {args.neurons - first_neuron}, args.down_stride},
                mine < rows ? args.outputs + (tile_row + mine) * args.outputs_stride : nullptr,
                rows, args.hidden_size, args.is_aligned
            );
#pragma unroll
            for (int n = 0; n < kTileColumns; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int row = row_of(n, i);
                    const int neuron = first_neuron + neuron_of(i);
                    if (row < rows && neuron < args.neurons) {
                        const float m = widen(
                            args.activations[(tile_row + row) * args.activations_stride + neuron]
                        );
                        const float gated = gates[row] * m;
                        const double inverse_norm = inverse_norms[row];
                        if (inverse_norm != kNoDirection) {
                            totals[0][i / 2] += m * (products[0][n][i] * inverse_norm);
                        }
                        totals[1][i / 2] += fabsf(m);
                        totals[2][i / 2] += static_cast<double>(gated) * gated;
                        totals[3][i / 2] = larger_or_nan(totals[3][i / 2], fabsf(gated));
                    }
                }
            }
            __syncthreads();  // the norms and gates are used
        }

#pragma unroll
        for (int kind = 0; kind < kSumKinds; ++kind) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                double total = totals[kind][half];
#pragma unroll
                for (int flip = 1; flip < 4; flip *= 2) {
                    const double other = __shfl_xor_sync(~0u, total, flip);
                    total = kind == 3 ? larger_or_nan(total, other) : total + other;
                }
                const int neuron = first_neuron + neuron_of(2 * half);
                if (thread % 4 == 0 && neuron < args.neurons) {
                    args.partials
                        [(std::int64_t{chunk} * kSumKinds + kind) * args.neurons + neuron] = total;
                }
            }
        }
    }
}

struct Totals {
    const std::int32_t* first_chunks;  // [E+1]
    const double* partials;            // [chunks, 4, I]
    int neurons;
    double* sums[kSumKinds];  // [E, I] each
};

/// Adds every expert's partial sums, in the order of its chunks, to the caller's.
/// Grid: one block for 256 neurons of one expert.
/// A thread owns one neuron.
/// Shared memory: none.
/// Holds: partials come from contribution_kernel.
__global__ void __launch_bounds__(256) totals_kernel(Totals args) {
    const int blocks = (args.neurons + 255) / 256;
    const int expert = static_cast<int>(blockIdx.x) / blocks;
    const int neuron = static_cast<int>(blockIdx.x) % blocks * 256 + static_cast<int>(threadIdx.x);
    if (neuron >= args.neurons) {
        return;
    }
    double totals[kSumKinds] = {};
    for (int chunk = args.first_chunks[expert]; chunk < args.first_chunks[expert + 1]; ++chunk) {
        const double* partials =
            args.partials + std::int64_t{chunk} * kSumKinds * args.neurons + neuron;
        totals[0] += partials[0];
        totals[1] += partials[args.neurons];
        totals[2] += partials[2 * std::int64_t{args.neurons}];
        totals[3] = larger_or_nan(totals[3], partials[3 * std::int64_t{args.neurons}]);
    }
    const std::int64_t i = std::int64_t{expert} * args.neurons + neuron;
    args.sums[0][i] += totals[0];
    args.sums[1][i] += totals[1];
    args.sums[2][i] += totals[2];
    args.sums[3][i] = larger_or_nan(args.sums[3][i], totals[3]);
}

// ---- launchers ----------------------------------------------------------------------------------

template <class T, bool kNeuronsContiguous>
void launch_contribution(const Contribution<T>& args, std::int64_t chunks, Stream stream) {
    using Product = BlockProduct<T, MathOf<T>, 1, kNeuronsContiguous>;
    const std::int64_t blocks = (args.neurons + kGroupNeurons - 1) / kGroupNeurons;
    launch_persistent(
        contribution_kernel<T, kNeuronsContiguous>, chunks * blocks,
        {.threads = kBlockThreads,
         .shared_bytes = Product::kSharedBytes + kBlockRows * (sizeof(double) + sizeof(float))},
        stream, args
    );
}

}  // namespace

RowChunks::RowChunks(Workspace& workspace, std::int64_t rows, std::int64_t experts)
    : first(workspace.take<std::int32_t>(experts + 1)),
      // Every expert may end in one partial chunk.
      capacity(std::min(experts, rows) + rows / kChunkRows) {}

void RowChunks::fill(const std::int32_t* offsets, std::int64_t experts, Stream stream) const {
    launch(chunks_kernel, {.blocks = 1}, stream, offsets, static_cast<int>(experts), first);
}

double* take_contribution_partials(
    Workspace& workspace, const RowChunks& chunks, std::int64_t neurons
) {
    return workspace.take<double>(chunks.capacity * kSumKinds * neurons);
}

void add_contribution(
    const NeuronContributionArgs& args,
    const double* norms,
    const RowChunks& chunks,
    double* partials,
    Stream stream
) {
    const std::int64_t experts = args.down.shape[0];
    const std::int64_t neurons = args.down.shape[2];
    const bool neurons_are_contiguous = args.down.stride[2] == 1 || neurons == 1;
    dispatch(args.activations.dtype, Floats{}, [&]<class T>() {
        const std::int64_t down_stride = args.down.stride[neurons_are_contiguous ? 1 : 2];
        const auto* down = data<const T>(args.down);
        const auto* outputs = data<const T>(args.outputs);
        const Contribution<T> contribution{
            .activations = data<const T>(args.activations),
            .activations_stride = args.activations.stride[0],
            .outputs = outputs,
            .outputs_stride = args.outputs.stride[0],
            .down = down,
            .down_expert_stride = args.down.stride[0],
            .down_stride = down_stride,
            .gates = data<const float>(args.gates),
            .offsets = data<const std::int32_t>(args.offsets),
            .norms = norms,
            .first_chunks = chunks.first,
            .partials = partials,
            .experts = static_cast<int>(experts),
            .hidden_size = static_cast<int>(args.down.shape[1]),
            .neurons = static_cast<int>(neurons),
            .is_aligned = rows_are_aligned(down, down_stride) &&
                          rows_are_aligned(down, args.down.stride[0]) &&
                          rows_are_aligned(outputs, args.outputs.stride[0]),
        };
        if (neurons_are_contiguous) {
            launch_contribution<T, true>(contribution, chunks.capacity, stream);
        } else {
            launch_contribution<T, false>(contribution, chunks.capacity, stream);
        }
    });
    launch(
        totals_kernel, {.blocks = experts * ((neurons + 255) / 256)}, stream,
        Totals{
            .first_chunks = chunks.first,
            .partials = partials,
            .neurons = static_cast<int>(neurons),
            .sums = {
                data<double>(args.projection),
                data<double>(args.magnitude),
                data<double>(args.energy),
                data<double>(args.peak),
            },
        }
    );
}

std::size_t neuron_contribution_workspace_bytes(
    std::int64_t rows, std::int64_t experts, std::int64_t neurons
) {
    Workspace workspace;
    workspace.take<double>(rows);
    const RowChunks chunks(workspace, rows, experts);
    take_contribution_partials(workspace, chunks, neurons);
    return workspace.bytes();
}

void accumulate_neuron_contribution(const NeuronContributionArgs& args, Stream stream) {
    const std::int64_t rows = args.activations.shape[0];
    const std::int64_t experts = args.down.shape[0];
    const std::int64_t neurons = args.down.shape[2];
    if (experts == 0 || neurons == 0) {
        return;
    }
    Workspace workspace(args.workspace.data);
    auto* norms = workspace.take<double>(rows);
    const RowChunks chunks(workspace, rows, experts);
    auto* partials = take_contribution_partials(workspace, chunks, neurons);
    const auto* offsets = data<const std::int32_t>(args.offsets);
    row_norms(args.outputs, offsets, experts, norms, stream);
    chunks.fill(offsets, experts, stream);
    add_contribution(args, norms, chunks, partials, stream);
}

}  // namespace tenp::cuda
