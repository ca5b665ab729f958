// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/kernels.h"
#include "support.h"

// The matrix products of the CPU kernels against plain loops.

namespace tenp::test {
namespace {

using Ints64 = std::vector<std::int64_t>;

/// Small multiples of 1/4, exact in every type; their products and sums are exact in float32.
float value_at(std::int64_t row, std::int64_t column) {
    return static_cast<float>((5 * row + 3 * column + row * column) % 15 - 7) / 4;
}

template <class T>
void fill(Guarded<T>& matrix, std::int64_t columns) {
    for (std::int64_t i = 0; i < matrix.size(); ++i) {
        matrix[i] = from_float<T>(value_at(i / columns, i % columns));
    }
}

struct Sizes {
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t depth;
};

/// Runs a product of matrices with the given rows, and compares it with its equation.
template <class T>
void check_product(
    void (*product)(const cpu::Gemm<T>&),
    const Sizes& sizes,
    bool b_is_transposed,
    const Ints64* a_rows,
    const Ints64* b_rows
) {
    CAPTURE(sizes.rows);
    CAPTURE(sizes.columns);
    CAPTURE(sizes.depth);
    const auto row_of = [](const Ints64* index, std::int64_t row) {
        return index == nullptr ? row : (*index)[static_cast<std::size_t>(row)];
    };
    const auto rows_of = [](const Ints64* index, std::int64_t rows) {
        return index == nullptr ? rows : 1 + *std::ranges::max_element(*index);
    };
    const std::int64_t b_width = b_is_transposed ? sizes.depth : sizes.columns;
    const std::int64_t b_height = b_is_transposed ? sizes.columns : sizes.depth;
    Guarded<T> a(rows_of(a_rows, sizes.rows) * sizes.depth);
    Guarded<T> b(rows_of(b_rows, b_height) * b_width);
    fill(a, sizes.depth);
    fill(b, b_width);
    const std::int64_t c_stride = sizes.columns + 3;
    Guarded<float> c(sizes.rows * c_stride, static_cast<float>(kNan));
    std::vector<float> scratch(cpu::kGemmScratch, static_cast<float>(kNan));
    product({
        .a = {a.data(), sizes.depth, a_rows == nullptr ? nullptr : a_rows->data()},
        .b = {b.data(), b_width, b_rows == nullptr ? nullptr : b_rows->data()},
        .c = c.data(),
        .c_stride = c_stride,
        .rows = sizes.rows,
        .columns = sizes.columns,
        .depth = sizes.depth,
        .scratch = scratch.data(),
    });
    int wrong = 0;
    for (std::int64_t row = 0; row < sizes.rows; ++row) {
        for (std::int64_t column = 0; column < c_stride; ++column) {
            if (column >= sizes.columns) {
                wrong += !std::isnan(c[row * c_stride + column]);
                continue;
            }
            double sum = 0;
            for (std::int64_t k = 0; k < sizes.depth; ++k) {
                const float factor = b_is_transposed ? value_at(row_of(b_rows, column), k)
                                                     : value_at(row_of(b_rows, k), column);
                sum += value_at(row_of(a_rows, row), k) * factor;
            }
            wrong += c[row * c_stride + column] != sum;
        }
    }
    CHECK(wrong == 0);
}

}  // namespace

TEST_CASE_TEMPLATE("products are those of the matrices, for any sizes", T, float, BFloat16) {
    const auto& kernels = cpu::kernels().of<T>();
    for (const std::int64_t rows : {1, 4, 5, 17, 40}) {
        for (const std::int64_t columns : {1, 15, 33, 64}) {
            for (const std::int64_t depth : {0, 1, 31, 64, 99}) {
                check_product<T>(kernels.gemm_nt, {rows, columns, depth}, true, nullptr, nullptr);
                check_product<T>(kernels.gemm_nn, {rows, columns, depth}, false, nullptr, nullptr);
            }
        }
    }
}

TEST_CASE_TEMPLATE("products of more than one block", T, float, BFloat16) {
    const auto& kernels = cpu::kernels().of<T>();
    for (const std::int64_t rows : {3, 100}) {  // as many as need two packings
        check_product<T>(kernels.gemm_nt, {rows, kernels.nt_columns, 40}, true, nullptr, nullptr);
        check_product<T>(kernels.gemm_nt, {rows, 20, 2090}, true, nullptr, nullptr);
        check_product<T>(
            kernels.gemm_nn, {rows, cpu::kGemmWideColumns, 210}, false, nullptr, nullptr
        );
        check_product<T>(kernels.gemm_nn, {rows, 20, 2090}, false, nullptr, nullptr);
    }
}

TEST_CASE_TEMPLATE("rows of the factors may be anywhere", T, float, BFloat16) {
    const auto& kernels = cpu::kernels().of<T>();
    for (const std::int64_t rows : {3, 20}) {
        Ints64 tokens;
        for (std::int64_t row = 0; row < rows; ++row) {
            tokens.push_back((row * 7 + 3) % 23);
        }
        Ints64 weights;  // of two places, as gate and up have them, the second with a hole
        for (std::int64_t column = 0; column < 40; ++column) {
            weights.push_back(column < 20 ? column : column + 30 + (column > 30 ? 1 : 0));
        }
        check_product<T>(kernels.gemm_nt, {rows, 40, 64}, true, &tokens, &weights);
        check_product<T>(kernels.gemm_nn, {rows, 40, 16}, false, &tokens, nullptr);
    }
}

}  // namespace tenp::test
