// SPDX-License-Identifier: Apache-2.0
#include <string>

#include "core/backend.h"
#include "tenp/error.h"

// Takes the place of the other files of csrc/cuda in a build without the CUDA backend.

namespace tenp::cuda {

bool is_available() noexcept {
    return false;
}

std::string unavailable_reason() {
    return "this build of tenp has no CUDA backend (TENP_BUILD_CUDA was off)";
}

namespace {

[[noreturn]] void refuse(const std::string& op) {
    throw Unsupported(op + ": CUDA arrays are not supported: " + unavailable_reason());
}

}  // namespace

void route(const RoutingArgs&, Stream) {
    refuse("route");
}

void tile_table(const TileTableArgs&, Stream) {
    refuse("tile_table");
}

void accumulate_activation_stats(const ActivationStatsArgs&, Stream) {
    refuse("accumulate_activation_stats");
}

void accumulate_direction_change(const DirectionChangeArgs&, Stream) {
    refuse("accumulate_direction_change");
}

void accumulate_neuron_contribution(const NeuronContributionArgs&, Stream) {
    refuse("accumulate_neuron_contribution");
}

void accumulate_second_moment(const SecondMomentArgs&, Stream) {
    refuse("accumulate_second_moment");
}

void expert_activations(const ExpertActivationsArgs&, Stream) {
    refuse("expert_activations");
}

void expert_statistics(const ExpertStatisticsArgs&, Stream) {
    refuse("expert_statistics");
}

void expert_gemm(const ExpertGemmArgs&, Stream) {
    refuse("expert_gemm");
}

std::size_t route_workspace_bytes(std::int64_t, std::int64_t) {
    return 0;
}

std::size_t activation_stats_workspace_bytes(std::int64_t, std::int64_t) {
    return 0;
}

std::size_t direction_change_workspace_bytes(std::int64_t, std::int64_t) {
    return 0;
}

std::size_t neuron_contribution_workspace_bytes(std::int64_t, std::int64_t, std::int64_t) {
    return 0;
}

std::size_t expert_activations_workspace_bytes(std::int64_t, std::int64_t, std::int64_t) {
    return 0;
}

std::size_t expert_statistics_workspace_bytes(
    std::int64_t, std::int64_t, std::int64_t, std::int64_t, DType
) {
    return 0;
}

std::size_t expert_gemm_workspace_bytes(
    std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, DType
) {
    return 0;
}

}  // namespace tenp::cuda
