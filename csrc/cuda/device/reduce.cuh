// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cuda/device/ptx.cuh"

// Sums over a block in an order that depends on nothing but the block's size.

namespace tenp::cuda {

/// The larger of two values; NaN when one of them is.
__device__ __forceinline__ double larger_or_nan(double a, double b) {
    return b > a || b != b ? b : a;
}

/// Sum over the warp, in every lane; float or double.
template <class Number>
__device__ __forceinline__ Number warp_sum(Number value) {
    for (int flip = 16; flip > 0; flip /= 2) {
        value += __shfl_xor_sync(~0u, value, flip);
    }
    return value;
}

/// Sum over the block in thread 0. partial: one double per warp of shared memory.
__device__ __forceinline__ double block_sum(double value, double* partial) {
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        partial[threadIdx.x / 32] = value;
    }
    __syncthreads();
    double total = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
        total += partial[warp];
    }
    return total;
}

/// Maximum over the block in thread 0, NaN when one value is.
__device__ __forceinline__ double block_max(double value, double* partial) {
    for (int flip = 16; flip > 0; flip /= 2) {
        value = larger_or_nan(value, __shfl_xor_sync(~0u, value, flip));
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        partial[threadIdx.x / 32] = value;
    }
    __syncthreads();
    double largest = partial[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) {
        largest = larger_or_nan(largest, partial[warp]);
    }
    return largest;
}

/// One warp walks over a row of `size` elements: f<n>(i) gets the n neighbours from i on, 16 bytes
/// of them where `is_aligned` says that the row starts at a multiple of 16 bytes, else one.
template <class T, class F>
__device__ __forceinline__ void for_each_of_row(int size, bool is_aligned, F f) {
    constexpr int kVector = 16 / static_cast<int>(sizeof(T));
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int in_vectors = is_aligned ? size / kVector * kVector : 0;
    for (int i = lane * kVector; i < in_vectors; i += 32 * kVector) {
        f.template operator()<kVector>(i);
    }
    for (int i = in_vectors + lane; i < size; i += 32) {
        f.template operator()<1>(i);
    }
}

/// kCount neighbours as float32.
template <int kCount, class T>
__device__ __forceinline__ void load_widened(float (&values)[kCount], const T* from) {
    if constexpr (kCount == 1) {
        values[0] = widen(*from);
    } else {
        static_assert(kCount * sizeof(T) == 16);
        struct alignas(16) Vector {
            T elements[kCount];
        };
        const Vector vector = *reinterpret_cast<const Vector*>(from);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            values[i] = widen(vector.elements[i]);
        }
    }
}

}  // namespace tenp::cuda
