# SPDX-License-Identifier: Apache-2.0
"""Reads tensors of a checkpoint with plain reads, and notices when its files change meanwhile.

Memory-mapped files are simpler, but a shard that is cut off while it is mapped kills the process;
a read that comes up short can be told to the user. Reads are counted, and any thread may read.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tenp.checkpoint import Checkpoint, TensorEntry
from tenp.errors import CheckpointError

#: One read of so many bytes is as fast as a larger one and leaves the lock of the file often.
_CHUNK = 16 << 20

#: Experts read ahead while one computes; more would not be faster, because reads are sequential.
READ_AHEAD = 2

T = TypeVar("T")


class Reader:
    """The tensors of a checkpoint, whole or by rows.

    Attributes:
        checkpoint: Where they lie.
        bytes: Bytes read so far, by all threads.
        error: What went wrong first; loaders that run in threads may hide what was raised.

    Args:
        checkpoint: Its shards must stay as they are as long as the reader is used.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.bytes = 0
        self.error: CheckpointError | None = None
        self._lock = threading.Lock()
        self._files: dict[str, int] = {}
        self._states = {
            shard: _state(checkpoint.directory / shard) for shard in checkpoint.shards()
        }

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Return a tensor; weights with scales in the dtype that the checkpoint shows them in.

        Args:
            name: Of the tensor.
            first: First row, along the leading axis.
            count: Rows; None reads to the end.

        Raises:
            CheckpointError: The shard is gone, has changed, or cannot be read.
        """
        entry = self.checkpoint.tensors[name]
        if entry.stored_shape is not None:
            assert entry.scales is not None
            experts = entry.shape[0] - first if count is None else count
            blocks = self._read(entry, (experts, *entry.stored_shape[1:]), first)
            scales = self._read(entry.scales, (experts, *entry.scales.shape[1:]), first)
            return from_mxfp4(blocks, scales)
        if entry.scales is not None:
            weight = self._read(entry, entry.shape, 0)
            scales = self._read(entry.scales, entry.scales.shape, 0)
            block = self.checkpoint.block
            product = (
                weight * scales.float() if block is None else dequantize(weight, scales, block)
            )
            whole = product.to(entry.dtype)
            return whole if count is None else whole[first : first + count]
        if count is None:
            return self._read(entry, entry.shape, 0)
        return self._read(entry, (count, *entry.shape[1:]), first)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor in blocks of rows, so that no more than `_CHUNK` bytes are held if possible."""
        entry = self.checkpoint.tensors[name]
        if entry.scales is not None or entry.bytes <= _CHUNK:
            yield self.read(name)
            return
        rows = max(_CHUNK * entry.shape[0] // entry.bytes, 1)
        for first in range(0, entry.shape[0], rows):
            yield self.read(name, first, min(rows, entry.shape[0] - first))

    def _read(self, entry: TensorEntry, shape: tuple[int, ...], first: int) -> Tensor:
        """Read so many rows from the first on, as they are stored."""
        tensor = torch.empty(shape, dtype=entry.stored_dtype or entry.dtype)
        if tensor.numel():
            begin = entry.begin + first * (entry.stored_bytes // entry.shape[0] if first else 0)
            self._fill(entry.shard, begin, tensor.view(-1).view(torch.uint8))
        return tensor

    def touch(self, names: Iterable[str], stop: threading.Event) -> None:
        """Bring tensors into the page cache, which costs no memory that anyone holds."""
        scratch = torch.empty(_CHUNK, dtype=torch.uint8)
        for name in names:
            entry = self.checkpoint.tensors[name]
            for offset in range(0, entry.stored_bytes, _CHUNK):
                if stop.is_set():
                    return
                size = min(_CHUNK, entry.stored_bytes - offset)
                try:
                    file = self._file(entry.shard)
                    os.preadv(file, [scratch[:size].numpy().data], entry.begin + offset)
                except (OSError, CheckpointError):
                    return  # whoever needs the tensor will be told

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()

    def _fill(self, shard: str, begin: int, buffer: Tensor) -> None:
        path = self.checkpoint.directory / shard
        file = self._file(shard)
        view = buffer.numpy().data
        done = 0
        while done < len(view):
            try:
                got = os.preadv(file, [view[done : done + _CHUNK]], begin + done)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
            if got == 0:
                break
            done += got
        if done < len(view) or _state(path) != self._states[shard]:
            raise CheckpointError(
                f"{path} must stay as it was when the run began, but it has changed meanwhile; "
                "put the original back and run the same command again"
            )
        with self._lock:
            self.bytes += done

    def _file(self, shard: str) -> int:
        with self._lock:
            if shard not in self._files:
                path = self.checkpoint.directory / shard
                try:
                    self._files[shard] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
            return self._files[shard]


def dequantize(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Return float8 weights times the scales of their blocks, in float32.

    Args:
        weight: `[R, C]`, float8.
        scales: `[ceil(R / block[0]), ceil(C / block[1])]`; blocks at the edges may be smaller.
        block: Rows and columns of a block.
    """
    spread = scales.float().repeat_interleave(block[1], dim=1)[:, : weight.shape[1]]
    result = weight.float()
    for number, band in enumerate(result.split(block[0])):
        band.mul_(spread[number])
    return result


#: The 16 values of 4 bits: a sign, two bits of exponent and one of mantissa.
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FP4 = torch.cat([_FP4, -_FP4])


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return MXFP4 weights as bfloat16, which holds each of their values (OCP Microscaling Formats 1.0).

    Args:
        blocks: `[E, R, G, 16]`, uint8. Two numbers a byte, the lower half first; 32 share a scale.
        scales: `[E, R, G]`, uint8. s stands for the factor 2^(s - 127).

    Returns:
        `[E, 32 G, R]`: transposed, as the experts that are stored so hold their weights.
    """
    experts, rows, groups, size = blocks.shape
    result = torch.empty(experts, groups * size * 2, rows, dtype=torch.bfloat16)
    for expert in range(experts):  # what is in between takes many times the room
        halves = torch.stack([blocks[expert] & 15, blocks[expert] >> 4], dim=-1)  # [R, G, 16, 2]
        factors = torch.ldexp(torch.ones(rows, groups), scales[expert].int() - 127)
        values = _FP4[halves.flatten(2).int()] * factors[..., None]
        result[expert] = values.flatten(1).t()
    return result


class LazyTensor:
    """A tensor that is read when it is indexed with `...`, as loaders of transformers do."""

    def __init__(self, reader: Reader, name: str) -> None:
        self._reader, self._name = reader, name

    def __getitem__(self, index: Any) -> Tensor:
        """Read it."""
        try:
            return self._reader.read(self._name)[index]
        except CheckpointError as error:
            self._reader.error = error
            raise

    def get_shape(self) -> list[int]:
        """Return its shape, like safetensors."""
        return list(self._reader.checkpoint.tensors[self._name].shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it is read in."""
        return self._reader.checkpoint.tensors[self._name].dtype


def _state(path: Path) -> tuple[int, int, int]:
    """What changes when somebody replaces or rewrites a file."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(
            f"{path} must stay as it was when the run began, but it cannot be found: {error.strerror}; "
            "put it back and run the same command again"
        ) from error
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_ahead(read: Callable[[int], T], count: int) -> Iterator[T]:
    """Yield `read(0)` to `read(count - 1)`, read in a thread of its own, `READ_AHEAD` at most waiting."""
    waiting: queue.Queue[T | Exception] = queue.Queue(READ_AHEAD)
    stopped = threading.Event()

    def put(item: T | Exception) -> None:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for number in range(count):
                if stopped.is_set():
                    return
                put(read(number))
        except Exception as error:
            put(error)

    thread = threading.Thread(target=work, name="tenp-read-ahead", daemon=True)
    thread.start()
    try:
        for _ in range(count):
            item = waiting.get()
            if isinstance(item, Exception):
                raise item
            yield item
            del item
    finally:
        stopped.set()
        thread.join()
