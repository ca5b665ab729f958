// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace tenp::cpu {

/// The kernels of one instruction set.
struct Kernels {
    const char* name;
};

const Kernels& kernels();

}  // namespace tenp::cpu
