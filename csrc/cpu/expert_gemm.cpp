// SPDX-License-Identifier: Apache-2.0
#include "tenp/expert_gemm.h"

#include <algorithm>
#include <span>
#include <type_traits>
#include <vector>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cpu/isa/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "tenp/error.h"

namespace tenp::cpu {
namespace {

/// Rows that go through the layer at a time. It bounds the workspace; weights are read once more
/// for every chunk, which at this size no longer shows.
constexpr std::int64_t kChunkRows = 16384;

/// With fewer rows than this an expert's weights are mostly waited for, so they are read in longer
/// pieces.
constexpr std::int64_t kFewRows = 32;

/// Tokens that one task combines.
constexpr std::int64_t kCombineTokens = 16;

std::int64_t tokens_per_chunk(std::int64_t tokens, std::int64_t per_token) {
    return std::min(
        tokens, std::max<std::int64_t>(1, kChunkRows / std::max<std::int64_t>(1, per_token))
    );
}

/// Where things are in the workspace; offsets and the size are in bytes.
class Workspace {
 public:
    Workspace(
        std::int64_t tokens,
        std::int64_t per_token,
        std::int64_t hidden_size,
        std::int64_t experts,
        std::int64_t max_width,
        DType dtype
    ) {
        const std::int64_t rows = tokens_per_chunk(tokens, per_token) * per_token;
        offsets_ = take(experts + 1, 1, sizeof(std::int32_t));
        slots_ = take(rows, 1, sizeof(std::int32_t));
        rows_ = take(rows, 1, sizeof(std::int32_t));
        activations_ = take(rows, max_width, dtype_size(dtype));
        outputs_ = take(rows, hidden_size, sizeof(float));
    }

    /// Room to align the caller's address included.
    std::size_t bytes() const { return size_ + kAlignment; }

    void place(void* memory) {
        const auto address = reinterpret_cast<std::uintptr_t>(memory);
        base_ = static_cast<char*>(memory) + (kAlignment - address % kAlignment) % kAlignment;
    }

    std::int32_t* offsets() const { return at<std::int32_t>(offsets_); }
    std::int32_t* slots() const { return at<std::int32_t>(slots_); }
    std::int32_t* rows() const { return at<std::int32_t>(rows_); }
    template <class T>
    T* activations() const {
        return at<T>(activations_);
    }
    float* outputs() const { return at<float>(outputs_); }

 private:
    static constexpr std::size_t kAlignment = 64;

    /// Extents are below 2^31, so only the multiplication by the element's size can overflow.
    std::size_t take(std::int64_t rows, std::int64_t columns, std::size_t element) {
        const std::size_t first = size_;
        const auto count = static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns);
        std::size_t bytes = 0;
        if (__builtin_mul_overflow(count, element, &bytes) ||
            __builtin_add_overflow(size_, bytes + kAlignment, &size_)) {
            throw InvalidArgument(
                "expert_gemm: sizes must be such that a workspace fits, got more"
            );
        }
        size_ = size_ / kAlignment * kAlignment;
        return first;
    }

    template <class T>
    T* at(std::size_t offset) const {
        return reinterpret_cast<T*>(base_ + offset);
    }

    char* base_ = nullptr;
    std::size_t size_ = 0;
    std::size_t offsets_, slots_, rows_, activations_, outputs_;
};

/// One block of a product: rows of one expert by columns (neurons or hidden dimensions).
struct Task {
    std::int64_t expert;
    std::int64_t row;
    std::int64_t rows;
    std::int64_t column;
    std::int64_t columns;
};

/// W is the type of the weights: T or int8.
template <class T, class W>
class Layer {
 public:
    Layer(const ExpertGemmArgs& args, const Workspace& workspace, std::int64_t max_width)
        : args_(args),
          offsets_(workspace.offsets()),
          slots_(workspace.slots()),
          rows_(workspace.rows()),
          activations_(workspace.template activations<T>()),
          outputs_(workspace.outputs()),
          max_width_(max_width) {}

    /// Tokens first_..first_ + tokens - 1, from routing to the sum over slots.
    void run(std::int64_t first_token, std::int64_t tokens) {
        first_token_ = first_token;
        tokens_ = tokens;
        sort_rows();

        for_each_block(
            [&](std::int64_t expert) { return widths()[expert]; },
            [&](std::int64_t rows) { return product_columns(rows) / (args_.gated ? 2 : 1); },
            [&](const Task& task) { compute_activations(task); }
        );
        for_each_block(
            [&](std::int64_t) { return hidden_size(); },
            [&](std::int64_t rows) { return rows < kFewRows ? kGemmWideColumns : kGemmColumns; },
            [&](const Task& task) { compute_outputs(task); }
        );
        parallel_for((tokens + kCombineTokens - 1) / kCombineTokens, [&](std::int64_t task) {
            const std::int64_t begin = task * kCombineTokens;
            for (std::int64_t token = begin; token < std::min(tokens, begin + kCombineTokens);
                 ++token) {
                combine_slots(token);
            }
        });
    }

