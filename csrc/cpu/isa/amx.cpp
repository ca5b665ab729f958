// SPDX-License-Identifier: Apache-2.0

// Products of bfloat16 matrices in the tile registers of AMX.
//
// A tile is 16 rows of 64 bytes. One instruction adds A B to C, 16 x 16 sums: A is 16 rows of 32
// values as they lie in a matrix; B has 32 values of every column in pairs, so that its row p is
// (b[2p][0], b[2p + 1][0]), (b[2p][1], b[2p + 1][1]), ... A matrix that takes the place of B is
// therefore rearranged. In A B^T those are the rows of A, the tokens, since there are fewer of them
// than there are weights: the weights are read where they lie, and what is computed is the
// transpose of C. In A B it is a block of weights, whose rows are only interleaved.
//
// Four tiles of sums take two tiles of A times two of B, so that every tile is used twice.

#define TENP_ISA amx
#include "cpu/isa/multiply.inc.h"

namespace tenp::cpu::TENP_ISA {
namespace {

constexpr std::int64_t kTile = 16;       // rows of a tile, and columns of sums
constexpr std::int64_t kTileDepth = 32;  // values in a row of a tile
constexpr std::int64_t kTwoTiles = 2 * kTile;
static_assert(kPanelColumns == kTwoTiles);

/// With so few rows the time is that of reading the weights, which vectors do as fast.
constexpr std::int64_t kVectorRows = 4;

/// Of A B^T, what one packing of A serves: arranging it anew costs as much as 64 columns.
constexpr std::int64_t kNtColumns = 512;
static_assert(kNtColumns <= kGemmWideColumns);

/// What one pass takes at most; rows only in A B^T, where they are packed.
constexpr std::int64_t kDepth = 2048;
constexpr std::int64_t kPackedRows = 96;

/// What is in scratch, in values: what takes the place of B, then copies of two strips.
constexpr std::int64_t kPackedSize = kPackedRows * kDepth;  // 384 KB
constexpr std::int64_t kStripSize = kTile * kDepth;
static_assert((kPackedSize + 2 * kStripSize) * sizeof(BFloat16) <= kGemmScratch * sizeof(float));

/// The shapes of the eight tile registers of this thread: 16 rows of 64 bytes each.
struct alignas(64) TileShapes {
    std::uint8_t palette = 1;
    std::uint8_t zeros[15] = {};
    std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileShapes kShapes;

/// Tile registers for a scope. A function may leave them as it likes, by the calling convention, so
/// nothing is put back; released, they are nothing that a switch of threads has to save.
class TileRegisters {
 public:
    TileRegisters() { _tile_loadconfig(&kShapes); }
    ~TileRegisters() { _tile_release(); }
    TileRegisters(const TileRegisters&) = delete;
};

constexpr std::int64_t round_up(std::int64_t value, std::int64_t to) {
    return (value + to - 1) / to * to;
}

/// 16 rows of a matrix from some column on, which tiles of A are read from; null for no rows at
/// all.
struct Strip {
    const BFloat16* data = nullptr;
    std::int64_t row_bytes = 0;
};

/// Rows first..first + count - 1, columns k..k + depth - 1: where they lie, if tiles can be read
/// from there, otherwise copied, with zeros for what is missing.
Strip strip_of(
    const Rows<BFloat16>& rows,
    std::int64_t first,
    std::int64_t count,
    std::int64_t k,
    std::int64_t depth,
    BFloat16* copy  // [kStripSize]
) {
    constexpr std::int64_t kBytes = sizeof(BFloat16);
    if (count <= 0) {
        return {};
    }
    if (count >= kTile && depth % kTileDepth == 0) {
        const std::int64_t distance = rows[first + 1] - rows[first];
        bool is_even = true;
        for (std::int64_t row = 1; row < kTile; ++row) {
            is_even &= rows[first + row] - rows[first] == row * distance;
        }
        if (is_even) {
            return {rows[first] + k, distance * kBytes};
        }
    }
    const std::int64_t distance = round_up(depth, kTileDepth);
    __builtin_memset(copy, 0, static_cast<std::size_t>(kTile * distance * kBytes));
    for (std::int64_t row = 0; row < smaller(kTile, count); ++row) {
        Pairs::copy(rows[first + row] + k, depth, copy + row * distance);
    }
    return {copy, distance * kBytes};
}

/// Two tiles of B for every step in depth.
struct PackedTiles {
    const BFloat16* data[2] = {};
    std::int64_t row_bytes = 0;
    std::int64_t step = 0;  // values from one step to the next
};

using Sums = Bits[2][2][kTile];  // four tiles of float32

/// sums[i][j] += strip a[i] times tiles j of b, if there are a second strip and second tiles.
[[gnu::noinline]] void multiply(
    const Strip (&a)[2], const PackedTiles& b, std::int64_t depth, bool ahead, Sums& sums
) {
    asm volatile("" ::: "memory");  // gcc does not know that tile loads read memory
    _tile_loadd(0, sums[0][0], sizeof(Bits));
    _tile_loadd(1, sums[0][1], sizeof(Bits));
    _tile_loadd(2, sums[1][0], sizeof(Bits));
    _tile_loadd(3, sums[1][1], sizeof(Bits));
    for (std::int64_t k = 0; k < depth; k += kTileDepth) {
        const std::int64_t at = k / kTileDepth * b.step;
        _tile_loadd(4, a[0].data + k, a[0].row_bytes);
        _tile_loadd(6, b.data[0] + at, b.row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if (b.data[1] != nullptr) {
            _tile_loadd(7, b.data[1] + at, b.row_bytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (a[1].data != nullptr) {
            _tile_loadd(5, a[1].data + k, a[1].row_bytes);
            _tile_dpbf16ps(2, 5, 6);
            if (b.data[1] != nullptr) {
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        if (ahead) {
            // The strips after these; the hardware does not see that they begin on other pages.
            const auto* next = reinterpret_cast<const char*>(a[0].data + k);
            for (std::int64_t row = kTwoTiles; row < 2 * kTwoTiles; ++row) {
                __builtin_prefetch(next + row * a[0].row_bytes);
            }
        }
    }
    _tile_stored(0, sums[0][0], sizeof(Bits));
    _tile_stored(1, sums[0][1], sizeof(Bits));
    _tile_stored(2, sums[1][0], sizeof(Bits));
    _tile_stored(3, sums[1][1], sizeof(Bits));
}

/// One stage of a transposition: in every block of 2 kSize x 2 kSize values, exchanges the upper
/// right quarter and the lower left one.
template <int kSize>
[[gnu::always_inline]] inline void exchange_quarters(Bits (&rows)[kTile]) {
    [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
#pragma GCC unroll 16
        for (int row = 0; row < kTile; ++row) {
            if ((row & kSize) == 0) {
                const Bits upper = rows[row];
                const Bits lower = rows[row + kSize];
                rows[row] = __builtin_shufflevector(
                    upper, lower, (kLane & kSize) == 0 ? kLane : kLane - kSize + kLanes...
                );
                rows[row + kSize] = __builtin_shufflevector(
                    upper, lower, (kLane & kSize) == 0 ? kLane + kSize : kLane + kLanes...
                );
            }
        }
    }(std::make_integer_sequence<int, kLanes>());
}

[[gnu::always_inline]] inline void transpose(Bits (&rows)[kTile]) {
    exchange_quarters<8>(rows);
    exchange_quarters<4>(rows);
    exchange_quarters<2>(rows);
    exchange_quarters<1>(rows);
}

/// The four tiles of C, or of its transpose, from a row and a column of C on: (+)= a times b.
template <bool kTransposed>
void multiply_into(
    const Gemm<BFloat16>& g,
    std::int64_t row,
    std::int64_t column,
    const Strip (&a)[2],
    const PackedTiles& b,
    std::int64_t depth,
    bool add,
    bool ahead
) {
    Sums sums = {};
    // Calls f(row of the tile, where it is in C, how much of it C has).
    const auto for_each_row = [&](Bits(&tile)[kTile], std::int64_t i, std::int64_t j, auto f) {
        const std::int64_t top = row + kTile * (kTransposed ? j : i);
        const std::int64_t left = column + kTile * (kTransposed ? i : j);
        for (std::int64_t r = 0; r < smaller(kTile, g.rows - top); ++r) {
            f(tile[r], g.c + (top + r) * g.c_stride + left, smaller(kTile, g.columns - left));
        }
    };
    for (std::int64_t i = 0; add && i < 2; ++i) {
        for (std::int64_t j = 0; j < 2; ++j) {
            for_each_row(
                sums[i][j], i, j, [](Bits& in_tile, const float* in_c, std::int64_t count) {
                    for_each_vector(count, [&](std::int64_t, auto read_at, auto) {
                        in_tile = bits_as<Bits>(read_at(in_c));
                    });
                }
            );
            if (kTransposed) {
                transpose(sums[i][j]);
            }
        }
    }
    multiply(a, b, depth, ahead, sums);
    for (std::int64_t i = 0; i < 2; ++i) {
        for (std::int64_t j = 0; j < 2; ++j) {
            if (kTransposed) {
                transpose(sums[i][j]);
            }
            for_each_row(sums[i][j], i, j, [](Bits& in_tile, float* in_c, std::int64_t count) {
                for_each_vector(count, [&](std::int64_t, auto, auto write_at) {
                    write_at(in_c, bits_as<Vector>(in_tile));
                });
            });
        }
    }
}

/// Rows first..first + count - 1, columns k..k + depth - 1, as the columns of tiles of B, a tile
/// after the other in depth; zeros for what is missing.
void pack_as_columns(
    const Rows<BFloat16>& rows,
    std::int64_t first,
    std::int64_t count,
    std::int64_t k,
    std::int64_t depth,
    BFloat16* to
) {
    for (std::int64_t d = 0; d < depth; d += kTileDepth) {
        Bits pairs[kTile] = {};
        for (std::int64_t row = 0; row < smaller(kTile, count); ++row) {
            Pairs::copy(
                rows[first + row] + k + d, smaller(kTileDepth, depth - d),
                reinterpret_cast<BFloat16*>(&pairs[row])
            );
        }
        transpose(pairs);
        for (const Bits& row : pairs) {
            write(to, row);
            to += kTileDepth;
        }
    }
}

/// In vectors, which take fewer columns at a time.
void gemm_nt_few_rows(const Gemm<BFloat16>& g) {
    for (std::int64_t column = 0; column < g.columns; column += kGemmColumns) {
        Gemm<BFloat16> part = g;
        part.columns = smaller(kGemmColumns, g.columns - column);
        part.c += column;
        if (g.b.index != nullptr) {
            part.b.index += column;
        } else {
            part.b.data += column * g.b.stride;
        }
        kAvx512Bf16Products.gemm_nt(part);
    }
}

void gemm_nt(const Gemm<BFloat16>& g) {
    if (g.rows <= kVectorRows) {
        gemm_nt_few_rows(g);
        return;
    }
    const TileRegisters registers;
    auto* packed = reinterpret_cast<BFloat16*>(g.scratch);
    BFloat16* copies = packed + kPackedSize;
    for (std::int64_t k = 0; k == 0 || k < g.depth; k += kDepth) {
        const std::int64_t depth = smaller(kDepth, g.depth - k);
        const std::int64_t packed_tiles = kTile * round_up(depth, kTileDepth);  // of 16 rows
        for (std::int64_t top = 0; top < g.rows; top += kPackedRows) {
            const std::int64_t last = smaller(g.rows, top + kPackedRows);
            for (std::int64_t row = top; row < last; row += kTile) {
                pack_as_columns(
                    g.a, row, last - row, k, depth, packed + (row - top) / kTile * packed_tiles
                );
            }
            for (std::int64_t column = 0; column < g.columns; column += kTwoTiles) {
                const Strip weights[2] = {
                    strip_of(g.b, column, g.columns - column, k, depth, copies),
                    strip_of(
                        g.b, column + kTile, g.columns - column - kTile, k, depth,
                        copies + kStripSize
                    )
                };
                for (std::int64_t row = top; row < last; row += kTwoTiles) {
                    const BFloat16* tiles = packed + (row - top) / kTile * packed_tiles;
                    const BFloat16* more = row + kTile < last ? tiles + packed_tiles : nullptr;
                    const PackedTiles tokens = {
                        .data = {tiles, more},
                        .row_bytes = kTileDepth * sizeof(BFloat16),
                        .step = kTile * kTileDepth,
                    };
                    const bool is_first = row == 0;
                    multiply_into<true>(g, row, column, weights, tokens, depth, k > 0, is_first);
                }
            }
        }
    }
}

void gemm_nn(const Gemm<BFloat16>& g) {
    if (g.rows <= kVectorRows) {
        kAvx512Bf16Products.gemm_nn(g);
        return;
    }
    const TileRegisters registers;
    auto* packed = reinterpret_cast<BFloat16*>(g.scratch);
    BFloat16* copies = packed + kPackedSize;
    const std::int64_t fits = kPackedSize / round_up(g.columns, kPanelColumns);
    const std::int64_t most_depth = smaller(kDepth, fits / kTileDepth * kTileDepth);
    for (std::int64_t k = 0; k == 0 || k < g.depth; k += most_depth) {
        const std::int64_t depth = smaller(most_depth, g.depth - k);
        const std::int64_t panel_size = round_up(depth, kTileDepth) * kPanelColumns;
        for (std::int64_t d = 0; d < round_up(depth, kTileDepth); d += Pairs::kDeep) {
            const auto row = [&](std::int64_t i) { return i < depth ? g.b[k + i] : nullptr; };
            BFloat16* to = packed + d * kPanelColumns;
            Pairs::copy_to_panels(row(d), row(d + 1), g.columns, to, panel_size);
        }
        for (std::int64_t row = 0; row < g.rows; row += kTwoTiles) {
            const Strip rows[2] = {
                strip_of(g.a, row, g.rows - row, k, depth, copies),
                strip_of(g.a, row + kTile, g.rows - row - kTile, k, depth, copies + kStripSize),
            };
            for (std::int64_t column = 0; column < g.columns; column += kPanelColumns) {
                const BFloat16* tiles = packed + column / kPanelColumns * panel_size;
                const BFloat16* more =
                    column + kTile < g.columns ? tiles + kTile * Pairs::kDeep : nullptr;
                const PackedTiles weights = {
                    .data = {tiles, more},
                    .row_bytes = kPanelColumns * Pairs::kDeep * sizeof(BFloat16),
                    .step = kTileDepth * kPanelColumns,
                };
                multiply_into<false>(g, row, column, rows, weights, depth, k > 0, false);
            }
        }
    }
}

}  // namespace
}  // namespace tenp::cpu::TENP_ISA

namespace tenp::cpu {

const BFloat16Products kAmxProducts = {TENP_ISA::gemm_nt, TENP_ISA::gemm_nn, TENP_ISA::kNtColumns};

}  // namespace tenp::cpu
