# SPDX-License-Identifier: Apache-2.0
"""A directory that keeps what a long run has finished, so that the same command can go on from there.

Every finished layer is one file, written under a temporary name, flushed, and renamed; the hidden
states that the next layer needs are another, and always appear first. So whenever a run ends, by an
error, a kill or a power cut, the directory describes a run that stopped between two layers.
`docs/streaming.md` describes the files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tenp.errors import CheckpointError
from tenp.files import write_atomically

FORMAT_VERSION = 1

_KEPT = "all finished layers are kept: make room and run the same command again"


@dataclass(frozen=True)
class FinishedLayer:
    """What a finished layer left.

    Attributes:
        tensors: Its statistics, by name; empty for a layer without routed experts.
        facts: What the next layers need to know, as JSON.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class WorkDirectory:
    """The finished part of one run. Use it as a context: one process at a time can have it.

    Attributes:
        path: Where it is.
        rank: Of this process.

    Args:
        path: The directory; made if it is missing.
        rank: Of this process in a distributed run. Only rank 0 locks and writes the layers.

    Raises:
        CheckpointError: Another process uses it, or it cannot be written.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path = path
        self.rank = rank
        self._lock: int | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                self._take_lock()
                for partial in path.glob(".*.partial"):
                    partial.unlink()
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} cannot be used: {error.strerror}") from error

    def __enter__(self) -> WorkDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        # The system lets go of the lock when the process ends, however it ends.
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(self._lock, 20, 0).decode(errors="replace").strip()
            os.close(self._lock)
            self._lock = None
            raise CheckpointError(
                f"{self.path} must be used by one run at a time, but process {owner} uses it; "
                "wait for it, or choose another work directory"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    def require(self, identity: Mapping[str, Any]) -> None:
        """Check that the directory belongs to this run, or make it so if it is new.

        Args:
            identity: What makes two runs the same, as JSON values by name.

        Raises:
            CheckpointError: It belongs to another run; the message says what differs.
        """
        path = self.path / "run.json"
        wanted = {"format": "tenp.work", "format_version": FORMAT_VERSION, **identity}
        wanted = json.loads(json.dumps(wanted))
        if not path.exists():
            if self.rank == 0:
                self._write(path, (json.dumps(wanted, indent=2) + "\n").encode())
            return
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise self._damaged("run.json", f"it cannot be read: {error}") from error
        difference = _difference(found if isinstance(found, dict) else {}, wanted)
        if difference is not None:
            name, theirs, ours = difference
            raise CheckpointError(
                f"{self.path} must belong to this run, but its {name} is {_short(theirs)} instead of "
                f"{_short(ours)}; choose another work directory, or remove this one"
            )

    def finished_layers(self) -> int:
        """Return how many layers are finished, from layer 0 on."""
        count = 0
        while self._layer_path(count).exists():
            count += 1
        return count

    def save_layer(
        self, layer: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
    ) -> None:
        """Keep a finished layer. Its hidden states must be saved before."""
        metadata = {"tenp": json.dumps({"layer": layer, **facts}, sort_keys=True)}
        content = {name: tensor.cpu().contiguous() for name, tensor in sorted(tensors.items())}
        self._write(self._layer_path(layer), save(content, metadata=metadata))

    def load_layer(self, layer: int) -> FinishedLayer:
        """Return a finished layer.

        Raises:
            CheckpointError: The file is damaged.
        """
        path = self._layer_path(layer)
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["tenp"])
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise self._damaged(path.name, f"it cannot be read: {error}") from error
        return FinishedLayer(tensors, facts)

    def save_hidden(self, layer: int, hidden: Sequence[Tensor]) -> dict[str, Any]:
        """Keep the hidden states that a layer takes in, and return how to know them again.

        Raises:
            CheckpointError: The disk is full.
        """
        path = self._hidden_path(layer)
        partial = path.with_name(f".{path.name}.partial")
        digest = hashlib.sha256()
        try:
            with partial.open("wb") as file:
                for tensor in hidden:
                    data = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
                    digest.update(data)
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CheckpointError(f"{path} cannot be written: {error.strerror}; {_KEPT}") from error
        dtype = str(hidden[0].dtype).removeprefix("torch.")
        return {
            "dtype": dtype,
            "size": hidden[0].shape[-1],
            "tensors": len(hidden),
            "sha256": digest.hexdigest(),
        }

    def load_hidden(self, layer: int, facts: Mapping[str, Any], hidden: Sequence[Tensor]) -> None:
        """Read hidden states into tensors of the right shapes.

        Args:
            layer: The layer that takes them in.
            facts: What `save_hidden` returned.
            hidden: Tensors to read into.

        Raises:
            CheckpointError: The file is missing, truncated or changed.
        """
        path = self._hidden_path(layer)
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                for tensor in hidden:
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
                    data = buffer.view(-1).view(torch.uint8).numpy().data
                    if file.readinto(data) != len(data):
                        raise self._damaged(path.name, "it is truncated")
                    digest.update(data)
                    tensor.copy_(buffer)
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise self._damaged(path.name, f"it cannot be read: {error.strerror}") from error
        if digest.hexdigest() != facts["sha256"]:
            raise self._damaged(path.name, "its content has changed")

    def drop_hidden(self, before: int) -> None:
        """Remove the hidden states that no layer from `before` on needs."""
        for path in self.path.glob(f"hidden-*.{self.rank}.bin"):
            if int(path.name.split("-")[1].split(".")[0]) < before:
                path.unlink(missing_ok=True)

    def read_note(self, name: str) -> dict[str, Any] | None:
        """Return a small JSON file of `write_note`, or None."""
        try:
            note = json.loads((self.path / f"{name}.json").read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._damaged(f"{name}.json", f"it cannot be read: {error}") from error
        return note if isinstance(note, dict) else None

    def write_note(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep a small JSON file."""
        self._write(self.path / f"{name}.json", (json.dumps(content) + "\n").encode())

    def _write(self, path: Path, content: bytes) -> None:
        try:
            write_atomically(path, content)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {_KEPT}") from error

    def _layer_path(self, layer: int) -> Path:
        return self.path / f"layer-{layer:04}.safetensors"

    def _hidden_path(self, layer: int) -> Path:
        return self.path / f"hidden-{layer:04}.{self.rank}.bin"

    def _damaged(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path / name} must be whole, but {why}; remove {self.path} to start again"
        )


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the name of the first value that is not as wanted, and both; None if all are."""
    for name, ours in wanted.items():
        theirs = found.get(name)
        if isinstance(theirs, dict) and isinstance(ours, dict):
            if (inner := _difference(theirs, ours)) is not None:
                return f"{name}.{inner[0]}", *inner[1:]
        elif theirs != ours:
            return name, theirs, ours
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
