// SPDX-License-Identifier: Apache-2.0

// The two matrix products, A B^T and A B.
//
// Both copy a block of B, and one tile of rows of A at a time, into scratch: conversions are paid
// once a block, tails are filled with zeros, and rows whose distance is a power of two do not evict
// each other. Rows are a multiple of a page's lines plus one line apart there. M says how lanes
// multiply, and so what the copies are: float32 or pairs of bfloat16.

#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/multiply.inc.h"
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
constexpr std::int64_t kNtDirectDepth = 8 * kNtDepth;  // 6 rows of A alone: 192 KB
constexpr std::int64_t kNnFewRows = kNnRows / 2;
constexpr std::int64_t kNnAtOnce = 4;
constexpr std::int64_t kNnDepth = 256;                      // 12 rows of A: 12 KB
constexpr std::int64_t kNnBlock = kNnDepth * kGemmColumns;  // values of B: 128 KB
static_assert(kGemmColumns % kNtColumns == 0 && kGemmColumns % kPanelColumns == 0);
static_assert(kGemmWideColumns % kPanelColumns == 0);

constexpr std::int64_t kCacheLine = 64;

/// Distance of rows of `depth` values in scratch.
template <class M>
constexpr std::int64_t pitch(std::int64_t depth) {
    return depth + kCacheLine / static_cast<std::int64_t>(sizeof(typename M::Value));
}
template <class M>
constexpr std::int64_t kNtPitch = pitch<M>(kNtDepth);
template <class M>
constexpr std::int64_t kNtDirectPitch = pitch<M>(kNtDirectDepth);
template <class M>
constexpr std::int64_t kNnPitch = pitch<M>(kNnDepth);
static_assert((kGemmColumns + kNtRows) * kNtPitch<Singles> <= kGemmScratch);
static_assert(kNtRows * kNtDirectPitch<Singles> <= kGemmScratch);
static_assert(kNnBlock + kNnRows * kNnPitch<Singles> <= kGemmScratch);

/// How many rows ahead of the copy B is asked for, 4 KB in bfloat16: the hardware asks for what
/// follows on a page, and every row begins on another one.
constexpr std::int64_t kNtAhead = 2;
constexpr std::int64_t kNnAhead = 16;

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

/// Asks for the cache line of an address.
[[gnu::always_inline]] inline void prefetch(const void* address) {
    __builtin_prefetch(address);
}

/// Asks for `count` values.
template <class T>
[[gnu::always_inline]] inline void prefetch_row(const T* row, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i += kCacheLine / static_cast<std::int64_t>(sizeof(T))) {
        prefetch(row + i);
    }
}

/// c[r, j] (+)= <row r of a, b[j]> for `columns` <= kNtColumns columns. `depth` is a multiple of a
/// vector's; all pointers of b can be read. What `ahead` points to is asked for in passing, if it
/// is given: the hardware does not see that the next row begins on another page.
template <class M, std::int64_t kRows, std::int64_t kPitch, bool kAhead, class T>
[[gnu::noinline]] void nt_tile(
    const typename M::Value* a,
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
    for (std::int64_t k = 0; k < depth; k += kLanes * M::kDeep) {
        if (kAhead && k * static_cast<std::int64_t>(sizeof(T)) % kCacheLine == 0) {
            for (std::int64_t j = 0; j < kNtColumns; ++j) {
                prefetch(ahead[j] + k);
            }
        }
        const decltype(M::lanes(b0)) b_lanes[kNtColumns] = {
            M::lanes(b0 + k), M::lanes(b1 + k), M::lanes(b2 + k), M::lanes(b3 + k)
        };
#pragma GCC unroll 16
        for (std::int64_t r = 0; r < kRows; ++r) {
            const auto a_lanes = M::lanes(a + r * kPitch + k);
#pragma GCC unroll 16
            for (std::int64_t j = 0; j < kNtColumns; ++j) {
                sum[r][j] = M::add_product(sum[r][j], a_lanes, b_lanes[j]);
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
template <class M, std::int64_t kPitch, bool kAhead, class T, class W, class Row>
[[gnu::always_inline]] inline void nt_tile_row(
    const Gemm<T, W>& g,
    std::int64_t row,
    const typename M::Value* a,
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
                nt_tile<M, kRows, kPitch, kAhead>(
                    a + d, b_d, ahead_d, most, c, g.c_stride, columns, k + d > 0
                );
            }
        });
    }
}

