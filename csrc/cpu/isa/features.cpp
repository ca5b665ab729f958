// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa/features.h"

#include <cpuid.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tenp::cpu {

bool has_avx512_bf16() {
    constexpr unsigned kAvx512Bf16 = 1u << 5;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __builtin_cpu_supports("avx512f") && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) &&
           (eax & kAvx512Bf16) != 0;
}

bool has_amx_bf16() {
#if defined(__linux__)
    constexpr unsigned kAmxBf16 = 1u << 22;
    constexpr unsigned kAmxTile = 1u << 24;
    constexpr unsigned kBoth = kAmxBf16 | kAmxTile;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) ||
        (edx & kBoth) != kBoth) {
        return false;
    }
    // Linux saves tiles only for processes that have asked. One call is for all their threads.
    constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace tenp::cpu
