// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "tenp/error.h"

/// Throws DeviceError, naming the call, when a CUDA runtime call fails. After a kernel launch:
/// TENP_CUDA_CHECK(cudaGetLastError()).
#define TENP_CUDA_CHECK(call)                                                                \
    do {                                                                                     \
        if (const cudaError_t status = (call); status != cudaSuccess) {                      \
            throw ::tenp::DeviceError(std::string(#call ": ") + cudaGetErrorString(status)); \
        }                                                                                    \
    } while (false)
