// SPDX-License-Identifier: Apache-2.0
#include "tenp/expert_activations.h"

#include "core/backend.h"
#include "core/dispatch.h"
#include "cuda/alignment.h"
#include "cuda/expert_gemm/layer.h"

namespace tenp::cuda {

void expert_activations(const ExpertActivationsArgs& args, Stream stream) {
    const std::int64_t rows = args.activations.shape[0];
    if (args.up.shape[0] == 0 || rows == 0) {
        return;
    }
    dispatch(args.hidden.dtype, Floats{}, [&]<class T>() {
        const auto weights_are_aligned = [](const TensorView& view) {
            const auto* first = data<const T>(view);
            return rows_are_aligned(first, view.stride[0]) &&
                   rows_are_aligned(first, view.stride[1]);
        };
        const bool is_gated = args.gate.data != nullptr;
        Layer<T> layer{};
        layer.hidden = data<const T>(args.hidden);
        layer.hidden_stride = args.hidden.stride[0];
        layer.gate = data<const T>(args.gate);
        layer.up = data<const T>(args.up);
        layer.weight_stride = args.up.stride[1];
        layer.expert_stride = args.up.stride[0];
        layer.gate_bias = data<const T>(args.gate_bias);
        layer.up_bias = data<const T>(args.up_bias);
        layer.per_token = args.per_token;
        layer.hidden_size = static_cast<int>(args.hidden.shape[1]);
        layer.experts = static_cast<int>(args.up.shape[0]);
        layer.max_width = static_cast<int>(args.up.shape[1]);
        layer.activation = args.activation;
        layer.limit = args.limit;
        layer.alpha = args.alpha;
        layer.is_aligned = rows_are_aligned(layer.hidden, layer.hidden_stride) &&
                           weights_are_aligned(args.up) &&
                           (!is_gated || weights_are_aligned(args.gate));
        layer.offsets = const_cast<std::int32_t*>(data<const std::int32_t>(args.offsets));
        layer.slots = const_cast<std::int32_t*>(data<const std::int32_t>(args.slots));
        layer.activations = data<T>(args.activations);
        layer.activations_stride = args.activations.stride[0];
        layer.activations_are_aligned =
            rows_are_aligned(layer.activations, layer.activations_stride);
        run_activations(layer, rows, is_gated, args.workspace.data, stream);
    });
}

std::size_t expert_activations_workspace_bytes(
    std::int64_t rows, std::int64_t experts, std::int64_t neurons
) {
    Layer<float> layer{};
    layer.experts = static_cast<int>(experts);
    layer.max_width = static_cast<int>(neurons);
    return activations_workspace_bytes(layer, rows);
}

}  // namespace tenp::cuda
