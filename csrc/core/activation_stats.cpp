// SPDX-License-Identifier: Apache-2.0
#include "tenp/activation_stats.h"

#include "core/backend.h"
#include "core/checks.h"

namespace tenp {

void accumulate_activation_stats(const ActivationStatsArgs& args, Stream stream) {
    const Checks check("accumulate_activation_stats", args.outputs);
    const Named outputs{"outputs", args.outputs};
    const Named gates{"gates", args.gates};
    const Named offsets{"offsets", args.offsets};
    const Named counts{"counts", args.counts};
    const Named gate_sum{"gate_sum", args.gate_sum};
    const Named norm_sum{"norm_sum", args.norm_sum};
    const Named gated_norm_sum{"gated_norm_sum", args.gated_norm_sum};
    const Named norm_max{"norm_max", args.norm_max};

    check.rank(outputs, 2);
    check.rank(counts, 1);
    const std::int64_t rows = args.outputs.shape[0];
    const std::int64_t experts = args.counts.shape[0];
    check.is_float(outputs);
    check.array(outputs, args.outputs.dtype, {rows, args.outputs.shape[1]}, Layout::kRows);
    check.array(gates, DType::kFloat32, {rows});
    check.array(offsets, DType::kInt32, {experts + 1});
    check.array(counts, DType::kInt64, {experts});
    for (const Named& sum : {gate_sum, norm_sum, gated_norm_sum, norm_max}) {
        check.array(sum, DType::kFloat64, {experts});
    }
    check.apart(
        {counts, gate_sum, norm_sum, gated_norm_sum, norm_max, {"workspace", args.workspace}},
        {outputs, gates, offsets}
    );
    check.offsets(offsets, rows);

    if (check.device() == Device::kCuda) {
        check.workspace(args.workspace, cuda::activation_stats_workspace_bytes(rows, experts));
        cuda::accumulate_activation_stats(args, stream);
    } else {
        cpu::accumulate_activation_stats(args);
    }
}

std::size_t activation_stats_workspace_bytes(std::int64_t rows, std::int64_t experts) {
    const Checks check("activation_stats_workspace_bytes", TensorView{});
    check.size("rows", rows);
    check.size("experts", experts);
    return cuda::activation_stats_workspace_bytes(rows, experts);
}

}  // namespace tenp
