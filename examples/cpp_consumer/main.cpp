// SPDX-License-Identifier: Apache-2.0
#include <tenp/tenp.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <vector>

// One MoE layer of three experts, 2, 0 and 1 neurons wide, on two tokens: pack the experts'
// matrices once, then run the layer.

int main() try {
    using tenp::contiguous_view;

    constexpr std::int64_t kHidden = 2;
    const std::vector<std::int32_t> widths = {2, 0, 1};
    const auto experts = static_cast<std::int64_t>(widths.size());
    const tenp::ExpertLayout layout(widths);
    const std::int64_t rows = layout.rows();

    // Checkpoints hold gate and up as [W, H] and down as [H, W], one matrix for each expert.
    const float ones[4] = {1, 1, 1, 1};
    std::vector<float> gate_up(static_cast<std::size_t>(2 * rows * kHidden));
    std::vector<float> down(static_cast<std::size_t>(rows * kHidden));
    for (std::int64_t expert = 0; expert < experts; ++expert) {
        const std::int64_t width = widths[static_cast<std::size_t>(expert)];
        tenp::pack_expert(
            layout, expert,
            {
                .gate = contiguous_view(ones, {width, kHidden}),
                .up = contiguous_view(ones, {width, kHidden}),
                .down = contiguous_view(ones, {kHidden, width}),
                .gate_up = contiguous_view(gate_up.data(), {2 * rows, kHidden}),
                .packed_down = contiguous_view(down.data(), {rows, kHidden}),
            }
        );
    }

    constexpr std::int64_t kTokens = 2;
    constexpr std::int64_t kPerToken = 2;
    const float hidden[kTokens * kHidden] = {1, 0, 2, 1};
    const std::int32_t expert_ids[kTokens * kPerToken] = {0, 1, 0, 2};
    const float gates[kTokens * kPerToken] = {1.0f, 1.0f, 0.5f, 2.0f};
    float out[kTokens * kHidden];
    std::vector<char> workspace(
        tenp::expert_gemm_workspace_bytes(
            kTokens, kPerToken, kHidden, experts, /*max_width=*/2, tenp::DType::kFloat32
        )
    );
    tenp::expert_gemm({
        .hidden = contiguous_view(hidden, {kTokens, kHidden}),
        .expert_ids = contiguous_view(expert_ids, {kTokens, kPerToken}),
        .gates = contiguous_view(gates, {kTokens, kPerToken}),
        .gate_up = contiguous_view(gate_up.data(), {2 * rows, kHidden}),
        .down = contiguous_view(down.data(), {rows, kHidden}),
        .widths = contiguous_view(widths.data(), {experts}),
        .neuron_offsets = contiguous_view(layout.offsets().data(), {experts + 1}),
        .activation = tenp::Activation::kRelu,
        .out = contiguous_view(out, {kTokens, kHidden}),
        .workspace =
            contiguous_view(workspace.data(), {static_cast<std::int64_t>(workspace.size())}),
    });

    std::printf("tenp %s on %s: %g and %g\n", tenp::version(), tenp::cpu_isa(), out[0], out[2]);
    // A neuron gives relu(1) * 1 = 1 for the first token and 3 * 3 = 9 for the second: 1 * 2 * 1
    // and 0.5 * 2 * 9 + 2 * 1 * 9.
    return out[0] == 2 && out[2] == 27 ? 0 : 1;
} catch (const tenp::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
}
