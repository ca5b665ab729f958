// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cpu/isa/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace tenp::cpu {
namespace {

constexpr std::int64_t kTile = OuterProducts::kTile;

/// Rows at a time: two panels and the tile of sums stay in the L2 cache.
constexpr std::int64_t kPanelRows = 256;

/// Rows of the upper triangle before row i, which is how it is packed.
std::int64_t packed_start(std::int64_t size, std::int64_t i) {
    return i * size - i * (i - 1) / 2;
}

/// panel[r][c] = g_r m_r[first + c]; 1 for m beyond the neurons, 0 beyond `size`.
template <class T>
void fill_panel(
    const SecondMomentArgs& args,
    std::int64_t first_row,
    std::int64_t rows,
    std::int64_t first,
    std::int64_t size,
    double* panel
) {
    const std::int64_t neurons = args.activations.shape[1];
    const std::int64_t stored = std::clamp<std::int64_t>(neurons - first, 0, kTile);
    const std::int64_t used = std::min(kTile, size - first);
    for (std::int64_t r = 0; r < rows; ++r) {
        const T* m =
            data<const T>(args.activations) + (first_row + r) * args.activations.stride[0] + first;
        const double gate = data<const float>(args.gates)[first_row + r];
        double* out = panel + r * kTile;
        for (std::int64_t c = 0; c < stored; ++c) {
            out[c] = gate * static_cast<double>(to_float(m[c]));
        }
        std::fill(out + stored, out + used, gate);
        std::fill(out + used, out + kTile, 0.0);
    }
}

/// Adds one tile of one expert's C: rows from `top`, columns from `left` on.
template <class T>
void add_tile(
    const SecondMomentArgs& args,
    std::int64_t expert,
    std::int64_t top,
    std::int64_t left,
    std::int64_t size
) {
    thread_local Scratch scratch;
    double* sums = scratch.get<double>(kTile * (kTile + 2 * kPanelRows));
    double* a = sums + kTile * kTile;
    double* b = top == left ? a : a + kTile * kPanelRows;
    std::fill_n(sums, kTile * kTile, 0.0);

    const auto* offsets = data<const std::int32_t>(args.offsets);
    const std::int64_t last = offsets[expert + 1];
    for (std::int64_t row = offsets[expert]; row < last; row += kPanelRows) {
        const std::int64_t rows = std::min(kPanelRows, last - row);
        fill_panel<T>(args, row, rows, top, size, a);
        if (b != a) {
            fill_panel<T>(args, row, rows, left, size, b);
        }
        kernels().add_outer_products({.a = a, .b = b, .rows = rows, .sums = sums});
    }

    double* packed = data<double>(args.second_moment) + expert * args.second_moment.shape[1];
    for (std::int64_t i = top; i < std::min(size, top + kTile); ++i) {
        double* row = packed + packed_start(size, i) - i;
        for (std::int64_t j = std::max(i, left); j < std::min(size, left + kTile); ++j) {
            row[j] += sums[(i - top) * kTile + j - left];
        }
    }
}

}  // namespace

void accumulate_second_moment(const SecondMomentArgs& args) {
    const std::int64_t experts = args.second_moment.shape[0];
    const std::int64_t size = args.activations.shape[1] + (args.has_bias ? 1 : 0);
    const std::int64_t blocks = (size + kTile - 1) / kTile;
    dispatch(args.activations.dtype, Floats{}, [&]<class T>() {
        parallel_for(experts * blocks * blocks, [&](std::int64_t task) {
            const std::int64_t top = task / blocks % blocks;
            const std::int64_t left = task % blocks;
            if (left >= top) {
                add_tile<T>(args, task / (blocks * blocks), top * kTile, left * kTile, size);
            }
        });
    });
}

}  // namespace tenp::cpu
