// SPDX-License-Identifier: Apache-2.0

// The activation functions, and m = act(gate) * up of one row.

#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/vectors.inc.h"

namespace tenp::cpu::TENP_ISA {
namespace {

/// e^x to about 2 units in the last place; 0 and infinity beyond the range of float.
[[gnu::always_inline]] inline Vector exp(Vector x) {
    x = x > 104.0f ? Vector{} + 104.0f : x;  // a NaN passes both comparisons
    x = x < -104.0f ? Vector{} - 104.0f : x;
    // x = n ln 2 + r with |r| <= ln 2 / 2. Adding 1.5 * 2^23 leaves n in the lowest bits.
    const Vector shifted = x * 0x1.715476p+0f + 0x1.8p+23f;
    const Vector n = shifted - 0x1.8p+23f;
    const Vector r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // ln 2 in two parts
    // The Taylor series of e^r up to r^7: the next term is below 2^-27.
    Vector p = Vector{} + 0x1.a01a02p-13f;
    p = p * r + 0x1.6c16c2p-10f;
    p = p * r + 0x1.111112p-7f;
    p = p * r + 0x1.555556p-5f;
    p = p * r + 0x1.555556p-3f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    // 2^n in two factors, since n reaches +-150 and an exponent only 127.
    const Bits whole = bits_as<Bits>(shifted) - 0x4b400000u;
    const Bits first = bits_as<Bits>(bits_as<Integers>(whole) >> 1);
    const Bits second = whole - first;
    return p * bits_as<Vector>((first + 127u) << 23) * bits_as<Vector>((second + 127u) << 23);
}

[[gnu::always_inline]] inline Vector sigmoid(Vector x) {
    return 1.0f / (1.0f + exp(-x));
}

[[gnu::always_inline]] inline Vector positive_part(Vector x) {
    return x < 0.0f ? Vector{} : x;
}

template <Activation kActivation>
[[gnu::always_inline]] inline Vector activated(Vector z) {
    if constexpr (kActivation == Activation::kSilu) {
        return z * sigmoid(z);
    } else if constexpr (kActivation == Activation::kGelu) {
        Vector erf = z;
        for (int lane = 0; lane < kLanes; ++lane) {
            erf[lane] = __builtin_erff(z[lane] * 0x1.6a09e6p-1f);
        }
        return 0.5f * z * (1.0f + erf);
    } else if constexpr (kActivation == Activation::kGeluTanh) {
        // (1 + tanh u) / 2 = sigmoid(2u), u = sqrt(2 / pi) (z + 0.044715 z^3)
        return z * sigmoid(0x1.988454p+0f * (z + 0.044715f * z * z * z));
    } else if constexpr (kActivation == Activation::kRelu) {
        return positive_part(z);
    } else {
        static_assert(kActivation == Activation::kRelu2);
        return positive_part(z) * positive_part(z);
    }
}

template <class T, class F>
[[gnu::always_inline]] inline void activate_each(const Activate<T>& row, F f) {
    for_each_vector(row.count, [&](std::int64_t i, auto read_at, auto write_at) {
        const auto affine = [&](const float* values, const T* scale, const T* bias) {
            Vector value = read_at(values + i);
            value = scale == nullptr ? value : value * read_at(scale + i);
            return bias == nullptr ? value : value + read_at(bias + i);
        };
        const Vector gate =
            row.gate == nullptr ? Vector{} : affine(row.gate, row.gate_scale, row.gate_bias);
        write_at(row.out + i, f(gate, affine(row.up, row.up_scale, row.up_bias)));
    });
}

template <Activation kActivation, class T>
void activate_as(const Activate<T>& row) {
    if (row.gate == nullptr) {
        activate_each(row, [](Vector, Vector up) { return activated<kActivation>(up); });
    } else {
        activate_each(row, [](Vector gate, Vector up) {
            return activated<kActivation>(gate) * up;
        });
    }
}

template <class T>
void activate_swiglu_oai(const Activate<T>& row) {
    activate_each(row, [&](Vector gate, Vector up) {
        gate = gate > row.limit ? Vector{} + row.limit : gate;
        up = up > row.limit ? Vector{} + row.limit : up;
        up = up < -row.limit ? Vector{} - row.limit : up;
        return (up + 1.0f) * gate * sigmoid(row.alpha * gate);
    });
}

template <class T>
void activate(const Activate<T>& row) {
    switch (row.activation) {
        case Activation::kSilu: return activate_as<Activation::kSilu>(row);
        case Activation::kGelu: return activate_as<Activation::kGelu>(row);
        case Activation::kGeluTanh: return activate_as<Activation::kGeluTanh>(row);
        case Activation::kRelu: return activate_as<Activation::kRelu>(row);
        case Activation::kRelu2: return activate_as<Activation::kRelu2>(row);
        case Activation::kSwigluOai: return activate_swiglu_oai(row);
    }
}

}  // namespace
}  // namespace tenp::cpu::TENP_ISA
