# SPDX-License-Identifier: Apache-2.0
"""The forward pass of a layer's routed experts, every expert with its own width."""

import threading

import torch
from torch import Tensor

from tenp import _C
from tenp.ops._binding import as_expert_ids, as_gates, call, extent, register, register_gradient
from tenp.ops.expert_gemm_backward import backward, keep_arguments


def expert_gemm(
    hidden: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    widths: Tensor,
    neuron_offsets: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    limit: float = 0.0,
    alpha: float = 0.0,
    max_width: int | None = None,
    allow_tf32: bool = False,
) -> Tensor:
    """Apply the routed experts of one layer, each with its own width.

    out_t = sum over the slots j of g_tj (W_d m + b_d) of expert e = expert_ids[t, j], with
    m = act(W_g x_t + b_g) * (W_u x_t + b_u), or m = act(W_u x_t + b_u) for experts without a gate
    (notation of TENP: He, Zhu, Xiong, Findings of ACL 2026, arXiv 2606.09885).

    Args:
        hidden: `[T, H]`, float32, bfloat16 or float16, rows of any stride. x. Inside `torch.autocast`
            it is converted to the dtype of the weights, as in the experts of transformers.
        expert_ids: `[T, k]`, int8 to int64 or uint8. An id outside `0..E-1` names no expert.
        gates: `[T, k]`, floating point. g.
        gate_up: `[2R, H]`, dtype of `hidden` or int8. Gate rows, then up rows, packed by
            `expert_layout.pack`; `[R, H]` without a gate.
        down: `[R, H]`, dtype of `gate_up`. One row per neuron.
        widths: `[E]`, int32. Neurons of each expert, W_e; 0 is legal and leaves only `down_bias`.
        neuron_offsets: `[E+1]`, int32. `expert_layout.neuron_offsets(widths)`.
        gate_up_bias: `[2R]` (`[R]` without a gate), dtype of `hidden`, or None.
        down_bias: `[E, H]`, dtype of `hidden`, or None.
        gate_up_scale: `[2R]` (`[R]` without a gate), dtype of `hidden`. With int8 weights only: what
            their rows are multiplied by.
        down_scale: `[R]`, dtype of `hidden`. With int8 weights only.
        activation: "silu", "gelu" (by erf), "gelu_tanh", "relu", "relu2" (relu squared) or
            "swiglu_oai", which is m = (up + 1) * gate * sigmoid(alpha * gate) after gate was
            clamped to at most `limit` and up to `-limit..limit`.
        gated: Whether the experts have a gate matrix.
        limit: Of "swiglu_oai".
        alpha: Of "swiglu_oai".
        max_width: The largest of `widths`, for the size of the workspace. None reads it, which
            synchronises on CUDA.
        allow_tf32: Whether products of float32 on CUDA may round their factors to 11 significant
            bits, for the speed of the matrix instruction.

    Returns:
        `[T, H]`, dtype and device of `hidden`, new and contiguous. 0 where a token has no expert.

    Raises:
        InvalidArgument: A shape, dtype, device or name that does not fit.
        Unsupported: In backward, when the gradient itself is to be differentiated, or the weights are
            int8. On CUDA, int8 weights and more than 12288 experts.

    Note:
        6 S H W FLOPs for S rows of width W. Accumulated in float32; rounded to the dtype twice: m
        and the result. The result is the same bits in every run and for any number of threads.
        On the CPU each calling thread keeps its workspace, as large as its largest call needed.
        On CUDA the workspace comes from torch's allocator, so the call can be captured in a graph.

    Example:
        >>> from tenp.ops.expert_layout import neuron_offsets, pack
        >>> widths = [2, 0]  # the second expert has lost all its neurons
        >>> gate_up, down = pack(
        ...     gate=[torch.ones(2, 3), torch.ones(0, 3)],
        ...     up=[torch.ones(2, 3), torch.ones(0, 3)],
        ...     down=[torch.ones(3, 2), torch.ones(3, 0)],
        ...     widths=widths,
        ... )
        >>> out = expert_gemm(
        ...     hidden=torch.ones(2, 3),
        ...     expert_ids=torch.tensor([[0], [1]]),
        ...     gates=torch.tensor([[0.5], [0.5]]),
        ...     gate_up=gate_up,
        ...     down=down,
        ...     widths=torch.tensor(widths, dtype=torch.int32),
        ...     neuron_offsets=torch.tensor(neuron_offsets(widths), dtype=torch.int32),
        ...     activation="relu",
        ... )
        >>> out.tolist()  # 0.5 * (2 neurons of relu(3) * 3), and nothing
        [[9.0, 9.0, 9.0], [0.0, 0.0, 0.0]]
    """
    dtype = hidden.dtype
    of_weights = (gate_up if gate_up_scale is None else gate_up_scale).dtype
    if dtype != of_weights and torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(of_weights)
    arguments = (
        hidden,
        expert_ids,
        gates,
        gate_up,
        down,
        widths,
        neuron_offsets,
        gate_up_bias,
        down_bias,
        gate_up_scale,
        down_scale,
        activation,
        gated,
        limit,
        alpha,
        max_width,
        allow_tf32,
    )
    out: Tensor
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        out = _EXPERT_GEMM(*arguments)
    else:
        # torch's way through a gradient written in Python costs as much as the rest of a small
        # call, even when nothing is differentiated.
        with torch._C._AutoDispatchBelowAutograd():
            out = _EXPERT_GEMM(*arguments)
    return out.to(dtype)


