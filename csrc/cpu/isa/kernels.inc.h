// SPDX-License-Identifier: Apache-2.0

// The inner loops, in GCC/Clang vector types: how many lanes a vector has follows from the flags
// that the including file is compiled with. portable.cpp, avx2.cpp and avx512.cpp define TENP_ISA
// (a namespace) and TENP_KERNELS (the table that this file fills) and include it.
//
// Everything here has internal linkage or is always inlined, and no function of the standard
// library is used: a shared inline function compiled with AVX-512 could end up in code that runs
// anywhere.

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <utility>

#include "cpu/isa/kernels.h"

namespace tenp::cpu::TENP_ISA {
namespace {

// ---- vectors ----------------------------------------------------------------------------------

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

// ---- matrix products --------------------------------------------------------------------------
//
// Both products copy a block of B, and one tile of rows of A at a time, as float32 into scratch:
// conversions are paid once a block, tails are filled with zeros, and rows whose distance is a
// power of two do not evict each other. Rows are a multiple of a page's lines plus one vector apart
// there.

#if defined(__AVX512F__)
constexpr std::int64_t kNtRows = 6;   // 6 x 4 sums, 4 vectors of B and one of A: 29 of 32 registers
constexpr std::int64_t kNnRows = 12;  // 12 x 2 sums, 2 vectors of B: 26 of 32
#else
constexpr std::int64_t kNtRows = 3;  // 3 x 4 sums and 4 vectors of B: 16 of 16
constexpr std::int64_t kNnRows = 6;  // 6 x 2 sums, 2 vectors of B: 14 of 16
#endif
constexpr std::int64_t kNtColumns = 4;
constexpr std::int64_t kNtDepth = 1024;  // 128 columns of B: 520 KB; 6 rows of A: 24 KB
constexpr std::int64_t kNtPitch = kNtDepth + 16;
constexpr std::int64_t kNtDirectDepth = 8 * kNtDepth;  // 6 rows of A alone: 192 KB
constexpr std::int64_t kNtDirectPitch = kNtDirectDepth + 16;
constexpr std::int64_t kNnFewRows = kNnRows / 2;
constexpr std::int64_t kNnAtOnce = 4;
constexpr std::int64_t kNnVectors = 2;
constexpr std::int64_t kNnColumns = kNnVectors * kLanes;
constexpr std::int64_t kNnDepth = 256;  // 12 rows of A: 12 KB
constexpr std::int64_t kNnPitch = kNnDepth + 16;
constexpr std::int64_t kNnBlock = kNnDepth * kGemmColumns;  // values of B: 128 KB
static_assert((kGemmColumns + kNtRows) * kNtPitch <= kGemmScratch);
static_assert(kNtRows * kNtDirectPitch <= kGemmScratch);
static_assert(kNnBlock + kNnRows * kNnPitch <= kGemmScratch);
static_assert(kGemmColumns % kNtColumns == 0 && kGemmColumns % kNnColumns == 0);
static_assert(kGemmWideColumns % kNnColumns == 0);

constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) {
    return a < b ? a : b;
}

/// Copies `count` values as float32 and fills up the last vector with zeros.
template <class T>
[[gnu::always_inline]] inline void to_floats(const T* from, std::int64_t count, float* to) {
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        store(to + i, load(from + i));
    }
    if (i < count) {
        store(to + i, load_tail(from + i, count - i));
    }
}

/// Calls f.operator()<n>() for n = rows, 1 <= rows <= kMost.
template <std::int64_t kMost, class F>
[[gnu::always_inline]] inline void with_rows(std::int64_t rows, F f) {
    if constexpr (kMost > 1) {
        if (rows < kMost) {
            with_rows<kMost - 1>(rows, f);
            return;
        }
    }
    f.template operator()<kMost>();
}

constexpr std::int64_t kCacheLine = 64;

/// Asks for the cache line of an address.
[[gnu::always_inline]] inline void prefetch(const void* address) {
    __builtin_prefetch(address);
}

