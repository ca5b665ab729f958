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

// ---- kernels ------------------------------------------------------------------------------------

/// norms[row] = sqrt(sum over h of y_h^2), products and sums in float64.
/// Grid: any number of blocks. A warp takes every n-th row, n the warps of the grid.
/// A lane sums every 32nd group of 16 bytes; the lanes' sums are added in a fixed tree.
/// Shared memory: none.
/// Holds: rows are contiguous; `is_aligned` says whether they start at multiples of 16 bytes.
template <class T>
__global__ void __launch_bounds__(kThreads) row_norms_kernel(
    const T* outputs,  // [S, H]
    std::int64_t stride,
    int hidden_size,
    bool is_aligned,
    const std::int32_t* offsets,  // [E+1]
    int experts,
    double* norms  // [S]
) {
    const int last = offsets[experts];
    const int step = static_cast<int>(gridDim.x) * kWarps;
    for (std::int64_t row = offsets[0] + static_cast<int>(blockIdx.x * kWarps + threadIdx.x / 32);
         row < last; row += step) {
        const T* y = outputs + row * stride;
        double sum = 0;
        for_each_of_row<T>(hidden_size, is_aligned, [&]<int kCount>(int i) {
            float values[kCount];
            load_widened(values, y + i);
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
                sum += static_cast<double>(values[j]) * values[j];
            }
        });
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) {
            norms[row] = sqrt(sum);
        }
    }
}

/// Adds an expert's rows to its sums.
/// Grid: one block an expert.
/// A thread sums every 256th row; the threads' sums are added in a fixed tree.
/// Shared memory: one double per warp.
/// Holds: nothing.
__global__ void __launch_bounds__(kThreads) expert_sums_kernel(ExpertSums args) {
    auto* partial = shared_memory<double>();
    const int expert = static_cast<int>(blockIdx.x);
    const int first = args.offsets[expert];
    const int last = args.offsets[expert + 1];
    double gate_sum = 0;
    double norm_sum = 0;
    double gated_norm_sum = 0;
    double norm_max = 0;
    for (int row = first + static_cast<int>(threadIdx.x); row < last; row += kThreads) {
        const double gate = args.gates[row];
        const double norm = args.norms[row];
        gate_sum += gate;
        norm_sum += norm;
        gated_norm_sum += gate * norm;
        norm_max = larger_or_nan(norm_max, norm);
    }
    gate_sum = block_sum(gate_sum, partial);
    norm_sum = block_sum(norm_sum, partial);
    gated_norm_sum = block_sum(gated_norm_sum, partial);
    norm_max = block_max(norm_max, partial);
    if (threadIdx.x == 0) {
        args.counts[expert] += last - first;
        args.gate_sum[expert] += gate_sum;
        args.norm_sum[expert] += norm_sum;
        args.gated_norm_sum[expert] += gated_norm_sum;
        args.norm_max[expert] = larger_or_nan(args.norm_max[expert], norm_max);
    }
}

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------

void row_norms(
    const TensorView& outputs,
    const std::int32_t* offsets,
    std::int64_t experts,
    double* norms,
    Stream stream
) {
    const std::int64_t rows = outputs.shape[0];
    const std::int64_t stride = outputs.stride[0];
    dispatch(outputs.dtype, Floats{}, [&]<class T>() {
        const auto* first = data<const T>(outputs);
        launch_persistent(
            row_norms_kernel<T>, (rows + kWarps - 1) / kWarps, {.threads = kThreads}, stream, first,
            stride, outputs.shape[1], rows_are_aligned(first, stride), offsets, experts, norms
        );
    });
}

void add_expert_sums(const ExpertSums& sums, std::int64_t experts, Stream stream) {
    launch(
        expert_sums_kernel,
        {.blocks = experts, .threads = kThreads, .shared_bytes = kWarps * sizeof(double)}, stream,
        sums
    );
}

std::size_t activation_stats_workspace_bytes(std::int64_t rows, std::int64_t) {
    Workspace workspace;
    workspace.take<double>(rows);
    return workspace.bytes();
}

void accumulate_activation_stats(const ActivationStatsArgs& args, Stream stream) {
    const std::int64_t experts = args.counts.shape[0];
    if (experts == 0) {
        return;
    }
    Workspace workspace(args.workspace.data);
    auto* norms = workspace.take<double>(args.outputs.shape[0]);
    const auto* offsets = data<const std::int32_t>(args.offsets);
    row_norms(args.outputs, offsets, experts, norms, stream);
    const ExpertSums sums{
        .offsets = offsets,
        .gates = data<const float>(args.gates),
        .norms = norms,
        .counts = data<std::int64_t>(args.counts),
        .gate_sum = data<double>(args.gate_sum),
        .norm_sum = data<double>(args.norm_sum),
        .gated_norm_sum = data<double>(args.gated_norm_sum),
        .norm_max = data<double>(args.norm_max),
    };
    add_expert_sums(sums, experts, stream);
}

}  // namespace tenp::cuda
