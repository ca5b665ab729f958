// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device/ptx.cuh"

// The matrix product inside the kernels: sums[M, 64] += left[M, depth] right[64, depth]^T by one
// block, M = 128 per group. The left operand is weights, the right one rows of tokens: neurons come
// in large numbers, so tokens get the side of the instruction that is 8 wide.

namespace tenp::cuda {

/// Tag: float32 products by the general units, without the rounding of the matrix instruction.
struct Exact {};

/// The math of an element type that rounds no factor: the matrix instruction, or exact float32.
template <class T>
using MathOf = std::conditional_t<std::is_same_v<T, float>, Exact, T>;

inline constexpr int kBlockThreads = 256;
inline constexpr int kBlockWarps = kBlockThreads / 32;
inline constexpr int kBlockRows = 64;      // of the right operand
inline constexpr int kGroupNeurons = 128;  // of the left operand, 16 per warp
inline constexpr int kTileColumns = kBlockRows / 8;

/// Blocks that share a multiprocessor: shared memory holds two where there are 160 KiB of it or
/// more, and 65536 registers then hold 128 a thread.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
inline constexpr int kResidentBlocks = 1;
#else
inline constexpr int kResidentBlocks = 2;
#endif

/// What a thread accumulates. With w = warp, g = lane / 4, m = lane % 4, sums[group][n][i] belongs
/// to neuron 16 w + g + 8 (i / 2) of the group and row 8 n + 2 m + i % 2.
template <int kGroups>
using Sums = float[kGroups][kTileColumns][4];

template <int kGroups>
__device__ __forceinline__ void clear(Sums<kGroups>& sums) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
        for (int n = 0; n < kTileColumns; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sums[group][n][i] = 0;
            }
        }
    }
}

/// Which neuron of its group and which row sums[...][n][i] belongs to.
__device__ __forceinline__ int neuron_of(int i) {
    return static_cast<int>(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4) + 8 * (i / 2);
}
__device__ __forceinline__ int row_of(int n, int i) {
    return 8 * n + static_cast<int>(threadIdx.x % 4) * 2 + i % 2;
}

/// T: element type. Math: BFloat16, Float16, Tf32 or Exact. kTransposed: the left operand lies
/// [depth, M] in memory instead of [M, depth].
///
/// Operands arrive in slices of 64 bytes of depth, kStages slices in flight. In shared memory the
/// 16-byte chunks of a row are permuted so that the eight rows a load touches lie in different
/// banks.
template <class T, class Math, int kGroups, bool kTransposed>
class BlockProduct {
 public:
    static constexpr int kStages = 4;
    static constexpr int kSlice = 64 / static_cast<int>(sizeof(T));  // elements of depth
    static constexpr int kLeftBytes = kGroups * kGroupNeurons * 64;
    static constexpr int kStageBytes = kLeftBytes + kBlockRows * 64;
    static constexpr int kSharedBytes = kStages * kStageBytes;

    /// The left operand: for each group its first element and how many of its 128 neurons exist.
    struct Left {
        const T* first[kGroups];
        int count[kGroups];
        std::int64_t stride;  // of the dimension that is not contiguous
    };

    /// Adds the product to `sums`. `right_row` is the row right_row_index() of the right operand,
    /// or nullptr where there is none; `rows` are in use. When `is_aligned`, all addresses and
    /// strides are multiples of 16 bytes. All threads of the block call it, and may use `shared`
    /// afterwards.
    static __device__ __forceinline__ void add(
        Sums<kGroups>& sums,
        unsigned char* shared,
        const Left& left,
        const T* right_row,
        int rows,
        int depth,
        bool is_aligned
    ) {
        const int slices = (depth + kSlice - 1) / kSlice;
#pragma unroll
        for (int slice = 0; slice < kStages - 1; ++slice) {
            if (slice < slices) {
                start(shared + slice * kStageBytes, left, right_row, slice, depth, is_aligned);
            }
            commit_copies();
        }
        for (int slice = 0; slice < slices; ++slice) {
            wait_for_copies<kStages - 2>();
            __syncthreads();  // the slice is here, and everybody is done with the one before it
            const int next = slice + kStages - 1;
            if (next < slices) {
                start(
                    shared + next % kStages * kStageBytes, left, right_row, next, depth, is_aligned
                );
            }
            commit_copies();
            multiply(sums, shared + slice % kStages * kStageBytes, rows);
        }
        wait_for_copies<0>();
        __syncthreads();
    }

