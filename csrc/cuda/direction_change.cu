// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cuda/alignment.h"
#include "cuda/device/reduce.cuh"
#include "cuda/launch.cuh"
#include "cuda/row_sums.h"
#include "cuda/workspace.h"

namespace tenp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <class T>
struct Rows {
    const T* hidden;  // [T, H]
    std::int64_t hidden_stride;
    const T* outputs;  // [S, H]
    std::int64_t outputs_stride;
    int hidden_size;
    bool is_aligned;
    const std::int32_t* tokens;   // [S]
    const float* gates;           // [S]
    const std::int32_t* offsets;  // [E+1]
    int experts;
    double* changes;  // [S]
};

// ---- kernels ------------------------------------------------------------------------------------

/// changes[row] = g |y| (1 - cos(x, y)) = g (|y| - <x, y> / |x|), products and sums in float64.
/// Grid: any number of blocks. A warp takes every n-th row, n the warps of the grid.
/// A lane sums every 32nd group of 16 bytes; the lanes' sums are added in a fixed tree.
/// Shared memory: none.
/// Holds: rows are contiguous; `is_aligned` says whether all start at multiples of 16 bytes.
template <class T>
__global__ void __launch_bounds__(kThreads) row_changes_kernel(Rows<T> args) {
    const int last = args.offsets[args.experts];
    const int step = static_cast<int>(gridDim.x) * kWarps;
    for (std::int64_t row =
             args.offsets[0] + static_cast<int>(blockIdx.x * kWarps + threadIdx.x / 32);
         row < last; row += step) {
        const T* x = args.hidden + args.tokens[row] * args.hidden_stride;
        const T* y = args.outputs + row * args.outputs_stride;
        double xx = 0;
        double xy = 0;
        double yy = 0;
        for_each_of_row<T>(args.hidden_size, args.is_aligned, [&]<int kCount>(int i) {
            float xs[kCount];
            float ys[kCount];
            load_widened(xs, x + i);
            load_widened(ys, y + i);
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
                const double a = xs[j];
                const double b = ys[j];
                xx += a * a;
                xy += a * b;
                yy += b * b;
            }
        });
        xx = warp_sum(xx);
        xy = warp_sum(xy);
        yy = warp_sum(yy);
        if (threadIdx.x % 32 == 0) {
            const double along_x = xx == 0 ? 0 : xy / sqrt(xx);
            args.changes[row] = args.gates[row] * (yy == 0 ? 0 : sqrt(yy) - along_x);
        }
    }
}

/// totals[e] += sum of `values` over the rows of expert e.
/// Grid: one block an expert.
/// A thread sums every 256th row; the threads' sums are added in a fixed tree.
/// Shared memory: one double per warp.
/// Holds: nothing.
__global__ void __launch_bounds__(kThreads) expert_totals_kernel(
    const std::int32_t* offsets,  // [E+1]
    const double* values,         // [S]
    double* totals                // [E]
) {
    const int last = offsets[blockIdx.x + 1];
    double sum = 0;
    for (int row = offsets[blockIdx.x] + static_cast<int>(threadIdx.x); row < last;
         row += kThreads) {
        sum += values[row];
    }
    sum = block_sum(sum, shared_memory<double>());
    if (threadIdx.x == 0) {
        totals[blockIdx.x] += sum;
    }
}

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------

void add_rows(
    const std::int32_t* offsets,
    std::int64_t experts,
    const double* values,
    double* totals,
    Stream stream
) {
    launch(
        expert_totals_kernel,
        {.blocks = experts, .threads = kThreads, .shared_bytes = kWarps * sizeof(double)}, stream,
        offsets, values, totals
    );
}

std::size_t direction_change_workspace_bytes(std::int64_t rows, std::int64_t) {
    Workspace workspace;
    workspace.take<double>(rows);
    return workspace.bytes();
}

void accumulate_direction_change(const DirectionChangeArgs& args, Stream stream) {
    const std::int64_t experts = args.direction_change.shape[0];
    const std::int64_t rows = args.outputs.shape[0];
    if (experts == 0) {
        return;
    }
    Workspace workspace(args.workspace.data);
    auto* changes = workspace.take<double>(rows);
    const auto* offsets = data<const std::int32_t>(args.offsets);
    dispatch(args.hidden.dtype, Floats{}, [&]<class T>() {
        const auto* hidden = data<const T>(args.hidden);
        const auto* outputs = data<const T>(args.outputs);
        const Rows<T> row_args{
            .hidden = hidden,
            .hidden_stride = args.hidden.stride[0],
            .outputs = outputs,
            .outputs_stride = args.outputs.stride[0],
            .hidden_size = static_cast<int>(args.hidden.shape[1]),
            .is_aligned = rows_are_aligned(hidden, args.hidden.stride[0]) &&
                          rows_are_aligned(outputs, args.outputs.stride[0]),
            .tokens = data<const std::int32_t>(args.tokens),
            .gates = data<const float>(args.gates),
            .offsets = offsets,
            .experts = static_cast<int>(experts),
            .changes = changes,
        };
        launch_persistent(
            row_changes_kernel<T>, (rows + kWarps - 1) / kWarps, {.threads = kThreads}, stream,
            row_args
        );
    });
    add_rows(offsets, experts, changes, data<double>(args.direction_change), stream);
}

}  // namespace tenp::cuda
