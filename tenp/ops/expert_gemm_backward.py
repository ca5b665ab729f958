# SPDX-License-Identifier: Apache-2.0
"""The gradient of `expert_gemm`.

Written in torch, expert by expert: training spends its time in large products, which torch has.
Nothing but the arguments is kept from the forward pass; m is computed again.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from tenp.errors import Unsupported
from tenp.ops._binding import register, register_gradient
from tenp.ops.reference import activate
from tenp.ops.routing import route


def _expert_gemm_backward(of_out: Tensor, hidden: Tensor, *arguments: Any) -> list[Tensor]:
    # Inside torch.autocast the products below would be rounded.
    with torch.autocast(hidden.device.type, enabled=False):
        return _gradients(of_out, hidden, *arguments)


def _gradients(
    of_out: Tensor,
    hidden: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    widths: Tensor,
    neuron_offsets: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    limit: float,
    alpha: float,
    wanted: list[bool],
) -> list[Tensor]:
    """Return the gradients of sum(out * of_out) with respect to the arguments that are `wanted`.

    These are, in this order, `hidden`, `gates`, `gate_up`, `down`, `gate_up_bias` and `down_bias`.
    With v the row of `of_out`, g the gate and p the projections of a row, out = g (W_d m + b_d):

    - g gets <y, v>, b_d gets g v, W_d gets g v m^T, and m gets W_d^T g v;
    - the activation carries that to p = W x + b; b gets it, W gets it times x^T, x gets W^T times it.

    Computed in float32, or float64 if `hidden` is, and rounded once to the dtype of the argument.
    m is rounded as in the forward pass, and the gradient passes through that rounding. Every sum
    has one order: the result is the same bits in every run. On CUDA the call synchronises.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    num_slots = expert_ids.shape[-1]
    routing = route(expert_ids, len(widths))
    bounds, slots = routing.offsets.tolist(), routing.slots.long()
    first_up_row = len(down) if gated else 0
    arguments = (hidden, gates, gate_up, down, gate_up_bias, down_bias)
    results = [
        argument.new_zeros(argument.shape) if is_wanted and argument is not None else None
        for argument, is_wanted in zip(arguments, wanted, strict=True)
    ]
    of_hidden, of_gates, of_gate_up, of_down, of_gate_up_bias, of_down_bias = results
    # By slot, to be added up in slot order: adding to a token's row at once would race on CUDA.
    of_x = hidden.new_zeros(len(slots) if wanted[0] else 0, hidden.shape[-1], dtype=dtype)
    begins = neuron_offsets.tolist()

    for expert, width in enumerate(widths.tolist()):
        begin = begins[expert]
        rows = slots[bounds[expert] : bounds[expert + 1]]
        if len(rows) == 0:
            continue
        neurons = slice(begin, begin + width)
        up_neurons = slice(first_up_row + begin, first_up_row + begin + width)
        parts = [neurons, up_neurons] if gated else [up_neurons]

        token = rows // num_slots
        x = hidden[token].to(dtype)  # [M, H]
        v = of_out[token].to(dtype)  # [M, H]
        g = gates.flatten()[rows, None].to(dtype)  # [M, 1]
        w_d = down[neurons].to(dtype)  # [W_e, H]
        projections = [_project(x, gate_up, gate_up_bias, part) for part in parts]  # [M, W_e]
        gate, up = projections if gated else (None, projections[0])
        m = activate(gate, up, activation, limit, alpha).to(hidden.dtype).to(dtype)

        if of_gates is not None:
            y = m @ w_d if down_bias is None else m @ w_d + down_bias[expert].to(dtype)
            of_gates.view(-1)[rows] = (y * v).sum(dim=1).to(gates.dtype)
        if of_down is not None:
            of_down[neurons] = (m.T @ (g * v)).to(of_down.dtype)
        if of_down_bias is not None:
            of_down_bias[expert] = (g * v).sum(dim=0).to(of_down_bias.dtype)
        of_m = (g * v) @ w_d.T
        of_projections = _through_activation(of_m, gate, up, activation, limit, alpha)
        for part, of_p in zip(parts, of_projections, strict=True):
            if of_gate_up is not None:
                of_gate_up[part] = (of_p.T @ x).to(of_gate_up.dtype)
            if of_gate_up_bias is not None:
                of_gate_up_bias[part] = of_p.sum(dim=0).to(of_gate_up_bias.dtype)
            if of_hidden is not None:
                of_x[rows] += of_p @ gate_up[part].to(dtype)

    if of_hidden is not None:
        of_hidden.copy_(of_x.unflatten(0, expert_ids.shape).sum(dim=1))
    return [result for result in results if result is not None]


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    own = None if bias is None else bias[part].to(x.dtype)
    return functional.linear(x, weight[part].to(x.dtype), own)


