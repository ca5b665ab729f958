// SPDX-License-Identifier: Apache-2.0
#include "cuda/expert_gemm/tiles.cuh"

namespace tenp::cuda {

template std::size_t tiles_workspace_bytes(Layer<float>);
template void run_by_tiles(Layer<float>, bool, bool, void*, Stream);

}  // namespace tenp::cuda
