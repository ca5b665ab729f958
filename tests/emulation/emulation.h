// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

// Runs CUDA kernels on one thread of the host. The blocks of a grid run one after another; the
// threads of a block are fibers that take turns whenever one waits for others, at a block barrier
// or in an instruction of its whole warp. It finds what a GPU may forgive: reads of shared memory
// that was not written (it starts as NaN), copies that nobody waited for, addresses that are not
// aligned or outside the block's shared memory, warps whose lanes disagree on the instruction,
// barriers that not all threads reach. Under AddressSanitizer also every access outside "device
// memory".
//
// TENP_EMULATION_REVERSE=1 runs blocks and threads in descending order: a kernel that lacks a
// barrier gives another result then. Under ThreadSanitizer any two accesses to one address that
// nothing orders are reported, in whatever order they ran; see races.h.

namespace emulation {

/// While one lives, ThreadSanitizer does not see what the thread does: what emulation needs is no
/// access of a kernel.
class Unseen {
 public:
    Unseen();
    ~Unseen();
    Unseen(const Unseen&) = delete;
    Unseen& operator=(const Unseen&) = delete;
};

/// One value per lane of a warp.
template <class T>
using Lanes = std::array<T, 32>;

// ---- the grid -----------------------------------------------------------------------------------

/// Sets the shared memory that a kernel may ask for beyond 48 KiB; false if no GPU has that much.
bool allow_shared(const void* kernel, int bytes);

/// Calls `body` once for every thread of the grid. `start` is called before the first thread and
/// `enter` whenever a thread takes its turn. With `overlaps_previous` nothing orders the grid after
/// the one before it but wait_for_previous_grid(). Returns false when the launch would be refused.
bool run(
    const void* kernel,
    std::array<unsigned, 3> grid,
    unsigned threads,
    std::size_t shared_bytes,
    bool overlaps_previous,
    const std::function<void()>& body,
    void (*enter)(unsigned thread, const std::array<unsigned, 3>& block),
    const std::function<void()>& start
);

/// Prints what a kernel did wrong, and where, and aborts.
[[noreturn]] void fail(const char* what);

inline void require(bool holds, const char* what) {
    if (!holds) {
        fail(what);
    }
}

inline bool is_aligned(const void* pointer, std::size_t bytes) {
    return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// ---- one thread ---------------------------------------------------------------------------------

/// What the host has for this thread was read: it may be gone before the kernel ends.
void have_arguments();

int lane();
void block_barrier();
void warp_barrier();
void fence();
void meet_at(const int* atomic);
void wait_for_previous_grid();
void allow_next_grid();

unsigned char* shared_begin();

/// `bytes` at `pointer` are aligned to their number and in the block's shared memory.
void check_shared(const void* pointer, std::size_t bytes);

// Asynchronous copies: the destination is garbage until finish_copies().
void start_copy(void* destination, const void* source, int bytes);
void commit_copies();
void finish_copies(int groups_that_may_be_missing);

// ---- one warp -----------------------------------------------------------------------------------

inline constexpr std::size_t kSlotBytes = 64;
using Slots = std::array<std::array<unsigned char, kSlotBytes>, 32>;

Slots& inputs();
Slots& outputs();

/// True for the last lane of the warp to come, which then calls leave(). The others return false
/// after it did. All lanes name the same `instruction`.
bool arrive(const void* instruction);
void leave();

/// An instruction of the whole warp: `compute` gets the lanes' inputs and fills their outputs.
/// ThreadSanitizer sees what `compute` reads, and not what hands inputs and outputs over.
template <class Out, class In, class Compute>
[[gnu::no_sanitize("thread")]] Out collective(const In& mine, Compute compute) {
    static_assert(std::is_trivially_copyable_v<In> && std::is_trivially_copyable_v<Out>);
    static_assert(sizeof(In) <= kSlotBytes && sizeof(Out) <= kSlotBytes);
    static const char instruction = 0;
    const auto self = static_cast<std::size_t>(lane());
    std::memcpy(inputs()[self].data(), &mine, sizeof mine);
    if (arrive(&instruction)) {
        Lanes<In> in;
        Lanes<Out> out{};
        for (std::size_t i = 0; i < 32; ++i) {
            std::memcpy(&in[i], inputs()[i].data(), sizeof(In));
        }
        compute(in, out);
        for (std::size_t i = 0; i < 32; ++i) {
            std::memcpy(outputs()[i].data(), &out[i], sizeof(Out));
        }
        leave();
    }
    Out result;
    std::memcpy(&result, outputs()[self].data(), sizeof result);
    return result;
}

}  // namespace emulation
