// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/workspace.h"
#include "tenp/expert_gemm.h"

namespace tenp::cuda {

/// One call of expert_gemm() as its kernels see it: T tokens of which `tokens` are in this launch.
template <class T>
struct Layer {
    const T* hidden;  // [T, H]
    std::int64_t hidden_stride;
    const std::int32_t* expert_ids;  // [T, k]
    const float* gates;              // [T, k]
    const T* gate;                   // [R, H], rows weight_stride apart; nullptr: not gated
    const T* up;                     // like gate
    std::int64_t weight_stride;
    const T* down;                       // [R, H]
    const std::int32_t* widths;          // [E]; nullptr: max_width each
    const std::int32_t* neuron_offsets;  // [E+1]; nullptr: experts lie expert_stride apart
    std::int64_t expert_stride;          // of gate and up when there are no neuron_offsets
    const T* gate_bias;                  // [R]; nullptr: none
    const T* up_bias;                    // [R]; nullptr: none
    const T* down_bias;                  // [E, H]; nullptr: none
    T* out;                              // [T, H]
    std::int64_t out_stride;

    int tokens;
    int per_token;
    int hidden_size;
    int experts;
    int max_width;
    Activation activation;
    float limit;
    float alpha;
    bool is_aligned;  // every row of hidden, gate, up and down starts at a multiple of 16 bytes

    // Workspace. Row r of m and y belongs to slot slots[r].
    std::int32_t* offsets;  // [E+1]
    std::int32_t* slots;    // [T*k]
    std::int32_t* rows;     // [T, k]
    T* activations;         // m: [T*k, activations_stride]
    std::int64_t activations_stride;
    bool activations_are_aligned;  // as is_aligned
    float* outputs;                // y: [T*k, H]

    /// Neurons of an expert. Never more than the caller said, for which there is room.
    __device__ __forceinline__ int width(int expert) const {
        return widths == nullptr ? max_width : min(widths[expert], max_width);
    }

    /// From the start of gate and up to a neuron of an expert.
    __device__ __forceinline__ std::int64_t weight_offset(int expert, int neuron) const {
        return neuron_offsets == nullptr
                   ? expert * expert_stride + neuron * weight_stride
                   : (std::int64_t{neuron_offsets[expert]} + neuron) * weight_stride;
    }
    /// From the start of their biases to the expert's first.
    __device__ __forceinline__ std::int64_t first_bias_row(int expert) const {
        return neuron_offsets == nullptr ? std::int64_t{expert} * max_width
                                         : neuron_offsets[expert];
    }
};

/// The part of the workspace that every path has, and the m and y of `rows` rows.
template <class T>
void take_layer(Workspace& workspace, Layer<T>& layer, std::int64_t rows) {
    constexpr std::int64_t kVector = 16 / static_cast<std::int64_t>(sizeof(T));
    layer.activations_stride = (layer.max_width + kVector - 1) / kVector * kVector;
    layer.offsets = workspace.take<std::int32_t>(layer.experts + 1);
    layer.slots = workspace.take<std::int32_t>(rows);
    layer.rows = workspace.take<std::int32_t>(rows);
    layer.activations_are_aligned = true;
    layer.activations = workspace.take<T>(rows * layer.activations_stride);
    layer.outputs = workspace.take<float>(rows * layer.hidden_size);
}

// Two paths: by tiles, for any layer, and by streaming weights, for few tokens of 16-bit elements
// whose rows start aligned. Bytes of workspace are those of layer.tokens tokens.

template <class T>
std::size_t tiles_workspace_bytes(Layer<T> layer);
template <class T>
void run_by_tiles(Layer<T> layer, bool is_gated, bool allow_tf32, void* workspace, Stream stream);

/// The first product alone, m of `rows` rows that are sorted already.
template <class T>
std::size_t activations_workspace_bytes(const Layer<T>& layer, std::int64_t rows);
template <class T>
void run_activations(
    const Layer<T>& layer, std::int64_t rows, bool is_gated, void* workspace, Stream stream
);

/// Whether there are few enough tokens, slots a token and experts.
template <class T>
bool may_stream(const Layer<T>& layer);
template <class T>
std::size_t streaming_workspace_bytes(Layer<T> layer);
template <class T>
void run_by_streaming(Layer<T> layer, bool is_gated, void* workspace, Stream stream);

}  // namespace tenp::cuda
