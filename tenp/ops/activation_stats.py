# SPDX-License-Identifier: Apache-2.0
"""Per expert: how often it was chosen, with which weight, and how large its outputs were."""

from torch import Tensor

from tenp import _C
from tenp.ops._binding import as_gates, call, cuda_workspace, extent, register


def accumulate_activation_stats(
    outputs: Tensor,
    gates: Tensor,
    offsets: Tensor,
    *,
    counts: Tensor,
    gate_sum: Tensor,
    norm_sum: Tensor,
    gated_norm_sum: Tensor,
    norm_max: Tensor,
) -> None:
    """Add the routing and output-norm sums of one batch, per expert.

    With y_t the output of expert e for token t and g_t its gate, over the tokens routed to e:
    n = sum 1, sum g, sum |y|, sum g |y| and max |y|. They are the terms of the frequency, gate and
    norm criteria that TENP is compared with (He, Zhu, Xiong, Findings of ACL 2026, arXiv
    2606.09885).

    Args:
        outputs: `[S, H]`, float32, bfloat16 or float16, rows of any stride. y, ordered by expert,
            before the gate; rows from `offsets[E]` on are not read.
        gates: `[S]`, floating point. The weight that multiplies the row in the model.
        offsets: `[E+1]`, int32. From `route`.
        counts: `[E]`, int64, added to. n.
        gate_sum: `[E]`, float64, added to. sum g.
        norm_sum: `[E]`, float64, added to. sum |y|.
        gated_norm_sum: `[E]`, float64, added to. sum g |y|.
        norm_max: `[E]`, float64, raised to max |y|. Start from zero.

    Raises:
        InvalidArgument: A shape, dtype or device that does not fit.

    Note:
        Reads `outputs` once. A call adds its own float64 sums once, so statistics of separate calls
        merge by addition bit for bit, and the result does not depend on the number of threads.

    Example:
        >>> outputs = torch.tensor([[3.0, 4.0], [0.0, 1.0]])  # |y| = 5, 1
        >>> gates = torch.tensor([0.5, 1.0])
        >>> offsets = torch.tensor([0, 2, 2], dtype=torch.int32)  # both rows go to expert 0
        >>> counts = torch.zeros(2, dtype=torch.int64)
        >>> gate_sum, norm_sum, gated_norm_sum, norm_max = torch.zeros(4, 2, dtype=torch.float64)
        >>> accumulate_activation_stats(
        ...     outputs, gates, offsets, counts=counts, gate_sum=gate_sum,
        ...     norm_sum=norm_sum, gated_norm_sum=gated_norm_sum, norm_max=norm_max,
        ... )
        >>> counts.tolist(), norm_sum.tolist(), gated_norm_sum.tolist(), norm_max.tolist()
        ([2, 0], [6.0, 0.0], [3.5, 0.0], [5.0, 0.0])
    """
    _ACCUMULATE(outputs, gates, offsets, counts, gate_sum, norm_sum, gated_norm_sum, norm_max)


def _accumulate(
    outputs: Tensor,
    gates: Tensor,
    offsets: Tensor,
    counts: Tensor,
    gate_sum: Tensor,
    norm_sum: Tensor,
    gated_norm_sum: Tensor,
    norm_max: Tensor,
) -> None:
    call(
        _C.accumulate_activation_stats,
        outputs.device,
        outputs=outputs,
        gates=as_gates(gates),
        offsets=offsets,
        counts=counts,
        gate_sum=gate_sum,
        norm_sum=norm_sum,
        gated_norm_sum=gated_norm_sum,
        norm_max=norm_max,
        **cuda_workspace("activation_stats", outputs.device, extent(outputs, 0), extent(counts, 0)),
    )


def _fake_accumulate(*arguments: Tensor) -> None:
    return None


_ACCUMULATE = register(
    "accumulate_activation_stats(Tensor outputs, Tensor gates, Tensor offsets, "
    "Tensor(a!) counts, Tensor(b!) gate_sum, Tensor(c!) norm_sum, Tensor(d!) gated_norm_sum, "
    "Tensor(e!) norm_max) -> ()",
    _accumulate,
    _fake_accumulate,
)
