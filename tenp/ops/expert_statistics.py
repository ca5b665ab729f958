# SPDX-License-Identifier: Apache-2.0
"""What a layer's experts put out, and in the same pass all that calibration keeps of it."""

import torch
from torch import Tensor

from tenp import _C
from tenp.ops._binding import as_gates, call, extent, register


def expert_statistics(
    hidden: Tensor,
    activations: Tensor,
    down: Tensor,
    offsets: Tensor,
    slots: Tensor,
    rows: Tensor,
    gates: Tensor,
    *,
    down_bias: Tensor | None = None,
    out: Tensor,
    counts: Tensor,
    gate_sum: Tensor,
    normalized_gate_sum: Tensor,
    norm_sum: Tensor,
    gated_norm_sum: Tensor,
    norm_max: Tensor,
    direction_change: Tensor,
    input_energy: Tensor,
    projection: Tensor,
    magnitude: Tensor,
    energy: Tensor,
    peak: Tensor,
) -> None:
    """Add one batch to the output of a layer's experts and to every statistic of them.

    y = W_d m, rounded to the dtype, is formed once. Of it come out_t = sum over the rows of t of
    g (y + b_d), and the sums of `accumulate_activation_stats`, `accumulate_direction_change` and
    `accumulate_neuron_contribution`; of the input sum g^2 x^2 and the sum of the gate's share of
    its token's gates (TENP and its rivals: He, Zhu, Xiong, Findings of ACL 2026, arXiv 2606.09885).

    Args:
        hidden: `[T, H]`, float32, bfloat16 or float16, rows of any stride. x.
        activations: `[S, I]`, dtype of `hidden`, rows of any stride. m, from `expert_activations`.
        down: `[E, H, I]`, dtype of `hidden`, contiguous along H or I. W_d.
        offsets: `[E+1]`, int32. From `route`.
        slots: `[S]`, int32. From `route`.
        rows: `[T, k]`, int32. From `route`. A row outside `offsets[0]..offsets[E]-1` is another
            call's, so that experts may come in several calls: in ascending order they give the same
            bits as one call.
        gates: `[T, k]`, floating point. g; 0 where a slot names no expert.
        down_bias: `[E, H]`, dtype of `hidden`, or None. b_d; of `out` alone.
        out: `[T, H]`, float32, added to, by ascending row.
        counts: `[E]`, int64, added to. n.
        gate_sum: `[E]`, float64, added to. sum g.
        normalized_gate_sum: `[E]`, float64, added to. sum g / (sum of the token's g).
        norm_sum: `[E]`, float64, added to. sum |y|.
        gated_norm_sum: `[E]`, float64, added to. sum g |y|.
        norm_max: `[E]`, float64, raised to max |y|.
        direction_change: `[E]`, float64, added to. sum g |y| (1 - cos(x, y)).
        input_energy: `[E, H]`, float64, added to. sum g^2 x^2.
        projection: `[E, I]`, float64, added to. sum m <w, y> / |y|.
        magnitude: `[E, I]`, float64, added to. sum |m|.
        energy: `[E, I]`, float64, added to. sum (g m)^2.
        peak: `[E, I]`, float64, raised to max |g m|.

    Raises:
        InvalidArgument: A shape, dtype or device that does not fit.

    Note:
        4 S H I FLOPs. On CUDA |y|^2, <x, y> and |x|^2 are taken while y is still on the chip, in
        float32 over 256 dimensions and in float64 over those. Sums over rows are float64, in an
        order that the rows alone decide, and added once: results do not depend on threads or grids,
        and statistics of separate calls merge by addition bit for bit.

    Example:
        >>> zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64)
        >>> names = ("gate_sum", "normalized_gate_sum", "norm_sum", "gated_norm_sum", "norm_max",
        ...          "direction_change")
        >>> sums = {name: zeros(1) for name in names}
        >>> sums |= {name: zeros(1, 1) for name in ("projection", "magnitude", "energy", "peak")}
        >>> sums |= {"counts": torch.zeros(1, dtype=torch.int64), "input_energy": zeros(1, 2)}
        >>> out = torch.zeros(1, 2)
        >>> expert_statistics(
        ...     hidden=torch.tensor([[1.0, 0.0]]),
        ...     activations=torch.tensor([[2.0]]),  # y = 2 (3, 4), |y| = 10
        ...     down=torch.tensor([[[3.0], [4.0]]]),
        ...     offsets=torch.tensor([0, 1], dtype=torch.int32),
        ...     slots=torch.tensor([0], dtype=torch.int32),
        ...     rows=torch.tensor([[0]], dtype=torch.int32),
        ...     gates=torch.tensor([[0.5]]),
        ...     out=out,
        ...     **sums,
        ... )
        >>> out.tolist(), sums["norm_sum"].tolist(), sums["direction_change"].tolist()
        ([[3.0, 4.0]], [10.0], [2.0])
    """
    _EXPERT_STATISTICS(
        hidden, activations, down, down_bias, offsets, slots, rows, gates, out, counts, gate_sum,
        normalized_gate_sum, norm_sum, gated_norm_sum, norm_max, direction_change, input_energy,
        projection, magnitude, energy, peak,
    )  # fmt: skip


def _expert_statistics(
    hidden: Tensor,
    activations: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    offsets: Tensor,
    slots: Tensor,
    rows: Tensor,
    gates: Tensor,
    out: Tensor,
    counts: Tensor,
    gate_sum: Tensor,
    normalized_gate_sum: Tensor,
    norm_sum: Tensor,
    gated_norm_sum: Tensor,
    norm_max: Tensor,
    direction_change: Tensor,
    input_energy: Tensor,
    projection: Tensor,
    magnitude: Tensor,
    energy: Tensor,
    peak: Tensor,
) -> None:
    num_bytes = _C.expert_statistics_workspace_bytes(
        extent(slots, 0),
        extent(down, 0),
        extent(hidden, -1),
        extent(activations, -1),
        str(hidden.dtype).removeprefix("torch."),
    )
    call(
        _C.expert_statistics,
        hidden.device,
        hidden=hidden,
        activations=activations,
        down=down,
        down_bias=down_bias,
        offsets=offsets,
        slots=slots,
        rows=rows,
        gates=as_gates(gates),
        out=out,
        counts=counts,
        gate_sum=gate_sum,
        normalized_gate_sum=normalized_gate_sum,
        norm_sum=norm_sum,
        gated_norm_sum=gated_norm_sum,
        norm_max=norm_max,
        direction_change=direction_change,
        input_energy=input_energy,
        projection=projection,
        magnitude=magnitude,
        energy=energy,
        peak=peak,
        workspace=torch.empty(num_bytes, dtype=torch.uint8, device=hidden.device),
    )


def _fake(*arguments: object) -> None:
    return None


_EXPERT_STATISTICS = register(
    "expert_statistics(Tensor hidden, Tensor activations, Tensor down, Tensor? down_bias, "
    "Tensor offsets, Tensor slots, Tensor rows, Tensor gates, Tensor(a!) out, Tensor(b!) counts, "
    "Tensor(c!) gate_sum, Tensor(d!) normalized_gate_sum, Tensor(e!) norm_sum, "
    "Tensor(f!) gated_norm_sum, Tensor(g!) norm_max, Tensor(h!) direction_change, "
    "Tensor(i!) input_energy, Tensor(j!) projection, Tensor(k!) magnitude, Tensor(l!) energy, "
    "Tensor(m!) peak) -> ()",
    _expert_statistics,
    _fake,
)
