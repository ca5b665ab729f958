// SPDX-License-Identifier: Apache-2.0

// Vectors of floats in GCC/Clang vector types: how many lanes one has follows from the flags that
// the including file is compiled with. That file defines TENP_ISA, a namespace.
//
// Here and in the other files of this kind (.inc.h) everything has internal linkage or is always
// inlined, and no function of the standard library is used: a shared inline function compiled with
// AVX-512 could end up in code that runs anywhere.

#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <utility>

#include "core/float16.h"

namespace tenp::cpu::TENP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2, NEON
#endif

using Vector [[gnu::vector_size(kLanes * sizeof(float))]] = float;
using Quad [[gnu::vector_size(4 * sizeof(float))]] = float;
using Bits [[gnu::vector_size(kLanes * sizeof(float))]] = std::uint32_t;
using ShortBits [[gnu::vector_size(kLanes * sizeof(std::uint16_t))]] = std::uint16_t;

// A vector of doubles fills a register with half as many lanes.
constexpr int kHalf = kLanes / 2;
using Doubles [[gnu::vector_size(kHalf * sizeof(double))]] = double;

template <class To, class From>
[[gnu::always_inline]] inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

/// Reads a whole V from an address of any alignment.
template <class V>
[[gnu::always_inline]] inline V read(const void* from) {
    V to;
    __builtin_memcpy(&to, from, sizeof(to));
    return to;
}

template <class V>
[[gnu::always_inline]] inline void write(void* to, V from) {
    __builtin_memcpy(to, &from, sizeof(from));
}

// Widening is the one thing written with intrinsics: of a conversion to vectors of four times the
// size gcc makes scalar code, and of one to twice the size two halves.

using Integers [[gnu::vector_size(sizeof(Bits))]] = std::int32_t;

#if defined(__AVX512F__)
// With a mask, because gcc 12 warns of what is undefined in the forms without.
constexpr __mmask16 kAll = 0xffff;
#endif

/// kLanes numbers of 16 bits with zeros above.
[[gnu::always_inline]] inline Bits widen_shorts(const void* from) {
#if defined(__AVX512F__)
    return bits_as<Bits>(_mm512_maskz_cvtepu16_epi32(kAll, read<__m256i>(from)));
#elif defined(__AVX2__)
    return bits_as<Bits>(_mm256_cvtepu16_epi32(read<__m128i>(from)));
#else
    return __builtin_convertvector(read<ShortBits>(from), Bits);
#endif
}

/// kLanes signed bytes.
[[gnu::always_inline]] inline Integers widen_bytes(const void* from) {
#if defined(__AVX512F__)
    return bits_as<Integers>(_mm512_maskz_cvtepi8_epi32(kAll, read<__m128i>(from)));
#elif defined(__AVX2__)
    return bits_as<Integers>(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from)))
    );
#else
    using Bytes [[gnu::vector_size(kLanes)]] = std::int8_t;
    using Shorts [[gnu::vector_size(sizeof(ShortBits))]] = std::int16_t;
    return __builtin_convertvector(__builtin_convertvector(read<Bytes>(from), Shorts), Integers);
#endif
}

[[gnu::always_inline]] inline Vector load(const float* from) {
    return read<Vector>(from);
}

[[gnu::always_inline]] inline Vector load(const BFloat16* from) {
    return bits_as<Vector>(widen_shorts(from) << 16);
}

[[gnu::always_inline]] inline Vector load(const Float16* from) {
    const Bits value = widen_shorts(from);
    const Bits sign = (value & 0x8000u) << 16;
    const Bits magnitude = value & 0x7fffu;
    const Bits bias = Bits{} + (112u << 23);  // of the exponents, 127 - 15
    const Bits normal = (magnitude << 13) + bias;
    const Vector subnormal = __builtin_convertvector(magnitude, Vector) * 0x1p-24f;
    Bits result = magnitude < 0x0400u ? bits_as<Bits>(subnormal) : normal;
    result = magnitude < 0x7c00u ? result : normal + bias;  // infinity, NaN: exponent 255
    return bits_as<Vector>(sign | result);
}

