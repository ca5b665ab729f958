// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>
#include <immintrin.h>

#include <thread>
#include <vector>

#include "core/float16.h"

// That the emulated instructions do what the manual says.

namespace {

std::uint16_t bfloat16(float value) {
    return tenp::from_float<tenp::BFloat16>(value).bits;
}

/// What is the same in all lanes.
__m512bh pairs(float first, float second) {
    __m512bh pairs;
    for (int lane = 0; lane < 16; ++lane) {
        pairs[2 * lane] = bfloat16(first);
        pairs[2 * lane + 1] = bfloat16(second);
    }
    return pairs;
}

float dot(float sum, __m512bh a, __m512bh b) {
    const __m512 sums = _mm512_dpbf16_ps(__m512{} + sum, a, b);
    for (int lane = 1; lane < 16; ++lane) {
        CHECK(sums[lane] == sums[0]);
    }
    return sums[0];
}

/// The first four tiles of m x n, m x 2p, p x n pairs and 16 x 16.
struct Shapes {
    std::uint8_t palette = 1;
    std::uint8_t zeros[15] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};

    Shapes(int m, int n, int p) {
        const auto set = [&](int tile, int tile_rows, int columns) {
            rows[tile] = static_cast<std::uint8_t>(tile_rows);
            row_bytes[tile] = static_cast<std::uint16_t>(4 * columns);
        };
        set(0, m, n);
        set(1, m, p);
        set(2, p, n);
        set(3, 16, 16);
    }
};
static_assert(sizeof(Shapes) == 64);

}  // namespace

TEST_CASE("a lane adds the product of its second values, then that of its first") {
    // 2^24 + 1 rounds to 2^24, and 2^24 + 2 is exact: the order shows.
    CHECK(dot(0x1p24f, pairs(-0x1p24f, 1), pairs(1, 1)) == 0);
    CHECK(dot(0x1p24f, pairs(1, -0x1p24f), pairs(1, 1)) == 1);
    CHECK(dot(0x1p24f, pairs(1, 1), pairs(1, 1)) == 0x1p24f);  // twice a tie, to even
    CHECK(dot(1, pairs(2, 3), pairs(5, 7)) == 32);
}

TEST_CASE("denormal numbers are zeros, before and after") {
    const float denormal = 0x1p-127f;
    CHECK(dot(0, pairs(denormal, 0), pairs(0x1p100f, 0)) == 0);
    CHECK(dot(denormal, pairs(0, 0), pairs(0, 0)) == 0);
    CHECK(dot(0x1.8p-126f, pairs(-0x1p-63f, 0), pairs(0x1p-63f, 0)) == 0);
    CHECK(dot(0x1p-125f, pairs(-0x1p-63f, 0), pairs(0x1p-63f, 0)) == 0x1p-126f);
}

TEST_CASE("a tile product is that of the matrices, whose second one is in pairs") {
    for (const auto& [m, n, p] : {std::array{16, 16, 16}, {1, 16, 16}, {5, 3, 7}}) {
        const auto a = [](int row, int k) {
            return static_cast<float>((3 * row + 5 * k) % 17 - 8);
        };
        const auto b = [](int k, int column) {
            return static_cast<float>((7 * k + 2 * column) % 13 - 6);
        };
        std::vector<std::uint16_t> a_rows(16 * 40), b_rows(16 * 40);
        std::vector<float> c(16 * 20, 2.0f);
        for (int row = 0; row < m; ++row) {
            for (int k = 0; k < 2 * p; ++k) {
                a_rows[row * 40 + k] = bfloat16(a(row, k));
            }
        }
        for (int k = 0; k < 2 * p; ++k) {
            for (int column = 0; column < n; ++column) {
                b_rows[k / 2 * 40 + 2 * column + k % 2] = bfloat16(b(k, column));
            }
        }
        const Shapes shapes(m, n, p);
        _tile_loadconfig(&shapes);
        _tile_loadd(0, c.data(), 80);
        _tile_loadd(1, a_rows.data(), 80);
        _tile_loadd(2, b_rows.data(), 80);
        _tile_dpbf16ps(0, 1, 2);
        _tile_stored(0, c.data(), 80);
        _tile_release();
        for (int row = 0; row < 16; ++row) {
            for (int column = 0; column < 20; ++column) {
                float expected = 2;
                for (int k = 0; k < 2 * p && row < m && column < n; ++k) {
                    expected += a(row, k) * b(k, column);
                }
                CHECK(c[row * 20 + column] == expected);
            }
        }
    }
}

TEST_CASE("a tile product adds up first and second values apart, and then to the tile") {
    const Shapes shapes(1, 1, 2);
    _tile_loadconfig(&shapes);
    float c = 0;
    const auto product = [&](float before, std::array<float, 4> values) {
        std::uint16_t a[4];
        std::transform(values.begin(), values.end(), a, bfloat16);
        const std::uint16_t ones[2][2] = {{bfloat16(1), bfloat16(1)}, {bfloat16(1), bfloat16(1)}};
        _tile_loadd(0, &before, 4);
        _tile_loadd(1, a, 8);
        _tile_loadd(2, ones, 4);
        _tile_dpbf16ps(0, 1, 2);
        _tile_stored(0, &c, 4);
        return c;
    };
    CHECK(product(0, {0x1p24f, 1, 1, 1}) == 0x1p24f + 2);  // (2^24 + 1) + (1 + 1)
    CHECK(product(1, {0x1p24f, -0x1p24f, 0, 0}) == 1);     // 1 + (2^24 - 2^24)
    _tile_release();
}

TEST_CASE("what the hardware refuses throws") {
    std::uint16_t memory[16 * 32] = {};
    _tile_release();
    CHECK_THROWS(_tile_zero(0));
    Shapes shapes(16, 16, 16);
    _tile_loadconfig(&shapes);
    CHECK_THROWS(_tile_loadd(4, memory, 64));
    CHECK_THROWS(_tile_dpbf16ps(0, 1, 1));
    std::thread([] { CHECK_THROWS(_tile_zero(0)); }).join();  // every thread has its own
    _tile_release();
    CHECK_THROWS(_tile_stored(0, memory, 64));
    const Shapes unfit(16, 8, 16);
    _tile_loadconfig(&unfit);
    CHECK_THROWS(_tile_dpbf16ps(0, 1, 3));
    shapes.rows[0] = 17;
    CHECK_THROWS(_tile_loadconfig(&shapes));
    _tile_release();
}
