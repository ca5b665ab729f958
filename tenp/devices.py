# SPDX-License-Identifier: Apache-2.0
"""The devices to compute on: those that torch sees and this build of tenp has kernels for."""

from __future__ import annotations

import functools

import torch

from tenp.errors import InvalidArgument, Unsupported
from tenp.ops._binding import _C


@torch.compiler.assume_constant_result  # a compiled model cannot trace into the native module
def has_cuda() -> bool:
    """Whether this build of tenp has kernels for a GPU, and its driver shows one."""
    return not _cuda_trouble()


def require(device: str) -> None:
    """Refuse a device that is not there, before anything is read.

    Args:
        device: A torch device, or `auto`, which is always there.

    Raises:
        InvalidArgument: It is none.
        Unsupported: It is not there, or this build of tenp cannot use it.
    """
    if device == "auto":
        return
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise InvalidArgument(
            f"device must be auto or a torch device such as cpu or cuda:0, got {device}"
        ) from None
    if wanted.type != "cuda":
        return
    count = torch.cuda.device_count()
    if (wanted.index or 0) >= count:
        raise Unsupported(f"device {device} must be there, but torch sees {count} CUDA devices")
    if not has_cuda():
        raise Unsupported(
            f"device {device} must be one that tenp has kernels for, but {_cuda_trouble()}; "
            "use --device cpu, or install tenp with CUDA"
        )


def resolve(device: str) -> str:
    """Return the one device that a device stands for; `auto` is the GPU if there is one.

    Raises:
        InvalidArgument: As `require`.
        Unsupported: As `require`.
    """
    require(device)
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() and has_cuda() else "cpu"


def free_bytes(device: torch.device) -> int:
    """Return the memory of a GPU that is free for new tensors, in bytes."""
    free, _ = torch.cuda.mem_get_info(device)
    # What torch keeps of freed tensors it hands out again.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@functools.cache
def _cuda_trouble() -> str:
    """Asked once, and not on import: asking starts the driver, and then this process cannot fork."""
    return _C.cuda_unavailable_reason()
