// SPDX-License-Identifier: Apache-2.0

// Sums: over a token's slots, and those of the statistics.

#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/vectors.inc.h"

namespace tenp::cpu::TENP_ISA {
namespace {

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
void round_row(const float* row, T* out, std::int64_t count) {
    for_each_vector(count, [&](std::int64_t i, auto read_at, auto write_at) {
        write_at(out + i, read_at(row + i));
    });
}

template <class T>
void add_row(float* sums, const T* row, float factor, std::int64_t count) {
    for_each_vector(count, [&](std::int64_t i, auto read_at, auto write_at) {
        write_at(sums + i, read_at(sums + i) + factor * read_at(row + i));
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

/// The sum of the lanes, the lower half's and the upper half's of each vector of floats.
[[gnu::always_inline]] inline double total(Doubles low, Doubles high) {
    const Doubles both = low + high;
    double sum = 0;
    for (int lane = 0; lane < kHalf; ++lane) {
        sum += both[lane];
    }
    return sum;
}

template <class T>
DotProducts dots(const T* x, const T* y, std::int64_t count) {
    Doubles xx[2] = {};
    Doubles xy[2] = {};
    Doubles yy[2] = {};
    for_each_vector(count, [&](std::int64_t i, auto read_at, auto) {
        const Vector x_lanes = read_at(x + i);
        const Vector y_lanes = read_at(y + i);
        const Doubles x_halves[2] = {half<0>(x_lanes), half<kHalf>(x_lanes)};
        const Doubles y_halves[2] = {half<0>(y_lanes), half<kHalf>(y_lanes)};
        for (int h = 0; h < 2; ++h) {
            xx[h] += x_halves[h] * x_halves[h];
            xy[h] += x_halves[h] * y_halves[h];
            yy[h] += y_halves[h] * y_halves[h];
        }
    });
    return {total(xx[0], xx[1]), total(xy[0], xy[1]), total(yy[0], yy[1])};
}

/// sums[i] += factor row[i]^2
template <class T>
void add_squares(double* sums, const T* row, double factor, std::int64_t count) {
    const auto add = [&](Doubles value, double* to) {
        write(to, read<Doubles>(to) + factor * (value * value));
    };
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Vector lanes = load(row + i);
        add(half<0>(lanes), sums + i);
        add(half<kHalf>(lanes), sums + i + kHalf);
    }
    for (; i < count; ++i) {
        const double value = to_float(row[i]);
        sums[i] += factor * (value * value);
    }
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

}  // namespace
}  // namespace tenp::cpu::TENP_ISA
