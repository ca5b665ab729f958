// SPDX-License-Identifier: Apache-2.0
#include "tenp/expert_statistics.h"

#include <climits>
#include <cmath>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cuda/alignment.h"
#include "cuda/device/block_product.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/row_chunks.cuh"
#include "cuda/device/tiles.cuh"
#include "cuda/launch.cuh"
#include "cuda/neuron_contribution.h"
#include "cuda/row_sums.h"

namespace tenp::cuda {
namespace {

constexpr int kWarps = kBlockWarps;

/// Columns of a tile of y: two groups. A lane has 8 of a row's.
constexpr int kTileHidden = 2 * kGroupNeurons;

/// <x, x>, <x, y> and <y, y> of a row.
constexpr int kProducts = 3;

/// One call as its kernels see it.
template <class T>
struct Batch {
    const T* hidden;  // [T, H]
    std::int64_t hidden_stride;
    const T* activations;  // [S, I]
    std::int64_t activations_stride;
    const T* down;  // [E, H, I]
    std::int64_t down_expert_stride;
    std::int64_t down_stride;     // of the one of H and I that is not contiguous
    const T* down_bias;           // [E, H]; nullptr: none
    const std::int32_t* offsets;  // [E+1]
    const std::int32_t* slots;    // [S]
    const std::int32_t* rows;     // [T, k]
    const float* gates;           // [T, k]
    float* out;                   // [T, H]
    int per_token;
    int hidden_size;
    int neurons;
    int experts;
    bool operands_are_aligned;  // rows of activations and down start at multiples of 16 bytes
    bool hidden_is_aligned;     // rows of hidden do

    // Workspace.
    T* outputs;  // y: [S, H], rows outputs_stride apart, which start at multiples of 16 bytes
    std::int64_t outputs_stride;
    float* products;                   // [S, column blocks, 3]
    float* row_gates;                  // [S]
    double* norms;                     // [S], |y|
    double* changes;                   // [S], g |y| (1 - cos(x, y))
    double* shares;                    // [S], g of all gates of the token
    double* energies;                  // [chunks, H]
    const std::int32_t* first_chunks;  // [E+1]