/// c[r, j] (+)= <row r of a, b[j]> for `columns` <= kNtColumns columns. `depth` is a multiple of
/// kLanes; all pointers of b can be read. What `ahead` points to is asked for in passing, if it is
/// given: the hardware does not see that the next row begins on another page.
template <std::int64_t kRows, std::int64_t kPitch, bool kAhead, class T>
[[gnu::noinline]] void nt_tile(
    const float* a,
    const T* const* b,
    const T* const* ahead,
    std::int64_t depth,
    float* c,
    std::int64_t c_stride,
    std::int64_t columns,
    bool add
) {
    static_assert(kNtColumns == 4);
    const T* const b0 = b[0];
    const T* const b1 = b[1];
    const T* const b2 = b[2];
    const T* const b3 = b[3];
    Vector sum[kRows][kNtColumns] = {};
    for (std::int64_t k = 0; k < depth; k += kLanes) {
        if (kAhead && k * static_cast<std::int64_t>(sizeof(T)) % kCacheLine == 0) {
            for (std::int64_t j = 0; j < kNtColumns; ++j) {
                prefetch(ahead[j] + k);
            }
        }
        const Vector b_lanes[kNtColumns] = {load(b0 + k), load(b1 + k), load(b2 + k), load(b3 + k)};
#pragma GCC unroll 16
        for (std::int64_t r = 0; r < kRows; ++r) {
            const Vector a_lanes = load(a + r * kPitch + k);
#pragma GCC unroll 16
            for (std::int64_t j = 0; j < kNtColumns; ++j) {
                sum[r][j] += a_lanes * b_lanes[j];
            }
        }
    }
#pragma GCC unroll 16
    for (std::int64_t r = 0; r < kRows; ++r) {
        const Vector lanes = lane_sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
        const Quad total = __builtin_shufflevector(lanes, lanes, 0, 1, 2, 3);
        float* to = c + r * c_stride;
        if (columns == kNtColumns) {
            write(to, add ? read<Quad>(to) + total : total);
            continue;
        }
        for (std::int64_t j = 0; j < columns; ++j) {
            to[j] = add ? to[j] + total[j] : total[j];
        }
    }
}

/// The product of one tile of rows with every column. A is at `a`, k is where its depth begins, and
/// b_row(column) gives the rows of B from there on; kAhead asks for those of the next tile too.
template <std::int64_t kPitch, bool kAhead, class T, class W, class Row>
[[gnu::always_inline]] inline void nt_tile_row(
    const Gemm<T, W>& g,
    std::int64_t row,
    const float* a,
    std::int64_t k,
    std::int64_t depth,
    Row b_row
) {
    for (std::int64_t column = 0; column < g.columns; column += kNtColumns) {
        const std::int64_t columns = smaller(kNtColumns, g.columns - column);
        decltype(b_row(column)) b[kNtColumns];
        decltype(b_row(column)) ahead[kNtColumns];
        for (std::int64_t j = 0; j < kNtColumns; ++j) {
            b[j] = b_row(column + smaller(j, columns - 1));  // a last tile repeats a column
            ahead[j] = b_row(smaller(column + kNtColumns + j, g.columns - 1));
        }
        float* c = g.c + row * g.c_stride + column;
        with_rows<kNtRows>(smaller(kNtRows, g.rows - row), [&]<std::int64_t kRows>() {
            for (std::int64_t d = 0; d == 0 || d < depth; d += kNtDepth) {
                const decltype(b_row(column)) b_d[] = {b[0] + d, b[1] + d, b[2] + d, b[3] + d};
                const decltype(b_row(column)) ahead_d[] = {
                    ahead[0] + d, ahead[1] + d, ahead[2] + d, ahead[3] + d
                };
                const std::int64_t most = smaller(kNtDepth, depth - d);
                nt_tile<kRows, kPitch, kAhead>(
                    a + d, b_d, ahead_d, most, c, g.c_stride, columns, k + d > 0
                );
            }
        });
    }
}

