// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

#include "emulation.h"

// Stands in for the CUDA toolkit's header: the words of CUDA C++ and the runtime calls that
// csrc/cuda uses, with "device memory" being host memory.

// ---- the language -------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline int4 make_int4(int x, int y, int z, int w) {
    return {x, y, z, w};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
inline float __uint_as_float(unsigned bits) {
    return __builtin_bit_cast(float, bits);
}
inline unsigned __float_as_uint(float value) {
    return __builtin_bit_cast(unsigned, value);
}
inline int __popc(unsigned value) {
    return __builtin_popcount(value);
}
inline int __ffs(unsigned value) {
    return __builtin_ffs(static_cast<int>(value));
}
template <class T>
T __ldg(const T* pointer) {
    return *pointer;
}
template <class T>
T __ldcg(const T* pointer) {
    return *pointer;
}
using std::max;
using std::min;

inline void __syncthreads() {
    emulation::block_barrier();
}
inline void __syncwarp() {
    emulation::warp_barrier();
}
inline void __threadfence() {
    emulation::fence();
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
    emulation::require(mask == ~0u, "shuffles of part of a warp");
    struct Ask {
        T value;
        int lane;
    };
    return emulation::collective<T>(
        Ask{value, lane}, [](const emulation::Lanes<Ask>& in, emulation::Lanes<T>& out) {
            for (int i = 0; i < 32; ++i) {
                out[i] = in[in[i].lane & 31].value;
            }
        }
    );
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip) {
    return __shfl_sync(mask, value, emulation::lane() ^ flip);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
    const int lane = emulation::lane();
    return __shfl_sync(mask, value, lane < distance ? lane : lane - distance);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
    emulation::require(mask == ~0u, "votes of part of a warp");
    return emulation::collective<unsigned>(
        vote, [](const emulation::Lanes<bool>& in, emulation::Lanes<unsigned>& out) {
            unsigned votes = 0;
            for (int i = 0; i < 32; ++i) {
                votes |= static_cast<unsigned>(in[i]) << i;
            }
            out.fill(votes);
        }
    );
}
inline unsigned __match_any_sync(unsigned mask, int value) {
    emulation::require(mask == ~0u, "matches of part of a warp");
    return emulation::collective<unsigned>(
        value, [](const emulation::Lanes<int>& in, emulation::Lanes<unsigned>& out) {
            for (int i = 0; i < 32; ++i) {
                out[i] = 0;
                for (int j = 0; j < 32; ++j) {
                    out[i] |= static_cast<unsigned>(in[i] == in[j]) << j;
                }
            }
        }
    );
}
inline int atomicAdd(int* address, int value) {
    emulation::meet_at(address);
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

// ---- the runtime --------------------------------------------------------------------------------

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaFuncAttributes {
    int ptxVersion;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    cudaLaunchAttribute* attrs = nullptr;
    unsigned numAttrs = 0;
};

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "invalid value";
}
inline cudaError_t cudaGetDeviceCount(int* count) {
    return *count = 1, cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    return *device = 0, cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    return *value = 3, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
    return attributes->ptxVersion = 90, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    return emulation::allow_shared(reinterpret_cast<const void*>(kernel), bytes)
               ? cudaSuccess
               : cudaErrorInvalidValue;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, std::size_t) {
    return *blocks = 2, cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments
) {
    const bool fits = emulation::run(
        reinterpret_cast<const void*>(kernel),
        {config->gridDim.x, config->gridDim.y, config->gridDim.z}, config->blockDim.x,
        config->dynamicSmemBytes, config->numAttrs > 0,
        [&] {
            auto* const body = kernel;
            std::tuple<Parameters...> own(arguments...);
            emulation::have_arguments();
            std::apply(body, std::move(own));
        },
        [](unsigned thread, const std::array<unsigned, 3>& block) {
            const emulation::Unseen unseen;
            threadIdx = {thread, 0, 0};
            blockIdx = {block[0], block[1], block[2]};
        },
        [&] {
            const emulation::Unseen unseen;
            gridDim = config->gridDim;
            blockDim = config->blockDim;
        }
    );
    return fits ? cudaSuccess : cudaErrorInvalidValue;
}
