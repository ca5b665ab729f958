// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

// Stands in for the compiler's header: the instructions that csrc/cpu/isa/avx512bf16.cpp and
// amx.cpp use, in plain C++, as volume 2 of Intel's Software Developer's Manual defines them, so
// that these files can be tested on a machine without them. What the hardware answers with a fault
// throws.

// ---- AVX-512 ------------------------------------------------------------------------------------

using __m128i [[gnu::vector_size(16), gnu::may_alias]] = long long;
using __m256i [[gnu::vector_size(32), gnu::may_alias]] = long long;
using __m512i [[gnu::vector_size(64), gnu::may_alias]] = long long;
using __m512 [[gnu::vector_size(64), gnu::may_alias]] = float;
using __m512bh [[gnu::vector_size(64), gnu::may_alias]] = std::uint16_t;
using __mmask16 = std::uint16_t;

namespace emulation {

/// 16 numbers of type Narrow as ones of 32 bits.
template <class Narrow, class From>
__m512i widen(From from) {
    std::array<Narrow, 16> narrow;
    std::array<std::int32_t, 16> wide;
    std::memcpy(&narrow, &from, sizeof(narrow));
    std::copy(narrow.begin(), narrow.end(), wide.begin());
    __m512i to;
    std::memcpy(&to, &wide, sizeof(to));
    return to;
}

/// Denormal numbers, before and after every operation, are zeros of their sign.
inline float flushed(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    return std::bit_cast<float>((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}

inline float widened(std::uint16_t bits) {
    return flushed(std::bit_cast<float>(std::uint32_t{bits} << 16));
}

/// sum + a b, rounded once to the nearest, ties to even: the product of two bfloat16 values has 16
/// bits, so that float32 holds it.
inline float multiply_add(float sum, float a, float b) {
    return flushed(sum + a * b);
}

inline void require(bool condition, const char* fault) {
    if (!condition) {
        throw std::logic_error(fault);
    }
}

}  // namespace emulation

inline __m512i _mm512_maskz_cvtepu16_epi32(__mmask16, __m256i from) {
    return emulation::widen<std::uint16_t>(from);
}

inline __m512i _mm512_maskz_cvtepi8_epi32(__mmask16, __m128i from) {
    return emulation::widen<std::int8_t>(from);
}

[[gnu::noinline]] inline __m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
    using namespace emulation;
    for (int lane = 0; lane < 16; ++lane) {
        float sum = flushed(sums[lane]);
        for (const int i : {2 * lane + 1, 2 * lane}) {
            sum = multiply_add(sum, widened(a[i]), widened(b[i]));
        }
        sums[lane] = sum;
    }
    return sums;
}

// ---- AMX ----------------------------------------------------------------------------------------

namespace emulation {

constexpr int kTiles = 8;

struct Tile {
    int rows = 0;
    int row_bytes = 0;
    std::uint16_t values[16][32] = {};

    float get(int row, int column) const {
        float value;
        std::memcpy(&value, &values[row][2 * column], sizeof(value));
        return value;
    }
    void set(int row, int column, float value) {
        std::memcpy(&values[row][2 * column], &value, sizeof(value));
    }
    void clear() { std::memset(values, 0, sizeof(values)); }
};

/// The registers of a thread. Without a configuration no tile has rows.
inline thread_local std::array<Tile, kTiles> tiles;

inline Tile& configured(int tile) {
    require(tile >= 0 && tile < kTiles && tiles[tile].rows > 0, "a tile without a configuration");
    return tiles[tile];
}

}  // namespace emulation

inline void _tile_release() {
    emulation::tiles.fill({});
}

inline void _tile_loadconfig(const void* memory) {
    struct Config {
        std::uint8_t palette, start_row, reserved[14];
        std::uint16_t row_bytes[16];
        std::uint8_t rows[16];
    } config;
    std::memcpy(&config, memory, sizeof(config));
    emulation::require(config.palette == 1 && config.start_row == 0, "a palette that is not 1");
    for (const std::uint8_t zero : config.reserved) {
        emulation::require(zero == 0, "a reserved byte that is not 0");
    }
    _tile_release();
    for (int tile = 0; tile < 16; ++tile) {
        const int rows = config.rows[tile];
        const int row_bytes = config.row_bytes[tile];
        emulation::require(rows <= 16 && row_bytes <= 64, "a tile larger than 16 x 64 bytes");
        emulation::require(
            (rows > 0) == (row_bytes > 0), "rows without bytes, or bytes without rows"
        );
        emulation::require(tile < emulation::kTiles || rows == 0, "a tile that does not exist");
        if (tile < emulation::kTiles) {
            emulation::tiles[tile].rows = rows;
            emulation::tiles[tile].row_bytes = row_bytes;
        }
    }
}

inline void _tile_zero(int tile) {
    emulation::configured(tile).clear();
}

inline void _tile_loadd(int tile, const void* memory, std::ptrdiff_t stride) {
    emulation::Tile& to = emulation::configured(tile);
    to.clear();
    for (int row = 0; row < to.rows; ++row) {
        std::memcpy(to.values[row], static_cast<const char*>(memory) + row * stride, to.row_bytes);
    }
}

inline void _tile_stored(int tile, void* memory, std::ptrdiff_t stride) {
    const emulation::Tile& from = emulation::configured(tile);
    for (int row = 0; row < from.rows; ++row) {
        std::memcpy(static_cast<char*>(memory) + row * stride, from.values[row], from.row_bytes);
    }
}

/// The products of the first values of all pairs are added up on their own, as are those of the
/// second values; then the two sums are added to each other and to the tile.
inline void _tile_dpbf16ps(int c_tile, int a_tile, int b_tile) {
    emulation::Tile& c = emulation::configured(c_tile);
    const emulation::Tile& a = emulation::configured(a_tile);
    const emulation::Tile& b = emulation::configured(b_tile);
    emulation::require(
        c_tile != a_tile && c_tile != b_tile && a_tile != b_tile, "a tile that is named twice"
    );
    emulation::require(
        a.rows == c.rows && b.row_bytes == c.row_bytes && a.row_bytes == 4 * b.rows &&
            c.row_bytes % 4 == 0,
        "tiles whose shapes do not fit"
    );
    using emulation::flushed, emulation::widened, emulation::multiply_add;
    float b_values[16][2][16];
    for (int pair = 0; pair < b.rows; ++pair) {
        for (int column = 0; column < 16; ++column) {
            b_values[pair][0][column] = widened(b.values[pair][2 * column]);
            b_values[pair][1][column] = widened(b.values[pair][2 * column + 1]);
        }
    }
    for (int row = 0; row < c.rows; ++row) {
        float sums[2][16] = {};
        for (int pair = 0; pair < b.rows; ++pair) {
            for (const int i : {0, 1}) {
                const float a_value = widened(a.values[row][2 * pair + i]);
                for (int column = 0; column < 16; ++column) {
                    sums[i][column] =
                        multiply_add(sums[i][column], a_value, b_values[pair][i][column]);
                }
            }
        }
        for (int column = 0; column < c.row_bytes / 4; ++column) {
            const float both = flushed(sums[0][column] + sums[1][column]);
            c.set(row, column, flushed(flushed(c.get(row, column)) + both));
        }
    }
}
