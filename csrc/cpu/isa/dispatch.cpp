// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/kernels.h"

namespace tenp::cpu {

const Kernels& kernels() {
    static const Kernels portable{"portable"};
    return portable;
}

}  // namespace tenp::cpu
