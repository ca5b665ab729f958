# SPDX-License-Identifier: Apache-2.0
"""What every op needs to reach the native side: registration, borrowed tensors, streams.

The native library knows neither torch nor Python objects. A tensor goes to it as a DLPack capsule
that lives for one call, a stream as the integer of its pointer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from tenp import _C

_LIBRARY = torch.library.Library("tenp", "DEF")


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Define the op `tenp::<schema>` with one kernel for CPU and CUDA, and its shapes.

    No schema has defaults: the public functions have them, and the dispatcher would leave equal
    arguments out of its call of the kernel.

    `Library` rather than `custom_op`: its dispatch costs a fraction of the other's, and in decoding
    an op is called once per layer and token.
    """
    name = _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = name.split("::")[-1]
    for dispatch_key in ("CPU", "CUDA"):
        _LIBRARY.impl(op, kernel, dispatch_key)
    torch.library.register_fake(f"tenp::{op}", fake, lib=_LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.tenp, op).default
    return overload


def register_gradient(
    op: str,
    backward: Callable[..., Any],
    keep: Callable[..., None] | None = None,
) -> None:
    """Give the op `tenp::<op>` a gradient.

    Args:
        op: Its name.
        backward: `(ctx, gradients of the results)` to the gradients of the arguments.
        keep: `(ctx, arguments, results)`, called after the op when something is differentiated.
    """
    torch.library.register_autograd(f"tenp::{op}", backward, setup_context=keep, lib=_LIBRARY)


def call(native: Callable[..., None], device: torch.device, **arguments: Any) -> None:
    """Call a function of `tenp._C` with its tensors borrowed, on the device's current stream.

    `to_dlpack` rather than `Tensor.__dlpack__`: it is several times cheaper and takes tensors that
    require grad, which the weights of a module do even when nobody differentiates.
    """
    borrowed = {
        name: to_dlpack(value) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    if device.type == "cuda":
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            native(**borrowed, stream=stream)
    else:
        native(**borrowed)


def extent(tensor: Tensor, axis: int) -> int:
    """Return `tensor.shape[axis]` for the size of what is allocated, or 0 if it has no such axis.

    A tensor of the wrong rank is refused by name, by the native side, which is called afterwards.
    """
    return tensor.shape[axis] if -tensor.dim() <= axis < tensor.dim() else 0


def cuda_workspace(op: str, device: torch.device, *sizes: int) -> dict[str, Tensor]:
    """Return the argument `workspace` of an op that needs one on CUDA alone.

    From torch's allocator, like the results, so that the call can be captured in a graph.
    """
    if device.type != "cuda":
        return {}
    num_bytes = getattr(_C, f"{op}_workspace_bytes")(*sizes)
    return {"workspace": torch.empty(num_bytes, dtype=torch.uint8, device=device)}


def as_expert_ids(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Return ids of int8 to int64 or uint8 and any strides as contiguous int32; the op's small input.

    int64 ids are clamped before they are narrowed: 2**32 + 1 would otherwise come out as expert 1.
    Other dtypes pass through, for the native side to refuse by name.
    """
    if expert_ids.dtype == torch.int64:
        expert_ids = expert_ids.clamp(-1, num_experts)
    if expert_ids.dtype in (torch.int64, torch.int16, torch.int8, torch.uint8):
        expert_ids = expert_ids.to(torch.int32)
    return expert_ids.contiguous()


def as_gates(gates: Tensor) -> Tensor:
    """Return gates of any float dtype and strides as contiguous float32; the op's small input."""
    return gates.to(torch.float32).contiguous()
