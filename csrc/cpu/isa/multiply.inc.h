// SPDX-License-Identifier: Apache-2.0

// How the lanes of a matrix product multiply: single values in float32, or pairs of bfloat16 values
// by the instruction for them. Both have the same members, which gemm.inc.h is written in.

#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/vectors.inc.h"

namespace tenp::cpu::TENP_ISA {
namespace {

/// Columns of a panel, as which A B has a block of B in scratch: a row of a panel after the other.
constexpr std::int64_t kPanelVectors = 2;
constexpr std::int64_t kPanelColumns = kPanelVectors * kLanes;

constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) {
    return a < b ? a : b;
}

struct Singles {
    /// What factors are in scratch.
    using Value = float;

    /// Values that are neighbours in depth and share a lane.
    static constexpr std::int64_t kDeep = 1;

    /// Tiles of rows of A for which A B^T reads B where it is, and does not copy it.
    static constexpr std::int64_t kTilesInPlace = 1;

    template <class T>
    [[gnu::always_inline]] static Vector lanes(const T* from) {
        return load(from);
    }

    /// The values of one lane, for all of them.
    [[gnu::always_inline]] static float spread(const float* from) { return *from; }

    template <class A>
    [[gnu::always_inline]] static Vector add_product(Vector sum, A a, Vector b) {
        return sum + a * b;
    }

    /// Copies `count` values and fills the last vector up with zeros.
    template <class T>
    [[gnu::always_inline]] static void copy(const T* from, std::int64_t count, float* to) {
        std::int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) {
            store(to + i, load(from + i));
        }
        if (i < count) {
            store(to + i, load_tail(from + i, count - i));
        }
    }

    /// Copies kDeep rows of B to where its panels have them, and fills the last vector up with
    /// zeros. Of two rows, one that is missing is null and taken for zeros.
    template <class T>
    [[gnu::always_inline]] static void copy_to_panels(
        const T* row, const T*, std::int64_t count, float* to, std::int64_t panel_size
    ) {
        for (std::int64_t i = 0; i < count; i += kPanelColumns) {
            copy(row + i, smaller(kPanelColumns, count - i), to + i / kPanelColumns * panel_size);
        }
    }
};

#if defined(__AVX512BF16__)

/// The instruction adds the product of the second values, then that of the first, each rounded
/// once. It takes denormal numbers for zeros.
struct Pairs {
    using Value = BFloat16;
    static constexpr std::int64_t kDeep = 2;
    /// Nothing is to be converted, and L2 holds what tiles read again; with more a copy pays.
    static constexpr std::int64_t kTilesInPlace = 8;

    [[gnu::always_inline]] static Bits lanes(const BFloat16* from) { return read<Bits>(from); }

    [[gnu::always_inline]] static Bits spread(const BFloat16* from) {
        return Bits{} + read<std::uint32_t>(from);
    }

    [[gnu::always_inline]] static Vector add_product(Vector sum, Bits a, Bits b) {
        return _mm512_dpbf16_ps(sum, bits_as<__m512bh>(a), bits_as<__m512bh>(b));
    }

    [[gnu::always_inline]] static void copy(
        const BFloat16* from, std::int64_t count, BFloat16* to
    ) {
        constexpr std::int64_t kValues = kLanes * kDeep;
        std::int64_t i = 0;
        for (; i + kValues <= count; i += kValues) {
            write(to + i, read<Bits>(from + i));
        }
        if (i < count) {
            BFloat16 values[kValues] = {};
            __builtin_memcpy(values, from + i, static_cast<std::size_t>(count - i) * sizeof(*from));
            write(to + i, read<Bits>(values));
        }
    }

    /// A column's value of the first row is in the lower half of its lane.
    [[gnu::always_inline]] static void copy_to_panels(
        const BFloat16* row,
        const BFloat16* next_row,
        std::int64_t count,
        BFloat16* to,
        std::int64_t panel_size
    ) {
        for_each_vector(count, [&](std::int64_t i, auto read_at, auto) {
            // Widening puts a value into the upper half of its lane, and zeros into the lower.
            Bits pairs = {};
            if (row != nullptr) {
                pairs = bits_as<Bits>(read_at(row + i)) >> 16;
            }
            if (next_row != nullptr) {
                pairs |= bits_as<Bits>(read_at(next_row + i));
            }
            write(to + i / kPanelColumns * panel_size + i % kPanelColumns * kDeep, pairs);
        });
    }
};

#endif

}  // namespace
}  // namespace tenp::cpu::TENP_ISA
