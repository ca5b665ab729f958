// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>

#include "core/backend.h"
#include "core/dispatch.h"

// Takes the place of csrc/cpu in a build whose CUDA kernels are emulated: arrays on the CPU go
// through the CUDA backend. Its workspaces start as NaN.

namespace tenp::cpu {
namespace {

/// Runs a kernel with a workspace that is exactly as large as its size says.
template <class Args>
void run(void (*kernel)(const Args&, Stream), Args args, std::size_t workspace_bytes) {
    const std::unique_ptr<unsigned char[]> workspace(new unsigned char[workspace_bytes]);
    std::memset(workspace.get(), 0xff, workspace_bytes);
    args.workspace = contiguous_view(workspace.get(), {static_cast<std::int64_t>(workspace_bytes)});
    kernel(args, nullptr);
}

}  // namespace

void route(const RoutingArgs& args) {
    run(cuda::route, args,
        cuda::route_workspace_bytes(args.slots.shape[0], args.offsets.shape[0] - 1));
}

void tile_table(const TileTableArgs& args) {
    cuda::tile_table(args, nullptr);
}

void accumulate_activation_stats(const ActivationStatsArgs& args) {
    run(cuda::accumulate_activation_stats, args,
        cuda::activation_stats_workspace_bytes(args.outputs.shape[0], args.counts.shape[0]));
}

void accumulate_direction_change(const DirectionChangeArgs& args) {
    run(cuda::accumulate_direction_change, args,
        cuda::direction_change_workspace_bytes(
            args.outputs.shape[0], args.direction_change.shape[0]
        ));
}

void accumulate_neuron_contribution(const NeuronContributionArgs& args) {
    run(cuda::accumulate_neuron_contribution, args,
        cuda::neuron_contribution_workspace_bytes(
            args.activations.shape[0], args.down.shape[0], args.down.shape[2]
        ));
}

void accumulate_second_moment(const SecondMomentArgs& args) {
    cuda::accumulate_second_moment(args, nullptr);
}

void expert_activations(const ExpertActivationsArgs& args) {
    run(cuda::expert_activations, args,
        cuda::expert_activations_workspace_bytes(
            args.activations.shape[0], args.up.shape[0], args.up.shape[1]
        ));
}

void expert_statistics(const ExpertStatisticsArgs& args) {
    run(cuda::expert_statistics, args,
        cuda::expert_statistics_workspace_bytes(
            args.activations.shape[0], args.down.shape[0], args.down.shape[1], args.down.shape[2],
            args.hidden.dtype
        ));
}

std::size_t expert_statistics_workspace_bytes(std::int64_t, std::int64_t, DType) {
    return 0;
}

void expert_gemm(const ExpertGemmArgs& args) {
    ExpertGemmArgs with_width = args;
    const auto* widths = data<const std::int32_t>(args.widths);
    with_width.max_width = std::max<std::int64_t>(args.max_width, 0);
    for (std::int64_t expert = 0; expert < args.widths.shape[0]; ++expert) {
        with_width.max_width = std::max<std::int64_t>(with_width.max_width, widths[expert]);
    }
    run(cuda::expert_gemm, with_width,
        cuda::expert_gemm_workspace_bytes(
            args.hidden.shape[0], args.expert_ids.shape[1], args.hidden.shape[1],
            args.widths.shape[0], with_width.max_width, args.hidden.dtype
        ));
}

std::size_t expert_gemm_workspace_bytes(
    std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, DType
) {
    return 0;
}

}  // namespace tenp::cpu
