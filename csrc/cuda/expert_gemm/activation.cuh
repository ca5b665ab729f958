// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "cuda/device/ptx.cuh"
#include "tenp/expert_gemm.h"

namespace tenp::cuda {

/// act(z). Written so that NaN stays NaN and large arguments saturate.
__device__ __forceinline__ float activate(Activation activation, float z) {
    switch (activation) {
        case Activation::kGelu: return 0.5f * z * erfcf(-0.70710678118654752f * z);
        case Activation::kGeluTanh:
            return 0.5f * z * (1 + tanhf(0.79788456080286536f * (z + 0.044715f * z * z * z)));
        case Activation::kRelu: return z < 0 ? 0 : z;
        case Activation::kRelu2: return z < 0 ? 0 : z * z;
        default: return z / (1 + expf(-z));
    }
}

/// m of a neuron from its two projections.
__device__ __forceinline__ float activate_gated(
    Activation activation, float limit, float alpha, float gate, float up
) {
    if (activation == Activation::kSwigluOai) {
        gate = gate > limit ? limit : gate;
        up = up > limit ? limit : up < -limit ? -limit : up;
        return (up + 1) * gate / (1 + expf(-alpha * gate));
    }
    return activate(activation, gate) * up;
}

}  // namespace tenp::cuda
