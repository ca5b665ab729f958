# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint directory on disk: its config, its shards, its tensors one at a time.

Headers are read once and checked against the files; tensors are read when asked for, so that a
checkpoint larger than memory is no special case. What the tensors mean is in `tenp.adapter`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from torch import Tensor

from tenp.errors import CheckpointError
from tenp.quantization import scale_name

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: Bytes of every tensor that the fingerprint reads.
_SAMPLE_BYTES = 1 << 12


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as its shard's header describes it."""

    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int = 0  # where its bytes begin in the file
    scales: TensorEntry | None = None  # of its blocks in float8 or MXFP4, of its neurons in int8
    stored_dtype: torch.dtype | None = None  # in the file, if another than `dtype`
    stored_shape: tuple[int, ...] | None = None  # in the file, if another than `shape`: MXFP4

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes in memory, in its dtype; those in the file if that is the stored one."""
        return self.elements * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file, without those of its scales."""
        return (
            math.prod(self.stored_shape or self.shape) * (self.stored_dtype or self.dtype).itemsize
        )


class Checkpoint:
    """A local checkpoint in safetensors format, sharded or not.

    Attributes:
        directory: Where it lies.
        config: `config.json` as it is; without its quantization when that is read as bfloat16.
        tensors: Name to entry, in the order of shards and then of names. Weights in MXFP4, and in float8
            with a scale per block, appear as the bfloat16 weights that they stand for, without their scales;
            int8 weights of tenp as weights in the dtype of their scales.
        block: `[rows, columns]` of a block of float8 weights, or None.

    Args:
        directory: A directory with `config.json` and safetensors files.

    Raises:
        CheckpointError: A file is missing, truncated, or is not what the index says.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{directory} must be a checkpoint directory, but there is none")
        self.config: dict[str, Any] = _read_json(self.directory / "config.json")
        self.tensors: dict[str, TensorEntry] = {}
        for shard, expected in self._shards().items():
            entries = _read_header(self.directory / shard)
            if missing := expected - entries.keys():
                raise CheckpointError(
                    f"{self.directory / shard} must hold {min(missing)}, as {INDEX_FILE} says, but does not"
                )
            for name, (dtype, shape, begin) in sorted(entries.items()):
                # What the index does not name is in a file, but not in the model.
                if not expected or name in expected:
                    self.tensors[name] = TensorEntry(shard, dtype, shape, begin)
        self.block = _float8_block(self.config)
        is_mxfp4 = _settings(self.config).get("quant_method") == "mxfp4"
        if self.block is not None or is_mxfp4:
            self.config = {k: v for k, v in self.config.items() if k != "quantization_config"}
            self.tensors = (_of_mxfp4 if is_mxfp4 else _of_float8)(self.tensors)
        elif _settings(self.config).get("weights") == "int8":
            self.tensors = _of_int8(self.tensors)

    @classmethod
    def resolve(cls, model: str | Path) -> Checkpoint:
        """Open a local directory, or download a model of the Hugging Face Hub by its name.

        Raises:
            CheckpointError: It is neither, or the checkpoint is damaged.
        """
        if Path(model).exists():
            return cls(model)
        try:
            return cls(
                snapshot_download(
                    str(model),
                    allow_patterns=[
                        *("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"),
                        *("README.md", "LICENSE*"),  # a pruned copy stays under the licence
                    ],
                )
            )
        except HFValidationError:
            raise CheckpointError(
                f"{model} must be a checkpoint directory or a model name, but there is none"
            ) from None
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise CheckpointError(
                f"{model} is no local directory and cannot be downloaded: {error}"
            ) from error

    def _shards(self) -> dict[str, set[str]]:
        """Return the shards in order, each with the tensors that the index expects in it."""
        index = self.directory / INDEX_FILE
        if not index.exists():
            if not (self.directory / SINGLE_FILE).exists():
                raise CheckpointError(
                    f"{self.directory} must hold {SINGLE_FILE} or {INDEX_FILE}, but has neither; "
                    "convert other formats to safetensors first"
                )
            return {SINGLE_FILE: set()}
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} must have a weight_map from tensors to files, got none")
        shards: dict[str, set[str]] = {}
        for name, shard in weight_map.items():
            shards.setdefault(str(shard), set()).add(name)
        return dict(sorted(shards.items()))

    def shards(self) -> list[str]:
        """Return the file names of the shards, in order."""
        return list(dict.fromkeys(entry.shard for entry in self.tensors.values()))

    @property
    def parameters(self) -> int:
        """Parameters of all tensors, without scales."""
        return sum(entry.elements for entry in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors when they are read; weights in float8, MXFP4 and int8 count as what they stand for."""
        return sum(entry.bytes for entry in self.tensors.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the files, with those of their scales."""
        return sum(
            entry.stored_bytes + (entry.scales.stored_bytes if entry.scales else 0)
            for entry in self.tensors.values()
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the config, all headers, and the middle 4 KiB of every tensor.

        A small part of the checkpoint is read, yet a fine-tuned twin is told apart although it has
        the same headers, even if only its attention was trained.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        by_shard: dict[str, list[TensorEntry]] = {}
        for entry in self.tensors.values():
            by_shard.setdefault(entry.shard, []).append(entry)
        for shard, entries in by_shard.items():
            path = self.directory / shard
            with path.open("rb") as file:
                digest.update(shard.encode() + b"\0" + struct.pack("<Q", path.stat().st_size))
                digest.update(_header_bytes(file))
                for entry in sorted(entries, key=lambda entry: entry.begin):
                    file.seek(entry.begin + max(entry.stored_bytes - _SAMPLE_BYTES, 0) // 2)
                    digest.update(file.read(min(entry.stored_bytes, _SAMPLE_BYTES)))
        return digest.hexdigest()


class ShardWriter:
    """Writes one safetensors file tensor by tensor, so that memory holds one tensor at a time.

    The header comes first in the format, so shapes and dtypes are stated up front and the tensors
    then follow in that order.

    Args:
        path: The new file.
        entries: Name, dtype and shape of every tensor, in the order they will be written.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        self._expected = iter(entries.items())
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in entries.items():
            begin, end = end, end + TensorEntry("", dtype, shape).bytes
            header[name] = {
                "dtype": _DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor."""
        expected, (dtype, shape) = next(self._expected)
        assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, dtype, shape)
        # A view as bytes, because numpy has no bfloat16.
        self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def write_chunks(self, name: str, chunks: Iterable[Tensor]) -> None:
        """Append the next tensor, given in blocks of rows."""
        expected, (dtype, shape) = next(self._expected)
        assert name == expected
        elements = 0
        for chunk in chunks:
            assert chunk.dtype == dtype
            elements += chunk.numel()
            self._file.write(chunk.contiguous().flatten().view(torch.uint8).numpy().data)
        assert elements == TensorEntry("", dtype, shape).elements

    def close(self) -> None:
        """Finish the file: it is on the disk when this returns."""
        assert next(self._expected, None) is None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Let go of the file, finished or not."""
        with suppress(OSError):  # what is buffered may not fit on the disk
            self._file.close()


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("quantization_config") or {}


#: How the scales of a float8 weight are named after it.
_SCALES = "_scale_inv"


def _float8_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the block of a checkpoint in DeepSeek-V3's float8 format."""
    block = _settings(config).get("weight_block_size")
    if _settings(config).get("quant_method") != "fp8" or not block:
        return None
    return int(block[0]), int(block[1])


def _of_float8(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Show float8 weights as bfloat16 and hide their scales."""
    shown = {}
    for name, entry in tensors.items():
        if name.endswith(_SCALES) and name.removesuffix(_SCALES) in tensors:
            continue
        scales = tensors.get(name + _SCALES)
        if scales is not None:
            entry = dataclasses.replace(
                entry, dtype=torch.bfloat16, stored_dtype=entry.dtype, scales=scales
            )
        shown[name] = entry
    return shown


def _of_int8(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Show int8 weights in the dtype of their scales and hide these."""
    hidden = {scale_name(name) for name, entry in tensors.items() if entry.dtype == torch.int8}
    shown = {}
    for name, entry in tensors.items():
        scales = tensors.get(scale_name(name)) if entry.dtype == torch.int8 else None
        if scales is not None:
            entry = dataclasses.replace(
                entry, dtype=scales.dtype, stored_dtype=torch.int8, scales=scales
            )
        if name not in hidden:
            shown[name] = entry
    return shown


def _of_mxfp4(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Show the blocks `[E, R, G, 16]` of MXFP4 weights as bfloat16 `[E, 32 G, R]` and hide their scales."""
    shown = {}
    for name, entry in tensors.items():
        if name.removesuffix("_scales") + "_blocks" in tensors:
            continue
        scales = tensors.get(name.removesuffix("_blocks") + "_scales")
        if scales is not None:
            name = name.removesuffix("_blocks")
            experts, rows, groups, size = entry.shape
            entry = dataclasses.replace(
                entry,
                dtype=torch.bfloat16,
                shape=(experts, groups * size * 2, rows),
                stored_dtype=entry.dtype,
                stored_shape=entry.shape,
                scales=scales,
            )
        shown[name] = entry
    return dict(sorted(shown.items(), key=lambda item: (item[1].shard, item[0])))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} must exist in a checkpoint, but is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be JSON, but cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(content).__name__}")
    return content


def _header_bytes(file: BinaryIO) -> bytes:
    length = file.read(8)
    return file.read(struct.unpack("<Q", length)[0]) if len(length) == 8 else b""


def _read_header(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """Return dtype, shape and first byte of every tensor."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = file.read(8)
            if len(length) < 8 or struct.unpack("<Q", length)[0] > size - 8:
                raise CheckpointError(
                    f"{path} must be a whole safetensors file, got a truncated or damaged header"
                )
            file.seek(0)
            raw = _header_bytes(file)
        header = json.loads(raw)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + len(raw) + end != size:
            raise CheckpointError(
                f"{path} must have {8 + len(raw) + end} bytes, as its header says, got {size}: the file is truncated"
            )
        return {name: _read_entry(name, entry, data=8 + len(raw)) for name, entry in header.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} must exist, as {INDEX_FILE} says, but is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} must be a safetensors file, but its header cannot be read: {error}"
        ) from error


def _read_entry(
    name: str, entry: dict[str, Any], data: int
) -> tuple[torch.dtype, tuple[int, ...], int]:
    """Return dtype, shape and first byte of one tensor of a file whose data begin at byte `data`."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} has dtype {entry['dtype']}, which is none of {', '.join(DTYPES)}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"])
    begin, end = entry["data_offsets"]
    if TensorEntry("", dtype, shape).bytes != end - begin:
        raise ValueError(f"{name} of shape {shape} and {entry['dtype']} has {end - begin} bytes")
    return dtype, shape, data + begin