template <class M, class T, class W>
void gemm_nt(const Gemm<T, W>& g) {
    using Value = typename M::Value;
    auto* a = reinterpret_cast<Value*>(g.scratch);
    Value* b = a + kNtRows * kNtPitch<M>;
    const auto copy_a = [&](std::int64_t row, std::int64_t k, std::int64_t depth,
                            std::int64_t a_pitch) {
        for (std::int64_t r = 0; r < smaller(kNtRows, g.rows - row); ++r) {
            M::copy(g.a[row + r] + k, depth, a + r * a_pitch);
        }
    };
    if (g.rows <= M::kTilesInPlace * kNtRows && g.depth % (kLanes * M::kDeep) == 0) {
        // Few tiles of rows use every value of B: it is read where it is, whole rows at a time.
        constexpr std::int64_t kPitch = kNtDirectPitch<M>;
        for (std::int64_t k = 0; k == 0 || k < g.depth; k += kNtDirectDepth) {
            const std::int64_t depth = smaller(kNtDirectDepth, g.depth - k);
            for (std::int64_t row = 0; row < g.rows; row += kNtRows) {
                copy_a(row, k, depth, kPitch);
                nt_tile_row<M, kPitch, true>(g, row, a, k, depth, [&](std::int64_t column) {
                    return g.b[column] + k;
                });
            }
        }
        return;
    }
    constexpr std::int64_t kPitch = kNtPitch<M>;
    for (std::int64_t k = 0; k == 0 || k < g.depth; k += kNtDepth) {
        const std::int64_t depth = smaller(kNtDepth, g.depth - k);
        for (std::int64_t column = 0; column < g.columns; ++column) {
            prefetch_row(g.b[smaller(column + kNtAhead, g.columns - 1)] + k, depth);
            M::copy(g.b[column] + k, depth, b + column * kPitch);
        }
        for (std::int64_t row = 0; row < g.rows; row += kNtRows) {
            copy_a(row, k, depth, kPitch);
            nt_tile_row<M, kPitch, false>(g, row, a, k, depth, [&](std::int64_t column) {
                return static_cast<const Value*>(b + column * kPitch);
            });
        }
    }
}

/// c[r, :] (+)= sum over k of a[r, k] * b[k, :] for one panel.
template <class M, std::int64_t kRows>
void nn_tile(
    const typename M::Value* a,
    const typename M::Value* b,
    std::int64_t depth,
    float* c,
    std::int64_t c_stride,
    bool add
) {
    Vector sum[kRows][kPanelVectors] = {};
    if (add) {
#pragma GCC unroll 16
        for (std::int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
            for (std::int64_t v = 0; v < kPanelVectors; ++v) {
                sum[r][v] = load(c + r * c_stride + v * kLanes);
            }
        }
    }
    for (std::int64_t k = 0; k < depth; k += M::kDeep) {
        decltype(M::lanes(b)) b_lanes[kPanelVectors];
#pragma GCC unroll 16
        for (std::int64_t v = 0; v < kPanelVectors; ++v) {
            b_lanes[v] = M::lanes(b + k * kPanelColumns + v * kLanes * M::kDeep);
        }
#pragma GCC unroll 16
        for (std::int64_t r = 0; r < kRows; ++r) {
            const auto a_values = M::spread(a + r * kNnPitch<M> + k);
#pragma GCC unroll 16
            for (std::int64_t v = 0; v < kPanelVectors; ++v) {
                sum[r][v] = M::add_product(sum[r][v], a_values, b_lanes[v]);
            }
        }
    }
#pragma GCC unroll 16
    for (std::int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (std::int64_t v = 0; v < kPanelVectors; ++v) {
            store(c + r * c_stride + v * kLanes, sum[r][v]);
        }
    }
}

/// The same for the first `columns` < kPanelColumns columns of a tile.
template <class M, std::int64_t kRows>
void nn_tile_tail(
    const typename M::Value* a,
    const typename M::Value* b,
    std::int64_t depth,
    float* c,
    std::int64_t c_stride,
    std::int64_t columns,
    bool add
) {
    float tile[kRows * kPanelColumns] = {};
    const auto copy = [&](auto move) {
        for (std::int64_t r = 0; r < kRows; ++r) {
            for (std::int64_t column = 0; column < columns; ++column) {
                move(tile[r * kPanelColumns + column], c[r * c_stride + column]);
            }
        }
    };
    if (add) {
        copy([](float& in_tile, float& in_c) { in_tile = in_c; });
    }
    nn_tile<M, kRows>(a, b, depth, tile, kPanelColumns, add);
    copy([](float& in_tile, float& in_c) { in_c = in_tile; });
}

