// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/sums.h"

namespace tenp::cpu {

void accumulate_activation_stats(const ActivationStatsArgs& args) {
    const std::int64_t experts = args.counts.shape[0];
    const std::int64_t hidden_size = args.outputs.shape[1];
    const auto* offsets = data<const std::int32_t>(args.offsets);
    const auto* gates = data<const float>(args.gates);
    dispatch(args.outputs.dtype, Floats{}, [&]<class T>() {
        parallel_for(experts, [&](std::int64_t expert) {
            double gate_sum = 0, norm_sum = 0, gated = 0, largest = 0;
            for (std::int64_t row = offsets[expert]; row < offsets[expert + 1]; ++row) {
                const T* y = data<const T>(args.outputs) + row * args.outputs.stride[0];
                double squares = 0;
                for (std::int64_t h = 0; h < hidden_size; ++h) {
                    const double value = to_float(y[h]);
                    squares += value * value;
                }
                const double norm = std::sqrt(squares);
                gate_sum += gates[row];
                norm_sum += norm;
                gated += gates[row] * norm;
                largest = max_or_nan(largest, norm);
            }
            data<std::int64_t>(args.counts)[expert] += offsets[expert + 1] - offsets[expert];
            data<double>(args.gate_sum)[expert] += gate_sum;
            data<double>(args.norm_sum)[expert] += norm_sum;
            data<double>(args.gated_norm_sum)[expert] += gated;
            double& maximum = data<double>(args.norm_max)[expert];
            maximum = max_or_nan(maximum, largest);
        });
    });
}

}  // namespace tenp::cpu
