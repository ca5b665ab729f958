// SPDX-License-Identifier: Apache-2.0
// One MoE layer whose two experts have 1 and 2 neurons, from checkpoint layout to its output.

#include <tenp/tenp.h>

#include <cstdint>
#include <cstdio>
#include <vector>

int main() {
    using tenp::contiguous_view;
    constexpr std::int64_t kTokens = 3;    // T
    constexpr std::int64_t kPerToken = 1;  // k
    constexpr std::int64_t kHidden = 2;    // H
    constexpr std::int64_t kExperts = 2;   // E
    const std::vector<std::int32_t> widths = {1, 2};

    // Weights as a checkpoint has them: gate and up [W, H], down [H, W].
    const std::vector<float> up[kExperts] = {{1, 0}, {0, 1, 1, 1}};
    const std::vector<float> down[kExperts] = {{1, 2}, {1, 0, 0, 3}};

    const tenp::ExpertLayout layout(widths);
    const std::int64_t rows = layout.rows();
    std::vector<float> packed_up(static_cast<std::size_t>(rows * kHidden));
    std::vector<float> packed_down(packed_up.size());
    for (std::int64_t expert = 0; expert < kExperts; ++expert) {
        const std::int64_t width = widths[static_cast<std::size_t>(expert)];
        tenp::pack_expert(
            layout, expert,
            {
                .up = contiguous_view(up[expert].data(), {width, kHidden}),
                .down = contiguous_view(down[expert].data(), {kHidden, width}),
                .gate_up = contiguous_view(packed_up.data(), {rows, kHidden}),
                .packed_down = contiguous_view(packed_down.data(), {rows, kHidden}),
                .gated = false,
            }
        );
    }

    const std::vector<float> hidden = {2, 5, -3, 4, 1, 1};
    const std::vector<std::int32_t> expert_ids = {0, 1, -1};  // the last token goes nowhere
    const std::vector<float> gates = {1, 0.5, 1};
    std::vector<float> out(hidden.size());
    std::vector<std::uint8_t> workspace(
        tenp::expert_gemm_workspace_bytes(
            kTokens, kPerToken, kHidden, kExperts, 2, tenp::DType::kFloat32
        )
    );
    tenp::expert_gemm({
        .hidden = contiguous_view(hidden.data(), {kTokens, kHidden}),
        .expert_ids = contiguous_view(expert_ids.data(), {kTokens, kPerToken}),
        .gates = contiguous_view(gates.data(), {kTokens, kPerToken}),
        .gate_up = contiguous_view(packed_up.data(), {rows, kHidden}),
        .down = contiguous_view(packed_down.data(), {rows, kHidden}),
        .widths = contiguous_view(widths.data(), {kExperts}),
        .neuron_offsets = contiguous_view(layout.offsets().data(), {kExperts + 1}),
        .activation = tenp::Activation::kRelu,
        .gated = false,
        .out = contiguous_view(out.data(), {kTokens, kHidden}),
        .workspace =
            contiguous_view(workspace.data(), {static_cast<std::int64_t>(workspace.size())}),
    });

    std::printf("tenp %s\n", tenp::version());
    for (std::int64_t token = 0; token < kTokens; ++token) {
        std::printf("%g %g\n", out[2 * token], out[2 * token + 1]);
    }
    return 0;
}
