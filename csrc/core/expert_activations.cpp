// SPDX-License-Identifier: Apache-2.0
#include "tenp/expert_activations.h"

#include <cmath>
#include <string>

#include "core/backend.h"
#include "core/checks.h"
#include "core/dispatch.h"

namespace tenp {

void expert_activations(const ExpertActivationsArgs& args, Stream stream) {
    const Checks check("expert_activations", args.hidden);
    const Named hidden{"hidden", args.hidden};
    const Named offsets{"offsets", args.offsets};
    const Named slots{"slots", args.slots};
    const Named gate{"gate", args.gate};
    const Named up{"up", args.up};
    const Named gate_bias{"gate_bias", args.gate_bias};
    const Named up_bias{"up_bias", args.up_bias};
    const Named activations{"activations", args.activations};
    const Named workspace{"workspace", args.workspace};

    check.rank(hidden, 2);
    check.rank(up, 3);
    check.rank(activations, 2);
    const std::int64_t tokens = args.hidden.shape[0];
    const std::int64_t hidden_size = args.hidden.shape[1];
    const std::int64_t experts = args.up.shape[0];
    const std::int64_t neurons = args.up.shape[1];
    const std::int64_t rows = args.activations.shape[0];
    const DType dtype = args.hidden.dtype;
    const bool is_gated = args.gate.data != nullptr;
    check.is_float(hidden);
    check.array(hidden, dtype, {tokens, hidden_size}, Layout::kRows);
    check.array(offsets, DType::kInt32, {experts + 1});
    check.array(slots, DType::kInt32, {rows});
    check.array(up, dtype, {experts, neurons, hidden_size}, Layout::kRows);
    if (is_gated) {
        check.array(gate, dtype, {experts, neurons, hidden_size}, Layout::kRows);
        if (args.gate.stride[0] != args.up.stride[0] || args.gate.stride[1] != args.up.stride[1]) {
            check.fail(
                "gate", "strided like up, " + shape_text({args.up.stride[0], args.up.stride[1], 1}),
                shape_text({args.gate.stride[0], args.gate.stride[1], 1})
            );
        }
    }
    if (args.gate_bias.data != nullptr) {
        check.array(gate_bias, dtype, {experts, neurons});
    }
    if (args.up_bias.data != nullptr) {
        check.array(up_bias, dtype, {experts, neurons});
    }
    check.array(activations, dtype, {rows, neurons}, Layout::kRows);
    if (args.per_token < 1) {
        check.fail("per_token", "positive", std::to_string(args.per_token));
    }
    const std::int64_t slot_count = check.rows("hidden", tokens, args.per_token);
    if (args.activation == Activation::kSwigluOai) {
        if (!is_gated) {
            check.fail("gate", "given for swiglu_oai", "none");
        }
        if (!(args.limit > 0)) {
            check.fail("limit", "positive for swiglu_oai", std::to_string(args.limit));
        }
        if (!std::isfinite(args.alpha)) {
            check.fail("alpha", "finite for swiglu_oai", std::to_string(args.alpha));
        }
    }
    check.apart({activations, workspace}, {hidden, offsets, slots, gate, up, gate_bias, up_bias});
    check.offsets(offsets, rows);

    if (check.device() == Device::kCuda) {
        check.workspace(
            args.workspace, cuda::expert_activations_workspace_bytes(rows, experts, neurons)
        );
        cuda::expert_activations(args, stream);
    } else {
        const auto* bounds = data<const std::int32_t>(args.offsets);
        check.indices(slots, bounds[0], bounds[experts], slot_count);
        cpu::expert_activations(args);
    }
}

std::size_t expert_activations_workspace_bytes(
    std::int64_t rows, std::int64_t experts, std::int64_t neurons
) {
    const Checks check("expert_activations_workspace_bytes", TensorView{});
    check.size("rows", rows);
    check.size("experts", experts);
    check.size("neurons", neurons);
    return cuda::expert_activations_workspace_bytes(rows, experts, neurons);
}

}  // namespace tenp
