// SPDX-License-Identifier: Apache-2.0
#include "tenp/expert_statistics.h"

#include <algorithm>
#include <string>

#include "core/backend.h"
#include "core/checks.h"
#include "core/dispatch.h"

namespace tenp {

void expert_statistics(const ExpertStatisticsArgs& args, Stream stream) {
    const Checks check("expert_statistics", args.hidden);
    const Named hidden{"hidden", args.hidden};
    const Named activations{"activations", args.activations};
    const Named down{"down", args.down};
    const Named down_bias{"down_bias", args.down_bias};
    const Named offsets{"offsets", args.offsets};
    const Named slots{"slots", args.slots};
    const Named rows{"rows", args.rows};
    const Named gates{"gates", args.gates};
    const Named out{"out", args.out};
    const Named counts{"counts", args.counts};
    const Named gate_sum{"gate_sum", args.gate_sum};
    const Named normalized_gate_sum{"normalized_gate_sum", args.normalized_gate_sum};
    const Named norm_sum{"norm_sum", args.norm_sum};
    const Named gated_norm_sum{"gated_norm_sum", args.gated_norm_sum};
    const Named norm_max{"norm_max", args.norm_max};
    const Named direction_change{"direction_change", args.direction_change};
    const Named input_energy{"input_energy", args.input_energy};
    const Named projection{"projection", args.projection};
    const Named magnitude{"magnitude", args.magnitude};
    const Named energy{"energy", args.energy};
    const Named peak{"peak", args.peak};
    const Named workspace{"workspace", args.workspace};

    check.rank(hidden, 2);
    check.rank(activations, 2);
    check.rank(down, 3);
    check.rank(rows, 2);
    const std::int64_t tokens = args.hidden.shape[0];
    const std::int64_t hidden_size = args.hidden.shape[1];
    const std::int64_t row_count = args.activations.shape[0];
    const std::int64_t neurons = args.activations.shape[1];
    const std::int64_t experts = args.down.shape[0];
    const std::int64_t per_token = args.rows.shape[1];
    const DType dtype = args.hidden.dtype;
    check.is_float(hidden);
    check.array(hidden, dtype, {tokens, hidden_size}, Layout::kRows);
    check.array(activations, dtype, {row_count, neurons}, Layout::kRows);
    check.array(down, dtype, {experts, hidden_size, neurons}, Layout::kAny);
    check.contiguous_along_second_or_third(down);
    if (args.down_bias.data != nullptr) {
        check.array(down_bias, dtype, {experts, hidden_size});
    }
    check.array(offsets, DType::kInt32, {experts + 1});
    check.array(slots, DType::kInt32, {row_count});
    check.array(rows, DType::kInt32, {tokens, per_token});
    const std::int64_t slot_count = check.rows("rows", tokens, per_token);
    check.array(gates, DType::kFloat32, {tokens, per_token});
    check.array(out, DType::kFloat32, {tokens, hidden_size});
    check.array(counts, DType::kInt64, {experts});
    for (const Named& sum :
         {gate_sum, normalized_gate_sum, norm_sum, gated_norm_sum, norm_max, direction_change}) {
        check.array(sum, DType::kFloat64, {experts});
    }
    check.array(input_energy, DType::kFloat64, {experts, hidden_size});
    for (const Named& sum : {projection, magnitude, energy, peak}) {
        check.array(sum, DType::kFloat64, {experts, neurons});
    }
    check.apart(
        {out, counts, gate_sum, normalized_gate_sum, norm_sum, gated_norm_sum, norm_max,
         direction_change, input_energy, projection, magnitude, energy, peak, workspace},
        {hidden, activations, down, down_bias, offsets, slots, rows, gates}
    );
    check.offsets(offsets, row_count);
    check.workspace(
        args.workspace,
        expert_statistics_workspace_bytes(row_count, experts, hidden_size, neurons, dtype)
    );

    if (check.device() == Device::kCuda) {
        cuda::expert_statistics(args, stream);
    } else {
        const auto* bounds = data<const std::int32_t>(args.offsets);
        check.indices(slots, bounds[0], bounds[experts], slot_count);
        cpu::expert_statistics(args);
    }
}

std::size_t expert_statistics_workspace_bytes(
    std::int64_t rows,
    std::int64_t experts,
    std::int64_t hidden_size,
    std::int64_t neurons,
    DType dtype
) {
    const TensorView like{.dtype = dtype};
    const Checks check("expert_statistics_workspace_bytes", like);
    check.size("rows", rows);
    check.size("experts", experts);
    check.size("hidden_size", hidden_size);
    check.size("neurons", neurons);
    check.is_float({"dtype", like});
    return std::max(
        cpu::expert_statistics_workspace_bytes(rows, hidden_size, dtype),
        cuda::expert_statistics_workspace_bytes(rows, experts, hidden_size, neurons, dtype)
    );
}

}  // namespace tenp
