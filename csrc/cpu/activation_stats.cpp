// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cpu/isa/kernels.h"
#include "cpu/parallel.h"
#include "cpu/row_sums.h"

namespace tenp::cpu {

void add_activation_stats(const ActivationStatsArgs& args, const double* norms) {
    const std::int64_t experts = args.counts.shape[0];
    const auto* offsets = data<const std::int32_t>(args.offsets);
    const auto* gates = data<const float>(args.gates);

    parallel_for(experts, [&](std::int64_t expert) {
        double gate_sum = 0;
        double norm_sum = 0;
        double gated_norm_sum = 0;
        double norm_max = 0;
        for (std::int64_t row = offsets[expert]; row < offsets[expert + 1]; ++row) {
            const double norm = norms[row];
            gate_sum += gates[row];
            norm_sum += norm;
            gated_norm_sum += gates[row] * norm;
            norm_max = larger_or_nan(norm_max, norm);
        }
        data<std::int64_t>(args.counts)[expert] += offsets[expert + 1] - offsets[expert];
        data<double>(args.gate_sum)[expert] += gate_sum;
        data<double>(args.norm_sum)[expert] += norm_sum;
        data<double>(args.gated_norm_sum)[expert] += gated_norm_sum;
        double& largest = data<double>(args.norm_max)[expert];
        largest = larger_or_nan(largest, norm_max);
    });
}

void accumulate_activation_stats(const ActivationStatsArgs& args) {
    const auto* offsets = data<const std::int32_t>(args.offsets);
    const std::int64_t experts = args.counts.shape[0];
    add_activation_stats(args, row_norms(args.outputs, offsets[0], offsets[experts]));
}

}  // namespace tenp::cpu
