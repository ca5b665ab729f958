// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cpu/isa/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

// Numbers of every row, computed in any order, so that the sums over rows can then be taken in
// theirs.

namespace tenp::cpu {

/// Rows that one task takes: enough to pay for handing it out.
inline constexpr std::int64_t kRowsPerTask = 64;

/// Calls f(row) for rows first..last-1 on all threads.
template <class F>
void for_each_row(std::int64_t first, std::int64_t last, F&& f) {
    const std::int64_t tasks = (last - first + kRowsPerTask - 1) / kRowsPerTask;
    parallel_for(tasks, [&](std::int64_t task) {
        const std::int64_t begin = first + task * kRowsPerTask;
        for (std::int64_t row = begin; row < last && row < begin + kRowsPerTask; ++row) {
            f(row);
        }
    });
}

/// |y| of rows first..last-1 of a matrix, at index row; valid until this thread's next call.
inline const double* row_norms(const TensorView& matrix, std::int64_t first, std::int64_t last) {
    thread_local Scratch scratch;
    auto* norms = scratch.get<double>(matrix.shape[0]);
    dispatch(matrix.dtype, Floats{}, [&]<class T>() {
        const auto dots = kernels().of<T>().dots;
        for_each_row(first, last, [&](std::int64_t row) {
            const T* values = data<const T>(matrix) + row * matrix.stride[0];
            norms[row] = std::sqrt(dots(values, values, matrix.shape[1]).yy);
        });
    });
    return norms;
}

/// |y| (1 - cos(x, y)) = |y| - <x, y> / |x|
inline double direction_change(const DotProducts& dots) {
    if (dots.yy == 0) {
        return 0;
    }
    const double along_x = dots.xx == 0 ? 0 : dots.xy / std::sqrt(dots.xx);
    return std::sqrt(dots.yy) - along_x;
}

// The sums of three ops over rows of which that is known, at index row: |y|, or the change times
// the gate.

/// Reads no outputs.
void add_activation_stats(const ActivationStatsArgs& args, const double* norms);

void add_direction_change(
    const std::int32_t* offsets,  // [E+1]
    std::int64_t experts,
    const double* changes,
    double* sums  // [E], added to
);

void add_neuron_contribution(const NeuronContributionArgs& args, const double* norms);

/// The larger of two values; NaN when one of them is.
inline double larger_or_nan(double a, double b) {
    return b > a || b != b ? b : a;
}

}  // namespace tenp::cpu
