// SPDX-License-Identifier: Apache-2.0

// What this GPU can do at most with the instructions of csrc/cuda: multiply in registers, and read
// memory once. Compiled and run by gpu_ceilings.py; prints one line of JSON.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "cuda/device/ptx.cuh"
#include "cuda/launch.cuh"

namespace {

using namespace tenp;
using namespace tenp::cuda;

constexpr int kThreads = 256;
constexpr int kProducts = 8;  // independent ones in flight in every warp
constexpr double kFlopsOfProduct = 2.0 * 16 * 8 * 16;

/// `rounds` times kProducts matrix products a warp, operands and sums in registers.
/// Grid: any number of blocks.
/// Writes nothing: the sums never equal `impossible`, which the compiler does not know.
template <class T>
__global__ void __launch_bounds__(kThreads) multiply_kernel(
    int rounds, float impossible, float* never
) {
    // Random numbers within -1..1: zeros would let the chip clock higher.
    std::uint32_t state = threadIdx.x * 2654435761u + 1;
    const auto next = [&state] {
        state = state * 1664525u + 1013904223u;
        return static_cast<float>(static_cast<std::int32_t>(state)) * 0x1p-31f;
    };
    const auto two_numbers = [&next] {
        const std::uint32_t low = narrow<T>(next()).bits;
        return low | static_cast<std::uint32_t>(narrow<T>(next()).bits) << 16;
    };
    const std::uint32_t a[4] = {two_numbers(), two_numbers(), two_numbers(), two_numbers()};
    const std::uint32_t b[2] = {two_numbers(), two_numbers()};
    float sums[kProducts][4] = {};
    for (int round = 0; round < rounds; ++round) {
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
            multiply_add<T>(sums[i], a, b[0], b[1]);
        }
    }
    float total = 0;
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
        total += sums[i][0] + sums[i][1] + sums[i][2] + sums[i][3];
    }
    if (total == impossible) {
        *never = total;
    }
}

/// Reads `vectors` times 16 bytes.
/// Grid: any number of blocks. A thread reads every n-th vector, four at a time.
/// Writes nothing: the memory holds zeros.
__global__ void __launch_bounds__(kThreads) read_kernel(
    const uint4* memory, std::int64_t vectors, unsigned* never
) {
    const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
    unsigned bits = 0;
#pragma unroll 4
    for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < vectors;
         i += step) {
        const uint4 vector = load_streaming(memory + i);
        bits |= vector.x | vector.y | vector.z | vector.w;
    }
    if (bits != 0) {
        *never = bits;
    }
}

/// Median seconds of one call of `f`, which starts a kernel.
template <class F>
double seconds_of(F f) {
    cudaEvent_t begin;
    cudaEvent_t end;
    TENP_CUDA_CHECK(cudaEventCreate(&begin));
    TENP_CUDA_CHECK(cudaEventCreate(&end));
    std::vector<float> times(11);
    f();
    for (float& milliseconds : times) {
        TENP_CUDA_CHECK(cudaEventRecord(begin));
        f();
        TENP_CUDA_CHECK(cudaEventRecord(end));
        TENP_CUDA_CHECK(cudaEventSynchronize(end));
        TENP_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    }
    std::nth_element(times.begin(), times.begin() + 5, times.end());
    return times[5] * 1e-3;
}

template <class T>
double multiply_flops_per_second(float* never) {
    constexpr int kRounds = 1 << 16;
    const std::int64_t blocks =
        std::int64_t{device_attribute(cudaDevAttrMultiProcessorCount)} * 2048 / kThreads;
    const double seconds = seconds_of([&] {
        launch(
            multiply_kernel<T>, {.blocks = blocks, .threads = kThreads}, nullptr, kRounds, -1.5e30f,
            never
        );
    });
    const double warps = static_cast<double>(blocks) * kThreads / 32;
    return warps * kRounds * kProducts * kFlopsOfProduct / seconds;
}

double read_bytes_per_second(unsigned* never) {
    constexpr std::int64_t kBytes = std::int64_t{2} << 30;  // more than any cache holds
    void* memory = nullptr;
    TENP_CUDA_CHECK(cudaMalloc(&memory, kBytes));
    TENP_CUDA_CHECK(cudaMemset(memory, 0, kBytes));
    const double seconds = seconds_of([&] {
        launch_persistent(
            read_kernel, kBytes / 16 / kThreads, {.threads = kThreads}, nullptr,
            static_cast<const uint4*>(memory), kBytes / 16, never
        );
    });
    TENP_CUDA_CHECK(cudaFree(memory));
    return static_cast<double>(kBytes) / seconds;
}

}  // namespace

int main() {
    try {
        void* never = nullptr;
        TENP_CUDA_CHECK(cudaMalloc(&never, sizeof(float)));
        const double bfloat16 = multiply_flops_per_second<BFloat16>(static_cast<float*>(never));
        const double float16 = multiply_flops_per_second<Float16>(static_cast<float*>(never));
        const double read = read_bytes_per_second(static_cast<unsigned*>(never));
        std::printf(
            "{\"mma bfloat16 TFLOP/s\": %.1f, \"mma float16 TFLOP/s\": %.1f, \"read GB/s\": "
            "%.1f}\n",
            bfloat16 * 1e-12, float16 * 1e-12, read * 1e-9
        );
        return 0;
    } catch (const Error& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 2;
    }
}
