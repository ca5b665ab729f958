// SPDX-License-Identifier: Apache-2.0
#include "tenp/second_moment.h"

#include "core/backend.h"
#include "core/dispatch.h"
#include "cuda/alignment.h"
#include "cuda/device/block_product.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/launch.cuh"

namespace tenp::cuda {
namespace {

constexpr int kTile = 64;         // rows and columns of C that a block computes
constexpr int kSliceRows = 32;    // rows of m in shared memory at a time
constexpr int kSlicesPerSum = 2;  // that are added up in float32 before float64 takes over
constexpr int kThreads = 256;
constexpr int kPiece = 4;  // rows and columns of C that a thread computes

template <class T>
struct Moments {
    const T* activations;  // [S, I]
    std::int64_t activations_stride;
    const float* gates;           // [S]
    const std::int32_t* offsets;  // [E+1]
    double* second_moment;        // [E, n (n+1) / 2]
    int experts;
    int neurons;
    int size;         // n: neurons, and one more with a bias
    bool is_aligned;  // rows of activations start at multiples of 16 bytes

    __host__ __device__ int blocks() const { return (size + kTile - 1) / kTile; }
    __host__ __device__ int tiles() const { return blocks() * (blocks() + 1) / 2; }
};

// ---- kernels ------------------------------------------------------------------------------------

/// panel[r][c] = g m of row first_row + r and neuron first + c. Beyond the neurons m is 1, beyond
/// `size` and from last_row on everything is 0.
template <class T>
__device__ __forceinline__ void load_panel(
    const Moments<T>& args, float (*panel)[kTile], int first_row, int last_row, int first
) {
    constexpr int kVector = 16 / static_cast<int>(sizeof(T));
    constexpr int kRowVectors = kTile / kVector;
    for (int i = static_cast<int>(threadIdx.x); i < kSliceRows * kRowVectors; i += kThreads) {
        const int r = i / kRowVectors;
        const int c = i % kRowVectors * kVector;
        const int row = first_row + r;
        const bool is_row = row < last_row;
        const float gate = is_row ? args.gates[row] : 0;
        const T* m = args.activations + row * args.activations_stride + first + c;
        float values[kVector];
        if (is_row && args.is_aligned && first + c + kVector <= args.neurons) {
            load_widened(values, m);
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                values[j] *= gate;
            }
        } else {
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                const int neuron = first + c + j;
                values[j] = !is_row || neuron >= args.size ? 0
                            : neuron >= args.neurons       ? gate
                                                           : gate * widen(m[j]);
            }
        }
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            panel[r][c + j] = values[j];
        }
    }
}

/// C += sum over rows of (g m) (g m)^T, upper triangle, packed row by row.
/// Grid: any number of blocks. A block takes every n-th (expert, tile of 64 x 64 of the triangle)
/// and walks over all rows of the expert, in their order: nobody else writes to its tile.
/// A thread has 4 x 4 elements: float32 sums of 64 rows, float64 sums of those.
/// Shared memory: two panels of 32 rows x 64 neurons of g m.
/// Holds: nothing.
template <class T>
__global__ void __launch_bounds__(kThreads) second_moment_kernel(Moments<T> args) {
    auto* top_panel = reinterpret_cast<float (*)[kTile]>(shared_memory<float>());
    auto* left_panel = top_panel + kSliceRows;
    const int thread_row = static_cast<int>(threadIdx.x) / (kTile / kPiece) * kPiece;
    const int thread_column = static_cast<int>(threadIdx.x) % (kTile / kPiece) * kPiece;
    const std::int64_t items = std::int64_t{args.experts} * args.tiles();

    for (std::int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const int expert = static_cast<int>(item / args.tiles());
        int tile = static_cast<int>(item % args.tiles());  // of the triangle, row by row
        int block_row = 0;
        for (; tile >= args.blocks() - block_row; ++block_row) {
            tile -= args.blocks() - block_row;
        }
        const int top = block_row * kTile;
        const int left = (block_row + tile) * kTile;
        const int last_row = args.offsets[expert + 1];

        double totals[kPiece][kPiece] = {};
        float sums[kPiece][kPiece] = {};
        int slices = 0;
        for (int row = args.offsets[expert]; row < last_row; row += kSliceRows) {
            load_panel(args, top_panel, row, last_row, top);
            load_panel(args, left_panel, row, last_row, left);
            __syncthreads();
#pragma unroll 8
            for (int r = 0; r < kSliceRows; ++r) {
                const float4 a = *reinterpret_cast<const float4*>(&top_panel[r][thread_row]);
                const float4 b = *reinterpret_cast<const float4*>(&left_panel[r][thread_column]);
                const float as[kPiece] = {a.x, a.y, a.z, a.w};
                const float bs[kPiece] = {b.x, b.y, b.z, b.w};
#pragma unroll
                for (int i = 0; i < kPiece; ++i) {
#pragma unroll
                    for (int j = 0; j < kPiece; ++j) {
                        sums[i][j] += as[i] * bs[j];
                    }
                }
            }
            __syncthreads();
            if (++slices == kSlicesPerSum || row + kSliceRows >= last_row) {
                slices = 0;
#pragma unroll
                for (int i = 0; i < kPiece; ++i) {
#pragma unroll
                    for (int j = 0; j < kPiece; ++j) {
                        totals[i][j] += sums[i][j];
                        sums[i][j] = 0;
                    }
                }
            }
        }

        const std::int64_t size = args.size;
        double* packed = args.second_moment + expert * (size * (size + 1) / 2);
#pragma unroll
        for (int i = 0; i < kPiece; ++i) {
            const std::int64_t row = top + thread_row + i;
#pragma unroll
            for (int j = 0; j < kPiece; ++j) {
                const std::int64_t column = left + thread_column + j;
                if (row < size && row <= column && column < size) {
                    packed[row * size - row * (row - 1) / 2 + column - row] += totals[i][j];
                }
            }
        }
    }
}

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------

void accumulate_second_moment(const SecondMomentArgs& args, Stream stream) {
    const std::int64_t experts = args.second_moment.shape[0];
    if (experts == 0 || args.second_moment.shape[1] == 0 || args.activations.shape[0] == 0) {
        return;
    }
    dispatch(args.activations.dtype, Floats{}, [&]<class T>() {
        const auto* activations = data<const T>(args.activations);
        const std::int64_t stride = args.activations.stride[0];
        const auto neurons = static_cast<int>(args.activations.shape[1]);
        const Moments<T> moments{
            .activations = activations,
            .activations_stride = stride,
            .gates = data<const float>(args.gates),
            .offsets = data<const std::int32_t>(args.offsets),
            .second_moment = data<double>(args.second_moment),
            .experts = static_cast<int>(experts),
            .neurons = neurons,
            .size = neurons + (args.has_bias ? 1 : 0),
            .is_aligned = rows_are_aligned(activations, stride),
        };
        launch_persistent(
            second_moment_kernel<T>, experts * moments.tiles(),
            {.threads = kThreads, .shared_bytes = 2 * kSliceRows * kTile * sizeof(float)}, stream,
            moments
        );
    });
}

}  // namespace tenp::cuda