 private:
    std::int64_t hidden_size() const { return args_.hidden.shape[1]; }
    std::int64_t per_token() const { return args_.expert_ids.shape[1]; }
    std::int64_t experts() const { return args_.widths.shape[0]; }
    const std::int32_t* widths() const { return data<const std::int32_t>(args_.widths); }
    const float* gates() const {
        return data<const float>(args_.gates) + first_token_ * per_token();
    }

    void sort_rows() {
        auto* ids = data<std::int32_t>(args_.expert_ids) + first_token_ * per_token();
        RoutingArgs args;
        args.expert_ids = contiguous_view(ids, {tokens_, per_token()});
        args.offsets = contiguous_view(offsets_, {experts() + 1});
        args.slots = contiguous_view(slots_, {tokens_ * per_token()});
        args.rows = contiguous_view(rows_, {tokens_, per_token()});
        cpu::route(args);
    }

    /// Calls f on all threads for blocks that cover every expert's rows and its width(expert)
    /// columns, columns(rows of the block) at a time.
    template <class Width, class Columns, class F>
    void for_each_block(Width width, Columns columns, F f) {
        tasks_.clear();
        for (std::int64_t expert = 0; expert < experts(); ++expert) {
            const std::int64_t last = offsets_[expert + 1];
            for (std::int64_t row = offsets_[expert]; row < last; row += kGemmRows) {
                const std::int64_t rows = std::min(kGemmRows, last - row);
                const std::int64_t step = columns(rows);
                for (std::int64_t column = 0; column < width(expert); column += step) {
                    tasks_.push_back(
                        {expert, row, rows, column, std::min(step, width(expert) - column)}
                    );
                }
            }
        }
        parallel_for(std::ssize(tasks_), [&](std::int64_t task) {
            f(tasks_[static_cast<std::size_t>(task)]);
        });
    }

    /// m of a block of neurons: gate and up in one product, then the activation.
    void compute_activations(const Task& task) {
        thread_local Scratch scratch;
        const std::int64_t products_stride = product_columns(task.rows);
        auto* gemm_scratch = scratch.get<float>(kGemmScratch + kGemmRows * products_stride);
        float* products = gemm_scratch + kGemmScratch;

        std::int64_t tokens[kGemmRows];
        for (std::int64_t row = 0; row < task.rows; ++row) {
            tokens[row] = first_token_ + slots_[task.row + row] / per_token();
        }
        const std::int64_t packed_rows = args_.down.shape[0];
        const std::int64_t first_neuron = packed_row(task.expert) + task.column;
        std::int64_t weight_rows[kGemmWideColumns];
        std::int64_t columns = 0;
        for (std::int64_t matrix = 0; matrix < (args_.gated ? 2 : 1); ++matrix) {
            for (std::int64_t neuron = 0; neuron < task.columns; ++neuron) {
                weight_rows[columns++] = matrix * packed_rows + first_neuron + neuron;
            }
        }
        gemm_nt({
            .a = {data<const T>(args_.hidden), args_.hidden.stride[0], tokens},
            .b = {data<const W>(args_.gate_up), hidden_size(), weight_rows},
            .c = products,
            .c_stride = products_stride,
            .rows = task.rows,
            .columns = columns,
            .depth = hidden_size(),
            .scratch = gemm_scratch,
        });

        const std::int64_t first_up = first_neuron + (args_.gated ? packed_rows : 0);
        const auto* scale = data<const T>(args_.gate_up_scale);
        const auto* bias = data<const T>(args_.gate_up_bias);
        Activate<T> activate{
            .count = task.columns,
            .activation = args_.activation,
            .limit = args_.limit,
            .alpha = args_.alpha,
        };
        if (scale != nullptr) {
            activate.gate_scale = scale + first_neuron;
            activate.up_scale = scale + first_up;
        }
        if (bias != nullptr) {
            activate.gate_bias = bias + first_neuron;
            activate.up_bias = bias + first_up;
        }
        for (std::int64_t row = 0; row < task.rows; ++row) {
            const float* product = products + row * products_stride;
            activate.gate = args_.gated ? product : nullptr;
            activate.up = args_.gated ? product + task.columns : product;
            activate.out = activations_ + (task.row + row) * max_width_ + task.column;
            kernels().of<T>().activate(activate);
        }
    }

