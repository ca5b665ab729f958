// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/float16.h"
#include "tenp/expert_gemm.h"

// The inner loops of the CPU backend, compiled once per instruction set from isa/*.inc.h.
// They run on the calling thread and assume what the ops have checked. T is the element type of a
// call: float, BFloat16 or Float16. W is that of its weights: T, or int8 with a scale for every
// row.

namespace tenp::cpu {

/// Rows of a matrix, each contiguous: row r starts at data + (index == nullptr ? r : index[r]) *
/// stride.
template <class T>
struct Rows {
    const T* data = nullptr;
    std::int64_t stride = 0;
    const std::int64_t* index = nullptr;

    [[gnu::always_inline]] const T* operator[](std::int64_t row) const {
        return data + (index == nullptr ? row : index[row]) * stride;
    }
};

/// A matrix product takes this many columns at a time, so that its block of B fits L2. Some take
/// more.
inline constexpr std::int64_t kGemmColumns = 128;

/// gemm_nn takes up to this many: with few rows, what counts is to read B in long pieces.
inline constexpr std::int64_t kGemmWideColumns = 1024;

/// Rows for which it is worth to convert that block again.
inline constexpr std::int64_t kGemmRows = 384;

/// Floats of scratch that a matrix product uses.
inline constexpr std::int64_t kGemmScratch = (kGemmColumns + 16) * 1040;

/// C = A B^T (gemm_nt) or C = A B (gemm_nn), accumulated in float32. What a row of C gets does not
/// depend on the other rows of the call.
template <class T, class W = T>
struct Gemm {
    Rows<T> a;                   // [rows, depth]
    const T* a_scale = nullptr;  // [depth], nn with int8 weights: of the columns of A
    Rows<W> b;                   // [columns, depth] for nt, [depth, columns] for nn
    float* c = nullptr;          // [rows, columns], overwritten
    std::int64_t c_stride = 0;
    std::int64_t rows = 0;
    std::int64_t columns = 0;  // 1..nt_columns of the kernels; for nn, 1..kGemmWideColumns
    std::int64_t depth = 0;    // 0 gives zeros
    float* scratch = nullptr;  // [kGemmScratch]
};

/// One row of m = act(gate_scale gate + gate_bias) * (up_scale up + up_bias); without a gate,
/// act(up_scale up + up_bias).
template <class T>
struct Activate {
    const float* gate = nullptr;    // [count]; null: none
    const float* up = nullptr;      // [count]
    const T* gate_scale = nullptr;  // [count]; null: 1
    const T* up_scale = nullptr;    // [count]; null: 1
    const T* gate_bias = nullptr;   // [count]; null: none
    const T* up_bias = nullptr;     // [count]; null: none
    T* out = nullptr;               // [count], rounded once
    std::int64_t count = 0;
    Activation activation = Activation::kSilu;
    float limit = 0;
    float alpha = 0;
};

/// One token's out = sum over i of weights[i] * y[rows[i]], in that order.
template <class T>
struct Combine {
    Rows<float> y;
    const std::int64_t* rows = nullptr;  // [terms]
    const float* weights = nullptr;      // [terms]
    std::int64_t terms = 0;
    T* out = nullptr;  // [count], rounded once
    std::int64_t count = 0;
};

/// Adds rows of one expert, in order, to sums over its neurons; see neuron_contribution.h. The sums
/// are as long as kGemmColumns: a tail of neurons is filled up with zeros to a whole vector.
template <class T>
struct Contribute {
    Rows<T> activations;              // m: [rows, count]
    const float* products = nullptr;  // q = <w, y>: [rows, products_stride]
    std::int64_t products_stride = 0;
    const double* norms = nullptr;  // |y|: [rows]
    const float* gates = nullptr;   // [rows]
    std::int64_t rows = 0;
    std::int64_t count = 0;        // neurons, <= kGemmColumns
    double* projection = nullptr;  // [kGemmColumns], as the next three
    double* magnitude = nullptr;
    double* energy = nullptr;
    double* peak = nullptr;
};

/// Products of bfloat16 matrices by instructions for them, in the place of those in float32.
struct BFloat16Products {
    void (*gemm_nt)(const Gemm<BFloat16>&);
    void (*gemm_nn)(const Gemm<BFloat16>&);
    std::int64_t nt_columns;
};

/// Products of two rows with themselves and each other, multiplied and added in float64.
struct DotProducts {
    double xx = 0;
    double xy = 0;
    double yy = 0;
};

template <class T>
struct TypedKernels {
    void (*gemm_nt)(const Gemm<T>&);
    void (*gemm_nn)(const Gemm<T>&);
    void (*gemm_nt_int8)(const Gemm<T, std::int8_t>&);
    void (*gemm_nn_int8)(const Gemm<T, std::int8_t>&);
    void (*activate)(const Activate<T>&);
    void (*combine)(const Combine<T>&);
    void (*contribute)(const Contribute<T>&);
    void (*round_row)(const float* row, T* out, std::int64_t count);
    void (*add_row)(float* sums, const T* row, float factor, std::int64_t count);
    void (*add_squares)(double* sums, const T* row, double factor, std::int64_t count);
    DotProducts (*dots)(const T* x, const T* y, std::int64_t count);
    std::int64_t nt_columns = kGemmColumns;  // that gemm_nt takes at most
};

/// sums[i][j] += sum over rows, in order, of a[row][i] b[row][j].
struct OuterProducts {
    static constexpr std::int64_t kTile = 64;

    const double* a = nullptr;  // [rows, kTile]
    const double* b = nullptr;  // [rows, kTile]
    std::int64_t rows = 0;
    double* sums = nullptr;  // [kTile, kTile]
};

struct Kernels {
    const char* name;
    void (*add_outer_products)(const OuterProducts&);
    TypedKernels<float> float32;
    TypedKernels<BFloat16> bfloat16;
    TypedKernels<Float16> float16;

    template <class T>
    const TypedKernels<T>& of() const {
        if constexpr (std::is_same_v<T, float>) {
            return float32;
        } else if constexpr (std::is_same_v<T, BFloat16>) {
            return bfloat16;
        } else {
            return float16;
        }
    }
};

extern const Kernels kPortableKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const BFloat16Products kAvx512Bf16Products;
extern const BFloat16Products kAmxProducts;

/// The kernels that this process uses; see cpu_isa().
const Kernels& kernels();

}  // namespace tenp::cpu
