# SPDX-License-Identifier: Apache-2.0
"""The ops of tenp on torch tensors, CPU and CUDA.

Each is registered with `torch.library` under the namespace `tenp` and may be used inside
`torch.compile`. Shapes, dtypes and devices are checked by the native side. `reference` states every
op as its equation.
"""

from tenp.ops.activation_stats import accumulate_activation_stats
from tenp.ops.direction_change import accumulate_direction_change
from tenp.ops.expert_activations import expert_activations
from tenp.ops.expert_gemm import expert_gemm
from tenp.ops.expert_layout import neuron_offsets, pack, unpack
from tenp.ops.expert_statistics import expert_statistics
from tenp.ops.neuron_contribution import accumulate_neuron_contribution
from tenp.ops.routing import Routing, route, tile_table
from tenp.ops.second_moment import accumulate_second_moment
from tenp.ops.threads import num_threads, set_num_threads

__all__ = [
    "Routing",
    "accumulate_activation_stats",
    "accumulate_direction_change",
    "accumulate_neuron_contribution",
    "accumulate_second_moment",
    "expert_activations",
    "expert_gemm",
    "expert_statistics",
    "neuron_offsets",
    "num_threads",
    "pack",
    "route",
    "set_num_threads",
    "tile_table",
    "unpack",
]
