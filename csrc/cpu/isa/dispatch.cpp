// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <string>

#include "cpu/isa/kernels.h"
#include "tenp/error.h"

namespace tenp::cpu {
namespace {

struct Choice {
    const Kernels& kernels;
    bool runs_here;
};

const Kernels& choose() {
    const Choice choices[] = {
    // the best first
#if defined(TENP_X86_KERNELS)
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
    if (wanted == "avx2" || wanted == "avx512") {
        throw Unsupported("cpu_isa: this build has no kernels for " + wanted);
    }
    throw InvalidArgument(
        "cpu_isa: TENP_ISA must be portable, avx2 or avx512, got '" + wanted + "'"
    );
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace tenp::cpu
