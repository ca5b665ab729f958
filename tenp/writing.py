# SPDX-License-Identifier: Apache-2.0
"""Writes shards of a checkpoint from another's, several at a time, each tensor by tensor.

A shard has its name only when it is whole and on the disk, so after an interruption those that
have it need not be written again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from tenp.checkpoint import ShardWriter
from tenp.reading import Reader

#: More shards at once do not read or write faster from one disk.
_MOST_AT_ONCE = 4

#: Memory for tensors in flight when no budget is stated.
_DEFAULT_MEMORY = 2 << 30

Pieces = Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def write_shards(
    reader: Reader,
    layouts: Mapping[str, Layout],
    pieces: Pieces,
    directory: Path,
    memory: int | None = None,
    progress: Callable[[str, int], None] | None = None,
    copied: Container[str] = (),
) -> None:
    """Write every shard that is not there yet.

    Args:
        reader: The source.
        layouts: Shard to the names, dtypes and shapes of what it will hold, in order.
        pieces: `pieces(name, tensor)` yields the (name, tensor) pairs that a source tensor becomes.
        directory: Where to.
        memory: Bytes that the process may hold; half of it is for tensors in flight. One shard is
            written at a time at least.
        progress: Called with (shard, source bytes) after every tensor, from any thread.
        copied: Tensors that become themselves; they need not be in memory as a whole.

    Raises:
        OSError: The disk is full; whole shards stay.
        CheckpointError: The source is damaged or has changed.
    """
    tensors = reader.checkpoint.tensors
    changed = (entry.bytes for name, entry in tensors.items() if name not in copied)
    largest = max(changed, default=1)
    room = memory // 2 if memory else _DEFAULT_MEMORY
    at_once = room // max(2 * largest, 1)  # a tensor, and what it becomes
    failed = threading.Event()

    def write(shard: str) -> None:
        path = directory / shard
        names = [name for name, entry in tensors.items() if entry.shard == shard]
        if path.exists():
            if progress is not None:
                progress(shard, sum(tensors[name].bytes for name in names))
            return
        partial = directory / f".{shard}.partial"
        writer = ShardWriter(partial, layouts[shard])
        try:
            for name in names:
                if failed.is_set():
                    return
                if name in copied:
                    writer.write_chunks(name, reader.chunks(name))
                else:
                    _write(writer, pieces(name, reader.read(name)))
                if progress is not None:
                    progress(shard, tensors[name].bytes)
            writer.close()
            partial.rename(path)
        except BaseException:
            failed.set()
            raise
        finally:
            writer.abandon()
            partial.unlink(missing_ok=True)

    with ThreadPoolExecutor(max(1, min(_MOST_AT_ONCE, at_once, os.cpu_count() or 1))) as pool:
        for done in [pool.submit(write, shard) for shard in layouts]:
            done.result()


def _write(writer: ShardWriter, pieces: Iterable[tuple[str, Tensor]]) -> None:
    # A function of its own, so that nothing of one tensor is held while the next is read.
    for name, piece in pieces:
        writer.write(name, piece)
