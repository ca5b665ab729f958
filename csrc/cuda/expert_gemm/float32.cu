// SPDX-License-Identifier: Apache-2.0
#include "cuda/expert_gemm/tiles.cuh"

namespace tenp::cuda {

template std::size_t tiles_workspace_bytes(Layer<float>);
template void run_by_tiles(Layer<float>, bool, bool, void*, Stream);

template std::size_t activations_workspace_bytes(const Layer<float>&, std::int64_t);
template void run_activations(const Layer<float>&, std::int64_t, bool, void*, Stream);

}  // namespace tenp::cuda
