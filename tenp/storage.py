# SPDX-License-Identifier: Apache-2.0
"""Where activations of all batches stay between layers: on the device, in memory, or in a file.

A file is mapped into memory, so its pages belong to the page cache: the system may write them out
and drop them, and they are not memory that the process holds.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tenp.errors import CheckpointError

Offload = Literal["device", "ram", "disk"]


class Storage:
    """Room for lists of tensors.

    Args:
        offload: `device`, `ram` or `disk`.
        device: The device to compute on.
        directory: For `disk`; None makes a temporary directory that `close` removes.
    """

    def __init__(
        self,
        offload: Offload = "ram",
        device: torch.device | str = "cpu",
        directory: Path | None = None,
    ) -> None:
        self.offload = offload
        self._device = torch.device(device) if offload == "device" else torch.device("cpu")
        self._temporary = directory is None and offload == "disk"
        self._directory = Path(tempfile.mkdtemp(prefix="tenp-")) if self._temporary else directory
        self._names = 0

    def allocate(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
        """Return zeros of the given shapes.

        Raises:
            CheckpointError: The disk has no room for them.
        """
        if self.offload != "disk":
            return [torch.zeros(tuple(shape), dtype=dtype, device=self._device) for shape in shapes]
        assert self._directory is not None
        self._names += 1
        path = self._directory / f"activations-{os.getpid()}-{self._names}.tmp"
        try:
            return map_file(path, shapes, dtype)
        finally:
            path.unlink(
                missing_ok=True
            )  # the mapping keeps the file; a crash leaves nothing behind

    def close(self) -> None:
        """Remove the temporary directory."""
        if self._temporary and self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def map_file(path: Path, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
    """Return zeros whose memory is a new file's, one after another.

    Args:
        path: The file. All its room is taken on the disk: else a full disk would be noticed only by
            the death of the process.
        shapes: Of the tensors.
        dtype: Of all of them.

    Raises:
        CheckpointError: The file cannot be made, for example because the disk is full.
    """
    counts = [int(torch.Size(shape).numel()) for shape in shapes]
    total = sum(counts)
    if total == 0:
        return [torch.zeros(tuple(shape), dtype=dtype) for shape in shapes]
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, total * dtype.itemsize)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} needs {total * dtype.itemsize / 2**20:.1f} MiB, but cannot be written: {error.strerror}"
        ) from error
    whole = torch.from_file(str(path), shared=True, size=total, dtype=dtype)
    return [
        piece.view(tuple(shape)) for piece, shape in zip(whole.split(counts), shapes, strict=True)
    ]
