// SPDX-License-Identifier: Apache-2.0
#include "tenp/second_moment.h"

#include "core/backend.h"
#include "core/checks.h"

namespace tenp {

void accumulate_second_moment(const SecondMomentArgs& args, Stream stream) {
    const Checks check("accumulate_second_moment", args.activations);
    const Named activations{"activations", args.activations};
    const Named gates{"gates", args.gates};
    const Named offsets{"offsets", args.offsets};
    const Named second_moment{"second_moment", args.second_moment};

    check.rank(activations, 2);
    check.rank(second_moment, 2);
    const std::int64_t rows = args.activations.shape[0];
    const std::int64_t neurons = args.activations.shape[1];
    const std::int64_t experts = args.second_moment.shape[0];
    const std::int64_t size = neurons + (args.has_bias ? 1 : 0);
    check.is_float(activations);
    check.array(activations, args.activations.dtype, {rows, neurons}, Layout::kRows);
    check.array(gates, DType::kFloat32, {rows});
    check.array(offsets, DType::kInt32, {experts + 1});
    check.array(second_moment, DType::kFloat64, {experts, size * (size + 1) / 2});
    check.apart(second_moment, {activations, gates, offsets});
    check.offsets(offsets, rows);

    if (check.device() == Device::kCuda) {
        cuda::accumulate_second_moment(args, stream);
    } else {
        cpu::accumulate_second_moment(args);
    }
}

}  // namespace tenp
