// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "cuda/expert_gemm/layer.h"
#include "cuda/expert_gemm/streaming_activations.cuh"
#include "cuda/expert_gemm/streaming_outputs.cuh"
#include "cuda/launch.cuh"

// expert_gemm for few tokens, where reading the weights once is all the time there is: they go from
// memory to registers, 16 bytes a lane. Two launches. Both sort the slots by themselves, in shared
// memory, so that nothing comes before the first weights.

namespace tenp::cuda {
namespace {

template <class T>
StreamBuffers take_stream_buffers(Workspace& workspace, const Layer<T>& layer) {
    const int blocks = (layer.hidden_size + kUnitColumns - 1) / kUnitColumns;
    StreamBuffers buffers;
    buffers.taken = workspace.take<std::int32_t>(1);
    buffers.arrival_count = layer.tokens * blocks;
    buffers.arrivals = workspace.take<std::int32_t>(buffers.arrival_count);
    return buffers;
}

template <class T, bool kGated>
void launch_streams(const Layer<T>& layer, const StreamBuffers& buffers, Stream stream) {
    const int slots = layer.tokens * layer.per_token;
    const std::size_t routing_bytes = SmallRouting::bytes(layer.experts, slots);
    const std::int64_t active = std::min<std::int64_t>(layer.experts, slots);
    // Rows beyond an expert's first pass add at most slots / kPassRows passes in all.
    const std::int64_t neuron_units =
        (active + slots / kPassRows) * ((layer.max_width + kUnitNeurons - 1) / kUnitNeurons);
    const std::int64_t column_units =
        active * ((layer.hidden_size + kUnitColumns - 1) / kUnitColumns);
    launch_persistent(
        stream_activations_kernel<T, kGated>, neuron_units,
        {.threads = kThreads, .shared_bytes = kWarps * sizeof(PartialSums<kGated>) + routing_bytes},
        stream, layer, buffers
    );
    launch_persistent(
        stream_outputs_kernel<T>, column_units,
        {.threads = kThreads,
         .shared_bytes = sizeof(float) * kWarps * kOutputRows * kUnitColumns +
                         sizeof(int) * (kMostTokens + 2) + routing_bytes,
         .overlap_previous = true},
        stream, layer, buffers
    );
}

}  // namespace

template <class T>
bool may_stream(const Layer<T>& layer) {
    return layer.tokens <= kMostTokens && layer.per_token <= kMostPerToken &&
           layer.experts <= kMostExperts;
}

template <class T>
std::size_t streaming_workspace_bytes(Layer<T> layer) {
    Workspace workspace;
    take_layer(workspace, layer, std::int64_t{layer.tokens} * layer.per_token);
    take_stream_buffers(workspace, layer);
    return workspace.bytes();
}

template <class T>
void run_by_streaming(Layer<T> layer, bool is_gated, void* memory, Stream stream) {
    Workspace workspace(memory);
    take_layer(workspace, layer, std::int64_t{layer.tokens} * layer.per_token);
    const StreamBuffers buffers = take_stream_buffers(workspace, layer);
    if (is_gated) {
        launch_streams<T, true>(layer, buffers, stream);
    } else {
        launch_streams<T, false>(layer, buffers, stream);
    }
}

}  // namespace tenp::cuda
