// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/float16.h"

// The host's twin of csrc/cuda/device/ptx.cuh: what each instruction does, as hostile as the real
// one may be. Copies arrive when they are waited for and not earlier, addresses are checked.

namespace tenp::cuda {

struct Tf32 {};

template <class T>
T* shared_memory() {
    return reinterpret_cast<T*>(emulation::shared_begin());
}

inline float widen(float value) {
    return value;
}
inline float widen(BFloat16 value) {
    return to_float(value);
}
inline float widen(Float16 value) {
    return to_float(value);
}
template <class T>
T narrow(float value) {
    return from_float<T>(value);
}

inline std::uint32_t round_to_tf32(std::uint32_t bits) {
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    return finite ? (bits + 0x1000u) & 0xffffe000u : bits;
}

// ---- memory -------------------------------------------------------------------------------------

inline void copy_async(void* shared, const void* global, int bytes) {
    emulation::check_shared(shared, 16);
    emulation::require(bytes >= 0 && bytes <= 16, "copy_async: bytes within 0..16");
    emulation::require(bytes == 0 || emulation::is_aligned(global, 16), "copy_async: alignment");
    emulation::start_copy(shared, global, bytes);
}

inline void commit_copies() {
    emulation::commit_copies();
}

template <int kGroups>
void wait_for_copies() {
    emulation::finish_copies(kGroups);
}

inline uint4 load_streaming(const void* global) {
    emulation::require(emulation::is_aligned(global, 16), "load_streaming: alignment");
    uint4 value;
    std::memcpy(&value, global, 16);
    return value;
}

inline void prefetch(const void*) {}

// ---- matrices -----------------------------------------------------------------------------------

struct FourRegisters {
    std::uint32_t r[4];
};

template <bool kTransposed>
void load_four(std::uint32_t (&registers)[4], const void* shared_row) {
    emulation::check_shared(shared_row, 16);
    const FourRegisters result = emulation::collective<FourRegisters>(
        shared_row,
        [](const emulation::Lanes<const void*>& rows, emulation::Lanes<FourRegisters>& out) {
            for (int lane = 0; lane < 32; ++lane) {
                for (int i = 0; i < 4; ++i) {
                    std::uint16_t halves[2];
                    for (int j = 0; j < 2; ++j) {
                        const int row = kTransposed ? 2 * (lane % 4) + j : lane / 4;
                        const int column = kTransposed ? lane / 4 : 2 * (lane % 4) + j;
                        const auto* source = static_cast<const unsigned char*>(rows[8 * i + row]);
                        std::memcpy(&halves[j], source + 2 * column, 2);
                    }
                    out[lane].r[i] = halves[0] | static_cast<std::uint32_t>(halves[1]) << 16;
                }
            }
        }
    );
    std::memcpy(registers, result.r, sizeof registers);
}

inline void load_matrices(std::uint32_t (&registers)[4], const void* shared_row) {
    load_four<false>(registers, shared_row);
}

inline void load_matrices_transposed(std::uint32_t (&registers)[4], const void* shared_row) {
    load_four<true>(registers, shared_row);
}

/// The numbers in 32 bits of an operand: two of 16 bits, or one tf32.
template <class T>
struct Operand {
    static constexpr int kCount = 2;
    static float get(std::uint32_t bits, int i) {
        return to_float(T{static_cast<std::uint16_t>(bits >> (16 * i))});
    }
};
template <>
struct Operand<Tf32> {
    static constexpr int kCount = 1;
    static float get(std::uint32_t bits, int) {
        return __builtin_bit_cast(float, bits & 0xffffe000u);
    }
};

/// Accumulators of tensor cores drop what does not fit.
inline float truncate_to_float(double value) {
    const auto nearest = static_cast<float>(value);
    const bool away =
        std::isfinite(nearest) && std::abs(static_cast<double>(nearest)) > std::abs(value);
    return away ? std::nextafter(nearest, 0.0f) : nearest;
}

template <class T>
void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    struct Fragments {
        std::uint32_t a[4], b[2];
        float c[4];
    };
    struct Result {
        float c[4];
    };
    Fragments mine;
    std::memcpy(mine.a, a, sizeof a);
    mine.b[0] = b0, mine.b[1] = b1;
    std::memcpy(mine.c, c, sizeof c);
    const Result result = emulation::collective<Result>(
        mine, [](const emulation::Lanes<Fragments>& in, emulation::Lanes<Result>& out) {
            constexpr int kCount = Operand<T>::kCount;
            constexpr int kDepth = 8 * kCount;
            float rows[16][kDepth];
            float columns[kDepth][8];
            for (int lane = 0; lane < 32; ++lane) {
                const int g = lane / 4;
                const int m = lane % 4;
                for (int i = 0; i < kCount; ++i) {
                    const int k = kCount * m + i;
                    rows[g][k] = Operand<T>::get(in[lane].a[0], i);
                    rows[g + 8][k] = Operand<T>::get(in[lane].a[1], i);
                    rows[g][k + kDepth / 2] = Operand<T>::get(in[lane].a[2], i);
                    rows[g + 8][k + kDepth / 2] = Operand<T>::get(in[lane].a[3], i);
                    columns[k][g] = Operand<T>::get(in[lane].b[0], i);
                    columns[k + kDepth / 2][g] = Operand<T>::get(in[lane].b[1], i);
                }
            }
            double sums[16][8];
            for (int r = 0; r < 16; ++r) {
                for (int n = 0; n < 8; ++n) {
                    sums[r][n] = in[4 * (r % 8) + n / 2].c[2 * (r / 8) + n % 2];
                }
                for (int k = 0; k < kDepth; ++k) {
                    for (int n = 0; n < 8; ++n) {
                        sums[r][n] += static_cast<double>(rows[r][k]) * columns[k][n];
                    }
                }
            }
            for (int lane = 0; lane < 32; ++lane) {
                for (int i = 0; i < 4; ++i) {
                    out[lane].c[i] =
                        truncate_to_float(sums[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
                }
            }
        }
    );
    std::memcpy(c, result.c, sizeof c);
}

inline void wait_for_previous_kernel() {
    emulation::wait_for_previous_grid();
}
inline void allow_next_kernel() {
    emulation::allow_next_grid();
}

}  // namespace tenp::cuda
