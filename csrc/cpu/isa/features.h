// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace tenp::cpu {

/// Whether this CPU has the instructions that multiply pairs of bfloat16 values (AVX512_BF16).
bool has_avx512_bf16();

/// Whether this CPU has tiles of bfloat16 (AMX) and the system lets this process use them, which is
/// asked for here.
bool has_amx_bf16();

}  // namespace tenp::cpu
