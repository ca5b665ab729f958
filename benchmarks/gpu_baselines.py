# SPDX-License-Identifier: Apache-2.0
"""What else computes the experts of a layer on a GPU, for the timing table of gpu_suite.py.

None of them knows experts of different widths: all are given the weights padded with zeros to the
widest expert. Each is a call on the tensors of `expert_gemm`, or a sentence that says why it cannot
be had here. A fused MoE in Triton is not among them: it would have to be written and tuned first, on
a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

Baseline = Callable[[], Any]


def padded_weights(
    gate_up: Any, down: Any, widths: list[int], offsets: list[int]
) -> tuple[Any, Any]:
    """Return `[E, 2W, H]` (gate rows, then up rows) and `[E, H, W]` with W the largest width."""
    import torch

    width, hidden_size, rows = max(widths), down.shape[1], len(down)
    joined = gate_up.new_zeros(len(widths), 2, width, hidden_size)
    transposed = down.new_zeros(len(widths), width, hidden_size)
    for expert, (own, first) in enumerate(zip(widths, offsets, strict=False)):
        joined[expert, 0, :own] = gate_up[first : first + own]
        joined[expert, 1, :own] = gate_up[rows + first : rows + first + own]
        transposed[expert, :own] = down[first : first + own]
    # As checkpoints have them: the neurons of down lie next to each other.
    return joined.flatten(1, 2), torch.transpose(transposed, 1, 2).contiguous()


def grouped_mm(hidden: Any, ids: Any, gates: Any, gate_up: Any, down: Any) -> Baseline | str:
    """torch's grouped product on rows sorted by expert; sorting and summing are part of the call."""
    import torch
    from torch.nn.functional import silu

    if not hasattr(torch, "_grouped_mm"):
        return "this torch has no _grouped_mm"
    experts, per_token = len(down), ids.shape[1]

    def call() -> Any:
        order = ids.flatten().argsort(stable=True)
        ends = ids.flatten().bincount(minlength=experts).cumsum(0).to(torch.int32)
        x = hidden[order // per_token]
        gate, up = torch._grouped_mm(x, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=1)
        y = torch._grouped_mm(silu(gate) * up, down.transpose(1, 2), offs=ends)
        rows = torch.empty_like(order)
        rows[order] = torch.arange(len(order), device=order.device)
        weighted = y[rows].view(*ids.shape, -1).float() * gates[..., None]
        return weighted.sum(dim=1).to(hidden.dtype)

    return _if_it_runs(call)


def transformers_experts(
    name: str, hidden: Any, ids: Any, gates: Any, gate_up: Any, down: Any
) -> Baseline | str:
    """An implementation of transformers: `grouped_mm` or `batched_mm`."""
    try:
        from torch import nn
        from torch.nn.functional import silu
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        return str(error)

    # What these functions ask of an experts module.
    module = nn.Module()
    module.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
    module.down_proj = nn.Parameter(down, requires_grad=False)
    module.num_experts, module.act_fn = len(down), silu
    module.has_gate, module.has_bias = True, False
    module.is_transposed, module.is_concatenated = False, True
    module.has_post_expert_norm, module._is_expert_parallel = False, False

    def apply_gate(self: Any, projected: Any) -> Any:
        gate, up = projected.chunk(2, dim=-1)
        return silu(gate) * up

    module._apply_gate = MethodType(apply_gate, module)
    function = ALL_EXPERTS_FUNCTIONS[name]
    weights = gates.to(hidden.dtype)
    return _if_it_runs(lambda: function(module, hidden, ids.long(), weights))


def _if_it_runs(call: Baseline) -> Baseline | str:
    """The call, once it has worked; else what went wrong."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return call


def baselines(
    hidden: Any, ids: Any, gates: Any, gate_up: Any, down: Any
) -> dict[str, Baseline | str]:
    """Everything there is, by name, on padded weights of `padded_weights`."""
    arguments = (hidden, ids, gates, gate_up, down)
    found: dict[str, Baseline | str] = {"torch._grouped_mm": grouped_mm(*arguments)}
    for name in ("grouped_mm", "batched_mm"):
        # One token's weights are copied for each of its experts: too much memory for many tokens.
        if name == "batched_mm" and len(hidden) > 64:
            continue
        found[f"transformers {name}"] = transformers_experts(name, *arguments)
    return found
