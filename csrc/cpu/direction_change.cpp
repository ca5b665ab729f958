// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cpu/parallel.h"

namespace tenp::cpu {

void accumulate_direction_change(const DirectionChangeArgs& args) {
    const std::int64_t experts = args.direction_change.shape[0];
    const std::int64_t hidden_size = args.hidden.shape[1];
    const auto* offsets = data<const std::int32_t>(args.offsets);
    const auto* tokens = data<const std::int32_t>(args.tokens);
    const auto* gates = data<const float>(args.gates);
    dispatch(args.hidden.dtype, Floats{}, [&]<class T>() {
        parallel_for(experts, [&](std::int64_t expert) {
            double sum = 0;
            for (std::int64_t row = offsets[expert]; row < offsets[expert + 1]; ++row) {
                const T* x = data<const T>(args.hidden) + tokens[row] * args.hidden.stride[0];
                const T* y = data<const T>(args.outputs) + row * args.outputs.stride[0];
                double xx = 0, xy = 0, yy = 0;
                for (std::int64_t h = 0; h < hidden_size; ++h) {
                    const double a = to_float(x[h]), b = to_float(y[h]);
                    xx += a * a;
                    xy += a * b;
                    yy += b * b;
                }
                if (yy == 0) {
                    continue;
                }
                const double along = xx == 0 ? 0 : xy / std::sqrt(xx);
                sum += gates[row] * (std::sqrt(yy) - along);
            }
            data<double>(args.direction_change)[expert] += sum;
        });
    });
}

}  // namespace tenp::cpu
