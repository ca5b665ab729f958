// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>

#include "core/backend.h"
#include "core/dispatch.h"

// Takes the place of csrc/cpu in a build whose CUDA kernels are emulated: arrays on the CPU go
// through the CUDA backend. Its workspaces start as NaN.

namespace tenp::cpu {
namespace {

class PoisonedWorkspace {
 public:
    explicit PoisonedWorkspace(std::size_t bytes)
        : bytes_(bytes),
          memory_(new unsigned char[bytes]) {
        std::memset(memory_.get(), 0xff, bytes);
    }
    TensorView view() const {
        return contiguous_view(memory_.get(), {static_cast<std::int64_t>(bytes_)});
    }

 private:
    std::size_t bytes_;
    std::unique_ptr<unsigned char[]> memory_;
};

}  // namespace

void route(const RoutingArgs& args) {
    const PoisonedWorkspace workspace(
        cuda::route_workspace_bytes(args.slots.shape[0], args.offsets.shape[0] - 1)
    );
    RoutingArgs with_workspace = args;
    with_workspace.workspace = workspace.view();
    cuda::route(with_workspace, nullptr);
}

void tile_table(const TileTableArgs& args) {
    cuda::tile_table(args, nullptr);
}

void accumulate_activation_stats(const ActivationStatsArgs& args) {
    const PoisonedWorkspace workspace(
        cuda::activation_stats_workspace_bytes(args.outputs.shape[0], args.counts.shape[0])
    );
    ActivationStatsArgs with_workspace = args;
    with_workspace.workspace = workspace.view();
    cuda::accumulate_activation_stats(with_workspace, nullptr);
}

void accumulate_direction_change(const DirectionChangeArgs& args) {
    const PoisonedWorkspace workspace(
        cuda::direction_change_workspace_bytes(
            args.outputs.shape[0], args.direction_change.shape[0]
        )
    );
    DirectionChangeArgs with_workspace = args;
    with_workspace.workspace = workspace.view();
    cuda::accumulate_direction_change(with_workspace, nullptr);
}

void accumulate_neuron_contribution(const NeuronContributionArgs& args) {
    const PoisonedWorkspace workspace(
        cuda::neuron_contribution_workspace_bytes(
            args.activations.shape[0], args.down.shape[0], args.down.shape[2]
        )
    );
    NeuronContributionArgs with_workspace = args;
    with_workspace.workspace = workspace.view();
    cuda::accumulate_neuron_contribution(with_workspace, nullptr);
}

void accumulate_second_moment(const SecondMomentArgs& args) {
    cuda::accumulate_second_moment(args, nullptr);
}

void expert_activations(const ExpertActivationsArgs& args) {
    const PoisonedWorkspace workspace(
        cuda::expert_activations_workspace_bytes(
            args.activations.shape[0], args.up.shape[0], args.up.shape[1]
        )
    );
    ExpertActivationsArgs with_workspace = args;
    with_workspace.workspace = workspace.view();
    cuda::expert_activations(with_workspace, nullptr);
}

void expert_statistics(const ExpertStatisticsArgs& args) {
    const PoisonedWorkspace workspace(
        cuda::expert_statistics_workspace_bytes(
            args.activations.shape[0], args.down.shape[0], args.down.shape[1], args.down.shape[2],
            args.hidden.dtype
        )
    );
    ExpertStatisticsArgs with_workspace = args;
    with_workspace.workspace = workspace.view();
    cuda::expert_statistics(with_workspace, nullptr);
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
    // Not the caller's: this one is exactly as large as its size says.
    const PoisonedWorkspace workspace(
        cuda::expert_gemm_workspace_bytes(
            args.hidden.shape[0], args.expert_ids.shape[1], args.hidden.shape[1],
            args.widths.shape[0], with_width.max_width, args.hidden.dtype
        )
    );
    with_width.workspace = workspace.view();
    cuda::expert_gemm(with_width, nullptr);
}

std::size_t expert_gemm_workspace_bytes(
    std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, DType
) {
    return 0;
}

}  // namespace tenp::cpu
