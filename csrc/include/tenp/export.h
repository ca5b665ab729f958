// SPDX-License-Identifier: Apache-2.0
#pragma once

// Marks what a shared build of the library exports; everything else is hidden.
#if defined(__GNUC__)
#define TENP_API __attribute__((visibility("default")))
#else
#define TENP_API
#endif