template <class T, class W>
void gemm_nt(const Gemm<T, W>& g) {
    float* a = g.scratch;
    float* b = a + kNtRows * kNtPitch;
    const auto copy_a = [&](std::int64_t row, std::int64_t k, std::int64_t depth,
                            std::int64_t pitch) {
        for (std::int64_t r = 0; r < smaller(kNtRows, g.rows - row); ++r) {
            to_floats(g.a[row + r] + k, depth, a + r * pitch);
        }
    };
    if (g.rows <= kNtRows && g.depth % kLanes == 0) {
        // One tile of rows uses every value of B once: it is read where it is, whole rows at a
        // time.
        for (std::int64_t k = 0; k == 0 || k < g.depth; k += kNtDirectDepth) {
            const std::int64_t depth = smaller(kNtDirectDepth, g.depth - k);
            copy_a(0, k, depth, kNtDirectPitch);
            nt_tile_row<kNtDirectPitch, true>(g, 0, a, k, depth, [&](std::int64_t column) {
                return g.b[column] + k;
            });
        }
        return;
    }
    for (std::int64_t k = 0; k == 0 || k < g.depth; k += kNtDepth) {
        const std::int64_t depth = smaller(kNtDepth, g.depth - k);
        for (std::int64_t column = 0; column < g.columns; ++column) {
            to_floats(g.b[column] + k, depth, b + column * kNtPitch);
        }
        for (std::int64_t row = 0; row < g.rows; row += kNtRows) {
            copy_a(row, k, depth, kNtPitch);
            nt_tile_row<kNtPitch, false>(g, row, a, k, depth, [&](std::int64_t column) {
                return static_cast<const float*>(b + column * kNtPitch);
            });
        }
    }
}

/// c[r, :] (+)= sum over k of a[r, k] * b[k, :] for one panel of kNnColumns columns.
template <std::int64_t kRows>
void nn_tile(
    const float* a, const float* b, std::int64_t depth, float* c, std::int64_t c_stride, bool add
) {
    Vector sum[kRows][kNnVectors] = {};
    if (add) {
#pragma GCC unroll 16
        for (std::int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
            for (std::int64_t v = 0; v < kNnVectors; ++v) {
                sum[r][v] = load(c + r * c_stride + v * kLanes);
            }
        }
    }
    for (std::int64_t k = 0; k < depth; ++k) {
        Vector b_lanes[kNnVectors];
#pragma GCC unroll 16
        for (std::int64_t v = 0; v < kNnVectors; ++v) {
            b_lanes[v] = load(b + k * kNnColumns + v * kLanes);
        }
#pragma GCC unroll 16
        for (std::int64_t r = 0; r < kRows; ++r) {
            const float a_value = a[r * kNnPitch + k];
#pragma GCC unroll 16
            for (std::int64_t v = 0; v < kNnVectors; ++v) {
                sum[r][v] += a_value * b_lanes[v];
            }
        }
    }
#pragma GCC unroll 16
    for (std::int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (std::int64_t v = 0; v < kNnVectors; ++v) {
            store(c + r * c_stride + v * kLanes, sum[r][v]);
        }
    }
}

/// The same for the first `columns` < kNnColumns columns of a tile.
template <std::int64_t kRows>
void nn_tile_tail(
    const float* a,
    const float* b,
    std::int64_t depth,
    float* c,
    std::int64_t c_stride,
    std::int64_t columns,
    bool add
) {
    float tile[kRows * kNnColumns] = {};
    const auto copy = [&](auto move) {
        for (std::int64_t r = 0; r < kRows; ++r) {
            for (std::int64_t column = 0; column < columns; ++column) {
                move(tile[r * kNnColumns + column], c[r * c_stride + column]);
            }
        }
    };
    if (add) {
        copy([](float& in_tile, float& in_c) { in_tile = in_c; });
    }
    nn_tile<kRows>(a, b, depth, tile, kNnColumns, add);
    copy([](float& in_tile, float& in_c) { in_c = in_tile; });
}

