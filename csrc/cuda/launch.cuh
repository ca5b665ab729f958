// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "cuda/error.cuh"

// How every kernel is started.

namespace tenp::cuda {

struct LaunchShape {
    std::int64_t blocks = 1;
    int threads = 256;
    std::size_t shared_bytes = 0;
    /// Start while the previous kernel of the stream still runs; the kernel calls
    /// wait_for_previous_kernel() before it reads what that one wrote. Ignored when the kernel was
    /// compiled for less than sm_90, which has no such wait, whatever it runs on.
    bool overlap_previous = false;
};

inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0;
    TENP_CUDA_CHECK(cudaGetDevice(&device));
    int value = 0;
    TENP_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

/// Lets `kernel` have more shared memory than the 48 KiB that every kernel may have: as much as any
/// GPU since Ampere lends to a block. The limit is the kernel's and not the launch's: another
/// thread may be about to launch it with more than this one.
template <class... Parameters>
void allow_shared_memory(void (*kernel)(Parameters...), std::size_t bytes) {
    constexpr std::size_t kSharedWithoutAsking = 48 << 10;
    constexpr int kMostShared = 99 << 10;
    if (bytes > kSharedWithoutAsking) {
        TENP_CUDA_CHECK(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared)
        );
    }
}

/// Whether `kernel` can wait for the one before it.
template <class... Parameters>
bool can_overlap(void (*kernel)(Parameters...)) {
    cudaFuncAttributes attributes{};
    TENP_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
    return attributes.ptxVersion >= 90;
}

/// Starts `kernel` on `stream`; throws DeviceError when it cannot start.
template <class... Parameters, class... Arguments>
void launch(
    void (*kernel)(Parameters...),
    const LaunchShape& shape,
    cudaStream_t stream,
    Arguments... arguments
) {
    allow_shared_memory(kernel, shape.shared_bytes);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3{static_cast<unsigned>(shape.blocks), 1, 1};
    config.blockDim = dim3{static_cast<unsigned>(shape.threads), 1, 1};
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = shape.overlap_previous && can_overlap(kernel) ? 1 : 0;
    TENP_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

/// The same for a kernel whose blocks take work until none is left: as many blocks as the device
/// holds at a time, not more than there is work for, at least one. TENP_CUDA_SMS in the environment
/// takes the place of the number of multiprocessors, to test that results do not depend on it.
template <class... Parameters, class... Arguments>
void launch_persistent(
    void (*kernel)(Parameters...),
    std::int64_t work,
    LaunchShape shape,
    cudaStream_t stream,
    Arguments... arguments
) {
    allow_shared_memory(kernel, shape.shared_bytes);
    int per_multiprocessor = 0;
    TENP_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &per_multiprocessor, kernel, shape.threads, shape.shared_bytes
    ));
    const char* given = std::getenv("TENP_CUDA_SMS");
    const std::int64_t multiprocessors =
        given != nullptr ? std::atoi(given) : device_attribute(cudaDevAttrMultiProcessorCount);
    shape.blocks = std::max<std::int64_t>(1, std::min(work, multiprocessors * per_multiprocessor));
    launch(kernel, shape, stream, arguments...);
}

}  // namespace tenp::cuda
