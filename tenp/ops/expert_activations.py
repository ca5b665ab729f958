# SPDX-License-Identifier: Apache-2.0
"""The neurons of a layer's experts at full width, with the weights as checkpoints have them."""

from torch import Tensor

from tenp import _C
from tenp.ops._binding import call, cuda_workspace, extent, register


def expert_activations(
    hidden: Tensor,
    offsets: Tensor,
    slots: Tensor,
    gate: Tensor | None,
    up: Tensor,
    experts_per_token: int,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "silu",
    limit: float = 0.0,
    alpha: float = 0.0,
) -> Tensor:
    """Compute the neurons of every row: m = act(W_g x + b_g) * (W_u x + b_u).

    Without a gate m = act(W_u x + b_u). The first half of a calibration's forward pass;
    `expert_statistics` is the second (notation of TENP: He, Zhu, Xiong, Findings of ACL 2026, arXiv
    2606.09885).

    Args:
        hidden: `[T, H]`, float32, bfloat16 or float16, rows of any stride. x.
        offsets: `[E+1]`, int32. From `route`.
        slots: `[S]`, int32. From `route`; row r belongs to token `slots[r] // experts_per_token`.
        gate: `[E, I, H]`, dtype of `hidden`, contiguous along H. W_g; None without a gate.
        up: `[E, I, H]`, like `gate` and with its strides. W_u. The two may be views of one tensor.
        experts_per_token: k.
        gate_bias: `[E, I]`, dtype of `hidden`, any strides, or None.
        up_bias: `[E, I]`, dtype of `hidden`, any strides, or None.
        activation: As in `expert_gemm`.
        limit: Of "swiglu_oai".
        alpha: Of "swiglu_oai".

    Returns:
        `[S, I]`, dtype and device of `hidden`, new. Rows from `offsets[E]` on, and before
        `offsets[0]`, are not written.

    Raises:
        InvalidArgument: A shape, dtype, device or name that does not fit.

    Note:
        4 S H I FLOPs (2 without a gate). Accumulated in float32, float32 products without tf32;
        rounded once. A row's result depends on nothing but the row.

    Example:
        >>> expert_activations(
        ...     hidden=torch.tensor([[1.0, 2.0]]),
        ...     offsets=torch.tensor([0, 1, 1], dtype=torch.int32),  # one row, of expert 0
        ...     slots=torch.tensor([0], dtype=torch.int32),
        ...     gate=None,
        ...     up=torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[0.0, 0.0], [0.0, 0.0]]]),
        ...     experts_per_token=1,
        ...     activation="relu",
        ... ).tolist()
        [[3.0, 0.0]]
    """
    activations: Tensor = _EXPERT_ACTIVATIONS(
        hidden, offsets, slots, gate, up, gate_bias, up_bias, experts_per_token, activation, limit,
        alpha,
    )  # fmt: skip
    return activations


def _expert_activations(
    hidden: Tensor,
    offsets: Tensor,
    slots: Tensor,
    gate: Tensor | None,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    experts_per_token: int,
    activation: str,
    limit: float,
    alpha: float,
) -> Tensor:
    activations = _fake(hidden, offsets, slots, gate, up)
    call(
        _C.expert_activations,
        hidden.device,
        hidden=hidden,
        offsets=offsets,
        slots=slots,
        gate=gate,
        up=up,
        gate_bias=gate_bias if gate_bias is None else gate_bias.contiguous(),
        up_bias=up_bias if up_bias is None else up_bias.contiguous(),
        activations=activations,
        per_token=experts_per_token,
        activation=activation,
        limit=limit,
        alpha=alpha,
        **cuda_workspace(
            "expert_activations", hidden.device, extent(slots, 0), extent(up, 0), extent(up, -2)
        ),
    )
    return activations


def _fake(
    hidden: Tensor,
    offsets: Tensor,
    slots: Tensor,
    gate: Tensor | None,
    up: Tensor,
    *arguments: object,
) -> Tensor:
    return hidden.new_empty((extent(slots, 0), extent(up, -2)))


_EXPERT_ACTIVATIONS = register(
    "expert_activations(Tensor hidden, Tensor offsets, Tensor slots, Tensor? gate, Tensor up, "
    "Tensor? gate_bias, Tensor? up_bias, SymInt experts_per_token, str activation, float limit, "
    "float alpha) -> Tensor",
    _expert_activations,
    _fake,
)
