// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/float16.h"

// The instructions that C++ has no words for, one function each. Everything else in csrc/cuda is
// plain CUDA C++. tests/emulation has a file of the same name that does the same on the host.

namespace tenp::cuda {

/// Tag: float32 operands, of which the matrix instruction reads the upper 19 bits.
struct Tf32 {};

/// The block's dynamic shared memory; at least 16-byte aligned.
template <class T>
__device__ __forceinline__ T* shared_memory() {
    extern __shared__ __align__(128) unsigned char memory[];
    return reinterpret_cast<T*>(memory);
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// ---- numbers ------------------------------------------------------------------------------------

__device__ __forceinline__ float widen(float value) {
    return value;
}

__device__ __forceinline__ float widen(BFloat16 value) {
    return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}

__device__ __forceinline__ float widen(Float16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

/// Rounds to the nearest T, ties to even.
template <class T>
__device__ __forceinline__ T narrow(float value);

template <>
__device__ __forceinline__ float narrow<float>(float value) {
    return value;
}

template <>
__device__ __forceinline__ BFloat16 narrow<BFloat16>(float value) {
    BFloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

template <>
__device__ __forceinline__ Float16 narrow<Float16>(float value) {
    Float16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

/// Rounds a float32 to the nearest tf32, so that the multiplier's truncation loses nothing.
__device__ __forceinline__ std::uint32_t round_to_tf32(std::uint32_t bits) {
    std::uint32_t result;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(__uint_as_float(bits)));
    return result;
}

// ---- memory -------------------------------------------------------------------------------------

/// Starts to copy `bytes` (0 to 16) bytes to shared memory and zeros up to 16. Both addresses are
/// multiples of 16; `global` is not read when `bytes` is 0.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
}

/// Ends a group of copies.
__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until all but this thread's last kGroups groups have arrived.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

/// 16 bytes that nobody writes while the kernel runs and this SM does not read again.
__device__ __forceinline__ uint4 load_streaming(const void* global) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(global));
    return value;
}

/// Asks for the line at `global` to come to the L2 cache.
__device__ __forceinline__ void prefetch(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// ---- matrices -----------------------------------------------------------------------------------

/// Loads four 8x8 matrices of 16-bit elements (8x4 of 32-bit). Lane 8 i + j names row j of matrix
/// i, 16 bytes. Lane 4 g + m receives in registers[i] the m-th 32 bits of row g of matrix i.
__device__ __forceinline__ void load_matrices(
    std::uint32_t (&registers)[4], const void* shared_row
) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

/// The same with each matrix of 16-bit elements transposed.
__device__ __forceinline__ void load_matrices_transposed(
    std::uint32_t (&registers)[4], const void* shared_row
) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

/// c[16, 8] += a[16, K] b[K, 8]; K is 16 for 16-bit operands, 8 for tf32. Lane 4 g + m holds
///   c: (g, 2m) (g, 2m+1) (g+8, 2m) (g+8, 2m+1)
///   a, 32 bits each: row g, row g+8, then both again half of K later; columns from the m-th 32
///   bits b, 32 bits each: column g; rows from the m-th 32 bits, then half of K later.
template <class T>
__device__ __forceinline__ void multiply_add(
    float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1
);

template <>
__device__ __forceinline__ void multiply_add<BFloat16>(
    float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1
) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)
    );
}

template <>
__device__ __forceinline__ void multiply_add<Float16>(
    float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1
) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)
    );
}

template <>
__device__ __forceinline__ void multiply_add<Tf32>(
    float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1
) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)
    );
}

// ---- order between kernels ----------------------------------------------------------------------

/// Waits for all that earlier kernels of the stream wrote. Matters in a kernel that was launched to
/// overlap with the one before it (sm_90 and later).
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets such a kernel start.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace tenp::cuda
