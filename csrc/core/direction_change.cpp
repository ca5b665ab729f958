// SPDX-License-Identifier: Apache-2.0
#include "tenp/direction_change.h"

#include "core/backend.h"
#include "core/checks.h"
#include "core/dispatch.h"

namespace tenp {

void accumulate_direction_change(const DirectionChangeArgs& args, Stream stream) {
    const Checks check("accumulate_direction_change", args.hidden);
    const Named hidden{"hidden", args.hidden};
    const Named outputs{"outputs", args.outputs};
    const Named tokens{"tokens", args.tokens};
    const Named gates{"gates", args.gates};
    const Named offsets{"offsets", args.offsets};
    const Named direction_change{"direction_change", args.direction_change};

    check.rank(hidden, 2);
    check.rank(outputs, 2);
    check.rank(direction_change, 1);
    const std::int64_t token_count = args.hidden.shape[0];
    const std::int64_t hidden_size = args.hidden.shape[1];
    const std::int64_t rows = args.outputs.shape[0];
    const std::int64_t experts = args.direction_change.shape[0];
    check.is_float(hidden);
    check.array(hidden, args.hidden.dtype, {token_count, hidden_size}, Layout::kRows);
    check.array(outputs, args.hidden.dtype, {rows, hidden_size}, Layout::kRows);
    check.array(tokens, DType::kInt32, {rows});
    check.array(gates, DType::kFloat32, {rows});
    check.array(offsets, DType::kInt32, {experts + 1});
    check.array(direction_change, DType::kFloat64, {experts});
    check.apart(
        {direction_change, {"workspace", args.workspace}}, {hidden, outputs, tokens, gates, offsets}
    );
    check.offsets(offsets, rows);

    if (check.device() == Device::kCuda) {
        check.workspace(args.workspace, cuda::direction_change_workspace_bytes(rows, experts));
        cuda::accumulate_direction_change(args, stream);
    } else {
        const auto* bounds = data<const std::int32_t>(args.offsets);
        check.indices(tokens, bounds[0], bounds[experts], token_count);
        cpu::accumulate_direction_change(args);
    }
}

std::size_t direction_change_workspace_bytes(std::int64_t rows, std::int64_t experts) {
    const Checks check("direction_change_workspace_bytes", TensorView{});
    check.size("rows", rows);
    check.size("experts", experts);
    return cuda::direction_change_workspace_bytes(rows, experts);
}

}  // namespace tenp
