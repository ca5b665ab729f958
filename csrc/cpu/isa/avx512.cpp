// SPDX-License-Identifier: Apache-2.0
#define TENP_ISA avx512
#define TENP_KERNELS kAvx512Kernels
#include "cpu/isa/kernels.inc.h"
