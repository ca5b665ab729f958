# SPDX-License-Identifier: Apache-2.0
"""TENP's score of a neuron, its share of the length of the expert's output, and its rivals' sums.

The paper's Algorithm 1 builds a neurons x tokens x hidden tensor; here Q = Y W_d is formed block by
block, which gives the same number with one more GEMM and no such tensor.
"""

from torch import Tensor

from tenp import _C
from tenp.ops._binding import as_gates, call, cuda_workspace, extent, register


def accumulate_neuron_contribution(
    activations: Tensor,
    outputs: Tensor,
    down: Tensor,
    gates: Tensor,
    offsets: Tensor,
    *,
    projection: Tensor,
    magnitude: Tensor,
    energy: Tensor,
    peak: Tensor,
) -> None:
    """Add the per-neuron sums of one batch, per expert.

    For neuron k of expert e, with w_k column k of W_d, over the tokens t routed to e:

    - projection = sum m_tk <w_k, y_t> / |y_t|, signed: n_e times TENP's neuron importance P_k (He,
      Zhu, Xiong, Findings of ACL 2026, arXiv 2606.09885). y = 0 contributes 0. Where y = W_d m,
      sum_k projection_k = sum_t |y_t|.
    - magnitude = sum |m_tk|, energy = sum (g_t m_tk)^2, peak = max |g_t m_tk|.

    Args:
        activations: `[S, I]`, float32, bfloat16 or float16, rows of any stride. m, what W_d
            multiplies, ordered by expert; rows from `offsets[E]` on are not read.
        outputs: `[S, H]`, dtype of `activations`, rows of any stride. y = W_d m, before the gate
            and without the down bias.
        down: `[E, H, I]`, dtype of `activations`. W_d, any strides as long as H or I is contiguous.
        gates: `[S]`, floating point. The weight that multiplies the row in the model.
        offsets: `[E+1]`, int32. From `route`.
        projection: `[E, I]`, float64, added to.
        magnitude: `[E, I]`, float64, added to.
        energy: `[E, I]`, float64, added to.
        peak: `[E, I]`, float64, raised to the maximum. Start from zero.

    Raises:
        InvalidArgument: A shape, dtype, device or stride that does not fit.

    Note:
        2 S H I FLOPs, products in float32, sums over tokens in float64. A call adds its own sums
        once, so statistics of separate calls merge by addition bit for bit, and the result does not
        depend on the number of threads.

    Example:
        >>> down = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])  # one expert, two neurons
        >>> activations = torch.tensor([[3.0, 2.0]])
        >>> outputs = activations @ down[0].T  # [3, 4], of length 5
        >>> gates = torch.tensor([0.5])
        >>> offsets = torch.tensor([0, 1], dtype=torch.int32)
        >>> projection, magnitude, energy, peak = torch.zeros(4, 1, 2, dtype=torch.float64)
        >>> accumulate_neuron_contribution(
        ...     activations, outputs, down, gates, offsets,
        ...     projection=projection, magnitude=magnitude, energy=energy, peak=peak,
        ... )
        >>> [round(value, 4) for value in projection[0].tolist()]  # 9/5 and 16/5, together 5
        [1.8, 3.2]
        >>> magnitude.tolist(), energy.tolist(), peak.tolist()
        ([[3.0, 2.0]], [[2.25, 1.0]], [[1.5, 1.0]])
    """
    _ACCUMULATE(activations, outputs, down, gates, offsets, projection, magnitude, energy, peak)


def _accumulate(
    activations: Tensor,
    outputs: Tensor,
    down: Tensor,
    gates: Tensor,
    offsets: Tensor,
    projection: Tensor,
    magnitude: Tensor,
    energy: Tensor,
    peak: Tensor,
) -> None:
    call(
        _C.accumulate_neuron_contribution,
        activations.device,
        activations=activations,
        outputs=outputs,
        down=down,
        gates=as_gates(gates),
        offsets=offsets,
        projection=projection,
        magnitude=magnitude,
        energy=energy,
        peak=peak,
        **cuda_workspace(
            "neuron_contribution",
            outputs.device,
            extent(outputs, 0),
            extent(down, 0),
            extent(down, -1),
        ),
    )


def _fake_accumulate(*arguments: Tensor) -> None:
    return None


_ACCUMULATE = register(
    "accumulate_neuron_contribution(Tensor activations, Tensor outputs, Tensor down, Tensor gates, "
    "Tensor offsets, Tensor(a!) projection, Tensor(b!) magnitude, Tensor(c!) energy, "
    "Tensor(d!) peak) -> ()",
    _accumulate,
    _fake_accumulate,
)
