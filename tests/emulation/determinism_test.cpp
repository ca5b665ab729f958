// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "core/backend.h"
#include "core/float16.h"
#include "tenp/tenp.h"

// Results of the CUDA kernels are the same bits for any number of multiprocessors and in whatever
// order blocks and threads run. Padding is NaN throughout, and so are workspaces.

namespace tenp {
namespace {

const float kNaN = std::numeric_limits<float>::quiet_NaN();

class Numbers {
 public:
    float next() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return static_cast<float>(static_cast<std::int32_t>(state_ >> 32)) * 0x1p-31f;
    }
    std::vector<BFloat16> bfloat16(std::int64_t count) {
        std::vector<BFloat16> values(static_cast<std::size_t>(count));
        for (BFloat16& value : values) {
            value = from_float<BFloat16>(next());
        }
        return values;
    }

 private:
    std::uint64_t state_ = 1;
};

TensorView view(std::vector<BFloat16>& values, std::initializer_list<std::int64_t> shape) {
    return contiguous_view(values.data(), DType::kBFloat16, shape);
}

template <class T>
std::vector<unsigned char> bytes_of(const std::vector<T>& values) {
    std::vector<unsigned char> bytes(values.size() * sizeof(T));
    std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
}

/// Multiprocessors, and orders of threads. Races are found in any of them.
#if defined(__SANITIZE_THREAD__)
constexpr const char* kGrids[] = {"2"};
constexpr const char* kOrders[] = {"0"};
#else
constexpr const char* kGrids[] = {"66", "1", "2", "7"};
constexpr const char* kOrders[] = {"0", "1"};
#endif

/// Runs `f`, which returns bytes, on grids of several sizes, in both orders.
template <class F>
void check_every_grid(F f) {
    std::vector<unsigned char> expected;
    for (const char* multiprocessors : kGrids) {
        for (const char* reverse : kOrders) {
            setenv("TENP_CUDA_SMS", multiprocessors, 1);
            setenv("TENP_EMULATION_REVERSE", reverse, 1);
            const auto bytes = f();
            if (expected.empty()) {
                expected = bytes;
            }
            INFO("multiprocessors ", multiprocessors, ", reverse ", reverse);
            CHECK(bytes == expected);
        }
    }
    unsetenv("TENP_CUDA_SMS");
    unsetenv("TENP_EMULATION_REVERSE");
}

/// Runs kernels with a workspace that is exactly as large as its size says.
template <class Args>
void run(
    void (*kernels)(const Args&, Stream),
    std::type_identity_t<Args> args,
    std::size_t workspace_bytes
) {
    const std::unique_ptr<unsigned char[]> workspace(new unsigned char[workspace_bytes]);
    std::memset(workspace.get(), 0xff, workspace_bytes);
    args.workspace = contiguous_view(workspace.get(), {static_cast<std::int64_t>(workspace_bytes)});
    kernels(args, nullptr);
}

std::vector<std::int32_t> some_ids(std::int64_t count, int experts) {
    Numbers numbers;
    std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
    for (std::int32_t& id : ids) {
        const float draw = numbers.next();
        id = static_cast<std::int32_t>(draw * draw * static_cast<float>(experts + 1)) - 1;
    }
    return ids;
}

TEST_CASE("routing of several chunks does not depend on the order of blocks and threads") {
    constexpr std::int64_t kTokens = 3001, kPerToken = 3;
    constexpr int kExperts = 37;
    auto ids = some_ids(kTokens * kPerToken, kExperts);
    std::vector<std::int32_t> offsets(kExperts + 1), slots(ids.size()), rows(ids.size());
    check_every_grid([&] {
        run(cuda::route,
            {
                .expert_ids = contiguous_view(ids.data(), {kTokens, kPerToken}),
                .offsets = contiguous_view(offsets.data(), {kExperts + 1}),
                .slots = contiguous_view(slots.data(), {kTokens * kPerToken}),
                .rows = contiguous_view(rows.data(), {kTokens, kPerToken}),
            },
            cuda::route_workspace_bytes(kTokens * kPerToken, kExperts));
        return bytes_of(slots);
    });
    // By expert, then slot; -1 after the last.
    std::size_t row = 0;
    for (std::int32_t expert = 0; expert < kExperts; ++expert) {
        CHECK(offsets[static_cast<std::size_t>(expert)] == static_cast<std::int32_t>(row));
        for (std::size_t slot = 0; slot < ids.size(); ++slot) {
            if (ids[slot] == expert) {
                REQUIRE(slots[row] == static_cast<std::int32_t>(slot));
                REQUIRE(rows[slot] == static_cast<std::int32_t>(row));
                ++row;
            }
        }
    }
    CHECK(offsets[kExperts] == static_cast<std::int32_t>(row));
    for (; row < slots.size(); ++row) {
        REQUIRE(slots[row] == -1);
    }
}

void check_expert_gemm(std::int64_t tokens, std::int64_t hidden_size) {
    std::vector<std::int32_t> widths = {0, 1, 15, 16, 17, 63, 64, 65, 200, 130};
    widths.resize(40, 3);  // more experts than a warp has lanes
    const ExpertLayout layout(widths);
    const std::int64_t experts = std::ssize(widths), rows = layout.rows(), per_token = 4;
    Numbers numbers;
    auto hidden = numbers.bfloat16(tokens * hidden_size);
    auto gate_up = numbers.bfloat16(2 * rows * hidden_size);
    auto down = numbers.bfloat16(rows * hidden_size);
    for (std::size_t expert = 0; expert < widths.size(); ++expert) {
        const std::int64_t first = layout.offsets()[expert] + widths[expert];
        for (std::int64_t i = first * hidden_size; i < layout.offsets()[expert + 1] * hidden_size;
             ++i) {
            const auto nan = from_float<BFloat16>(kNaN);
            gate_up[static_cast<std::size_t>(i)] = nan;
            gate_up[static_cast<std::size_t>(rows * hidden_size + i)] = nan;
            down[static_cast<std::size_t>(i)] = nan;
        }
    }
    auto ids = some_ids(tokens * per_token, static_cast<int>(experts));
    std::vector<float> gates(ids.size(), 0.25f);
    std::vector<BFloat16> out(static_cast<std::size_t>(tokens * hidden_size));
    check_every_grid([&] {
        std::fill(out.begin(), out.end(), from_float<BFloat16>(kNaN));
        run(cuda::expert_gemm,
            {
                .hidden = view(hidden, {tokens, hidden_size}),
                .expert_ids = contiguous_view(ids.data(), {tokens, per_token}),
                .gates = contiguous_view(gates.data(), {tokens, per_token}),
                .gate_up = view(gate_up, {2 * rows, hidden_size}),
                .down = view(down, {rows, hidden_size}),
                .widths = contiguous_view(widths.data(), {experts}),
                .neuron_offsets = contiguous_view(layout.offsets().data(), {experts + 1}),
                .max_width = 200,
                .out = view(out, {tokens, hidden_size}),
            },
            cuda::expert_gemm_workspace_bytes(
                tokens, per_token, hidden_size, experts, 200, DType::kBFloat16
            ));
        return bytes_of(out);
    });
    for (const BFloat16 value : out) {
        REQUIRE(std::isfinite(to_float(value)));
    }
}

TEST_CASE("expert_gemm by tiles does not depend on the grid") {
    check_expert_gemm(150, 72);
    check_expert_gemm(70, 33);  // rows that do not start at multiples of 16 bytes
}

TEST_CASE("expert_gemm by streaming weights does not depend on the grid") {
    check_expert_gemm(64, 136);
    check_expert_gemm(1, 264);
}

TEST_CASE("statistics of several chunks do not depend on the grid") {
    constexpr std::int64_t kRows = 2600, kHidden = 40, kNeurons = 140, kExperts = 40;
    std::vector<std::int32_t> offsets = {0, 0, 1, 2300, 2301};
    offsets.resize(kExperts + 1, kRows);
    Numbers numbers;
    auto outputs = numbers.bfloat16(kRows * kHidden);
    auto activations = numbers.bfloat16(kRows * kNeurons);
    auto down = numbers.bfloat16(kExperts * kHidden * kNeurons);
    std::vector<float> gates(kRows);
    for (float& gate : gates) {
        gate = numbers.next();
    }
    std::vector<std::int32_t> tokens(kRows);
    for (std::size_t row = 0; row < tokens.size(); ++row) {
        tokens[row] = static_cast<std::int32_t>(row % 100);
    }
    std::array<std::vector<double>, 4> sums;
    std::vector<double> change;
    std::array<std::vector<double>, 4> stats;
    check_every_grid([&] {
        for (auto& sum : sums) {
            sum.assign(kExperts * kNeurons, 0);
        }
        change.assign(kExperts, 0);
        for (auto& sum : stats) {
            sum.assign(kExperts, 0);
        }
        std::vector<std::int64_t> counts(kExperts);
        const auto by_neuron = [&](std::size_t kind) {
            return contiguous_view(sums[kind].data(), {kExperts, kNeurons});
        };
        run(cuda::accumulate_neuron_contribution,
            {
                .activations = view(activations, {kRows, kNeurons}),
                .outputs = view(outputs, {kRows, kHidden}),
                .down = view(down, {kExperts, kHidden, kNeurons}),
                .gates = contiguous_view(gates.data(), {kRows}),
                .offsets = contiguous_view(offsets.data(), {kExperts + 1}),
                .projection = by_neuron(0),
                .magnitude = by_neuron(1),
                .energy = by_neuron(2),
                .peak = by_neuron(3),
            },
            cuda::neuron_contribution_workspace_bytes(kRows, kExperts, kNeurons));
        run(cuda::accumulate_direction_change,
            {
                .hidden = view(outputs, {kRows, kHidden}),
                .outputs = view(outputs, {kRows, kHidden}),
                .tokens = contiguous_view(tokens.data(), {kRows}),
                .gates = contiguous_view(gates.data(), {kRows}),
                .offsets = contiguous_view(offsets.data(), {kExperts + 1}),
                .direction_change = contiguous_view(change.data(), {kExperts}),
            },
            cuda::direction_change_workspace_bytes(kRows, kExperts));
        run(cuda::accumulate_activation_stats,
            {
                .outputs = view(outputs, {kRows, kHidden}),
                .gates = contiguous_view(gates.data(), {kRows}),
                .offsets = contiguous_view(offsets.data(), {kExperts + 1}),
                .counts = contiguous_view(counts.data(), {kExperts}),
                .gate_sum = contiguous_view(stats[0].data(), {kExperts}),
                .norm_sum = contiguous_view(stats[1].data(), {kExperts}),
                .gated_norm_sum = contiguous_view(stats[2].data(), {kExperts}),
                .norm_max = contiguous_view(stats[3].data(), {kExperts}),
            },
            cuda::activation_stats_workspace_bytes(kRows, kExperts));
        std::vector<double> all = change;
        for (const auto* group : {&sums, &stats}) {
            for (const auto& sum : *group) {
                all.insert(all.end(), sum.begin(), sum.end());
            }
        }
        return bytes_of(all);
    });
}

TEST_CASE("a calibration pass does not depend on the grid") {
    constexpr std::int64_t kTokens = 700, kPerToken = 3, kHidden = 300, kNeurons = 140;
    constexpr int kExperts = 5;
    constexpr std::int64_t kSlots = kTokens * kPerToken;
    constexpr std::int64_t kPacked = kNeurons * (kNeurons + 1) / 2;
    Numbers numbers;
    auto hidden = numbers.bfloat16(kTokens * kHidden);
    auto gate_up = numbers.bfloat16(kExperts * 2 * kNeurons * kHidden);
    auto down = numbers.bfloat16(kExperts * kHidden * kNeurons);
    auto ids = some_ids(kSlots, kExperts);
    std::vector<std::int32_t> offsets(kExperts + 1), slots(kSlots), rows(kSlots);
    run(cuda::route,
        {
            .expert_ids = contiguous_view(ids.data(), {kTokens, kPerToken}),
            .offsets = contiguous_view(offsets.data(), {kExperts + 1}),
            .slots = contiguous_view(slots.data(), {kSlots}),
            .rows = contiguous_view(rows.data(), {kTokens, kPerToken}),
        },
        cuda::route_workspace_bytes(kTokens * kPerToken, kExperts));
    std::vector<float> gates(kSlots);
    for (float& gate : gates) {
        gate = numbers.next();
    }
    const auto halves = [&](std::int64_t first_row) {
        TensorView half = view(gate_up, {kExperts, kNeurons, kHidden});
        half.data = gate_up.data() + first_row * kHidden;
        half.stride[0] = 2 * kNeurons * kHidden;
        return half;
    };
    std::vector<BFloat16> activations(kSlots * kNeurons);
    std::vector<float> out(kTokens * kHidden);
    std::vector<std::int64_t> counts(kExperts);
    std::vector<double> sums;
    check_every_grid([&] {
        run(cuda::expert_activations,
            {
                .hidden = view(hidden, {kTokens, kHidden}),
                .offsets = contiguous_view(offsets.data(), {kExperts + 1}),
                .slots = contiguous_view(slots.data(), {kSlots}),
                .gate = halves(0),
                .up = halves(kNeurons),
                .per_token = kPerToken,
                .activations = view(activations, {kSlots, kNeurons}),
            },
            cuda::expert_activations_workspace_bytes(kSlots, kExperts, kNeurons));
        out.assign(out.size(), 0);
        sums.assign(kExperts * (6 + kHidden + 4 * kNeurons + kPacked), 0);
        double* next = sums.data();
        const auto take = [&](std::initializer_list<std::int64_t> shape) {
            const TensorView taken = contiguous_view(next, shape);
            next += taken.shape[0] * taken.stride[0];
            return taken;
        };
        run(cuda::expert_statistics,
            {
                .hidden = view(hidden, {kTokens, kHidden}),
                .activations = view(activations, {kSlots, kNeurons}),
                .down = view(down, {kExperts, kHidden, kNeurons}),
                .offsets = contiguous_view(offsets.data(), {kExperts + 1}),
                .slots = contiguous_view(slots.data(), {kSlots}),
                .rows = contiguous_view(rows.data(), {kTokens, kPerToken}),
                .gates = contiguous_view(gates.data(), {kTokens, kPerToken}),
                .out = contiguous_view(out.data(), {kTokens, kHidden}),
                .counts = contiguous_view(counts.data(), {kExperts}),
                .gate_sum = take({kExperts}),
                .normalized_gate_sum = take({kExperts}),
                .norm_sum = take({kExperts}),
                .gated_norm_sum = take({kExperts}),
                .norm_max = take({kExperts}),
                .direction_change = take({kExperts}),
                .input_energy = take({kExperts, kHidden}),
                .projection = take({kExperts, kNeurons}),
                .magnitude = take({kExperts, kNeurons}),
                .energy = take({kExperts, kNeurons}),
                .peak = take({kExperts, kNeurons}),
            },
            cuda::expert_statistics_workspace_bytes(
                kSlots, kExperts, kHidden, kNeurons, DType::kBFloat16
            ));
        std::vector<float> row_gates(kSlots);
        for (std::size_t row = 0; row < static_cast<std::size_t>(offsets[kExperts]); ++row) {
            row_gates[row] = gates[static_cast<std::size_t>(slots[row])];
        }
        cuda::accumulate_second_moment(
            {
                .activations = view(activations, {kSlots, kNeurons}),
                .gates = contiguous_view(row_gates.data(), {kSlots}),
                .offsets = contiguous_view(offsets.data(), {kExperts + 1}),
                .second_moment = take({kExperts, kPacked}),
            },
            nullptr
        );
        auto bytes = bytes_of(sums);
        const auto more = bytes_of(out);
        bytes.insert(bytes.end(), more.begin(), more.end());
        return bytes;
    });
    for (const double sum : sums) {
        REQUIRE(std::isfinite(sum));
    }
}

}  // namespace
}  // namespace tenp