/// c[r, :] (+)= sum over k of a[r * a_stride + k] * b[k, :], kAtOnce rows of B at a time. With few
/// rows of A every value of B is used once or twice: it is read where it is, whole rows at a time,
/// while C stays in the L1 cache. The rows after these are asked for in passing. It adds in the
/// order in which M does.
template <class M, std::int64_t kRows, std::int64_t kAtOnce, class T>
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
        for (std::int64_t turn = 0; turn < kAtOnce; ++turn) {
            prefetch(b + (kAtOnce + turn) * b_stride + i);
            const std::int64_t k = kAtOnce > 1 ? turn ^ (M::kDeep - 1) : 0;
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

/// Copies `depth` values of a row of A, from column k on, times their scales if the weights have
/// such.
template <class M, class T, class W>
[[gnu::always_inline]] inline void copy_row(
    const Gemm<T, W>& g, std::int64_t row, std::int64_t k, std::int64_t depth, typename M::Value* to
) {
    if constexpr (std::is_same_v<T, W>) {
        M::copy(g.a[row] + k, depth, to);
    } else {
        for_each_vector(depth, [&](std::int64_t i, auto read_at, auto write_at) {
            write_at(to + i, read_at(g.a[row] + k + i) * read_at(g.a_scale + k + i));
        });
    }
}

template <class M, class T, class W>
void gemm_nn_few_rows(const Gemm<T, W>& g) {
    constexpr std::int64_t kPitch = kNnPitch<Singles>;
    float* a = g.scratch;
    with_rows<kNnFewRows>(g.rows, [&]<std::int64_t kRows>() {
        for (std::int64_t k = 0; k == 0 || k < g.depth; k += kNnDepth) {
            const std::int64_t depth = smaller(kNnDepth, g.depth - k);
            for (std::int64_t r = 0; r < kRows; ++r) {
                copy_row<Singles>(g, r, k, depth, a + r * kPitch);
            }
            std::int64_t d = 0;
            const auto add_rows = [&]<std::int64_t kAtOnce>() {
                for (; d + kAtOnce <= depth; d += kAtOnce) {
                    nn_rows<M, kRows, kAtOnce>(
                        a + d, kPitch, g.b[k + d], g.b.stride, g.c, g.c_stride, g.columns, k + d > 0
                    );
                }
            };
            add_rows.template operator()<kNnAtOnce>();
            add_rows.template operator()<M::kDeep>();
            add_rows.template operator()<1>();
        }
    });
}

template <class M, class T, class W>
void gemm_nn(const Gemm<T, W>& g) {
    if (g.rows <= kNnFewRows && g.depth > 0) {
        gemm_nn_few_rows<M>(g);
        return;
    }
    constexpr std::int64_t kPitch = kNnPitch<M>;
    const std::int64_t panels = (g.columns + kPanelColumns - 1) / kPanelColumns;
    const std::int64_t fits = kNnBlock / (panels * kPanelColumns);
    const std::int64_t most_depth = smaller(kNnDepth, fits / M::kDeep * M::kDeep);
    auto* b = reinterpret_cast<typename M::Value*>(g.scratch);
    auto* a = b + kNnBlock;
    for (std::int64_t k = 0; k == 0 || k < g.depth; k += most_depth) {
        const std::int64_t depth = smaller(most_depth, g.depth - k);
        const std::int64_t panel_size =
            (depth + M::kDeep - 1) / M::kDeep * M::kDeep * kPanelColumns;
        for (std::int64_t d = 0; d < depth; d += M::kDeep) {
            for (std::int64_t turn = 0; turn < M::kDeep; ++turn) {
                prefetch_row(g.b[smaller(k + d + kNnAhead + turn, g.depth - 1)], g.columns);
            }
            const W* next_row = d + 1 < depth ? g.b[k + d + 1] : nullptr;
            M::copy_to_panels(g.b[k + d], next_row, g.columns, b + d * kPanelColumns, panel_size);
        }
        for (std::int64_t row = 0; row < g.rows; row += kNnRows) {
            const std::int64_t rows = smaller(kNnRows, g.rows - row);
            for (std::int64_t r = 0; r < rows; ++r) {
                copy_row<M>(g, row + r, k, depth, a + r * kPitch);
            }
            with_rows<kNnRows>(rows, [&]<std::int64_t kRows>() {
                for (std::int64_t panel = 0; panel < panels; ++panel) {
                    const std::int64_t column = panel * kPanelColumns;
                    const auto* b_panel = b + panel * panel_size;
                    float* c = g.c + row * g.c_stride + column;
                    if (column + kPanelColumns <= g.columns) {
                        nn_tile<M, kRows>(a, b_panel, depth, c, g.c_stride, k > 0);
                    } else {
                        nn_tile_tail<M, kRows>(
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