class _Workspaces(threading.local):
    """One scratch buffer per calling thread, grown and never shrunk.

    Mapping and faulting in fresh pages for every call costs more than the arithmetic of a small
    one.
    """

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def of_at_least(self, num_bytes: int) -> Tensor:
        if self.buffer.numel() < num_bytes:
            # Freed first, so that the old and the new one never coexist.
            self.buffer = torch.empty(0, dtype=torch.uint8)
            self.buffer = torch.empty(num_bytes, dtype=torch.uint8)
        return self.buffer


_cpu_workspaces = _Workspaces()


def _expert_gemm(
    hidden: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    widths: Tensor,
    neuron_offsets: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    activation: str,
    gated: bool,
    limit: float,
    alpha: float,
    max_width: int | None,
    allow_tf32: bool,
) -> Tensor:
    num_experts = extent(widths, 0)
    if max_width is None:
        max_width = int(widths.max()) if num_experts else 0
    num_bytes = _C.expert_gemm_workspace_bytes(
        extent(hidden, 0),
        extent(expert_ids, -1),
        extent(hidden, -1),
        num_experts,
        max_width,
        str(hidden.dtype).removeprefix("torch."),
    )
    if hidden.device.type == "cpu":
        workspace = _cpu_workspaces.of_at_least(num_bytes)
    else:
        workspace = hidden.new_empty((num_bytes,), dtype=torch.uint8)
    on_cuda = (
        {} if hidden.device.type == "cpu" else {"max_width": max_width, "allow_tf32": allow_tf32}
    )
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    call(
        _C.expert_gemm,
        hidden.device,
        hidden=hidden,
        expert_ids=as_expert_ids(expert_ids, num_experts),
        gates=as_gates(gates),
        gate_up=gate_up,
        down=down,
        widths=widths,
        neuron_offsets=neuron_offsets,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        gate_up_scale=gate_up_scale,
        down_scale=down_scale,
        out=out,
        workspace=workspace,
        activation=activation,
        gated=gated,
        limit=limit,
        alpha=alpha,
        **on_cuda,
    )
    return out


def _fake_expert_gemm(hidden: Tensor, *arguments: object) -> Tensor:
    return hidden.new_empty(hidden.shape)


_EXPERT_GEMM = register(
    "expert_gemm(Tensor hidden, Tensor expert_ids, Tensor gates, Tensor gate_up, Tensor down, "
    "Tensor widths, Tensor neuron_offsets, Tensor? gate_up_bias, Tensor? down_bias, "
    "Tensor? gate_up_scale, Tensor? down_scale, str activation, bool gated, float limit, "
    "float alpha, SymInt? max_width, bool allow_tf32) -> Tensor",
    _expert_gemm,
    _fake_expert_gemm,
)

register_gradient("expert_gemm", backward, keep_arguments)