[[gnu::always_inline]] inline Vector load(const std::int8_t* from) {
    return __builtin_convertvector(widen_bytes(from), Vector);
}

[[gnu::always_inline]] inline void store(float* to, Vector value) {
    write(to, value);
}

// The next two are from_float<T>() of core/float16.h lane by lane; its comments apply.

[[gnu::always_inline]] inline void store(BFloat16* to, Vector value) {
    const Bits bits = bits_as<Bits>(value);
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits result = (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x0040u : rounded;
    write(to, __builtin_convertvector(result, ShortBits));
}

[[gnu::always_inline]] inline void store(Float16* to, Vector value) {
    const Bits bits = bits_as<Bits>(value);
    const Bits sign = (bits >> 16) & 0x8000u;
    const Bits magnitude = bits & 0x7fffffffu;
    const Bits normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    const Bits subnormal = bits_as<Bits>(bits_as<Vector>(magnitude) + 0.5f) - 0x3f000000u;
    Bits result = magnitude >= 0x38800000u ? normal : subnormal;
    result = magnitude >= 0x477ff000u ? Bits{} + 0x7c00u : result;
    result = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : result;
    write(to, __builtin_convertvector(sign | result, ShortBits));
}

/// The first `count` < kLanes values, then zeros.
template <class T>
[[gnu::always_inline]] inline Vector load_tail(const T* from, std::int64_t count) {
    T lanes[kLanes] = {};
    for (std::int64_t lane = 0; lane < count; ++lane) {
        lanes[lane] = from[lane];
    }
    return load(lanes);
}

template <class T>
[[gnu::always_inline]] inline void store_tail(T* to, Vector value, std::int64_t count) {
    T lanes[kLanes];
    store(lanes, value);
    for (std::int64_t lane = 0; lane < count; ++lane) {
        to[lane] = lanes[lane];
    }
}

/// Calls f(i, load, store) for every vector of `count` elements, where load(p) and store(p, v) are
/// for the elements from p on that belong to it.
template <class F>
[[gnu::always_inline]] inline void for_each_vector(std::int64_t count, F f) {
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        f(
            i, [](const auto* from) { return load(from); },
            [](auto* to, Vector value) { store(to, value); }
        );
    }
    if (i < count) {
        f(
            i, [=](const auto* from) { return load_tail(from, count - i); },
            [=](auto* to, Vector value) { store_tail(to, value, count - i); }
        );
    }
}

/// x and y are groups of kGroup lanes. Returns each group folded onto half as many lanes (its upper
/// half added to its lower one), x's groups first. With y = x the result repeats itself.
template <int kGroup>
[[gnu::always_inline]] inline Vector fold(Vector x, Vector y) {
    return [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
        constexpr int kTo = kGroup / 2;
        const Vector low = __builtin_shufflevector(x, y, kLane / kTo * kGroup + kLane % kTo...);
        const Vector high =
            __builtin_shufflevector(x, y, kLane / kTo * kGroup + kLane % kTo + kTo...);
        return low + high;
    }(std::make_integer_sequence<int, kLanes>());
}

/// The sums of the lanes of a, b, c and d, in the first four lanes.
[[gnu::always_inline]] inline Vector lane_sums(Vector a, Vector b, Vector c, Vector d) {
    Vector sums = fold<kLanes / 2>(fold<kLanes>(a, b), fold<kLanes>(c, d));
    if constexpr (kLanes >= 8) {
        sums = fold<kLanes / 4>(sums, sums);
    }
    if constexpr (kLanes >= 16) {
        sums = fold<kLanes / 8>(sums, sums);
    }
    return sums;
}

}  // namespace
}  // namespace tenp::cpu::TENP_ISA
