// SPDX-License-Identifier: Apache-2.0
#define TENP_ISA avx2
#define TENP_KERNELS kAvx2Kernels
#include "cpu/isa/kernels.inc.h"
