// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <span>
#include <utility>
#include <vector>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cpu/isa/kernels.h"
#include "cpu/parallel.h"
#include "cpu/row_blocks.h"
#include "cpu/row_sums.h"
#include "cpu/scratch.h"

// Here the parts of the work are separate: y goes to memory, what the sums need of every row is
// computed once, and the sums are those of the other ops. The products are nearly all the time that
// this takes.

namespace tenp::cpu {
namespace {

/// Tokens that one task adds the outputs of.
constexpr std::int64_t kTokensPerTask = 16;

/// Input dimensions whose energy one task adds up.
constexpr std::int64_t kInputColumns = 512;

/// Of y, wherever the caller's workspace starts.
constexpr std::size_t kAlignment = 64;

/// What every row says of itself, in the order of rows.
struct RowFacts {
    std::vector<std::int32_t> tokens;
    std::vector<float> gates;
    std::vector<double> shares;  // of the token's gates

    explicit RowFacts(const ExpertStatisticsArgs& args) {
        const std::int64_t experts = args.down.shape[0];
        const std::int64_t per_token = args.rows.shape[1];
        const auto* offsets = data<const std::int32_t>(args.offsets);
        const auto* slots = data<const std::int32_t>(args.slots);
        const auto count = static_cast<std::size_t>(args.activations.shape[0]);
        tokens.resize(count);
        gates.resize(count);
        shares.resize(count);
        for (auto row = static_cast<std::size_t>(offsets[0]);
             row < static_cast<std::size_t>(offsets[experts]); ++row) {
            const std::int64_t token = slots[row] / per_token;
            const auto* of_token = data<const float>(args.gates) + token * per_token;
            double total = 0;
            for (const float gate : std::span(of_token, static_cast<std::size_t>(per_token))) {
                total += gate;
            }
            tokens[row] = static_cast<std::int32_t>(token);
            gates[row] = of_token[slots[row] % per_token];
            shares[row] = total > 0 ? gates[row] / total : gates[row];
        }
    }
};

/// y of `rows` rows of an expert, for one block of its hidden dimensions.
template <class T>
void compute_outputs(
    const ExpertStatisticsArgs& args,
    T* outputs,  // [S, H]
    const RowBlock& block,
    std::int64_t column,
    std::int64_t columns,
    bool neurons_are_contiguous
) {
    thread_local Scratch scratch;
    auto* gemm_scratch = scratch.get<float>(kGemmScratch + kGemmRows * columns);
    float* products = gemm_scratch + kGemmScratch;
    const std::int64_t hidden_size = args.hidden.shape[1];
    const TensorView& m = args.activations;
    const TensorView& down = args.down;
    const TypedKernels<T>& run = kernels().of<T>();
    (neurons_are_contiguous ? run.gemm_nt : run.gemm_nn)({
        .a = {.data = data<const T>(m) + block.row * m.stride[0], .stride = m.stride[0]},
        .b =
            {.data = data<const T>(down) + block.expert * down.stride[0] + column * down.stride[1],
             .stride = down.stride[neurons_are_contiguous ? 1 : 2]},
        .c = products,
        .c_stride = columns,
        .rows = block.rows,
        .columns = columns,
        .depth = down.shape[2],
        .scratch = gemm_scratch,
    });
    for (std::int64_t row = 0; row < block.rows; ++row) {
        T* y = outputs + (block.row + row) * hidden_size + column;
        run.round_row(products + row * columns, y, columns);
    }
}

/// out_t += sum over this call's rows of token t, by ascending row, of g (y + b_d).
template <class T>
void add_outputs(const ExpertStatisticsArgs& args, const T* outputs, std::int64_t token) {
    thread_local std::vector<std::pair<std::int32_t, float>> rows;
    const std::int64_t per_token = args.rows.shape[1];
    const std::int64_t hidden_size = args.hidden.shape[1];
    const std::int64_t experts = args.down.shape[0];
    const auto* offsets = data<const std::int32_t>(args.offsets);
    rows.clear();
    for (std::int64_t slot = token * per_token; slot < (token + 1) * per_token; ++slot) {
        const std::int32_t row = data<const std::int32_t>(args.rows)[slot];
        if (row >= offsets[0] && row < offsets[experts]) {
            rows.emplace_back(row, data<const float>(args.gates)[slot]);
        }
    }
    std::ranges::sort(rows);
    float* out = data<float>(args.out) + token * hidden_size;
    const auto add_row = kernels().of<T>().add_row;
    const auto* biases = data<const T>(args.down_bias);
    for (const auto& [row, gate] : rows) {
        add_row(out, outputs + row * hidden_size, gate, hidden_size);
        if (biases != nullptr) {
            const auto expert = std::upper_bound(offsets, offsets + experts + 1, row) - offsets - 1;
            add_row(out, biases + expert * hidden_size, gate, hidden_size);
        }
    }
}

/// input_energy of some dimensions of one expert.
template <class T>
void add_input_energy(
    const ExpertStatisticsArgs& args,
    const RowFacts& facts,
    std::int64_t expert,
    std::int64_t column,
    std::int64_t columns
) {
    const auto* offsets = data<const std::int32_t>(args.offsets);
    double sums[kInputColumns] = {};
    for (std::int64_t row = offsets[expert]; row < offsets[expert + 1]; ++row) {
        const auto r = static_cast<std::size_t>(row);
        const double gate = facts.gates[r];
        const T* x = data<const T>(args.hidden) + facts.tokens[r] * args.hidden.stride[0] + column;
        kernels().of<T>().add_squares(sums, x, gate * gate, columns);
    }
    double* energy = data<double>(args.input_energy) + expert * args.hidden.shape[1] + column;
    for (std::int64_t i = 0; i < columns; ++i) {
        energy[i] += sums[i];
    }
}

void add_shares(const ExpertStatisticsArgs& args, const RowFacts& facts) {
    const auto* offsets = data<const std::int32_t>(args.offsets);
    for (std::int64_t expert = 0; expert < args.down.shape[0]; ++expert) {
        double sum = 0;
        for (std::int64_t row = offsets[expert]; row < offsets[expert + 1]; ++row) {
            sum += facts.shares[static_cast<std::size_t>(row)];
        }
        data<double>(args.normalized_gate_sum)[expert] += sum;
    }
}

template <class T>
void run(const ExpertStatisticsArgs& args) {
    const std::int64_t tokens = args.hidden.shape[0];
    const std::int64_t hidden_size = args.hidden.shape[1];
    const std::int64_t experts = args.down.shape[0];
    const std::int64_t rows = args.activations.shape[0];
    const auto* offsets = data<const std::int32_t>(args.offsets);
    const auto address = reinterpret_cast<std::uintptr_t>(args.workspace.data);
    auto* outputs = reinterpret_cast<T*>((address + kAlignment - 1) / kAlignment * kAlignment);
    const RowFacts facts(args);

    const std::vector<RowBlock> row_blocks = row_blocks_of(offsets, experts, kGemmRows);
    const bool neurons_are_contiguous = args.down.stride[2] == 1 || args.down.shape[2] <= 1;
    const std::int64_t columns =
        neurons_are_contiguous ? kernels().of<T>().nt_columns : kGemmColumns;
    const std::int64_t blocks = (hidden_size + columns - 1) / columns;
    parallel_for(std::ssize(row_blocks) * blocks, [&](std::int64_t task) {
        const std::int64_t column = task % blocks * columns;
        compute_outputs<T>(
            args, outputs, row_blocks[static_cast<std::size_t>(task / blocks)], column,
            std::min(columns, hidden_size - column), neurons_are_contiguous
        );
    });

    std::vector<double> norms(static_cast<std::size_t>(rows));
    std::vector<double> changes(norms.size());
    for_each_row(offsets[0], offsets[experts], [&](std::int64_t row) {
        const auto r = static_cast<std::size_t>(row);
        const T* x = data<const T>(args.hidden) + facts.tokens[r] * args.hidden.stride[0];
        const DotProducts dots =
            kernels().of<T>().dots(x, outputs + row * hidden_size, hidden_size);
        norms[r] = std::sqrt(dots.yy);
        changes[r] = facts.gates[r] * direction_change(dots);
    });

    const TensorView gates = contiguous_view(facts.gates.data(), {rows});
    add_activation_stats(
        {
            .outputs = {},  // not read
            .gates = gates,
            .offsets = args.offsets,
            .counts = args.counts,
            .gate_sum = args.gate_sum,
            .norm_sum = args.norm_sum,
            .gated_norm_sum = args.gated_norm_sum,
            .norm_max = args.norm_max,
        },
        norms.data()
    );
    add_direction_change(offsets, experts, changes.data(), data<double>(args.direction_change));
    add_neuron_contribution(
        {
            .activations = args.activations,
            .outputs = contiguous_view(outputs, args.hidden.dtype, {rows, hidden_size}),
            .down = args.down,
            .gates = gates,
            .offsets = args.offsets,
            .projection = args.projection,
            .magnitude = args.magnitude,
            .energy = args.energy,
            .peak = args.peak,
        },
        norms.data()
    );
    add_shares(args, facts);
    const std::int64_t input_blocks = (hidden_size + kInputColumns - 1) / kInputColumns;
    parallel_for(experts * input_blocks, [&](std::int64_t task) {
        const std::int64_t column = task % input_blocks * kInputColumns;
        add_input_energy<T>(
            args, facts, task / input_blocks, column, std::min(kInputColumns, hidden_size - column)
        );
    });
    parallel_for((tokens + kTokensPerTask - 1) / kTokensPerTask, [&](std::int64_t task) {
        const std::int64_t first = task * kTokensPerTask;
        for (std::int64_t token = first; token < std::min(tokens, first + kTokensPerTask);
             ++token) {
            add_outputs<T>(args, outputs, token);
        }
    });
}

}  // namespace

std::size_t expert_statistics_workspace_bytes(
    std::int64_t rows, std::int64_t hidden_size, DType dtype
) {
    return static_cast<std::size_t>(rows) * static_cast<std::size_t>(hidden_size) *
               dtype_size(dtype) +
           kAlignment;
}

void expert_statistics(const ExpertStatisticsArgs& args) {
    dispatch(args.hidden.dtype, Floats{}, [&]<class T>() { run<T>(args); });
}

}  // namespace tenp::cpu
