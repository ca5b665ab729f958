// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// The two 16-bit floats and their conversions. The conversions are always inlined: the kernels of
// csrc/cpu/isa are compiled once per instruction set, and an out-of-line copy from one of them
// could be linked into code that runs on any machine.

namespace tenp {

struct Float16 {
    std::uint16_t bits;
};

struct BFloat16 {
    std::uint16_t bits;
};

[[gnu::always_inline]] inline float to_float(float value) {
    return value;
}

[[gnu::always_inline]] inline float to_float(BFloat16 value) {
    return __builtin_bit_cast(float, static_cast<std::uint32_t>(value.bits) << 16);
}

[[gnu::always_inline]] inline float to_float(Float16 value) {
    const std::uint32_t sign = (value.bits & 0x8000u) << 16;
    const std::uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) {  // infinity or NaN
        return __builtin_bit_cast(float, sign | 0x7f800000u | (magnitude << 13));
    }
    if (magnitude >= 0x0400u) {  // normal: only the exponent's bias differs, 127 - 15
        return __builtin_bit_cast(float, sign | ((magnitude << 13) + (112u << 23)));
    }
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
    return __builtin_bit_cast(float, sign | __builtin_bit_cast(std::uint32_t, subnormal));
}

/// Rounds to the nearest value of T, ties to even.
template <class T>
T from_float(float value);

template <>
[[gnu::always_inline]] inline float from_float<float>(float value) {
    return value;
}

template <>
[[gnu::always_inline]] inline BFloat16 from_float<BFloat16>(float value) {
    const auto bits = __builtin_bit_cast(std::uint32_t, value);
    if (value != value) {  // rounding could carry a NaN's payload into infinity
        return {static_cast<std::uint16_t>((bits >> 16) | 0x0040u)};
    }
    return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
[[gnu::always_inline]] inline Float16 from_float<Float16>(float value) {
    const auto bits = __builtin_bit_cast(std::uint32_t, value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    std::uint32_t result;
    if (magnitude > 0x7f800000u) {
        result = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
        result = 0x7c00u;
    } else if (magnitude >= 0x38800000u) {  // normal in 16 bits
        result = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    } else {
        // Adding 0.5 puts the last bit of a 16-bit subnormal, 2^-24, at the last bit of a float.
        const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
        result = __builtin_bit_cast(std::uint32_t, shifted) - 0x3f000000u;
    }
    return {static_cast<std::uint16_t>(sign | result)};
}

}  // namespace tenp
