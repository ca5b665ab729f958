// SPDX-License-Identifier: Apache-2.0
#include "cpu/parallel.h"

#include <atomic>
#include <cfenv>

#include "support.h"

// The pool itself, which the public API shows only through its results.

namespace tenp::test {

using cpu::parallel_for;

TEST_CASE("every task runs once") {
    for (const int threads : {1, 2, 4}) {
        with_threads(threads, [] {
            for (const std::int64_t count : {0, 1, 2, 3, 1000}) {
                std::vector<std::atomic<int>> runs(static_cast<std::size_t>(count));
                parallel_for(count, [&](std::int64_t task) {
                    ++runs[static_cast<std::size_t>(task)];
                });
                for (const auto& run : runs) {
                    CHECK(run == 1);
                }
            }
        });
    }
}

TEST_CASE("an exception of a task reaches the caller, and the pool works on") {
    with_threads(3, [] {
        for (int repeat = 0; repeat < 50; ++repeat) {
            CHECK_THROWS_AS(
                parallel_for(
                    100,
                    [](std::int64_t task) {
                        if (task == 40) {
                            throw std::bad_alloc();
                        }
                    }
                ),
                std::bad_alloc
            );
        }
        std::atomic<int> runs = 0;
        parallel_for(100, [&](std::int64_t) { ++runs; });
        CHECK(runs == 100);
    });
}

TEST_CASE("a task may start tasks") {
    with_threads(3, [] {
        std::atomic<int> runs = 0;
        parallel_for(8, [&](std::int64_t) { parallel_for(8, [&](std::int64_t) { ++runs; }); });
        CHECK(runs == 64);
    });
}

TEST_CASE("workers compute in the caller's floating-point environment") {
    with_threads(4, [] {
        const int before = std::fegetround();
        std::fesetround(FE_UPWARD);
        std::atomic<int> upward = 0;
        parallel_for(200, [&](std::int64_t) { upward += std::fegetround() == FE_UPWARD; });
        std::fesetround(before);
        CHECK(upward == 200);
    });
}

}  // namespace tenp::test
