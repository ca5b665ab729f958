// SPDX-License-Identifier: Apache-2.0
#define TENP_ISA portable
#define TENP_KERNELS kPortableKernels
#include "cpu/isa/kernels.inc.h"
