// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <type_traits>

#include "core/backend.h"
#include "cuda/error.cuh"

namespace tenp::cuda {
namespace {

static_assert(std::is_same_v<Stream, cudaStream_t>);

int device_count() {
    int count = 0;
    TENP_CUDA_CHECK(cudaGetDeviceCount(&count));
    return count;
}

}  // namespace

bool is_available() noexcept {
    return unavailable_reason().empty();
}

std::string unavailable_reason() {
    try {
        return device_count() > 0 ? "" : "the CUDA driver shows no device";
    } catch (const DeviceError& error) {
        return error.what();
    }
}

}  // namespace tenp::cuda
