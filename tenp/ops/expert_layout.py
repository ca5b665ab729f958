# SPDX-License-Identifier: Apache-2.0
"""How the experts of one layer lie in memory when every expert has its own width.

One row per neuron: row `neuron_offsets(widths)[e] + j` of the gate, up and (transposed) down
matrices is neuron j of expert e. Each expert is padded with zero rows to a multiple of 16, so that
kernels work in whole blocks and never multiply a neighbour's rows. Removing neurons is dropping
rows; a width of 0 is an expert without neurons.
"""

from collections.abc import Sequence

from torch import Tensor

from tenp import _C
from tenp.errors import InvalidArgument

_INT32_MAX = 2**31 - 1


def neuron_offsets(widths: Sequence[int]) -> list[int]:
    """Return the first packed row of every expert, and R, the number of rows, at the end.

    Args:
        widths: W_e, neurons of each expert.

    Returns:
        E+1 integers.

    Raises:
        InvalidArgument: A width is negative, or R does not fit int32.

    Example:
        >>> neuron_offsets([16, 0, 17])
        [0, 16, 16, 48]
    """
    for width in widths:
        if abs(width) > _INT32_MAX:
            raise InvalidArgument(
                f"expert_layout: widths must be within 0..{_INT32_MAX}, got {width}"
            )
    return _C.expert_layout(list(widths))


def pack(
    gate: Sequence[Tensor] | None,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    widths: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Copy the matrices of a layer's experts into the layout that `expert_gemm` reads.

    Args:
        gate: E matrices `[W_e, H]`, or None for experts without a gate.
        up: E matrices `[W_e, H]`, same dtype and device, any strides.
        down: E matrices `[H, W_e]`.
        widths: W_e, neurons of each expert; must agree with the matrices.

    Returns:
        `gate_up`, `[2R, H]` (the R gate rows, then the R up rows; `[R, H]` without a gate), and
        `down`, `[R, H]`, both new, contiguous and zero in the padding rows. Any device, meta too.

    Raises:
        InvalidArgument: No expert, or a matrix whose shape is not the one `widths` asks for.

    Example:
        >>> up = [torch.ones(2, 4), torch.ones(0, 4)]
        >>> down = [torch.ones(4, 2), torch.ones(4, 0)]
        >>> gate_up, packed_down = pack(None, up, down, widths=[2, 0])
        >>> gate_up.shape, gate_up.sum().item()
        (torch.Size([16, 4]), 8.0)
    """
    if not down:
        raise InvalidArgument("pack: down must be a matrix per expert, got none")
    hidden_size = down[0].shape[0]
    _expect_one_per_expert("up", up, [(width, hidden_size) for width in widths])
    _expect_one_per_expert("down", down, [(hidden_size, width) for width in widths])
    if gate is not None:
        _expect_one_per_expert("gate", gate, [(width, hidden_size) for width in widths])

    offsets = neuron_offsets(widths)
    num_rows = offsets[-1]
    gated = gate is not None
    packed_gate_up = up[0].new_zeros((2 * num_rows if gated else num_rows, hidden_size))
    packed_down = down[0].new_zeros((num_rows, hidden_size))
    packed_gate, packed_up, packed_down_experts = unpack(
        packed_gate_up, packed_down, widths, gated=gated
    )
    for expert in range(len(widths)):
        if gate is not None and packed_gate is not None:
            packed_gate[expert].copy_(gate[expert])
        packed_up[expert].copy_(up[expert])
        packed_down_experts[expert].copy_(down[expert])
    return packed_gate_up, packed_down


def unpack(
    gate_up: Tensor, down: Tensor, widths: Sequence[int], *, gated: bool = True
) -> tuple[list[Tensor] | None, list[Tensor], list[Tensor]]:
    """View every expert of a packed layer as its own matrices, the inverse of `pack`.

    Args:
        gate_up: `[2R, H]`, or `[R, H]` without a gate.
        down: `[R, H]`.
        widths: W_e, neurons of each expert.
        gated: Whether `gate_up` holds gate rows before the up rows.

    Returns:
        gate (None when not gated), up and down: E matrices each, `[W_e, H]`, `[W_e, H]` and
        `[H, W_e]`. All are views: writing to them writes to the packed arrays.

    Raises:
        InvalidArgument: The packed arrays do not have the rows that `widths` asks for.

    Example:
        >>> gate_up, packed_down = torch.rand(32, 4), torch.rand(16, 4)
        >>> gate, up, down = unpack(gate_up, packed_down, widths=[3])
        >>> [tuple(matrix[0].shape) for matrix in (gate, up, down)]
        [(3, 4), (3, 4), (4, 3)]
    """
    offsets = neuron_offsets(widths)
    num_rows = offsets[-1]
    hidden_size = down.shape[-1]
    packed_rows = 2 * num_rows if gated else num_rows
    _expect_shape("unpack: gate_up", gate_up, (packed_rows, hidden_size))
    _expect_shape("unpack: down", down, (num_rows, hidden_size))

    def of_each_expert(packed: Tensor) -> list[Tensor]:
        firsts = offsets[:-1]
        return [packed[first : first + width] for first, width in zip(firsts, widths, strict=True)]

    gate = of_each_expert(gate_up[:num_rows]) if gated else None
    up = of_each_expert(gate_up[num_rows:] if gated else gate_up)
    return gate, up, [matrix.T for matrix in of_each_expert(down)]


def _expect_one_per_expert(
    name: str, matrices: Sequence[Tensor], shapes: Sequence[tuple[int, int]]
) -> None:
    if len(matrices) != len(shapes):
        raise InvalidArgument(f"pack: {name} must be {len(shapes)} matrices, got {len(matrices)}")
    for expert, (matrix, shape) in enumerate(zip(matrices, shapes, strict=True)):
        _expect_shape(f"pack: {name}[{expert}]", matrix, shape)


def _expect_shape(name: str, matrix: Tensor, shape: tuple[int, int]) -> None:
    if tuple(matrix.shape) != shape:
        raise InvalidArgument(f"{name} must be {list(shape)}, got {list(matrix.shape)}")
