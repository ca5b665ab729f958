# SPDX-License-Identifier: Apache-2.0
"""TENP's score of an expert: how far its outputs turn away from its inputs."""

from torch import Tensor

from tenp import _C
from tenp.ops._binding import as_gates, call, cuda_workspace, extent, register


def accumulate_direction_change(
    hidden: Tensor,
    outputs: Tensor,
    tokens: Tensor,
    gates: Tensor,
    offsets: Tensor,
    *,
    direction_change: Tensor,
) -> None:
    """Add TENP's expert importance of one batch, per expert.

    I_e = sum over the tokens t routed to e of g_t |y_t| (1 - cos(x_t, y_t)) (TENP, expert
    importance; He, Zhu, Xiong, Findings of ACL 2026, arXiv 2606.09885). A sum, not a mean. y = 0
    contributes 0; x = 0 has cos = 0.

    Args:
        hidden: `[T, H]`, float32, bfloat16 or float16, rows of any stride. x, what the router and
            the experts receive.
        outputs: `[S, H]`, dtype of `hidden`, rows of any stride. y, ordered by expert, before the
            gate; rows from `offsets[E]` on are not read.
        tokens: `[S]`, int32. Row to token: `slots // k` of `route`.
        gates: `[S]`, floating point. The weight that multiplies the row in the model.
        offsets: `[E+1]`, int32. From `route`.
        direction_change: `[E]`, float64, added to. I.

    Raises:
        InvalidArgument: A shape, dtype or device that does not fit.

    Note:
        Reads `outputs` once and a row of `hidden` per row. A call adds its own float64 sum once, so
        statistics of separate calls merge by addition bit for bit, and the result does not depend
        on the number of threads.

    Example:
        >>> hidden = torch.tensor([[1.0, 0.0]])
        >>> # along, across and against x
        >>> outputs = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
        >>> tokens = torch.tensor([0, 0, 0], dtype=torch.int32)
        >>> gates = torch.tensor([0.5, 0.5, 0.5])
        >>> offsets = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
        >>> direction_change = torch.zeros(3, dtype=torch.float64)
        >>> accumulate_direction_change(
        ...     hidden, outputs, tokens, gates, offsets, direction_change=direction_change
        ... )
        >>> direction_change.tolist()
        [0.0, 1.5, 1.0]
    """
    _ACCUMULATE(hidden, outputs, tokens, gates, offsets, direction_change)


def _accumulate(
    hidden: Tensor,
    outputs: Tensor,
    tokens: Tensor,
    gates: Tensor,
    offsets: Tensor,
    direction_change: Tensor,
) -> None:
    call(
        _C.accumulate_direction_change,
        outputs.device,
        hidden=hidden,
        outputs=outputs,
        tokens=tokens,
        gates=as_gates(gates),
        offsets=offsets,
        direction_change=direction_change,
        **cuda_workspace(
            "direction_change", outputs.device, extent(outputs, 0), extent(direction_change, 0)
        ),
    )


def _fake_accumulate(*arguments: Tensor) -> None:
    return None


_ACCUMULATE = register(
    "accumulate_direction_change(Tensor hidden, Tensor outputs, Tensor tokens, Tensor gates, "
    "Tensor offsets, Tensor(a!) direction_change) -> ()",
    _accumulate,
    _fake_accumulate,
)
