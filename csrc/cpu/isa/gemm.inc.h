// SPDX-License-Identifier: Apache-2.0

// The two matrix products, A B^T and A B.
//
// Both copy a block of B, and one tile of rows of A at a time, as float32 into scratch:
// conversions are paid once a block, tails are filled with zeros, and rows whose distance is a
// power of two do not evict each other. Rows are a multiple of a page's lines plus one vector apart
// there.

#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/vectors.inc.h"

namespace tenp::cpu::TENP_ISA {
namespace {

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

}  // namespace
}  // namespace tenp::cpu::TENP_ISA
