// SPDX-License-Identifier: Apache-2.0
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "support.h"

namespace tenp::test {
namespace {

/// Sums that many tasks take part in.
std::vector<double> norms_of_many_rows() {
    constexpr std::int64_t kRows = 2000;
    Matrix outputs(DType::kFloat32, kRows, 33);
    outputs.fill(1);
    Guarded<float> gates(kRows, 0.5f);
    Guarded<std::int32_t> offsets{0, 700, 700, 2000};
    Guarded<std::int64_t> counts(3);
    Guarded<double> gate_sum(3), norm_sum(3), gated_norm_sum(3), norm_max(3);
    accumulate_activation_stats({
        .outputs = outputs.view(),
        .gates = gates.view(),
        .offsets = offsets.view(),
        .counts = counts.view(),
        .gate_sum = gate_sum.view(),
        .norm_sum = norm_sum.view(),
        .gated_norm_sum = gated_norm_sum.view(),
        .norm_max = norm_max.view(),
    });
    return norm_sum.values();
}

}  // namespace

TEST_CASE("the number of threads can be set and is at least 1") {
    const int before = num_threads();
    CHECK(before >= 1);
    with_threads(3, [] { CHECK(num_threads() == 3); });
    CHECK(num_threads() == before);
    CHECK(refusal([] {
              set_num_threads(0);
          }) == "set_num_threads: threads must be positive, got 0");
}

TEST_CASE("calls from several threads at once give the same result") {
    with_threads(3, [] {
        const std::vector<double> expected = norms_of_many_rows();
        std::vector<std::vector<double>> results(4);
        std::vector<std::thread> callers;
        for (auto& result : results) {
            callers.emplace_back([&] {
                for (int repeat = 0; repeat < 20; ++repeat) {
                    result = norms_of_many_rows();
                }
            });
        }
        for (std::thread& caller : callers) {
            caller.join();
        }
        for (const auto& result : results) {
            CHECK(result == expected);
        }
    });
}

TEST_CASE("a forked child has threads of its own") {
    with_threads(3, [] {
        const std::vector<double> expected = norms_of_many_rows();  // the parent's pool now exists
        const pid_t child = fork();
        REQUIRE(child >= 0);
        if (child == 0) {
            alarm(20);  // a child that waits for its parent's threads would wait for ever
            _exit(norms_of_many_rows() == expected ? 0 : 1);
        }
        int status = 0;
        REQUIRE(waitpid(child, &status, 0) == child);
        CHECK(WIFEXITED(status));
        CHECK(WEXITSTATUS(status) == 0);
    });
}

}  // namespace tenp::test
