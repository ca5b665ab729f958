# SPDX-License-Identifier: Apache-2.0
"""The C++ API of tenp; shapes and contracts are in csrc/include/tenp/.

An array is anything with ``__dlpack__()``, or the capsule that it returns; a capsule
is read, not consumed. ``None`` stands for an absent array. Errors are those of
`tenp.errors`. Functions that take arrays release the GIL while they work.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

class _SupportsDLPack(Protocol):
    def __dlpack__(self) -> Any: ...

# A capsule has no type that a checker knows.
_Array: TypeAlias = _SupportsDLPack | Any

def version() -> str: ...
def cuda_is_available() -> bool: ...
def cuda_unavailable_reason() -> str: ...
def cpu_isa() -> str: ...
def num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def route(
    expert_ids: _Array,
    offsets: _Array,
    slots: _Array,
    rows: _Array,
    workspace: _Array | None = None,
    stream: int = 0,
) -> None: ...
def tile_table(
    offsets: _Array,
    widths: _Array,
    tiles: _Array,
    count: _Array,
    tile_rows: int,
    tile_neurons: int,
    stream: int = 0,
) -> None: ...
def tile_capacity(
    rows: int, experts: int, max_width: int, tile_rows: int, tile_neurons: int
) -> int: ...
def accumulate_activation_stats(
    outputs: _Array,
    gates: _Array,
    offsets: _Array,
    counts: _Array,
    gate_sum: _Array,
    norm_sum: _Array,
    gated_norm_sum: _Array,
    norm_max: _Array,
    workspace: _Array | None = None,
    stream: int = 0,
) -> None: ...
def accumulate_direction_change(
    hidden: _Array,
    outputs: _Array,
    tokens: _Array,
    gates: _Array,
    offsets: _Array,
    direction_change: _Array,
    workspace: _Array | None = None,
    stream: int = 0,
) -> None: ...
def accumulate_neuron_contribution(
    activations: _Array,
    outputs: _Array,
    down: _Array,
    gates: _Array,
    offsets: _Array,
    projection: _Array,
    magnitude: _Array,
    energy: _Array,
    peak: _Array,
    workspace: _Array | None = None,
    stream: int = 0,
) -> None: ...
def accumulate_second_moment(
    activations: _Array,
    gates: _Array,
    offsets: _Array,
    second_moment: _Array,
    has_bias: bool,
    stream: int = 0,
) -> None: ...
def expert_activations(
    hidden: _Array,
    offsets: _Array,
    slots: _Array,
    gate: _Array | None,
    up: _Array,
    gate_bias: _Array | None,
    up_bias: _Array | None,
    activations: _Array,
    per_token: int,
    activation: str,
    limit: float,
    alpha: float,
    workspace: _Array | None = None,
    stream: int = 0,
) -> None: ...
def expert_statistics(
    hidden: _Array,
    activations: _Array,
    down: _Array,
    down_bias: _Array | None,
    offsets: _Array,
    slots: _Array,
    rows: _Array,
    gates: _Array,
    out: _Array,
    counts: _Array,
    gate_sum: _Array,
    normalized_gate_sum: _Array,
    norm_sum: _Array,
    gated_norm_sum: _Array,
    norm_max: _Array,
    direction_change: _Array,
    input_energy: _Array,
    projection: _Array,
    magnitude: _Array,
    energy: _Array,
    peak: _Array,
    workspace: _Array,
    stream: int = 0,
) -> None: ...
def expert_activations_workspace_bytes(rows: int, experts: int, neurons: int) -> int: ...
def expert_statistics_workspace_bytes(
    rows: int, experts: int, hidden_size: int, neurons: int, dtype: str
) -> int: ...
def route_workspace_bytes(slots: int, experts: int) -> int: ...
def activation_stats_workspace_bytes(rows: int, experts: int) -> int: ...
def direction_change_workspace_bytes(rows: int, experts: int) -> int: ...
def neuron_contribution_workspace_bytes(rows: int, experts: int, neurons: int) -> int: ...
def expert_layout(widths: Sequence[int]) -> list[int]: ...
def expert_gemm(
    hidden: _Array,
    expert_ids: _Array,
    gates: _Array,
    gate_up: _Array,
    down: _Array,
    widths: _Array,
    neuron_offsets: _Array,
    gate_up_bias: _Array | None,
    down_bias: _Array | None,
    gate_up_scale: _Array | None,
    down_scale: _Array | None,
    out: _Array,
    workspace: _Array,
    activation: str,
    gated: bool,
    limit: float,
    alpha: float,
    max_width: int = -1,
    allow_tf32: bool = False,
    stream: int = 0,
) -> None: ...
def expert_gemm_workspace_bytes(
    tokens: int,
    experts_per_token: int,
    hidden_size: int,
    num_experts: int,
    max_width: int,
    dtype: str,
) -> int: ...
