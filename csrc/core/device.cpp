// SPDX-License-Identifier: Apache-2.0
#include "tenp/device.h"

#include "core/backend.h"
#include "cpu/isa/kernels.h"

namespace tenp {

bool cuda_is_available() noexcept {
    return cuda::is_available();
}

std::string cuda_unavailable_reason() {
    return cuda::unavailable_reason();
}

const char* cpu_isa() {
    return cpu::kernels().name;
}

}  // namespace tenp
