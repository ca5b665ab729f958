// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cpu/isa/kernels.h"
#include "cpu/parallel.h"
#include "cpu/row_sums.h"
#include "cpu/scratch.h"

namespace tenp::cpu {
namespace {

/// Sums over the rows of one expert for one block of its neurons.
struct Sums {
    double projection[kGemmColumns] = {};
    double magnitude[kGemmColumns] = {};
    double energy[kGemmColumns] = {};
    double peak[kGemmColumns] = {};
};

/// Whether a product with `down` reads neurons (nn) or hidden dimensions (nt) one after another.
bool neurons_are_contiguous(const TensorView& down) {
    return down.stride[2] == 1 || down.shape[2] <= 1;
}

template <class T>
void add_block(
    const NeuronContributionArgs& args,
    const double* norms,
    std::int64_t expert,
    std::int64_t neuron,
    std::int64_t neurons
) {
    thread_local Scratch scratch;
    auto* gemm_scratch = scratch.get<float>(kGemmScratch + kGemmRows * kGemmColumns);
    float* products = gemm_scratch + kGemmScratch;
    const TypedKernels<T>& run = kernels().of<T>();
    const auto* offsets = data<const std::int32_t>(args.offsets);
    const TensorView& m = args.activations;
    const TensorView& y = args.outputs;
    const TensorView& down = args.down;
    const bool nn = neurons_are_contiguous(down);

    Sums sums;
    const std::int64_t last = offsets[expert + 1];
    for (std::int64_t row = offsets[expert]; row < last; row += kGemmRows) {
        const std::int64_t rows = std::min(kGemmRows, last - row);
        const T* block = data<const T>(down) + expert * down.stride[0] + neuron * down.stride[2];
        (nn ? run.gemm_nn : run.gemm_nt)({
            .a = {.data = data<const T>(y) + row * y.stride[0], .stride = y.stride[0]},
            .b = {.data = block, .stride = down.stride[nn ? 1 : 2]},
            .c = products,
            .c_stride = kGemmColumns,
            .rows = rows,
            .columns = neurons,
            .depth = down.shape[1],
            .scratch = gemm_scratch,
        });
        run.contribute({
            .activations =
                {.data = data<const T>(m) + row * m.stride[0] + neuron, .stride = m.stride[0]},
            .products = products,
            .products_stride = kGemmColumns,
            .norms = norms + row,
            .gates = data<const float>(args.gates) + row,
            .rows = rows,
            .count = neurons,
            .projection = sums.projection,
            .magnitude = sums.magnitude,
            .energy = sums.energy,
            .peak = sums.peak,
        });
    }

    const std::int64_t first = expert * down.shape[2] + neuron;
    for (std::int64_t n = 0; n < neurons; ++n) {
        data<double>(args.projection)[first + n] += sums.projection[n];
        data<double>(args.magnitude)[first + n] += sums.magnitude[n];
        data<double>(args.energy)[first + n] += sums.energy[n];
        double& peak = data<double>(args.peak)[first + n];
        peak = larger_or_nan(peak, sums.peak[n]);
    }
}

}  // namespace

void add_neuron_contribution(const NeuronContributionArgs& args, const double* norms) {
    const std::int64_t experts = args.down.shape[0];
    const std::int64_t width = args.down.shape[2];
    const std::int64_t blocks = (width + kGemmColumns - 1) / kGemmColumns;
    dispatch(args.activations.dtype, Floats{}, [&]<class T>() {
        parallel_for(experts * blocks, [&](std::int64_t task) {
            const std::int64_t neuron = task % blocks * kGemmColumns;
            const std::int64_t neurons = std::min(kGemmColumns, width - neuron);
            add_block<T>(args, norms, task / blocks, neuron, neurons);
        });
    });
}

void accumulate_neuron_contribution(const NeuronContributionArgs& args) {
    const auto* offsets = data<const std::int32_t>(args.offsets);
    const std::int64_t experts = args.down.shape[0];
    add_neuron_contribution(args, row_norms(args.outputs, offsets[0], offsets[experts]));
}

}  // namespace tenp::cpu
