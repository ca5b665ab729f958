// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <vector>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/sums.h"

namespace tenp::cpu {

void accumulate_neuron_contribution(const NeuronContributionArgs& args) {
    const std::int64_t experts = args.down.shape[0];
    const std::int64_t hidden_size = args.down.shape[1];
    const std::int64_t neurons = args.down.shape[2];
    const auto* offsets = data<const std::int32_t>(args.offsets);
    const auto* gates = data<const float>(args.gates);
    dispatch(args.outputs.dtype, Floats{}, [&]<class T>() {
        parallel_for(experts * neurons, [&](std::int64_t task) {
            const std::int64_t expert = task / neurons, neuron = task % neurons;
            const T* w = data<const T>(args.down) + expert * args.down.stride[0] +
                         neuron * args.down.stride[2];
            double projection = 0, magnitude = 0, energy = 0, peak = 0;
            for (std::int64_t row = offsets[expert]; row < offsets[expert + 1]; ++row) {
                const T* y = data<const T>(args.outputs) + row * args.outputs.stride[0];
                const double m = to_float(
                    data<const T>(args.activations)[row * args.activations.stride[0] + neuron]
                );
                double yy = 0;
                float q = 0;
                for (std::int64_t h = 0; h < hidden_size; ++h) {
                    const float value = to_float(y[h]);
                    yy += static_cast<double>(value) * value;
                    q += value * to_float(w[h * args.down.stride[1]]);
                }
                const double gm = gates[row] * m;
                if (yy != 0) projection += m * q / std::sqrt(yy);
                magnitude += std::abs(m);
                energy += gm * gm;
                peak = max_or_nan(peak, std::abs(gm));
            }
            data<double>(args.projection)[task] += projection;
            data<double>(args.magnitude)[task] += magnitude;
            data<double>(args.energy)[task] += energy;
            double& maximum = data<double>(args.peak)[task];
            maximum = max_or_nan(maximum, peak);
        });
    });
}

}  // namespace tenp::cpu