/// Copies `count` values of one row of B to where its panels have them.
template <class T>
[[gnu::always_inline]] inline void to_panels(
    const T* from, std::int64_t count, float* to, std::int64_t panel_size
) {
    for (std::int64_t i = 0; i < count; i += kNnColumns) {
        to_floats(from + i, smaller(kNnColumns, count - i), to + i / kNnColumns * panel_size);
    }
}

/// c[r, :] (+)= sum over k of a[r * a_stride + k] * b[k, :], kAtOnce rows of B at a time. With few
/// rows of A every value of B is used once or twice: it is read where it is, whole rows at a time,
/// while C stays in the L1 cache. The rows after these are asked for in passing.
template <std::int64_t kRows, std::int64_t kAtOnce, class T>
[[gnu::noinline]] void nn_rows(
    const float* a,
    std::int64_t a_stride,
    const T* b,
    std::int64_t b_stride,
    float* c,
    std::int64_t c_stride,
    std::int64_t columns,
    bool add
) {
    for_each_vector(columns, [&](std::int64_t i, auto read_at, auto write_at) {
        Vector sum[kRows];
#pragma GCC unroll 16
        for (std::int64_t r = 0; r < kRows; ++r) {
            sum[r] = add ? read_at(c + r * c_stride + i) : Vector{};
        }
#pragma GCC unroll 16
        for (std::int64_t k = 0; k < kAtOnce; ++k) {
            prefetch(b + (kAtOnce + k) * b_stride + i);
            const Vector b_lanes = read_at(b + k * b_stride + i);
#pragma GCC unroll 16
            for (std::int64_t r = 0; r < kRows; ++r) {
                sum[r] += a[r * a_stride + k] * b_lanes;
            }
        }
#pragma GCC unroll 16
        for (std::int64_t r = 0; r < kRows; ++r) {
            write_at(c + r * c_stride + i, sum[r]);
        }
    });
}

/// Copies `depth` values of a row of A, from column k on, times their scales.
template <class T, class W>
[[gnu::always_inline]] inline void scaled_to_floats(
    const Gemm<T, W>& g, std::int64_t row, std::int64_t k, std::int64_t depth, float* to
) {
    if (g.a_scale == nullptr) {
        to_floats(g.a[row] + k, depth, to);
        return;
    }
    for_each_vector(depth, [&](std::int64_t i, auto read_at, auto write_at) {
        write_at(to + i, read_at(g.a[row] + k + i) * read_at(g.a_scale + k + i));
    });
}

template <class T, class W>
void gemm_nn_few_rows(const Gemm<T, W>& g) {
    float* a = g.scratch;
    with_rows<kNnFewRows>(g.rows, [&]<std::int64_t kRows>() {
        for (std::int64_t k = 0; k == 0 || k < g.depth; k += kNnDepth) {
            const std::int64_t depth = smaller(kNnDepth, g.depth - k);
            for (std::int64_t r = 0; r < kRows; ++r) {
                scaled_to_floats(g, r, k, depth, a + r * kNnPitch);
            }
            std::int64_t d = 0;
            for (; d + kNnAtOnce <= depth; d += kNnAtOnce) {
                nn_rows<kRows, kNnAtOnce>(
                    a + d, kNnPitch, g.b[k + d], g.b.stride, g.c, g.c_stride, g.columns, k + d > 0
                );
            }
            for (; d < depth; ++d) {
                nn_rows<kRows, 1>(
                    a + d, kNnPitch, g.b[k + d], g.b.stride, g.c, g.c_stride, g.columns, k + d > 0
                );
            }
        }
    });
}

