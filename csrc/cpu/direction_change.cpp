// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cpu/isa/kernels.h"
#include "cpu/parallel.h"
#include "cpu/row_sums.h"
#include "cpu/scratch.h"

namespace tenp::cpu {

void add_direction_change(
    const std::int32_t* offsets, std::int64_t experts, const double* changes, double* sums
) {
    parallel_for(experts, [&](std::int64_t expert) {
        double sum = 0;
        for (std::int64_t row = offsets[expert]; row < offsets[expert + 1]; ++row) {
            sum += changes[row];
        }
        sums[expert] += sum;
    });
}

void accumulate_direction_change(const DirectionChangeArgs& args) {
    const std::int64_t experts = args.direction_change.shape[0];
    const auto* offsets = data<const std::int32_t>(args.offsets);
    const auto* tokens = data<const std::int32_t>(args.tokens);
    const auto* gates = data<const float>(args.gates);

    thread_local Scratch scratch;
    auto* changes = scratch.get<double>(args.outputs.shape[0]);
    dispatch(args.hidden.dtype, Floats{}, [&]<class T>() {
        for_each_row(offsets[0], offsets[experts], [&](std::int64_t row) {
            const T* x = data<const T>(args.hidden) + tokens[row] * args.hidden.stride[0];
            const T* y = data<const T>(args.outputs) + row * args.outputs.stride[0];
            const DotProducts dots = kernels().of<T>().dots(x, y, args.hidden.shape[1]);
            changes[row] = gates[row] * direction_change(dots);
        });
    });
    add_direction_change(offsets, experts, changes, data<double>(args.direction_change));
}

}  // namespace tenp::cpu
