// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cpu/isa/kernels.h"
#include "cpu/parallel.h"
#include "cpu/row_blocks.h"
#include "cpu/scratch.h"

namespace tenp::cpu {
namespace {

/// m of `rows` rows of an expert, for one block of its neurons.
template <class T>
void activate_block(
    const ExpertActivationsArgs& args,
    std::int64_t expert,
    std::int64_t first_row,
    std::int64_t rows,
    std::int64_t neuron,
    std::int64_t neurons
) {
    thread_local Scratch scratch;
    const TypedKernels<T>& run = kernels().of<T>();
    const std::int64_t products_size = kGemmRows * run.nt_columns;
    auto* gemm_scratch = scratch.get<float>(kGemmScratch + 2 * products_size);
    float* up = gemm_scratch + kGemmScratch;
    float* gate = up + products_size;

    std::int64_t tokens[kGemmRows];
    for (std::int64_t row = 0; row < rows; ++row) {
        tokens[row] = data<const std::int32_t>(args.slots)[first_row + row] / args.per_token;
    }
    const auto project = [&](const TensorView& weights, float* products) {
        run.gemm_nt({
            .a = {data<const T>(args.hidden), args.hidden.stride[0], tokens},
            .b =
                {data<const T>(weights) + expert * weights.stride[0] + neuron * weights.stride[1],
                 weights.stride[1]},
            .c = products,
            .c_stride = run.nt_columns,
            .rows = rows,
            .columns = neurons,
            .depth = args.hidden.shape[1],
            .scratch = gemm_scratch,
        });
    };
    const bool is_gated = args.gate.data != nullptr;
    project(args.up, up);
    if (is_gated) {
        project(args.gate, gate);
    }

    const auto bias = [&](const TensorView& biases) {
        const T* first = data<const T>(biases);
        return first == nullptr ? nullptr : first + expert * args.up.shape[1] + neuron;
    };
    for (std::int64_t row = 0; row < rows; ++row) {
        run.activate({
            .gate = is_gated ? gate + row * run.nt_columns : nullptr,
            .up = up + row * run.nt_columns,
            .gate_bias = bias(args.gate_bias),
            .up_bias = bias(args.up_bias),
            .out =
                data<T>(args.activations) + (first_row + row) * args.activations.stride[0] + neuron,
            .count = neurons,
            .activation = args.activation,
            .limit = args.limit,
            .alpha = args.alpha,
        });
    }
}

}  // namespace

void expert_activations(const ExpertActivationsArgs& args) {
    const std::int64_t experts = args.up.shape[0];
    const std::int64_t width = args.up.shape[1];
    const auto* offsets = data<const std::int32_t>(args.offsets);
    const std::vector<RowBlock> row_blocks = row_blocks_of(offsets, experts, kGemmRows);
    dispatch(args.hidden.dtype, Floats{}, [&]<class T>() {
        const std::int64_t columns = kernels().of<T>().nt_columns;
        const std::int64_t blocks = (width + columns - 1) / columns;
        parallel_for(std::ssize(row_blocks) * blocks, [&](std::int64_t task) {
            const auto [expert, row, rows] = row_blocks[static_cast<std::size_t>(task / blocks)];
            const std::int64_t neuron = task % blocks * columns;
            activate_block<T>(args, expert, row, rows, neuron, std::min(columns, width - neuron));
        });
    });
}

}  // namespace tenp::cpu
