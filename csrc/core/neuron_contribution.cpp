// SPDX-License-Identifier: Apache-2.0
#include "tenp/neuron_contribution.h"

#include "core/backend.h"
#include "core/checks.h"

namespace tenp {

void accumulate_neuron_contribution(const NeuronContributionArgs& args, Stream stream) {
    const Checks check("accumulate_neuron_contribution", args.activations);
    const Named activations{"activations", args.activations};
    const Named outputs{"outputs", args.outputs};
    const Named down{"down", args.down};
    const Named gates{"gates", args.gates};
    const Named offsets{"offsets", args.offsets};
    const Named projection{"projection", args.projection};
    const Named magnitude{"magnitude", args.magnitude};
    const Named energy{"energy", args.energy};
    const Named peak{"peak", args.peak};

    check.rank(activations, 2);
    check.rank(down, 3);
    const std::int64_t rows = args.activations.shape[0];
    const std::int64_t experts = args.down.shape[0];
    const std::int64_t hidden_size = args.down.shape[1];
    const std::int64_t neurons = args.down.shape[2];
    const DType dtype = args.activations.dtype;
    check.is_float(activations);
    check.array(activations, dtype, {rows, neurons}, Layout::kRows);
    check.array(outputs, dtype, {rows, hidden_size}, Layout::kRows);
    check.array(down, dtype, {experts, hidden_size, neurons}, Layout::kAny);
    check.contiguous_along_second_or_third(down);
    check.array(gates, DType::kFloat32, {rows});
    check.array(offsets, DType::kInt32, {experts + 1});
    for (const Named& sum : {projection, magnitude, energy, peak}) {
        check.array(sum, DType::kFloat64, {experts, neurons});
    }
    check.apart(
        {projection, magnitude, energy, peak, {"workspace", args.workspace}},
        {activations, outputs, down, gates, offsets}
    );
    check.offsets(offsets, rows);

    if (check.device() == Device::kCuda) {
        check.workspace(
            args.workspace, cuda::neuron_contribution_workspace_bytes(rows, experts, neurons)
        );
        cuda::accumulate_neuron_contribution(args, stream);
    } else {
        cpu::accumulate_neuron_contribution(args);
    }
}

std::size_t neuron_contribution_workspace_bytes(
    std::int64_t rows, std::int64_t experts, std::int64_t neurons
) {
    const Checks check("neuron_contribution_workspace_bytes", TensorView{});
    check.size("rows", rows);
    check.size("experts", experts);
    check.size("neurons", neurons);
    return cuda::neuron_contribution_workspace_bytes(rows, experts, neurons);
}

}  // namespace tenp
