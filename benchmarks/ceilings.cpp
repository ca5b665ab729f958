// SPDX-License-Identifier: Apache-2.0

// What this machine can do at most: read memory, and multiply and add in registers. Compiled and
// loaded by ceilings.py.

#include <cstdint>
#include <thread>
#include <vector>

#if defined(__AMX_BF16__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
constexpr int kSums = 24;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
constexpr int kSums = 12;
#else
constexpr int kBytes = 16;
constexpr int kSums = 12;
#endif
using Floats [[gnu::vector_size(kBytes), gnu::may_alias]] = float;
using Words [[gnu::vector_size(kBytes), gnu::may_alias]] = std::uint64_t;

template <class F>
void on_threads(int threads, F f) {
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) {
        others.emplace_back(f, thread);
    }
    f(0);
    for (auto& other : others) {
        other.join();
    }
}

/// Keeps the compiler from leaving out how a value was made.
template <class V>
void use(V& value) {
#if defined(__x86_64__)
    asm volatile("" : "+x"(value));
#else
    asm volatile("" : "+w"(value));
#endif
}

#if defined(__AMX_BF16__)
// Tiles of 16 rows of 64 bytes; static, since gcc does not see that all of it is read.
struct alignas(64) TileConfig {
    std::uint8_t palette = 1;
    std::uint8_t zeros[15] = {};
    std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfig kTileConfig;
constexpr double kTileFlops = 2.0 * 16 * 16 * 32;
#endif

}  // namespace

extern "C" {

/// Reads `bytes` bytes (a multiple of 4096 a thread), each thread a part of its own, in four places
/// at once and asking ahead: one place at a time gets three quarters of that from a Cascade Lake's
/// memory.
void tenp_read(const char* memory, std::int64_t bytes, int threads) {
    on_threads(threads, [=](int thread) {
        constexpr std::int64_t kPlaces = 4;
        constexpr std::int64_t kLine = 64;
        constexpr std::int64_t kAhead = 1024;
        const std::int64_t pages = bytes / 4096;
        const std::int64_t begin = pages * thread / threads * 4096;
        const std::int64_t end = pages * (thread + 1) / threads * 4096;
        const std::int64_t apart = (end - begin) / kPlaces;
        Words sums[kPlaces] = {};
        for (std::int64_t at = begin; at < begin + apart; at += kLine) {
            for (std::int64_t place = 0; place < kPlaces; ++place) {
                const char* line = memory + at + place * apart;
                __builtin_prefetch(line + kAhead);
                for (std::int64_t i = 0; i < kLine; i += kBytes) {
                    sums[place] += *reinterpret_cast<const Words*>(line + i);
                }
            }
        }
        Words sum = sums[0] + sums[1] + sums[2] + sums[3];
        use(sum);
    });
}

/// Does about `flops` floating-point operations in vector registers: float32 multiply-adds.
void tenp_multiply_add(double flops, int threads) {
    on_threads(threads, [=](int) {
        Floats sums[kSums] = {};
        Floats x = Floats{} + 1.0001f;
        const double of_one_round = 2.0 * kSums * kBytes / sizeof(float) * threads;
        for (auto left = static_cast<std::int64_t>(flops / of_one_round); left > 0; --left) {
#pragma GCC unroll 24
            for (int i = 0; i < kSums; ++i) {
                sums[i] += x * x;
            }
#pragma GCC unroll 24
            for (int i = 0; i < kSums; ++i) {
                use(sums[i]);
            }
            use(x);
        }
    });
}

/// The same in tile registers, bfloat16 products. Returns whether this machine has them.
bool tenp_tile_multiply_add([[maybe_unused]] double flops, [[maybe_unused]] int threads) {
#if defined(__AMX_BF16__)
    constexpr int kRequestPermission = 0x1023;
    constexpr int kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
        return false;
    }
    on_threads(threads, [=](int) {
        _tile_loadconfig(&kTileConfig);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_zero(4);
        _tile_zero(5);
        _tile_zero(6);
        _tile_zero(7);
        for (auto left = static_cast<std::int64_t>(flops / (4 * kTileFlops * threads)); left > 0;
             --left) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_release();
    });
    return true;
#else
    return false;
#endif
}

}  // extern "C"
