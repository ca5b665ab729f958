// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "tenp/error.h"

/// Throws DeviceError, naming the call, when a CUDA runtime call fails. The error is the caller's
/// then: it is not left for the next who asks the runtime for the last one.
#define TENP_CUDA_CHECK(call)                                                                \
    do {                                                                                     \
        if (const cudaError_t status = (call); status != cudaSuccess) {                      \
            static_cast<void>(cudaGetLastError());                                           \
            throw ::tenp::DeviceError(std::string(#call ": ") + cudaGetErrorString(status)); \
        }                                                                                    \
    } while (false)
