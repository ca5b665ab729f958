// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "tenp/activation_stats.h"
#include "tenp/direction_change.h"
#include "tenp/expert_activations.h"
#include "tenp/expert_gemm.h"
#include "tenp/expert_statistics.h"
#include "tenp/neuron_contribution.h"
#include "tenp/routing.h"
#include "tenp/second_moment.h"

// What a backend provides. Arguments have passed the checks of core/<op>.cpp.

namespace tenp::cpu {

void route(const RoutingArgs& args);
void tile_table(const TileTableArgs& args);
void accumulate_activation_stats(const ActivationStatsArgs& args);
void accumulate_direction_change(const DirectionChangeArgs& args);
void accumulate_neuron_contribution(const NeuronContributionArgs& args);
void accumulate_second_moment(const SecondMomentArgs& args);
void expert_activations(const ExpertActivationsArgs& args);
void expert_statistics(const ExpertStatisticsArgs& args);
void expert_gemm(const ExpertGemmArgs& args);
std::size_t expert_statistics_workspace_bytes(
    std::int64_t rows, std::int64_t hidden_size, DType dtype
);
std::size_t expert_gemm_workspace_bytes(
    std::int64_t tokens,
    std::int64_t experts_per_token,
    std::int64_t hidden_size,
    std::int64_t num_experts,
    std::int64_t max_width,
    DType dtype
);

}  // namespace tenp::cpu

namespace tenp::cuda {

bool is_available() noexcept;
std::string unavailable_reason();

void route(const RoutingArgs& args, Stream stream);
void tile_table(const TileTableArgs& args, Stream stream);
void accumulate_activation_stats(const ActivationStatsArgs& args, Stream stream);
void accumulate_direction_change(const DirectionChangeArgs& args, Stream stream);
void accumulate_neuron_contribution(const NeuronContributionArgs& args, Stream stream);
void accumulate_second_moment(const SecondMomentArgs& args, Stream stream);
void expert_activations(const ExpertActivationsArgs& args, Stream stream);
void expert_statistics(const ExpertStatisticsArgs& args, Stream stream);
void expert_gemm(const ExpertGemmArgs& args, Stream stream);

// Bytes of workspace; 0 in a build without CUDA.
std::size_t route_workspace_bytes(std::int64_t slots, std::int64_t experts);
std::size_t activation_stats_workspace_bytes(std::int64_t rows, std::int64_t experts);
std::size_t direction_change_workspace_bytes(std::int64_t rows, std::int64_t experts);
std::size_t neuron_contribution_workspace_bytes(
    std::int64_t rows, std::int64_t experts, std::int64_t neurons
);
std::size_t expert_activations_workspace_bytes(
    std::int64_t rows, std::int64_t experts, std::int64_t neurons
);
std::size_t expert_statistics_workspace_bytes(
    std::int64_t rows,
    std::int64_t experts,
    std::int64_t hidden_size,
    std::int64_t neurons,
    DType dtype
);
std::size_t expert_gemm_workspace_bytes(
    std::int64_t tokens,
    std::int64_t experts_per_token,
    std::int64_t hidden_size,
    std::int64_t num_experts,
    std::int64_t max_width,
    DType dtype
);

}  // namespace tenp::cuda
