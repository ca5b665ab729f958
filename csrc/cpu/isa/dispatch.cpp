// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <string>

#if defined(TENP_X86_KERNELS)
#include "cpu/isa/features.h"
#endif
#include "cpu/isa/kernels.h"
#include "tenp/error.h"

namespace tenp::cpu {
namespace {

struct Choice {
    Kernels kernels;
    bool runs_here;
};

#if defined(TENP_X86_KERNELS)
/// The best kernels of this machine, with products for bfloat16 in the place of their own.
Kernels with_products(const char* name, const BFloat16Products& products) {
    Kernels kernels = __builtin_cpu_supports("avx512f") ? kAvx512Kernels : kPortableKernels;
    kernels.name = name;
    kernels.bfloat16.gemm_nt = products.gemm_nt;
    kernels.bfloat16.gemm_nn = products.gemm_nn;
    kernels.bfloat16.nt_columns = products.nt_columns;
    return kernels;
}
#endif

Kernels choose() {
    const Choice choices[] = {
    // the best first
#if defined(TENP_X86_KERNELS)
        {with_products("amx", kAmxProducts), has_amx_bf16()},
        {with_products("avx512bf16", kAvx512Bf16Products), has_avx512_bf16()},
        {kAvx512Kernels, __builtin_cpu_supports("avx512f") != 0},
        {kAvx2Kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
        {kPortableKernels, true},
    };
    const char* variable = std::getenv("TENP_ISA");
    const std::string wanted = variable == nullptr ? "" : variable;
    for (const auto& [kernels, runs_here] : choices) {
        if (wanted.empty() ? runs_here : wanted == kernels.name) {
            if (!runs_here) {
                throw Unsupported("cpu_isa: this machine has no " + wanted);
            }
            return kernels;
        }
    }
    for (const char* name : {"avx2", "avx512", "avx512bf16", "amx"}) {
        if (wanted == name) {
            throw Unsupported("cpu_isa: this build has no kernels for " + wanted);
        }
    }
    throw InvalidArgument(
        "cpu_isa: TENP_ISA must be portable, avx2, avx512, avx512bf16 or amx, got '" + wanted + "'"
    );
}

}  // namespace

const Kernels& kernels() {
    static const Kernels chosen = choose();
    return chosen;
}

}  // namespace tenp::cpu
