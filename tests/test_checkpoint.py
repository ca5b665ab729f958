# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are checked when opened; shards are written as the safetensors library would."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.fixtures import Tiny
from tenp.checkpoint import INDEX_FILE, Checkpoint, ShardWriter
from tenp.errors import CheckpointError


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny.directory, tmp_path / "model"))


def _shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def test_entries_are_what_the_files_hold(tiny: Tiny) -> None:
    shards = {path.name: load_file(path) for path in _shards(tiny.directory)}
    assert len(shards) > 2
    assert tiny.checkpoint.shards() == sorted(shards)
    for name, entry in tiny.checkpoint.tensors.items():
        tensor = shards[entry.shard][name]
        assert (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
        assert entry.bytes == tensor.numel() * tensor.itemsize
    assert tiny.checkpoint.parameters == sum(
        tensor.numel() for shard in shards.values() for tensor in shard.values()
    )
    assert tiny.checkpoint.bytes == 4 * tiny.checkpoint.parameters


def test_a_model_in_one_file_needs_no_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"x": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    assert list(Checkpoint(tmp_path).tensors) == ["x"]


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be a checkpoint directory, but there is none"):
        Checkpoint(tmp_path / "none")


def test_a_name_that_is_no_model_name_is_refused_without_the_network(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint directory or a model name"):
        Checkpoint.resolve(tmp_path / "none")


def test_a_missing_config_is_refused(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json must exist in a checkpoint"):
        Checkpoint(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_a_config_that_is_no_json_object_is_refused(copy: Path, content: bytes) -> None:
    (copy / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json must be "):
        Checkpoint(copy)


def test_a_missing_shard_is_named(copy: Path) -> None:
    _shards(copy)[1].unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-.*must exist, as .*index.* says"):
        Checkpoint(copy)


def test_a_directory_without_weights_is_refused(copy: Path) -> None:
    for path in [*_shards(copy), copy / INDEX_FILE]:
        path.unlink()
    with pytest.raises(CheckpointError, match="but has neither; convert other formats"):
        Checkpoint(copy)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_shard_is_named(copy: Path, size: int) -> None:
    shard = _shards(copy)[0]
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model-00001-.*truncated"):
        Checkpoint(copy)


def test_a_shard_with_bytes_to_spare_is_refused(copy: Path) -> None:
    with _shards(copy)[0].open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"model-00001-.* must have \d+ bytes"):
        Checkpoint(copy)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [1]}}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}',
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    raw = struct.pack("<Q", len(header)) + header + b"\0" * 4
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"model\.safetensors must "):
        Checkpoint(tmp_path)


def test_an_index_that_expects_a_tensor_elsewhere_is_refused(copy: Path) -> None:
    index = json.loads((copy / INDEX_FILE).read_text())
    first, *_, last = index["weight_map"]
    index["weight_map"][first] = index["weight_map"][last]
    (copy / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"must hold {first}, as .* says, but does not"):
        Checkpoint(copy)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', "3"])
def test_an_index_without_a_weight_map_is_refused(copy: Path, content: str) -> None:
    (copy / INDEX_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json must "):
        Checkpoint(copy)


# ---- fingerprints ----


def test_a_copy_has_the_same_fingerprint(tiny: Tiny, copy: Path) -> None:
    assert Checkpoint(copy).fingerprint == tiny.checkpoint.fingerprint


def test_files_beside_the_weights_do_not_count(tiny: Tiny, copy: Path) -> None:
    (copy / "README.md").write_text("hello")
    assert Checkpoint(copy).fingerprint == tiny.checkpoint.fingerprint


def test_a_changed_config_changes_the_fingerprint(tiny: Tiny, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "norm_topk_prob": True}))
    assert Checkpoint(copy).fingerprint != tiny.checkpoint.fingerprint


@pytest.mark.parametrize(
    "part", ["norm.weight", "q_proj", "mlp.gate.weight", "experts.3.down_proj", "embed_tokens"]
)
def test_a_changed_weight_changes_the_fingerprint(tiny: Tiny, copy: Path, part: str) -> None:
    name = next(name for name in tiny.checkpoint.tensors if part in name)
    path = copy / tiny.checkpoint.tensors[name].shard
    tensors = load_file(path)
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    assert Checkpoint(copy).fingerprint != tiny.checkpoint.fingerprint


def test_a_tensor_that_is_a_small_part_of_a_large_shard_counts(tmp_path: Path) -> None:
    # A fine-tuned twin whose experts are frozen differs in its attention only.
    def save(directory: Path, value: float) -> str:
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        tensors = {f"experts.{index}": torch.zeros(256, 1024) for index in range(12)}
        tensors["q_proj"] = torch.full((64, 64), value)
        save_file(tensors, directory / "model.safetensors")
        return Checkpoint(directory).fingerprint

    assert save(tmp_path / "a", 1.0) != save(tmp_path / "b", 2.0)


# ---- writing ----


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64]
)
def test_a_written_shard_is_byte_for_byte_what_safetensors_reads(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b.weight": torch.randn(5, 7, generator=generator).mul(10).to(dtype),
        "a.transposed": torch.randn(4, 6, generator=generator).mul(10).to(dtype).t(),
        "c.empty": torch.empty(0, 6, dtype=dtype),
        "d.scalar": torch.tensor(3.0).to(dtype),
    }
    path = tmp_path / "shard.safetensors"
    writer = ShardWriter(path, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()})
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        as_bytes = tensor.contiguous().flatten().view(torch.uint8)
        assert torch.equal(read[name].flatten().view(torch.uint8), as_bytes)


def test_the_data_of_a_shard_begin_at_a_multiple_of_8_bytes(tmp_path: Path) -> None:
    for length in range(1, 9):
        path = tmp_path / f"{length}.safetensors"
        writer = ShardWriter(path, {"x" * length: (torch.float32, (1,))})
        writer.write("x" * length, torch.ones(1))
        writer.close()
        assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0
