// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/features.h"

// Takes the place of csrc/cpu/isa/features.cpp: the emulation runs anywhere.

namespace tenp::cpu {

bool has_avx512_bf16() {
    return true;
}

bool has_amx_bf16() {
    return true;
}

}  // namespace tenp::cpu