template <class T, class W>
void gemm_nn(const Gemm<T, W>& g) {
    if (g.rows <= kNnFewRows && g.depth > 0) {
        gemm_nn_few_rows(g);
        return;
    }
    const std::int64_t panels = (g.columns + kNnColumns - 1) / kNnColumns;
    const std::int64_t most_depth = smaller(kNnDepth, kNnBlock / (panels * kNnColumns));
    float* b = g.scratch;
    float* a = b + kNnBlock;
    for (std::int64_t k = 0; k == 0 || k < g.depth; k += most_depth) {
        const std::int64_t depth = smaller(most_depth, g.depth - k);
        const std::int64_t panel_size = depth * kNnColumns;
        for (std::int64_t d = 0; d < depth; ++d) {
            to_panels(g.b[k + d], g.columns, b + d * kNnColumns, panel_size);
        }
        for (std::int64_t row = 0; row < g.rows; row += kNnRows) {
            const std::int64_t rows = smaller(kNnRows, g.rows - row);
            for (std::int64_t r = 0; r < rows; ++r) {
                scaled_to_floats(g, row + r, k, depth, a + r * kNnPitch);
            }
            with_rows<kNnRows>(rows, [&]<std::int64_t kRows>() {
                for (std::int64_t panel = 0; panel < panels; ++panel) {
                    const std::int64_t column = panel * kNnColumns;
                    const float* b_panel = b + panel * panel_size;
                    float* c = g.c + row * g.c_stride + column;
                    if (column + kNnColumns <= g.columns) {
                        nn_tile<kRows>(a, b_panel, depth, c, g.c_stride, k > 0);
                    } else {
                        nn_tile_tail<kRows>(
                            a, b_panel, depth, c, g.c_stride, g.columns - column, k > 0
                        );
                    }
                }
            });
        }
    }
}

// ---- activations ------------------------------------------------------------------------------

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

// ---- sums -------------------------------------------------------------------------------------

template <class T>
void combine(const Combine<T>& token) {
    for_each_vector(token.count, [&](std::int64_t i, auto read_at, auto write_at) {
        Vector sum = {};
        for (std::int64_t term = 0; term < token.terms; ++term) {
            sum += token.weights[term] * read_at(token.y[token.rows[term]] + i);
        }
        write_at(token.out + i, sum);
    });
}

template <class T>
void add_row(float* sum, const T* row, std::int64_t count) {
    for_each_vector(count, [&](std::int64_t i, auto read_at, auto write_at) {
        write_at(sum + i, read_at(sum + i) + read_at(row + i));
    });
}

/// kHalf lanes of a vector, from kFirst on.
template <int kFirst>
[[gnu::always_inline]] inline Doubles half(Vector value) {
    return [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
        return __builtin_convertvector(
            __builtin_shufflevector(value, value, kFirst + kLane...), Doubles
        );
    }(std::make_integer_sequence<int, kHalf>());
}

template <class T>
double dot(const T* a, const T* b, std::int64_t count) {
    Doubles low = {};
    Doubles high = {};
    for_each_vector(count, [&](std::int64_t i, auto read_at, auto) {
        const Vector a_lanes = read_at(a + i);
        const Vector b_lanes = read_at(b + i);
        low += half<0>(a_lanes) * half<0>(b_lanes);
        high += half<kHalf>(a_lanes) * half<kHalf>(b_lanes);
    });
    const Doubles both = low + high;
    double sum = 0;
    for (int lane = 0; lane < kHalf; ++lane) {
        sum += both[lane];
    }
    return sum;
}

[[gnu::always_inline]] inline Doubles magnitude(Doubles value) {
    return value < 0.0 ? -value : value;
}

