// SPDX-License-Identifier: Apache-2.0
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <cstdlib>
#include <vector>

#include "cuda/device/ptx.cuh"
#include "cuda/launch.cuh"

// The emulation against plain loops: fragment layouts, transposition, shuffles, barriers, copies.

namespace tenp::cuda {
namespace {

constexpr int kDepth = 48;

/// c[16, 8] = a[16, kDepth] b[8, kDepth]^T by one warp, both operands loaded row by row.
template <class T, class Element>
__global__ void product_kernel(const Element* a, const Element* b, float* c) {
    constexpr int kStep = 32 / static_cast<int>(sizeof(Element));  // elements in 32 bytes
    auto* rows = shared_memory<Element>();
    for (int i = static_cast<int>(threadIdx.x); i < 16 * kDepth; i += 32) {
        rows[i] = a[i];
    }
    auto* columns = rows + 16 * kDepth;
    for (int i = static_cast<int>(threadIdx.x); i < 8 * kDepth; i += 32) {
        columns[i] = b[i];
    }
    __syncwarp();
    const int lane = static_cast<int>(threadIdx.x);
    const int matrix = lane / 8;
    float sums[4] = {};
    for (int k = 0; k < kDepth; k += kStep) {
        std::uint32_t fa[4], fb[4];
        load_matrices(
            fa, rows + (lane % 8 + 8 * (matrix % 2)) * kDepth + k + matrix / 2 * kStep / 2
        );
        load_matrices(fb, columns + lane % 8 * kDepth + k + matrix % 2 * kStep / 2);
        multiply_add<T>(sums, fa, fb[0], fb[1]);
    }
    for (int i = 0; i < 4; ++i) {
        c[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = sums[i];
    }
}

template <class T, class Element>
void check_product() {
    std::vector<Element> a(16 * kDepth), b(8 * kDepth);
    for (int i = 0; i < 16 * kDepth; ++i) {
        a[i] = narrow<Element>(static_cast<float>(i * 37 % 11) - 5);
    }
    for (int i = 0; i < 8 * kDepth; ++i) {
        b[i] = narrow<Element>(static_cast<float>(i * 53 % 13) - 6);
    }
    std::vector<float> c(128);
    launch(
        product_kernel<T, Element>,
        {.blocks = 1, .threads = 32, .shared_bytes = 24 * kDepth * sizeof(Element)}, nullptr,
        a.data(), b.data(), c.data()
    );
    for (int row = 0; row < 16; ++row) {
        for (int column = 0; column < 8; ++column) {
            float expected = 0;
            for (int k = 0; k < kDepth; ++k) {
                expected += widen(a[row * kDepth + k]) * widen(b[column * kDepth + k]);
            }
            CHECK(c[row * 8 + column] == expected);  // small integers: exact in every order
        }
    }
}

/// out[c][r] of the left operand, loaded from its transpose: rows of `in` are depth.
__global__ void transpose_kernel(const BFloat16* in, float* out) {
    auto* tile = shared_memory<BFloat16>();  // [16, 16], [k][row]
    for (int i = static_cast<int>(threadIdx.x); i < 256; i += 32) {
        tile[i] = in[i];
    }
    __syncwarp();
    const int lane = static_cast<int>(threadIdx.x);
    std::uint32_t fa[4];
    load_matrices_transposed(fa, tile + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
    // The identity as right operand gives the left one back, eight columns at a time.
    for (int half = 0; half < 2; ++half) {
        float c[4] = {};
        std::uint32_t one[2] = {0, 0};
        const int g = lane / 4, m = lane % 4;
        if (g / 2 == m) {
            one[half] = g % 2 == 0 ? 0x3f80u : 0x3f800000u;
        }
        multiply_add<BFloat16>(c, fa, one[0], one[1]);
        for (int i = 0; i < 4; ++i) {
            out[(g + 8 * (i / 2)) * 16 + 8 * half + 2 * m + i % 2] = c[i];
        }
    }
}

/// Sum of each row by one block: shared memory, barrier, shuffles, a partly filled asynchronous
/// copy.
__global__ void row_sum_kernel(const float* x, int columns, float* out) {
    auto* partial = shared_memory<float>();
    auto* copied = partial + 4;
    const int thread = static_cast<int>(threadIdx.x);
    float sum = 0;
    for (int c = 0; c < columns; c += 4 * 128) {
        const int first = c + 4 * thread;
        const int valid = min(max(columns - first, 0), 4);
        copy_async(copied + 4 * thread, x + blockIdx.x * 300 + (valid > 0 ? first : 0), 4 * valid);
        commit_copies();
        wait_for_copies<0>();
        for (int i = 0; i < 4; ++i) {
            sum += copied[4 * thread + i];
        }
    }
    for (int flip = 16; flip > 0; flip /= 2) {
        sum += __shfl_xor_sync(~0u, sum, flip);
    }
    if (thread % 32 == 0) {
        partial[thread / 32] = sum;
    }
    __syncthreads();
    if (thread == 0) {
        out[blockIdx.x] = partial[0] + partial[1] + partial[2] + partial[3];
    }
}

__global__ void votes_kernel(unsigned* votes, unsigned* matches, int* shifted) {
    const int lane = static_cast<int>(threadIdx.x);
    votes[lane] = __ballot_sync(~0u, lane % 3 == 0);
    matches[lane] = __match_any_sync(~0u, lane / 5);
    shifted[lane] = __shfl_up_sync(~0u, lane, 4);
}

TEST_CASE("matrix products of fragments equal plain loops") {
    check_product<BFloat16, BFloat16>();
    check_product<Float16, Float16>();
    check_product<Tf32, float>();
}

TEST_CASE("a transposed load gives the left operand of a transposed matrix") {
    std::vector<BFloat16> in(256);
    for (int i = 0; i < 256; ++i) {
        in[i] = narrow<BFloat16>(static_cast<float>(i));
    }
    std::vector<float> out(256, -1);
    launch(
        transpose_kernel, {.blocks = 1, .threads = 32, .shared_bytes = 512}, nullptr, in.data(),
        out.data()
    );
    for (int k = 0; k < 16; ++k) {
        for (int row = 0; row < 16; ++row) {
            CHECK(out[row * 16 + k] == static_cast<float>(k * 16 + row));
        }
    }
}

TEST_CASE("barriers, shuffles and copies, in both orders of the threads") {
    std::vector<float> x(5 * 300), out(5);
    for (std::size_t i = 0; i < x.size(); ++i) {
        x[i] = static_cast<float>(i % 7) - 3;
    }
    for (const char* reverse : {"0", "1"}) {
        setenv("TENP_EMULATION_REVERSE", reverse, 1);
        launch(
            row_sum_kernel, {.blocks = 5, .threads = 128, .shared_bytes = 16 + 2048}, nullptr,
            x.data(), 300, out.data()
        );
        for (std::size_t row = 0; row < 5; ++row) {
            float expected = 0;
            for (std::size_t c = 0; c < 300; ++c) {
                expected += x[row * 300 + c];
            }
            CHECK(out[row] == expected);
        }
    }
    unsetenv("TENP_EMULATION_REVERSE");
}

TEST_CASE("votes and matches") {
    std::vector<unsigned> votes(32), matches(32);
    std::vector<int> shifted(32);
    launch(
        votes_kernel, {.blocks = 1, .threads = 32}, nullptr, votes.data(), matches.data(),
        shifted.data()
    );
    for (int lane = 0; lane < 32; ++lane) {
        CHECK(votes[lane] == 0x49249249u);
        for (int other = 0; other < 32; ++other) {
            CHECK((matches[lane] >> other & 1u) == (lane / 5 == other / 5 ? 1u : 0u));
        }
        CHECK(shifted[lane] == (lane < 4 ? lane : lane - 4));
    }
}

TEST_CASE("a launch that no GPU accepts is refused") {
    std::vector<unsigned> out(32);
    std::vector<int> ints(32);
    CHECK_THROWS_AS(
        launch(
            votes_kernel, {.blocks = 1, .threads = 32, .shared_bytes = 50 << 10 << 10}, nullptr,
            out.data(), out.data(), ints.data()
        ),
        DeviceError
    );
}

}  // namespace
}  // namespace tenp::cuda
