// SPDX-License-Identifier: Apache-2.0

// All inner loops of one instruction set. portable.cpp, avx2.cpp and avx512.cpp define TENP_ISA (a
// namespace) and TENP_KERNELS (the table that this file fills) and include it.

#include "cpu/isa/activations.inc.h"
#include "cpu/isa/gemm.inc.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/sums.inc.h"
#include "cpu/isa/vectors.inc.h"

namespace tenp::cpu::TENP_ISA {
namespace {

template <class T>
constexpr TypedKernels<T> typed_kernels() {
    return {
        gemm_nt<Singles, T, T>,
        gemm_nn<Singles, T, T>,
        gemm_nt<Singles, T, std::int8_t>,
        gemm_nn<Singles, T, std::int8_t>,
        activate<T>,
        combine<T>,
        contribute<T>,
        round_row<T>,
        add_row<T>,
        add_squares<T>,
        dots<T>,
    };
}

}  // namespace
}  // namespace tenp::cpu::TENP_ISA

namespace tenp::cpu {

#define TENP_NAME_OF(isa) #isa
#define TENP_NAME(isa) TENP_NAME_OF(isa)

const Kernels TENP_KERNELS = {
    TENP_NAME(TENP_ISA),
    TENP_ISA::add_outer_products,
    TENP_ISA::typed_kernels<float>(),
    TENP_ISA::typed_kernels<BFloat16>(),
    TENP_ISA::typed_kernels<Float16>(),
};

}  // namespace tenp::cpu
