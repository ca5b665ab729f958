// SPDX-License-Identifier: Apache-2.0
#include "tenp/expert_gemm.h"

#include <algorithm>
#include <type_traits>

#include "core/backend.h"
#include "core/dispatch.h"
#include "cuda/alignment.h"
#include "cuda/expert_gemm/layer.h"

namespace tenp::cuda {
namespace {

template <class T>
Layer<T> layer_of(const ExpertGemmArgs& args) {
    const std::int64_t hidden_size = args.hidden.shape[1];
    Layer<T> layer{};
    layer.hidden = data<const T>(args.hidden);
    layer.hidden_stride = args.hidden.stride[0];
    layer.expert_ids = data<const std::int32_t>(args.expert_ids);
    layer.gates = data<const float>(args.gates);
    // Rows of the gates come first; so do their biases.
    const auto* gate_up = data<const T>(args.gate_up);
    const std::int64_t packed_rows = args.down.shape[0];
    layer.gate = args.gated ? gate_up : nullptr;
    layer.up = gate_up + (args.gated ? packed_rows * hidden_size : 0);
    layer.weight_stride = hidden_size;
    layer.down = data<const T>(args.down);
    layer.widths = data<const std::int32_t>(args.widths);
    layer.neuron_offsets = data<const std::int32_t>(args.neuron_offsets);
    if (const auto* bias = data<const T>(args.gate_up_bias); bias != nullptr) {
        layer.gate_bias = args.gated ? bias : nullptr;
        layer.up_bias = bias + (args.gated ? packed_rows : 0);
    }
    layer.down_bias = data<const T>(args.down_bias);
    layer.out = data<T>(args.out);
    layer.out_stride = args.out.stride[0];
    layer.tokens = static_cast<int>(args.hidden.shape[0]);
    layer.per_token = static_cast<int>(args.expert_ids.shape[1]);
    layer.hidden_size = static_cast<int>(hidden_size);
    layer.experts = static_cast<int>(args.widths.shape[0]);
    layer.max_width = static_cast<int>(args.max_width);
    layer.activation = args.activation;
    layer.limit = args.limit;
    layer.alpha = args.alpha;
    layer.is_aligned = rows_are_aligned(layer.hidden, layer.hidden_stride) &&
                       rows_are_aligned(gate_up, hidden_size) &&
                       rows_are_aligned(layer.down, hidden_size);
    return layer;
}

}  // namespace

void expert_gemm(const ExpertGemmArgs& args, Stream stream) {
    if (args.out.shape[0] == 0 || args.out.shape[1] == 0) {
        return;
    }
    dispatch(args.hidden.dtype, Floats{}, [&]<class T>() {
        const Layer<T> layer = layer_of<T>(args);
        if constexpr (!std::is_same_v<T, float>) {
            if (layer.is_aligned && may_stream(layer)) {
                run_by_streaming(layer, args.gated, args.workspace.data, stream);
                return;
            }
        }
        run_by_tiles(layer, args.gated, args.allow_tf32, args.workspace.data, stream);
    });
}

std::size_t expert_gemm_workspace_bytes(
    std::int64_t tokens,
    std::int64_t experts_per_token,
    std::int64_t hidden_size,
    std::int64_t num_experts,
    std::int64_t max_width,
    DType dtype
) {
    std::size_t bytes = 0;
    dispatch(dtype, Floats{}, [&]<class T>() {
        Layer<T> layer{};
        layer.per_token = static_cast<int>(experts_per_token);
        layer.hidden_size = static_cast<int>(hidden_size);
        layer.experts = static_cast<int>(num_experts);
        layer.max_width = static_cast<int>(max_width);
        layer.tokens = static_cast<int>(tokens);
        bytes = tiles_workspace_bytes(layer);
        if constexpr (!std::is_same_v<T, float>) {
            if (may_stream(layer)) {
                bytes = std::max(bytes, streaming_workspace_bytes(layer));
            }
        }
    });
    return bytes;
}

}  // namespace tenp::cuda