    __device__ __forceinline__ int column_blocks() const {
        return (hidden_size + kTileHidden - 1) / kTileHidden;
    }
    __device__ __forceinline__ const T* hidden_of(int row) const {
        return hidden + slots[row] / per_token * hidden_stride;
    }
};

// ---- kernels ------------------------------------------------------------------------------------

/// y = W_d m for tiles of 64 rows and 256 hidden dimensions, rounded once; and of the rounded y and
/// the row's x the tile's part of the products <x, x>, <x, y> and <y, y>.
/// Grid: any number of blocks, a block takes tiles.
/// A thread has 4 hidden dimensions x 16 rows of the product (see Sums). Then a warp takes a row: a
/// lane multiplies 16 bytes at a time, the lanes' sums are added in a fixed tree.
/// Shared memory: the product's stages, reused for the tile of y on its way out; the next tile.
/// Holds: rows of outputs start at multiples of 16 bytes.
template <class T, bool kNeuronsContiguous>
__global__ void __launch_bounds__(
    kBlockThreads, sizeof(T) == 4 ? 1 : kResidentBlocks
) statistics_outputs_kernel(Batch<T> batch, Work work) {
    using Product = BlockProduct<T, MathOf<T>, 2, !kNeuronsContiguous>;
    constexpr int kVector = 16 / static_cast<int>(sizeof(T));
    constexpr int kTileStride = kTileHidden + kVector;
    static_assert(kBlockRows * kTileStride * sizeof(T) <= Product::kSharedBytes);
    auto* shared = shared_memory<unsigned char>();
    auto* y_tile = reinterpret_cast<T*>(shared);

    Tiles tile(work, reinterpret_cast<int*>(shared + Product::kSharedBytes));
    for (; !tile.is_done(); tile.advance()) {
        const int rows = tile.rows();
        const int first_column = tile.first_column();
        const std::int64_t column_stride = kNeuronsContiguous ? batch.down_stride : 1;

        typename Product::Left left;
        left.first[0] =
            batch.down + tile.expert() * batch.down_expert_stride + first_column * column_stride;
        left.first[1] = left.first[0] + kGroupNeurons * column_stride;
        left.count[0] = batch.hidden_size - first_column;
        left.count[1] = left.count[0] - kGroupNeurons;
        left.stride = batch.down_stride;
        const T* m = nullptr;
        if (const int mine = Product::right_row_index(); mine < rows) {
            m = batch.activations + (tile.first_row() + mine) * batch.activations_stride;
        }
        Sums<2> sums;
        clear<2>(sums);
        Product::add(sums, shared, left, m, rows, batch.neurons, batch.operands_are_aligned);

#pragma unroll
        for (int group = 0; group < 2; ++group) {
#pragma unroll
            for (int n = 0; n < kTileColumns; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    y_tile[row_of(n, i) * kTileStride + group * kGroupNeurons + neuron_of(i)] =
                        narrow<T>(sums[group][n][i]);
                }
            }
        }
        __syncthreads();
        const int columns = min(kTileHidden, batch.hidden_size - first_column);
        const int block = first_column / kTileHidden;
        for (int r = static_cast<int>(threadIdx.x / 32); r < rows; r += kWarps) {
            const int row = tile.first_row() + r;
            const T* x = batch.hidden_of(row) + first_column;
            const T* y = y_tile + r * kTileStride;
            T* out = batch.outputs + row * batch.outputs_stride + first_column;
            float xx = 0;
            float xy = 0;
            float yy = 0;
            for_each_of_row<T>(columns, batch.hidden_is_aligned, [&]<int kCount>(int i) {
                float xs[kCount];
                float ys[kCount];
                load_widened(xs, x + i);
                load_widened(ys, y + i);
#pragma unroll
                for (int j = 0; j < kCount; ++j) {
                    xx += xs[j] * xs[j];
                    xy += xs[j] * ys[j];
                    yy += ys[j] * ys[j];
                    if constexpr (kCount == 1) {
                        out[i] = y[i];
                    }
                }
                if constexpr (kCount > 1) {
                    *reinterpret_cast<uint4*>(out + i) = *reinterpret_cast<const uint4*>(y + i);
                }
            });
            xx = warp_sum(xx);
            xy = warp_sum(xy);
            yy = warp_sum(yy);
            if (threadIdx.x % 32 == 0) {
                float* products = batch.products +
                                  (std::int64_t{row} * batch.column_blocks() + block) * kProducts;
                products[0] = xx;
                products[1] = xy;
                products[2] = yy;
            }
        }
    }
}

/// Of every row |y|, g |y| (1 - cos(x, y)) = g (|y| - <x, y> / |x|), g, and the gate's share.
/// Grid: any number of blocks. A thread takes every n-th row, and adds the tiles' parts of its
/// products in float64, in the order of columns.
/// Shared memory: none.
/// Holds: products come from statistics_outputs_kernel.
template <class T>
__global__ void __launch_bounds__(256) row_facts_kernel(Batch<T> batch) {
    const int last = batch.offsets[batch.experts];
    const int step = static_cast<int>(gridDim.x) * 256;
    for (std::int64_t row = batch.offsets[0] + static_cast<int>(blockIdx.x * 256 + threadIdx.x);
         row < last; row += step) {
        double xx = 0;
        double xy = 0;
        double yy = 0;
        for (int block = 0; block < batch.column_blocks(); ++block) {
            const float* products =
                batch.products + (row * batch.column_blocks() + block) * kProducts;
            xx += products[0];
            xy += products[1];
            yy += products[2];
        }
        const int slot = batch.slots[row];
        const float* of_token = batch.gates + slot / batch.per_token * batch.per_token;
        double total = 0;
        for (int j = 0; j < batch.per_token; ++j) {
            total += of_token[j];
        }
        const float gate = batch.gates[slot];
        const double norm = sqrt(yy);
        const double along_x = xx == 0 ? 0 : xy / sqrt(xx);
        batch.row_gates[row] = gate;
        batch.norms[row] = norm;
        batch.changes[row] = gate * (yy == 0 ? 0 : norm - along_x);
        batch.shares[row] = total > 0 ? gate / total : gate;
    }
}

/// energies[chunk, h] = sum over the chunk's rows of (g x_h)^2, in float64.
/// Grid: any number of blocks. A block takes every n-th (chunk, 256 dimensions).
/// A thread owns one dimension and adds up the rows in order.
/// Shared memory: none.
/// Holds: row_gates come from row_facts_kernel.
template <class T>
__global__ void __launch_bounds__(256) input_energy_kernel(Batch<T> batch) {
    const int blocks = (batch.hidden_size + 255) / 256;
    const std::int64_t items = std::int64_t{batch.first_chunks[batch.experts]} * blocks;
    for (std::int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const int number = static_cast<int>(item / blocks);
        const int column = static_cast<int>(item % blocks) * 256 + static_cast<int>(threadIdx.x);
        const Chunk chunk(batch.first_chunks, batch.offsets, batch.experts, number);
        if (column < batch.hidden_size) {
            double sum = 0;
#pragma unroll 4
            for (int row = chunk.first_row; row < chunk.last_row; ++row) {
                const double gate = batch.row_gates[row];
                const double x = widen(batch.hidden_of(row)[column]);
                sum += gate * gate * (x * x);
            }
            batch.energies[std::int64_t{number} * batch.hidden_size + column] = sum;
        }
    }
}

/// input_energy[e, h] += sum over the expert's chunks, in their order.
/// Grid: one block for 256 dimensions of one expert.
/// A thread owns one dimension.
/// Shared memory: none.
/// Holds: energies come from input_energy_kernel.
template <class T>
__global__ void __launch_bounds__(256) energy_totals_kernel(
    Batch<T> batch, double* input_energy  // [E, H]
) {
    const int blocks = (batch.hidden_size + 255) / 256;
    const int expert = static_cast<int>(blockIdx.x) / blocks;
    const int column = static_cast<int>(blockIdx.x) % blocks * 256 + static_cast<int>(threadIdx.x);
    if (column < batch.hidden_size) {
        double total = 0;
        for (int chunk = batch.first_chunks[expert]; chunk < batch.first_chunks[expert + 1];
             ++chunk) {
            total += batch.energies[std::int64_t{chunk} * batch.hidden_size + column];
        }
        input_energy[std::int64_t{expert} * batch.hidden_size + column] += total;
    }
}

/// out_t += sum over this call's rows of token t, by ascending row, of g (y + b_d).
/// Grid: one block for 256 * kVector hidden dimensions of one token.
/// A thread owns kVector neighbouring dimensions.
/// Shared memory: none.
/// Holds: kVector is 1, or divides H with out starting at a multiple of 16 bytes.
template <class T, int kVector>
__global__ void __launch_bounds__(256) add_outputs_kernel(Batch<T> batch) {
    struct alignas(kVector * sizeof(float)) Floats {
        float values[kVector];
    };
    struct alignas(kVector * sizeof(T)) Elements {
        T values[kVector];
    };
    constexpr int kBlockColumns = 256 * kVector;
    const int blocks = (batch.hidden_size + kBlockColumns - 1) / kBlockColumns;
    const int token = static_cast<int>(blockIdx.x) / blocks;
    const int column = static_cast<int>(blockIdx.x) % blocks * kBlockColumns +
                       static_cast<int>(threadIdx.x) * kVector;
    if (column >= batch.hidden_size) {
        return;
    }
    auto* out =
        reinterpret_cast<Floats*>(batch.out + std::int64_t{token} * batch.hidden_size + column);
    const std::int64_t first_slot = std::int64_t{token} * batch.per_token;
    const int last = batch.offsets[batch.experts];
    Floats sums = *out;
    for (int done = batch.offsets[0] - 1;;) {
        int next = INT_MAX;  // the lowest row that is not done
        std::int64_t slot = 0;
        for (int j = 0; j < batch.per_token; ++j) {
            const int row = batch.rows[first_slot + j];
            if (row > done && row < last && row < next) {
                next = row;
                slot = first_slot + j;
            }
        }
        if (next == INT_MAX) {
            break;
        }
        done = next;
        const float gate = batch.gates[slot];
        const Elements y = *reinterpret_cast<const Elements*>(
            batch.outputs + next * batch.outputs_stride + column
        );
        float bias[kVector] = {};
        if (batch.down_bias != nullptr) {
            int expert = 0;
            while (batch.offsets[expert + 1] <= next) {
                ++expert;
            }
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                bias[i] =
                    widen(batch.down_bias[std::int64_t{expert} * batch.hidden_size + column + i]);
            }
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            sums.values[i] += gate * (widen(y.values[i]) + bias[i]);
        }
    }
    *out = sums;
}

