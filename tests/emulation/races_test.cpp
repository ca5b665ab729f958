// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <cstdint>
#include <vector>

#include "cuda/device/ptx.cuh"
#include "cuda/launch.cuh"

// What orders the accesses of emulated threads, and that ThreadSanitizer reports them where nothing
// does. Every kernel is there with what it needs and without; the cases named "no …" are run by
// CMakeLists.txt one by one, in a build with ThreadSanitizer, and must be reported.

namespace tenp::cuda {
namespace {

constexpr int kThreads = 64;
constexpr int kBlocks = 3;

/// Every thread gives its number to the one half a block further.
template <bool kOrdered>
__global__ void block_kernel(int* out) {
    auto* shared = shared_memory<int>();
    const int thread = static_cast<int>(threadIdx.x);
    shared[thread] = thread;
    if (kOrdered) {
        __syncthreads();
    }
    out[blockIdx.x * kThreads + threadIdx.x] = shared[(thread + kThreads / 2) % kThreads];
}

/// Every lane gives its number to its neighbour. A vote brings the lanes together, and orders
/// nothing.
template <bool kOrdered>
__global__ void warp_kernel(int* out) {
    auto* shared = shared_memory<int>();
    const int thread = static_cast<int>(threadIdx.x);
    shared[thread] = thread;
    __ballot_sync(~0u, true);
    if (kOrdered) {
        __syncwarp();
    }
    out[blockIdx.x * kThreads + threadIdx.x] = shared[thread ^ 1];
}

/// Every warp loads the matrices that the other one wrote.
template <bool kOrdered>
__global__ void matrices_kernel(int* out) {
    auto* shared = shared_memory<int>();
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = 0; i < 4; ++i) {
        shared[4 * thread + i] = 1;
    }
    if (kOrdered) {
        __syncthreads();
    }
    std::uint32_t registers[4];
    load_matrices(registers, shared + 4 * (thread ^ (kThreads / 2)));
    out[blockIdx.x * kThreads + threadIdx.x] = static_cast<int>(registers[0]);
}

/// The first half of a block reads what the second copied, again and again.
template <bool kOrdered>
__global__ void copy_kernel(const int* in, int* out) {
    auto* shared = shared_memory<int>();
    const int thread = static_cast<int>(threadIdx.x);
    int sum = 0;
    for (int turn = 0; turn < 2; ++turn) {
        if (thread >= kThreads / 2) {
            copy_async(shared + 4 * (thread - kThreads / 2), in + 4 * turn, 16);
            commit_copies();
            wait_for_copies<0>();
        }
        __syncthreads();
        if (thread < kThreads / 2) {
            sum += shared[4 * thread];
        }
        if (kOrdered) {
            __syncthreads();
        }
    }
    out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

/// Blocks write their numbers, to one place or to their own. Their barriers are no barriers between
/// them, here and below.
template <bool kOrdered>
__global__ void blocks_kernel(int* out) {
    __syncthreads();
    if (threadIdx.x == 0) {
        out[kOrdered ? blockIdx.x : 0] = static_cast<int>(blockIdx.x);
    }
}

/// The last block to arrive adds up what the others wrote.
template <bool kFenceBefore, bool kFenceAfter>
__global__ void arrivals_kernel(int* parts, int* arrived, int* out) {
    __syncthreads();
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
        if (kFenceBefore) {
            __threadfence();
        }
        if (atomicAdd(arrived, 1) + 1 == kBlocks) {
            if (kFenceAfter) {
                __threadfence();
            }
            *out = parts[0] + parts[1] + parts[2];
        }
    }
}

__global__ void first_kernel(int* written) {
    allow_next_kernel();
    written[blockIdx.x * kThreads + threadIdx.x] = 1;
    __syncthreads();
}

/// Started while first_kernel runs.
template <bool kOrdered>
__global__ void next_kernel(const int* written, int* out) {
    __syncthreads();
    if (kOrdered) {
        wait_for_previous_kernel();
    }
    const unsigned thread = blockIdx.x * kThreads + threadIdx.x;
    out[thread] = written[thread];
}

struct Arrays {
    std::vector<int> in = std::vector<int>(kBlocks * kThreads);
    std::vector<int> out = std::vector<int>(kBlocks * kThreads, -1);
    int count = 0;
};

const LaunchShape kShape{
    .blocks = kBlocks, .threads = kThreads, .shared_bytes = 4 * kThreads * sizeof(int)
};

template <bool kFenceBefore, bool kFenceAfter>
void run_arrivals(Arrays& arrays) {
    launch(
        arrivals_kernel<kFenceBefore, kFenceAfter>, kShape, nullptr, arrays.in.data(),
        &arrays.count, arrays.out.data()
    );
}

template <bool kOrdered>
void run_grids(Arrays& arrays) {
    launch(first_kernel, kShape, nullptr, arrays.in.data());
    LaunchShape overlapping = kShape;
    overlapping.overlap_previous = true;
    launch(next_kernel<kOrdered>, overlapping, nullptr, arrays.in.data(), arrays.out.data());
}

TEST_CASE("what CUDA promises orders threads") {
    Arrays arrays;
    launch(block_kernel<true>, kShape, nullptr, arrays.out.data());
    CHECK(arrays.out[1] == 1 + kThreads / 2);
    launch(warp_kernel<true>, kShape, nullptr, arrays.out.data());
    CHECK(arrays.out[2] == 3);
    launch(matrices_kernel<true>, kShape, nullptr, arrays.out.data());
    CHECK(arrays.out[5] == 1);
    launch(copy_kernel<true>, kShape, nullptr, arrays.in.data(), arrays.out.data());
    CHECK(arrays.out[0] == 0);
    launch(blocks_kernel<true>, kShape, nullptr, arrays.out.data());
    CHECK(arrays.out[2] == 2);
    run_arrivals<true, true>(arrays);
    CHECK(arrays.out[0] == 6);
    run_grids<true>(arrays);
    CHECK(arrays.out == std::vector<int>(kBlocks * kThreads, 1));
}

TEST_CASE("no __syncthreads" * doctest::skip()) {
    Arrays arrays;
    launch(block_kernel<false>, kShape, nullptr, arrays.out.data());
}

TEST_CASE("no __syncwarp" * doctest::skip()) {
    Arrays arrays;
    launch(warp_kernel<false>, kShape, nullptr, arrays.out.data());
}

TEST_CASE("no barrier before a load of matrices" * doctest::skip()) {
    Arrays arrays;
    launch(matrices_kernel<false>, kShape, nullptr, arrays.out.data());
}

TEST_CASE("no barrier before a copy" * doctest::skip()) {
    Arrays arrays;
    launch(copy_kernel<false>, kShape, nullptr, arrays.in.data(), arrays.out.data());
}

TEST_CASE("no place of its own" * doctest::skip()) {
    Arrays arrays;
    launch(blocks_kernel<false>, kShape, nullptr, arrays.out.data());
}

TEST_CASE("no __threadfence before the atomic" * doctest::skip()) {
    Arrays arrays;
    run_arrivals<false, true>(arrays);
}

TEST_CASE("no __threadfence after the atomic" * doctest::skip()) {
    Arrays arrays;
    run_arrivals<true, false>(arrays);
}

TEST_CASE("no wait for the previous kernel" * doctest::skip()) {
    Arrays arrays;
    run_grids<false>(arrays);
}

}  // namespace
}  // namespace tenp::cuda