    static __device__ __forceinline__ int right_row_index() {
        return static_cast<int>(threadIdx.x) / 4;
    }

 private:
    static constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes
    static constexpr int kChunksPerThread = kLeftBytes / 16 / kBlockThreads;
    // The left operand's chunks per row of memory, all groups together, when transposed.
    static constexpr int kRowChunks = kGroups * kGroupNeurons / kChunk;

    static __device__ __forceinline__ int swizzled(int row, int chunk) {
        return row * 64 + ((chunk ^ (row >> 1 & 3)) * 16);
    }
    /// 32-bit elements are read one by one, four rows at a time: twice the distance.
    static __device__ __forceinline__ int swizzled_transposed(int k, int chunk) {
        return k * kRowChunks * 16 + ((chunk ^ ((k & 7) * (sizeof(T) == 4 ? 2 : 1))) * 16);
    }

    /// Copies 16 bytes, `count` elements of which exist; the rest becomes zero.
    static __device__ __forceinline__ void copy_chunk(
        unsigned char* to, const T* from, int count, bool is_aligned
    ) {
        count = max(0, min(count, kChunk));
        if (is_aligned) {
            copy_async(to, from, count * static_cast<int>(sizeof(T)));
            return;
        }
        auto* elements = reinterpret_cast<T*>(to);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            elements[i] = i < count ? from[i] : narrow<T>(0);
        }
    }

    static __device__ __forceinline__ void start(
        unsigned char* stage,
        const Left& left,
        const T* right_row,
        int slice,
        int depth,
        bool is_aligned
    ) {
        const int thread = static_cast<int>(threadIdx.x);
        const int first_k = slice * kSlice;
#pragma unroll
        for (int i = 0; i < kChunksPerThread; ++i) {
            if constexpr (kTransposed) {
                const int index = thread + i * kBlockThreads;
                const int k = index / kRowChunks;
                const int chunk = index % kRowChunks;
                const int group = chunk / (kRowChunks / kGroups);
                const int neuron = chunk % (kRowChunks / kGroups) * kChunk;
                const T* first = left.first[0];
                int count = left.count[0];
                if (kGroups > 1 && group > 0) {
                    first = left.first[kGroups - 1];
                    count = left.count[kGroups - 1];
                }
                const int valid = first_k + k < depth ? count - neuron : 0;
                const T* from = first + (first_k + k) * left.stride + neuron;
                copy_chunk(stage + swizzled_transposed(k, chunk), from, valid, is_aligned);
            } else {
                const int group = i / 2;  // 256 threads copy 64 rows at a time
                const int neuron = thread / 4 + i % 2 * 64;
                const int k = first_k + thread % 4 * kChunk;
                const int valid = neuron < left.count[group] ? depth - k : 0;
                const T* from = left.first[group] + neuron * left.stride + k;
                const int row = group * kGroupNeurons + neuron;
                copy_chunk(stage + swizzled(row, thread % 4), from, valid, is_aligned);
            }
        }
        const int k = first_k + thread % 4 * kChunk;
        const bool is_row = right_row != nullptr;
        copy_chunk(
            stage + kLeftBytes + swizzled(thread / 4, thread % 4), is_row ? right_row + k : nullptr,
            is_row ? depth - k : 0, is_aligned
        );
    }

    static __device__ __forceinline__ void multiply(
        Sums<kGroups>& sums, const unsigned char* stage, int rows
    ) {
        if constexpr (std::is_same_v<Math, Exact>) {
            multiply_exactly(sums, stage, rows);
        } else {
#pragma unroll
            for (int step = 0; step < 2; ++step) {  // 32 bytes of depth each
                std::uint32_t left[kGroups][4];
#pragma unroll
                for (int group = 0; group < kGroups; ++group) {
                    load_left(left[group], stage, group, step);
                }
#pragma unroll
                for (int half = 0; half < 2; ++half) {  // of the rows: 128 registers hold no more
                    std::uint32_t right[2][4];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        load_right(right[i], stage + kLeftBytes, 2 * half + i, step);
                    }
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int pair = 2 * half + i;
                        if (pair == 0 || 16 * pair < rows) {
#pragma unroll
                            for (int group = 0; group < kGroups; ++group) {
                                auto& c = sums[group];
                                const auto& r = right[i];
                                multiply_add<Math>(c[2 * pair], left[group], r[0], r[1]);
                                multiply_add<Math>(c[2 * pair + 1], left[group], r[2], r[3]);
                            }
                        }
                    }
                }
            }
        }
    }

    static __device__ __forceinline__ void load_left(
        std::uint32_t (&registers)[4], const unsigned char* stage, int group, int step
    ) {
        const int lane = static_cast<int>(threadIdx.x % 32);
        const int first = group * kGroupNeurons + static_cast<int>(threadIdx.x / 32) * 16;
        if constexpr (!kTransposed) {
            const int row = first + lane % 16;
            load_matrices(registers, stage + swizzled(row, 2 * step + lane / 16));
        } else if constexpr (sizeof(T) == 2) {
            const int k = 16 * step + lane % 8 + lane / 16 * 8;
            const int chunk = first / kChunk + lane / 8 % 2;
            load_matrices_transposed(registers, stage + swizzled_transposed(k, chunk));
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int k = 8 * step + lane % 4 + i / 2 * 4;
                const int neuron = first + lane / 4 + i % 2 * 8;
                registers[i] = __float_as_uint(transposed_element(stage, k, neuron));
            }
        }
        if constexpr (std::is_same_v<Math, Tf32>) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                registers[i] = round_to_tf32(registers[i]);
            }
        }
    }

    static __device__ __forceinline__ void load_right(
        std::uint32_t (&registers)[4], const unsigned char* rows, int pair, int step
    ) {
        const int lane = static_cast<int>(threadIdx.x % 32);
        const int row = pair * 16 + lane % 8 + lane / 16 * 8;
        load_matrices(registers, rows + swizzled(row, 2 * step + lane / 8 % 2));
        if constexpr (std::is_same_v<Math, Tf32>) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                registers[i] = round_to_tf32(registers[i]);
            }
        }
    }

    static __device__ __forceinline__ float transposed_element(
        const unsigned char* stage, int k, int neuron
    ) {
        const auto* chunk = stage + swizzled_transposed(k, neuron / 4);
        return reinterpret_cast<const float*>(chunk)[neuron % 4];
    }

    /// The same sums, one after another along the depth.
    static __device__ __forceinline__ void multiply_exactly(
        Sums<kGroups>& sums, const unsigned char* stage, int rows
    ) {
        const unsigned char* right = stage + kLeftBytes;
#pragma unroll 1
        for (int chunk = 0; chunk < 4; ++chunk) {
            float left[kGroups][2][4];  // [group][neuron g or g + 8][k]
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int neuron = group * kGroupNeurons + neuron_of(2 * half);
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        if constexpr (kTransposed) {
                            left[group][half][k] = transposed_element(stage, 4 * chunk + k, neuron);
                        } else {
                            left[group][half][k] =
                                reinterpret_cast<const float*>(stage + swizzled(neuron, chunk))[k];
                        }
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < kTileColumns; ++n) {
                if (n == 0 || 8 * n < rows) {
#pragma unroll
                    for (int column = 0; column < 2; ++column) {
                        const auto* row = right + swizzled(row_of(n, column), chunk);
                        const float4 values = *reinterpret_cast<const float4*>(row);
                        const float k4[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
                        for (int group = 0; group < kGroups; ++group) {
#pragma unroll
                            for (int half = 0; half < 2; ++half) {
#pragma unroll
                                for (int k = 0; k < 4; ++k) {
                                    sums[group][n][2 * half + column] +=
                                        left[group][half][k] * k4[k];
                                }
                            }
                        }
                    }
                }
            }
        }
    }
};

}  // namespace tenp::cuda