// ---- launchers ----------------------------------------------------------------------------------

/// Where everything of a call is in its workspace.
template <class T>
struct Buffers {
    TileWork tiles;
    RowChunks chunks;
    double* contributions;

    Buffers(Workspace& workspace, Batch<T>& batch, std::int64_t rows)
        : tiles(workspace, rows, batch.experts, batch.hidden_size, kBlockRows, kTileHidden),
          chunks(workspace, rows, batch.experts),
          contributions(take_contribution_partials(workspace, chunks, batch.neurons)) {
        constexpr std::int64_t kVector = 16 / static_cast<std::int64_t>(sizeof(T));
        const std::int64_t blocks = (batch.hidden_size + kTileHidden - 1) / kTileHidden;
        batch.outputs_stride = (batch.hidden_size + kVector - 1) / kVector * kVector;
        batch.outputs = workspace.take<T>(rows * batch.outputs_stride);
        batch.products = workspace.take<float>(rows * blocks * kProducts);
        batch.row_gates = workspace.take<float>(rows);
        batch.norms = workspace.take<double>(rows);
        batch.changes = workspace.take<double>(rows);
        batch.shares = workspace.take<double>(rows);
        batch.energies = workspace.take<double>(chunks.capacity * batch.hidden_size);
        batch.first_chunks = chunks.first;
    }
};