/// What one row adds to the sums of kHalf neurons.
template <class T>
[[gnu::always_inline]] inline void contribute_lanes(
    const Contribute<T>& block, std::int64_t neuron, Doubles m, Doubles projection, double gate
) {
    const auto update = [&](double* sums, auto f) {
        write(sums + neuron, f(read<Doubles>(sums + neuron)));
    };
    const Doubles gated = magnitude(m * gate);
    update(block.projection, [&](Doubles sum) { return sum + projection; });
    update(block.magnitude, [&](Doubles sum) { return sum + magnitude(m); });
    update(block.energy, [&](Doubles sum) { return sum + gated * gated; });
    update(block.peak, [&](Doubles peak) {
        const Doubles larger = gated > peak ? gated : peak;
        return gated != gated ? gated : larger;  // nothing is larger than a NaN, so it stays
    });
}

template <class T>
void contribute(const Contribute<T>& block) {
    for (std::int64_t row = 0; row < block.rows; ++row) {
        const T* m_row = block.activations[row];
        const float* q_row = block.products + row * block.products_stride;
        const double gate = block.gates[row];
        const bool is_zero = block.norms[row] == 0;
        const double inverse_norm = 1 / block.norms[row];
        // Zero times an infinite m would be NaN: a row with y = 0 is left out, not multiplied by 0.
        const auto projection = [&](Doubles m, Doubles q) {
            return is_zero ? Doubles{} : m * q * inverse_norm;
        };
        for_each_vector(block.count, [&](std::int64_t i, auto read_at, auto) {
            const Vector m = read_at(m_row + i);
            const Vector q = read_at(q_row + i);
            const Doubles m_low = half<0>(m);
            const Doubles m_high = half<kHalf>(m);
            contribute_lanes(block, i, m_low, projection(m_low, half<0>(q)), gate);
            contribute_lanes(block, i + kHalf, m_high, projection(m_high, half<kHalf>(q)), gate);
        });
    }
}

void add_outer_products(const OuterProducts& tile) {
    constexpr std::int64_t kTile = OuterProducts::kTile;
    constexpr int kRows = 4;     // of sums, held in registers with two vectors of columns
    constexpr int kVectors = 2;  // eight chains of additions hide their latency
    for (std::int64_t i = 0; i < kTile; i += kRows) {
        for (std::int64_t j = 0; j < kTile; j += std::int64_t{kVectors} * kHalf) {
            double* corner = tile.sums + i * kTile + j;
            Doubles sums[kRows][kVectors];
            for (int row = 0; row < kRows; ++row) {
                for (int v = 0; v < kVectors; ++v) {
                    sums[row][v] = read<Doubles>(corner + row * kTile + v * kHalf);
                }
            }
            for (std::int64_t r = 0; r < tile.rows; ++r) {
                const double* a = tile.a + r * kTile + i;
                const double* b = tile.b + r * kTile + j;
                for (int v = 0; v < kVectors; ++v) {
                    const auto columns = read<Doubles>(b + v * kHalf);
                    for (int row = 0; row < kRows; ++row) {
                        sums[row][v] += a[row] * columns;
                    }
                }
            }
            for (int row = 0; row < kRows; ++row) {
                for (int v = 0; v < kVectors; ++v) {
                    write(corner + row * kTile + v * kHalf, sums[row][v]);
                }
            }
        }
    }
}

template <class T>
constexpr TypedKernels<T> typed_kernels() {
    return {
        gemm_nt<T, T>,           gemm_nn<T, T>, gemm_nt<T, std::int8_t>,
        gemm_nn<T, std::int8_t>, activate<T>,   combine<T>,
        contribute<T>,           add_row<T>,    dot<T>,
    };
}

}  // namespace
}  // namespace tenp::cpu::TENP_ISA

namespace tenp::cpu {

#define TENP_NAME_OF(isa) #isa
#define TENP_NAME(isa) TENP_NAME_OF(isa)

const Kernels TENP_KERNELS = {
    TENP_NAME(TENP_ISA),
    TENP_ISA::add_outer_products,
    TENP_ISA::typed_kernels<float>(),
    TENP_ISA::typed_kernels<BFloat16>(),
    TENP_ISA::typed_kernels<Float16>(),
};

}  // namespace tenp::cpu
