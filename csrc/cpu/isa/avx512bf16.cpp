// SPDX-License-Identifier: Apache-2.0
#define TENP_ISA avx512bf16
#include "cpu/isa/gemm.inc.h"

namespace tenp::cpu {

const BFloat16Products kAvx512Bf16Products = {
    TENP_ISA::gemm_nt<TENP_ISA::Pairs, BFloat16, BFloat16>,
    TENP_ISA::gemm_nn<TENP_ISA::Pairs, BFloat16, BFloat16>,
    kGemmColumns,
};

}  // namespace tenp::cpu
