// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/row_chunks.h"
#include "tenp/neuron_contribution.h"

// Neuron contributions for the other ops of this backend: nothing checked.

namespace tenp::cuda {

double* take_contribution_partials(
    Workspace& workspace, const RowChunks& chunks, std::int64_t neurons
);

/// accumulate_neuron_contribution() with norms [S], |y| of the rows, at hand. There is at least one
/// neuron.
void add_contribution(
    const NeuronContributionArgs& args,
    const double* norms,
    const RowChunks& chunks,
    double* partials,
    Stream stream
);

}  // namespace tenp::cuda
