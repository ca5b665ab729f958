# SPDX-License-Identifier: Apache-2.0
"""The second moment of an expert's neurons: what removing or refitting them costs."""

from torch import Tensor

from tenp import _C
from tenp.ops._binding import as_gates, call, register


def accumulate_second_moment(
    activations: Tensor,
    gates: Tensor,
    offsets: Tensor,
    *,
    second_moment: Tensor,
    has_bias: bool = False,
) -> None:
    """Add C = sum over the tokens t routed to an expert of g_t^2 m_t m_t^T.

    The error that a change D of the down projection makes, sum g^2 |D m|^2, is tr(D C D^T): all
    that repair, selection and allocation compute with.

    Args:
        activations: `[S, I]`, float32, bfloat16 or float16, rows of any stride. m, ordered by
            expert; rows from `offsets[E]` on are not read.
        gates: `[S]`, floating point. g.
        offsets: `[E+1]`, int32. From `route`.
        second_moment: `[E, n (n + 1) / 2]`, float64, added to. The upper triangle of C, row by row;
            n is I, or I + 1 with a bias.
        has_bias: Whether there is one more neuron, the last, of activation 1: the down bias.

    Raises:
        InvalidArgument: A shape, dtype or device that does not fit.

    Note:
        S n^2 FLOPs, half of what the full matrix would take: float64 on the CPU; on CUDA float32,
        without tf32, over 64 rows and float64 over those. A call adds its own sums once, so
        statistics of separate calls merge by addition bit for bit, and the result does not depend
        on threads or grids.

    Example:
        >>> second_moment = torch.zeros(1, 3, dtype=torch.float64)
        >>> accumulate_second_moment(
        ...     torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
        ...     torch.tensor([0.5, 1.0]),
        ...     torch.tensor([0, 2], dtype=torch.int32),
        ...     second_moment=second_moment,
        ... )
        >>> second_moment.tolist()  # C_00, C_01, C_11
        [[0.25, 0.5, 2.0]]
    """
    _ACCUMULATE(activations, gates, offsets, second_moment, has_bias)


def _accumulate(
    activations: Tensor, gates: Tensor, offsets: Tensor, second_moment: Tensor, has_bias: bool
) -> None:
    call(
        _C.accumulate_second_moment,
        activations.device,
        activations=activations,
        gates=as_gates(gates),
        offsets=offsets,
        second_moment=second_moment,
        has_bias=has_bias,
    )


def _fake_accumulate(*arguments: object) -> None:
    return None


_ACCUMULATE = register(
    "accumulate_second_moment(Tensor activations, Tensor gates, Tensor offsets, "
    "Tensor(a!) second_moment, bool has_bias) -> ()",
    _accumulate,
    _fake_accumulate,
)
