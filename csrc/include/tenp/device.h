// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "tenp/export.h"

// What this build can use on this machine.

namespace tenp {

/// True when the build has the CUDA backend and the driver shows a device.
TENP_API bool cuda_is_available() noexcept;

/// Why cuda_is_available() is false, as one sentence; empty when it is true.
TENP_API std::string cuda_unavailable_reason();

/// Instruction set of the CPU kernels: "portable", "avx2", "avx512", "avx512bf16" or "amx". It is
/// the best one that the machine has, unless the environment variable TENP_ISA names one. The last
/// two are AVX-512 with other products of bfloat16 matrices.
///
/// Throws InvalidArgument when TENP_ISA is none of these names, Unsupported when the machine
/// or the build lacks the one it names.
TENP_API const char* cpu_isa();

}  // namespace tenp
