// SPDX-License-Identifier: Apache-2.0
#include "cuda/expert_gemm/streaming.cuh"
#include "cuda/expert_gemm/tiles.cuh"

namespace tenp::cuda {

template std::size_t tiles_workspace_bytes(Layer<BFloat16>);
template void run_by_tiles(Layer<BFloat16>, bool, bool, void*, Stream);

template std::size_t activations_workspace_bytes(const Layer<BFloat16>&, std::int64_t);
template void run_activations(const Layer<BFloat16>&, std::int64_t, bool, void*, Stream);

template bool may_stream(const Layer<BFloat16>&);
template std::size_t streaming_workspace_bytes(Layer<BFloat16>);
template void run_by_streaming(Layer<BFloat16>, bool, void*, Stream);

}  // namespace tenp::cuda