#: Activation to its derivative at p, times what is given.
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda of_m, p: torch.ops.aten.gelu_backward(of_m, p, approximate="tanh"),
    "relu": lambda of_m, p: of_m * (p > 0),
    "relu2": lambda of_m, p: of_m * 2 * functional.relu(p),
}


def _through_activation(
    of_m: Tensor, gate: Tensor | None, up: Tensor, activation: str, limit: float, alpha: float
) -> list[Tensor]:
    """Return the gradients of the projections, gate and up, or up alone."""
    if activation == "swiglu_oai":
        assert gate is not None
        glu = gate.clamp(max=limit)
        sigmoid = torch.sigmoid(alpha * glu)
        slope = sigmoid * (1 + alpha * glu * (1 - sigmoid)) * (gate <= limit)
        of_gate = of_m * (up.clamp(-limit, limit) + 1) * slope
        return [of_gate, of_m * glu * sigmoid * (up.abs() <= limit)]
    derivative = _DERIVATIVES[activation]
    if gate is None:
        return [derivative(of_m, up)]
    return [derivative(of_m * up, gate), of_m * activate(None, gate, activation, limit, alpha)]


def _fake_expert_gemm_backward(of_out: Tensor, *arguments: Any) -> list[Tensor]:
    hidden, _, gates, gate_up, down, _, _, gate_up_bias, down_bias, *_, wanted = arguments
    differentiable = (hidden, gates, gate_up, down, gate_up_bias, down_bias)
    return [
        argument.new_empty(argument.shape)
        for argument, is_wanted in zip(differentiable, wanted, strict=True)
        if is_wanted
    ]


EXPERT_GEMM_BACKWARD = register(
    "expert_gemm_backward(Tensor of_out, Tensor hidden, Tensor expert_ids, Tensor gates, "
    "Tensor gate_up, Tensor down, Tensor widths, Tensor neuron_offsets, Tensor? gate_up_bias, "
    "Tensor? down_bias, str activation, bool gated, float limit, float alpha, bool[] wanted) "
    "-> Tensor[]",
    _expert_gemm_backward,
    _fake_expert_gemm_backward,
)


def _refuse(ctx: Any, *of_results: Any) -> NoReturn:
    raise Unsupported("expert_gemm has first derivatives only: its gradient has no gradient")


register_gradient("expert_gemm_backward", _refuse)


# ---- what torch asks of `expert_gemm` ----

#: Where the differentiable arguments are in the schema of `expert_gemm`.
_DIFFERENTIABLE = (0, 2, 3, 4, 7, 8)


def keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Remember what the gradient needs: the arguments, in the order of the schema."""
    *tensors, _, ctx.scale, ctx.activation, ctx.gated, ctx.limit, ctx.alpha, _, _ = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient of every argument of `expert_gemm`, None where there is none."""
    if ctx.scale is not None:
        raise Unsupported("expert_gemm has no gradient for int8 weights; dequantize them")
    wanted = [ctx.needs_input_grad[position] for position in _DIFFERENTIABLE]
    found = iter(
        EXPERT_GEMM_BACKWARD(
            of_out, *ctx.saved_tensors, ctx.activation, ctx.gated, ctx.limit, ctx.alpha, wanted
        )
    )
    of_arguments: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for position, is_wanted in zip(_DIFFERENTIABLE, wanted, strict=True):
        if is_wanted:
            of_arguments[position] = next(found)
    return tuple(of_arguments)