bool neurons_are_contiguous(const TensorView& down) {
    return down.stride[2] == 1 || down.shape[2] <= 1;
}

template <class T>
Batch<T> batch_of(const ExpertStatisticsArgs& args) {
    Batch<T> batch{};
    batch.hidden = data<const T>(args.hidden);
    batch.hidden_stride = args.hidden.stride[0];
    batch.activations = data<const T>(args.activations);
    batch.activations_stride = args.activations.stride[0];
    batch.down = data<const T>(args.down);
    batch.down_expert_stride = args.down.stride[0];
    batch.down_stride = args.down.stride[neurons_are_contiguous(args.down) ? 1 : 2];
    batch.down_bias = data<const T>(args.down_bias);
    batch.offsets = data<const std::int32_t>(args.offsets);
    batch.slots = data<const std::int32_t>(args.slots);
    batch.rows = data<const std::int32_t>(args.rows);
    batch.gates = data<const float>(args.gates);
    batch.out = data<float>(args.out);
    batch.per_token = static_cast<int>(args.rows.shape[1]);
    batch.hidden_size = static_cast<int>(args.hidden.shape[1]);
    batch.neurons = static_cast<int>(args.down.shape[2]);
    batch.experts = static_cast<int>(args.down.shape[0]);
    batch.operands_are_aligned = rows_are_aligned(batch.activations, batch.activations_stride) &&
                                 rows_are_aligned(batch.down, batch.down_stride) &&
                                 rows_are_aligned(batch.down, batch.down_expert_stride);
    batch.hidden_is_aligned = rows_are_aligned(batch.hidden, batch.hidden_stride);
    return batch;
}

template <class T, bool kNeuronsContiguous>
void launch_outputs(const Batch<T>& batch, const TileWork& tiles, Stream stream) {
    using Product = BlockProduct<T, MathOf<T>, 2, !kNeuronsContiguous>;
    if (tiles.capacity > 0) {
        launch_persistent(
            statistics_outputs_kernel<T, kNeuronsContiguous>, tiles.capacity,
            {.threads = kBlockThreads, .shared_bytes = Product::kSharedBytes + sizeof(int)}, stream,
            batch, tiles.work
        );
    }
}

