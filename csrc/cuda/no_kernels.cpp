// SPDX-License-Identifier: Apache-2.0
#include <string>

#include "core/backend.h"
#include "tenp/error.h"

// Ops that have no CUDA kernel in this build say so.

namespace tenp::cuda {
namespace {

[[noreturn]] void refuse(const std::string& op) {
    const std::string reason = unavailable_reason();
    throw Unsupported(
        op + ": CUDA arrays are not supported: " +
        (reason.empty() ? "this build of tenp has no CUDA kernel for it" : reason)
    );
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

void expert_gemm(const ExpertGemmArgs&, Stream) {
    refuse("expert_gemm");
}

}  // namespace tenp::cuda
