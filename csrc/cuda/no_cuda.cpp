// SPDX-License-Identifier: Apache-2.0
#include "core/backend.h"

// Takes the place of device.cu in a build without the CUDA backend.

namespace tenp::cuda {

bool is_available() noexcept {
    return false;
}

std::string unavailable_reason() {
    return "this build of tenp has no CUDA backend (TENP_BUILD_CUDA was off)";
}

}  // namespace tenp::cuda