template <class T>
void launch_add_outputs(const Batch<T>& batch, std::int64_t tokens, Stream stream) {
    const auto shape = [&](int vector) {
        const std::int64_t columns = std::int64_t{256} * vector;
        return LaunchShape{.blocks = tokens * ((batch.hidden_size + columns - 1) / columns)};
    };
    const bool by_fours = batch.hidden_size % 4 == 0 &&
                          reinterpret_cast<std::uintptr_t>(batch.out) % (4 * sizeof(float)) == 0;
    if (by_fours) {
        launch(add_outputs_kernel<T, 4>, shape(4), stream, batch);
    } else {
        launch(add_outputs_kernel<T, 1>, shape(1), stream, batch);
    }
}

template <class T>
void run(const ExpertStatisticsArgs& args, Stream stream) {
    Batch<T> batch = batch_of<T>(args);
    const std::int64_t rows = args.activations.shape[0];
    const std::int64_t experts = batch.experts;
    const std::int64_t hidden_size = batch.hidden_size;
    Workspace workspace(args.workspace.data);
    const Buffers<T> buffers(workspace, batch, rows);

    buffers.tiles.fill(batch.offsets, nullptr, batch.experts, batch.hidden_size, stream);
    if (neurons_are_contiguous(args.down)) {
        launch_outputs<T, true>(batch, buffers.tiles, stream);
    } else {
        launch_outputs<T, false>(batch, buffers.tiles, stream);
    }
    launch_persistent(row_facts_kernel<T>, (rows + 255) / 256, {}, stream, batch);
    add_expert_sums(
        {
            .offsets = batch.offsets,
            .gates = batch.row_gates,
            .norms = batch.norms,
            .counts = data<std::int64_t>(args.counts),
            .gate_sum = data<double>(args.gate_sum),
            .norm_sum = data<double>(args.norm_sum),
            .gated_norm_sum = data<double>(args.gated_norm_sum),
            .norm_max = data<double>(args.norm_max),
        },
        experts, stream
    );
    add_rows(batch.offsets, experts, batch.changes, data<double>(args.direction_change), stream);
    add_rows(batch.offsets, experts, batch.shares, data<double>(args.normalized_gate_sum), stream);

    buffers.chunks.fill(batch.offsets, experts, stream);
    const std::int64_t column_blocks = (hidden_size + 255) / 256;
    launch_persistent(
        input_energy_kernel<T>, buffers.chunks.capacity * column_blocks, {}, stream, batch
    );
    if (column_blocks > 0) {
        launch(
            energy_totals_kernel<T>, {.blocks = experts * column_blocks}, stream, batch,
            data<double>(args.input_energy)
        );
    }
    if (batch.neurons > 0) {
        TensorView outputs = contiguous_view(batch.outputs, args.hidden.dtype, {rows, hidden_size});
        outputs.stride[0] = batch.outputs_stride;
        add_contribution(
            {
                .activations = args.activations,
                .outputs = outputs,
                .down = args.down,
                .gates = contiguous_view(batch.row_gates, {rows}),
                .offsets = args.offsets,
                .projection = args.projection,
                .magnitude = args.magnitude,
                .energy = args.energy,
                .peak = args.peak,
            },
            batch.norms, buffers.chunks, buffers.contributions, stream
        );
    }
    if (args.hidden.shape[0] > 0 && hidden_size > 0) {
        launch_add_outputs(batch, args.hidden.shape[0], stream);
    }
}

}  // namespace

void expert_statistics(const ExpertStatisticsArgs& args, Stream stream) {
    if (args.down.shape[0] == 0 || args.activations.shape[0] == 0) {
        return;
    }
    dispatch(args.hidden.dtype, Floats{}, [&]<class T>() { run<T>(args, stream); });
}

std::size_t expert_statistics_workspace_bytes(
    std::int64_t rows,
    std::int64_t experts,
    std::int64_t hidden_size,
    std::int64_t neurons,
    DType dtype
) {
    std::size_t bytes = 0;
    dispatch(dtype, Floats{}, [&]<class T>() {
        Batch<T> batch{};
        batch.experts = static_cast<int>(experts);
        batch.hidden_size = static_cast<int>(hidden_size);
        batch.neurons = static_cast<int>(neurons);
        Workspace workspace;
        const Buffers<T> buffers(workspace, batch, rows);
        bytes = workspace.bytes();
    });
    return bytes;
}

}  // namespace tenp::cuda
