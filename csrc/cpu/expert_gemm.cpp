// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cpu/parallel.h"

namespace tenp::cpu {
namespace {

float activate(Activation activation, float z) {
    switch (activation) {
        case Activation::kSilu: return z / (1 + std::exp(-z));
        case Activation::kGelu: return 0.5f * z * (1 + std::erf(z * 0.70710678f));
        case Activation::kGeluTanh:
            return 0.5f * z * (1 + std::tanh(0.79788456f * (z + 0.044715f * z * z * z)));
        case Activation::kRelu: return z < 0 ? 0 : z;
        case Activation::kRelu2: return z < 0 ? 0 : z * z;
        case Activation::kSwigluOai: break;
    }
    return z;
}

}  // namespace

std::size_t expert_gemm_workspace_bytes(
    std::int64_t tokens, std::int64_t k, std::int64_t, std::int64_t, std::int64_t, DType
) {
    return static_cast<std::size_t>(tokens * k * 4);
}

void expert_gemm(const ExpertGemmArgs& args) {
    const std::int64_t tokens = args.hidden.shape[0], H = args.hidden.shape[1];
    const std::int64_t k = args.expert_ids.shape[1], experts = args.widths.shape[0];
    const std::int64_t R = args.down.shape[0];
    const auto* ids = data<const std::int32_t>(args.expert_ids);
    const auto* gates = data<const float>(args.gates);
    const auto* widths = data<const std::int32_t>(args.widths);
    const auto* first = data<const std::int32_t>(args.neuron_offsets);
    dispatch(args.hidden.dtype, Floats{}, [&]<class T>() {
        parallel_for(tokens, [&](std::int64_t t) {
            const auto n = static_cast<std::size_t>(H);
            std::vector<float> sum(n), y(n);
            const T* x = data<const T>(args.hidden) + t * args.hidden.stride[0];
            for (std::int64_t j = 0; j < k; ++j) {
                const std::int64_t e = ids[t * k + j];
                if (e < 0 || e >= experts) continue;
                std::fill(y.begin(), y.end(), 0.f);
                for (std::int64_t i = 0; i < widths[e]; ++i) {
                    const auto fc1 = [&](std::int64_t row) {
                        const T* w = data<const T>(args.gate_up) + row * H;
                        float z = 0;
                        for (std::int64_t h = 0; h < H; ++h) z += to_float(x[h]) * to_float(w[h]);
                        if (args.gate_up_bias.data)
                            z += to_float(data<const T>(args.gate_up_bias)[row]);
                        return z;
                    };
                    const std::int64_t row = first[e] + i;
                    float m;
                    if (!args.gated) {
                        m = activate(args.activation, fc1(row));
                    } else if (args.activation == Activation::kSwigluOai) {
                        const float g = std::min(fc1(row), args.limit);
                        const float u = std::clamp(fc1(R + row), -args.limit, args.limit);
                        m = (u + 1) * g / (1 + std::exp(-args.alpha * g));
                    } else {
                        m = activate(args.activation, fc1(row)) * fc1(R + row);
                    }
                    m = to_float(from_float<T>(m));
                    const T* w = data<const T>(args.down) + row * H;
                    for (std::size_t h = 0; h < n; ++h) y[h] += m * to_float(w[h]);
                }
                for (std::size_t h = 0; h < n; ++h) {
                    if (args.down_bias.data)
                        y[h] += to_float(
                            data<const T>(args.down_bias)[static_cast<std::size_t>(e) * n + h]
                        );
                    sum[h] += gates[t * k + j] * y[h];
                }
            }
            T* out = data<T>(args.out) + t * args.out.stride[0];
            for (std::size_t h = 0; h < n; ++h) out[h] = from_float<T>(sum[h]);
        });
    });
}

}  // namespace tenp::cpu