    /// y of a block of hidden dimensions.
    void compute_outputs(const Task& task) {
        thread_local Scratch scratch;
        float* y = outputs_ + task.row * hidden_size() + task.column;
        const auto* scale = data<const T>(args_.down_scale);
        gemm_nn({
            .a = {activations_ + task.row * max_width_, max_width_},
            .a_scale = scale == nullptr ? nullptr : scale + packed_row(task.expert),
            .b =
                {data<const W>(args_.down) + packed_row(task.expert) * hidden_size() + task.column,
                 hidden_size()},
            .c = y,
            .c_stride = hidden_size(),
            .rows = task.rows,
            .columns = task.columns,
            .depth = widths()[task.expert],
            .scratch = scratch.get<float>(kGemmScratch),
        });
        if (const auto* bias = data<const T>(args_.down_bias)) {
            bias += task.expert * hidden_size() + task.column;
            for (std::int64_t row = 0; row < task.rows; ++row) {
                kernels().of<T>().add_row(y + row * hidden_size(), bias, 1, task.columns);
            }
        }
    }

    void combine_slots(std::int64_t token) {
        thread_local std::vector<std::int64_t> rows;
        thread_local std::vector<float> weights;
        rows.clear();
        weights.clear();
        for (std::int64_t slot = token * per_token(); slot < (token + 1) * per_token(); ++slot) {
            if (rows_[slot] >= 0) {
                rows.push_back(rows_[slot]);
                weights.push_back(gates()[slot]);
            }
        }
        kernels().of<T>().combine({
            .y = {outputs_, hidden_size()},
            .rows = rows.data(),
            .weights = weights.data(),
            .terms = std::ssize(rows),
            .out = data<T>(args_.out) + (first_token_ + token) * args_.out.stride[0],
            .count = hidden_size(),
        });
    }

    /// Of gate and up together. Few rows get few columns, so that all threads have some.
    static std::int64_t product_columns(std::int64_t rows) {
        const bool is_wide = std::is_same_v<T, W> && rows >= kFewRows;
        return is_wide ? kernels().of<T>().nt_columns : kGemmColumns;
    }

    static void gemm_nt(const Gemm<T, W>& gemm) {
        if constexpr (std::is_same_v<T, W>) {
            kernels().of<T>().gemm_nt(gemm);
        } else {
            kernels().of<T>().gemm_nt_int8(gemm);
        }
    }

    static void gemm_nn(const Gemm<T, W>& gemm) {
        if constexpr (std::is_same_v<T, W>) {
            kernels().of<T>().gemm_nn(gemm);
        } else {
            kernels().of<T>().gemm_nn_int8(gemm);
        }
    }

    std::int64_t packed_row(std::int64_t expert) const {
        return data<const std::int32_t>(args_.neuron_offsets)[expert];
    }

    const ExpertGemmArgs& args_;
    std::int32_t* offsets_;
    std::int32_t* slots_;
    std::int32_t* rows_;
    T* activations_;  // m: [rows of the chunk, max_width]
    float* outputs_;  // y: [rows of the chunk, H]
    std::int64_t max_width_;
    std::int64_t first_token_ = 0;
    std::int64_t tokens_ = 0;
    std::vector<Task> tasks_;
};

}  // namespace

std::size_t expert_gemm_workspace_bytes(
    std::int64_t tokens,
    std::int64_t experts_per_token,
    std::int64_t hidden_size,
    std::int64_t num_experts,
    std::int64_t max_width,
    DType dtype
) {
    return Workspace(tokens, experts_per_token, hidden_size, num_experts, max_width, dtype).bytes();
}

void expert_gemm(const ExpertGemmArgs& args) {
    const std::int64_t tokens = args.hidden.shape[0];
    const std::int64_t per_token = args.expert_ids.shape[1];
    const std::span<const std::int32_t> widths(
        data<const std::int32_t>(args.widths), static_cast<std::size_t>(args.widths.shape[0])
    );
    const std::int64_t max_width = widths.empty() ? 0 : *std::ranges::max_element(widths);
    Workspace workspace(
        tokens, per_token, args.hidden.shape[1], args.widths.shape[0], max_width, args.hidden.dtype
    );
    workspace.place(args.workspace.data);

    const std::int64_t chunk = tokens_per_chunk(tokens, per_token);
    const auto run = [&](auto layer) {
        for (std::int64_t token = 0; token < tokens; token += chunk) {
            layer.run(token, std::min(chunk, tokens - token));
        }
    };
    dispatch(args.hidden.dtype, Floats{}, [&]<class T>() {
        if (args.down.dtype == DType::kInt8) {
            run(Layer<T, std::int8_t>(args, workspace, max_width));
        } else {
            run(Layer<T, T>(args, workspace, max_width));
        }
    });
}

}  // namespace tenp::cpu
