// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

// What ThreadSanitizer must know to find races of emulated threads: every one of them is a fiber of
// its own, and only what CUDA promises orders their accesses. Those are __syncthreads among the
// threads of a block, __syncwarp among those of a warp, __threadfence before an atomic operation
// and
// __threadfence after a later one on the same address, and the end of a kernel; not shuffles, not
// products, not the order in which the emulation happens to run them. In a build without
// ThreadSanitizer all of this is nothing.

#if defined(TENP_FIND_RACES)
#include <sanitizer/tsan_interface.h>

extern "C" {
void __tsan_read_range(void* address, std::size_t bytes);
void __tsan_write_range(void* address, std::size_t bytes);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#endif

namespace emulation::races {

#if defined(TENP_FIND_RACES)
inline constexpr bool kAreFound = true;
#else
inline constexpr bool kAreFound = false;
#endif

/// Blocks of which nothing orders one after another. More would find no more: a kernel's blocks
/// are all alike.
inline constexpr std::size_t kBlocksAtOnce = kAreFound ? 4 : 1;

/// A thread as ThreadSanitizer knows it.
using Thread = void*;

#if defined(TENP_FIND_RACES)

inline Thread make_thread() {
    return __tsan_create_fiber(0);
}
inline Thread this_thread() {
    return __tsan_get_current_fiber();
}
inline void become(Thread thread) {
    __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync);
}
inline void destroy(Thread thread) {
    __tsan_destroy_fiber(thread);
}

/// What this thread did so far comes before what others do after acquire() of the same object.
template <class T>
void release(T& object) {
    __tsan_release(&object);
}
template <class T>
void acquire(T& object) {
    __tsan_acquire(&object);
}

inline void reads(const void* address, std::size_t bytes) {
    __tsan_read_range(const_cast<void*>(address), bytes);
}
inline void writes(void* address, std::size_t bytes) {
    __tsan_write_range(address, bytes);
}

inline void look_away() {
    __tsan_ignore_thread_begin();
}
inline void look_again() {
    __tsan_ignore_thread_end();
}

#else

inline Thread make_thread() {
    return nullptr;
}
inline Thread this_thread() {
    return nullptr;
}
inline void become(Thread) {}
inline void destroy(Thread) {}
template <class T>
void release(T&) {}
template <class T>
void acquire(T&) {}
inline void reads(const void*, std::size_t) {}
inline void writes(void*, std::size_t) {}
inline void look_away() {}
inline void look_again() {}

#endif

}  // namespace emulation::races
