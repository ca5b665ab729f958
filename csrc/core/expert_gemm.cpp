// SPDX-License-Identifier: Apache-2.0
#include "tenp/expert_gemm.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "core/backend.h"
#include "core/checks.h"
#include "core/dispatch.h"
#include "tenp/error.h"

namespace tenp {
namespace {

constexpr std::string_view kOp = "expert_gemm";

/// What the kernels assume of the two index arrays: every expert's neurons are rows of its own.
/// Returns the largest width.
std::int64_t check_widths(const Checks& check, const ExpertGemmArgs& args) {
    const auto* widths = data<const std::int32_t>(args.widths);
    const auto* offsets = data<const std::int32_t>(args.neuron_offsets);
    const std::int64_t experts = args.widths.shape[0];
    const std::int64_t rows = args.down.shape[0];
    check.offsets({"neuron_offsets", args.neuron_offsets}, rows);
    if (offsets[experts] != rows) {
        check.fail(
            "neuron_offsets", "offsets that end at the " + std::to_string(rows) + " rows of down",
            std::to_string(offsets[experts])
        );
    }
    std::int64_t max_width = 0;
    for (std::int64_t expert = 0; expert < experts; ++expert) {
        const std::int64_t room = offsets[expert + 1] - offsets[expert];
        if (widths[expert] < 0 || widths[expert] > room) {
            check.fail(
                "widths",
                "within 0.." + std::to_string(room) + " for expert " + std::to_string(expert),
                std::to_string(widths[expert])
            );
        }
        max_width = std::max<std::int64_t>(max_width, widths[expert]);
    }
    return max_width;
}

}  // namespace

void expert_gemm(const ExpertGemmArgs& args, Stream stream) {
    const Checks check(kOp, args.hidden);
    const Named hidden{"hidden", args.hidden};
    const Named expert_ids{"expert_ids", args.expert_ids};
    const Named gates{"gates", args.gates};
    const Named gate_up{"gate_up", args.gate_up};
    const Named down{"down", args.down};
    const Named widths{"widths", args.widths};
    const Named neuron_offsets{"neuron_offsets", args.neuron_offsets};
    const Named gate_up_bias{"gate_up_bias", args.gate_up_bias};
    const Named down_bias{"down_bias", args.down_bias};
    const Named gate_up_scale{"gate_up_scale", args.gate_up_scale};
    const Named down_scale{"down_scale", args.down_scale};
    const Named out{"out", args.out};
    const Named workspace{"workspace", args.workspace};

    check.rank(hidden, 2);
    check.rank(expert_ids, 2);
    check.rank(down, 2);
    check.rank(widths, 1);
    const std::int64_t tokens = args.hidden.shape[0];
    const std::int64_t hidden_size = args.hidden.shape[1];
    const std::int64_t per_token = args.expert_ids.shape[1];
    const std::int64_t experts = args.widths.shape[0];
    const std::int64_t rows = args.down.shape[0];
    const std::int64_t gate_up_rows = args.gated ? 2 * rows : rows;
    const DType dtype = args.hidden.dtype;
    check.is_float(hidden);
    check.array(hidden, dtype, {tokens, hidden_size}, Layout::kRows);
    check.array(expert_ids, DType::kInt32, {tokens, per_token});
    check.rows("expert_ids", tokens, per_token);
    check.array(gates, DType::kFloat32, {tokens, per_token});
    const bool is_int8 = args.down.dtype == DType::kInt8;
    const DType weights = is_int8 ? DType::kInt8 : dtype;
    check.array(gate_up, weights, {gate_up_rows, hidden_size});
    check.array(down, weights, {rows, hidden_size});
    if (is_int8) {
        check.array(gate_up_scale, dtype, {gate_up_rows});
        check.array(down_scale, dtype, {rows});
    } else if (args.gate_up_scale.data != nullptr || args.down_scale.data != nullptr) {
        check.fail("gate_up_scale, down_scale", "absent for weights that are no int8", "given");
    }
    check.array(widths, DType::kInt32, {experts});
    check.array(neuron_offsets, DType::kInt32, {experts + 1});
    if (args.gate_up_bias.data != nullptr) {
        check.array(gate_up_bias, dtype, {gate_up_rows});
    }
    if (args.down_bias.data != nullptr) {
        check.array(down_bias, dtype, {experts, hidden_size});
    }
    check.array(out, dtype, {tokens, hidden_size}, Layout::kRows);
    if (args.activation == Activation::kSwigluOai) {
        if (!args.gated) {
            check.fail("gated", "true for swiglu_oai", "false");
        }
        if (!(args.limit > 0)) {
            check.fail("limit", "positive for swiglu_oai", std::to_string(args.limit));
        }
        if (!std::isfinite(args.alpha)) {
            check.fail("alpha", "finite for swiglu_oai", std::to_string(args.alpha));
        }
    }
    const bool on_cpu = check.device() == Device::kCpu;
    if (is_int8 && !on_cpu) {
        throw Unsupported("expert_gemm: int8 weights have no CUDA kernel; dequantize them");
    }
    if (!on_cpu && args.max_width < 0) {
        check.fail("max_width", "given for CUDA arrays", std::to_string(args.max_width));
    }
    const std::int64_t max_width = on_cpu ? check_widths(check, args) : args.max_width;
    check.workspace(
        args.workspace,
        expert_gemm_workspace_bytes(tokens, per_token, hidden_size, experts, max_width, dtype)
    );
    check.apart(
        {out, workspace}, {hidden, expert_ids, gates, gate_up, down, widths, neuron_offsets,
                           gate_up_bias, down_bias, gate_up_scale, down_scale}
    );

    if (on_cpu) {
        cpu::expert_gemm(args);
    } else {
        cuda::expert_gemm(args, stream);
    }
}

std::size_t expert_gemm_workspace_bytes(
    std::int64_t tokens,
    std::int64_t experts_per_token,
    std::int64_t hidden_size,
    std::int64_t num_experts,
    std::int64_t max_width,
    DType dtype
) {
    const TensorView like{.dtype = dtype};
    const Checks check("expert_gemm_workspace_bytes", like);
    check.size("tokens", tokens);
    check.size("experts_per_token", experts_per_token);
    check.size("hidden_size", hidden_size);
    check.size("num_experts", num_experts);
    check.size("max_width", max_width);
    check.rows("tokens * experts_per_token", tokens, experts_per_token);
    check.is_float({"dtype", like});
    return std::max(
        cpu::expert_gemm_workspace_bytes(
            tokens, experts_per_token, hidden_size, num_experts, max_width, dtype
        ),
        cuda::expert_gemm_workspace_bytes(
            tokens, experts_per_token, hidden_size, num_experts, max_width, dtype
        )
    );
}

}  // namespace tenp
