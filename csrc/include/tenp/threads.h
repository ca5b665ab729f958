// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tenp/export.h"

// The threads of the CPU backend. tenp has a pool of its own: workers sleep on a condition variable
// and never spin, a forked child starts a new pool, and a call that finds the pool busy (with
// another thread's call, or with the one it is part of) runs on its own thread.
//
// The number of threads never changes a result, not in a single bit.

namespace tenp {

/// Threads that one call may use, the caller's among them: what set_num_threads() said, else the
/// environment variable TENP_NUM_THREADS, else the processors that the process may run on.
///
/// Throws InvalidArgument when TENP_NUM_THREADS is not a positive number.
TENP_API int num_threads();

/// Sets num_threads() for the whole process. A call that is running keeps the number it began with.
///
/// Throws InvalidArgument when `threads` is less than 1.
TENP_API void set_num_threads(int threads);

}  // namespace tenp
