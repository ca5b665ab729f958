# SPDX-License-Identifier: Apache-2.0
"""Calibration layer by layer gives the bits of calibration in memory."""

import shutil
from pathlib import Path

import pytest
import torch

from support.fixtures import Command, Tiny, files_of
from support.tiny_models import FAMILIES, make_samples, save_model
from tenp import (
    adapter,
    calibration,
    memory,
    pruning,
    streaming,
    verification,
)
from tenp.checkpoint import Checkpoint
from tenp.errors import CheckpointError
from tenp.layerwise import LayerwiseModel
from tenp.reading import Reader
from tenp.storage import Storage


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_statistics_are_those_of_a_run_in_memory(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "model", family))
    source = pruning.source_of(checkpoint)
    samples = [make_samples("prose", seed=0), make_samples("code", (25, 50), seed=1)]
    model = adapter.load_model(checkpoint.directory, torch.float32)
    expected = calibration.collect(model, samples, source, batch_tokens=100)
    for stream in ("layers", "experts"):
        layerwise = LayerwiseModel(Reader(checkpoint), torch.float32)
        streamed = streaming.collect(layerwise, samples, source, batch_tokens=100, stream=stream)
        assert streamed.digest() == expected.digest()


def test_a_model_pruned_from_another_is_refused(
    tiny: Tiny, text_file: Path, command: Command, tmp_path: Path
) -> None:
    other = save_model(tmp_path / "other", with_tokenizer=True, num_hidden_layers=2)
    result = command(
        "calibrate",
        other,
        "--calibration",
        text_file,
        "--pruned",
        tiny.pruned,
        "--out",
        tmp_path / "s",
    )
    assert result.code == 2
    assert "the plan must be for the checkpoint at hand" in result.err


def test_a_budget_is_kept_or_refused(
    tiny: Tiny, text_file: Path, command: Command, tmp_path: Path
) -> None:
    options = ["calibrate", tiny.directory, "--calibration", text_file, "--json"]
    result = command(*options, "--memory", "2GiB", "--out", tmp_path / "s")
    assert result.code == 0
    assert "forecast: stream layers, hidden states in memory" in result.err
    result = command(*options, "--memory", "1MiB", "--out", tmp_path / "refused")
    assert result.code == 2
    assert "--memory must be at least 0.4" in result.err
    assert not (tmp_path / "refused").exists()
    result = command(*options, "--memory", "much", "--out", tmp_path / "refused")
    assert "--memory must be an amount like 4GiB or 800MiB, got much" in result.err


def test_amounts_of_memory() -> None:
    assert memory.parse_bytes("4GiB") == memory.parse_bytes("4g") == 4 << 30
    assert memory.parse_bytes("1.5 MiB") == 3 << 19
    assert memory.parse_bytes("1000") == 1000


def test_hidden_states_in_a_file_give_the_same(tiny: Tiny, tmp_path: Path) -> None:
    model = LayerwiseModel(Reader(tiny.checkpoint), torch.float32)
    storage = Storage("disk", directory=tmp_path)
    found = streaming.collect(
        model, tiny.samples, tiny.source, batch_tokens=100, stream="experts", storage=storage
    )
    assert found.digest() == tiny.statistics.digest()
    assert not list(tmp_path.iterdir())


def test_second_moments_are_those_of_a_run_in_memory(tiny: Tiny) -> None:
    model = adapter.load_model(tiny.directory, torch.float32)
    expected = calibration.collect(
        model, tiny.samples, tiny.source, batch_tokens=100, second_moments=True
    )
    layerwise = LayerwiseModel(Reader(tiny.checkpoint), torch.float32)
    found = streaming.collect(
        layerwise,
        tiny.samples,
        tiny.source,
        batch_tokens=100,
        stream="experts",
        second_moments=True,
    )
    assert found.digest() == expected.digest()


def test_a_damaged_pruned_checkpoint_is_noticed(tiny: Tiny, tmp_path: Path) -> None:
    verification.verify(tiny.checkpoint, tiny.plan, None, None, tiny.pruned)
    copy = tmp_path / "copy"
    shutil.copytree(tiny.pruned, copy)
    shard = max(copy.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    raw = bytearray(shard.read_bytes())
    raw[-400:] = bytes(400)
    shard.write_bytes(raw)
    with pytest.raises(CheckpointError, match="nothing was kept"):
        verification.verify(tiny.checkpoint, tiny.plan, None, None, copy)


def test_streamed_pruning_writes_what_pruning_in_memory_does(
    tiny: Tiny, text_file: Path, command: Command, tmp_path: Path
) -> None:
    options = ["prune", tiny.directory, "--calibration", text_file, "--keep", 0.5, "--quiet"]
    assert command(*options, "--out", tmp_path / "one").code == 0
    assert command(*options, "--stream", "experts", "--out", tmp_path / "two").code == 0
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
