# SPDX-License-Identifier: Apache-2.0
"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tenp.errors import CheckpointError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that a reader never sees half of it.

    Raises:
        CheckpointError: The file cannot be written, for example because the disk is full.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):  # gone after the rename; else also Ctrl-C leaves nothing
            partial.unlink()


def require_absent(directory: Path) -> None:
    """Refuse an output directory that exists, before any work is done for it.

    Raises:
        CheckpointError: Something is at `directory` already.
    """
    if directory.exists():
        raise CheckpointError(
            f"{directory} must not exist yet, got an existing path; remove it or choose another"
        )


def require_space(directory: Path, required_bytes: int) -> None:
    """Refuse a directory for which its disk has not the room.

    Raises:
        CheckpointError: There is less than `required_bytes` free.
    """
    there = next(path for path in directory.resolve().parents if path.exists())
    free = shutil.disk_usage(there).free
    if free < required_bytes:
        raise CheckpointError(
            f"{directory} needs {required_bytes / 2**20:,.1f} MiB, but its disk has {free / 2**20:,.1f} MiB free"
        )


@contextmanager
def new_directory(directory: Path, required_bytes: int) -> Iterator[Path]:
    """Yield a temporary sibling that becomes `directory` when the block ends well.

    Args:
        directory: Must not exist.
        required_bytes: What will be written, checked against the free space first.

    Raises:
        CheckpointError: `directory` exists, the disk has not the room, or it fills up on the way.
            Nothing is left behind.
    """
    require_absent(directory)
    require_space(directory, required_bytes)
    partial = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.partial")
    made = [path for path in partial.parents if not path.exists()]  # inner ones first
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(directory)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{directory} cannot be written: {error.strerror or error}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # the first that is not empty
            for path in made:
                path.rmdir()


@contextmanager
def resumable_directory(directory: Path, key: str, required_bytes: int) -> Iterator[Path]:
    """Yield a temporary sibling like `new_directory`, which stays when the block fails, for the next try.

    Args:
        directory: Must not exist.
        key: Says what is being written; another key is another temporary sibling.
        required_bytes: What will be written in all.

    Raises:
        CheckpointError: As in `new_directory`.
    """
    require_absent(directory)
    partial = partial_of(directory, key)
    there = sum(path.stat().st_size for path in partial.glob("*")) if partial.exists() else 0
    require_space(directory, required_bytes - there)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        partial.rename(directory)
        _sync(directory.parent)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{directory} cannot be written: {error.strerror or error}; what is finished is kept: "
            "run the same command again"
        ) from error


def partial_of(directory: Path, key: str) -> Path:
    """Return the temporary sibling of `resumable_directory`."""
    return directory.with_name(f".{directory.name}.{key[:16]}.partial")


def _sync(path: Path) -> None:
    """Make what a directory lists last through a power cut."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
