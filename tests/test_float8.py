# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in float8 with a scale per block are read as the bfloat16 weights they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from support.fixtures import Command
from support.tiny_models import make_model, make_tokenizer
from tenp.checkpoint import Checkpoint
from tenp.reading import Reader, dequantize

BLOCK = 16


@pytest.fixture
def float8_model(tmp_path: Path) -> Path:
    """A tiny DeepSeek-V3 whose linear weights are float8 with 16 x 16 blocks."""
    directory = tmp_path / "float8"
    make_model("deepseek_v3", moe_intermediate_size=32).bfloat16().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    stored = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        is_linear = tensor.ndim == 2 and not any(
            word in name for word in ("norm", "embed", "lm_head", "mlp.gate.")
        )
        if is_linear and not any(size % BLOCK for size in tensor.shape):
            tensor, stored[f"{name}_scale_inv"] = quantize(tensor)
        stored[name] = tensor
    assert sum(name.endswith("_scale_inv") for name in stored) > 30
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    blocks = weight.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / 448
    scaled = blocks / scales[:, None, :, None]
    return scaled.view(rows, columns).to(torch.float8_e4m3fn), scales


def test_blocks_at_the_edge_may_be_smaller() -> None:
    weight = torch.ones(5, 7).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    result = dequantize(weight, scales, (4, 4))
    assert result[0].tolist() == [1.0] * 4 + [2.0] * 3
    assert result[4].tolist() == [3.0] * 4 + [4.0] * 3


def test_weights_are_those_that_transformers_reads(float8_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(float8_model, dtype=torch.bfloat16)
    expected = model.state_dict()
    checkpoint = Checkpoint(float8_model)
    reader = Reader(checkpoint)
    assert not any(name.endswith("_scale_inv") for name in checkpoint.tensors)
    for name, entry in checkpoint.tensors.items():
        if ".experts." not in name:
            assert entry.dtype != torch.float8_e4m3fn
            assert torch.equal(reader.read(name), expected[name].to(entry.dtype)), name
    fused = expected["model.layers.1.mlp.experts.gate_up_proj"]
    for expert, matrix in enumerate(fused):
        prefix = f"model.layers.1.mlp.experts.{expert}"
        parts = [reader.read(f"{prefix}.{part}_proj.weight") for part in ("gate", "up")]
        assert torch.equal(torch.cat(parts), matrix)


def test_calibrating_and_pruning(
    float8_model: Path, text_file: Path, command: Command, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    checkpoint = Checkpoint(float8_model)
    reader = Reader(checkpoint)
    plain.mkdir()
    tensors = {name: reader.read(name) for name in checkpoint.tensors}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    (plain / "config.json").write_text(json.dumps(checkpoint.config))
    make_tokenizer().save_pretrained(plain)
    options = ["--calibration", text_file, "--keep", 0.5, "--quiet"]
    result = command("prune", float8_model, *options, "--out", tmp_path / "from8")
    assert result.code == 0, result.err
    assert command("prune", plain, *options, "--out", tmp_path / "from16").code == 0
    ours = Checkpoint(tmp_path / "from8")
    theirs = Checkpoint(tmp_path / "from16")
    assert ours.tensors == theirs.tensors
    assert ours.config == theirs.config
    for name in ours.tensors:
        assert torch.equal(Reader(ours).read(name), Reader(theirs).read(name))


def test_stored_bytes_are_those_of_the_file(float8_model: Path) -> None:
    checkpoint = Checkpoint(float8_model)
    tensors = load_file(float8_model / "model.safetensors").values()
    assert checkpoint.stored_bytes == sum(tensor.nbytes for tensor in tensors)
    assert checkpoint.stored_bytes < checkpoint.bytes == 2 * checkpoint.parameters


def test_in_memory_is_refused(float8_model: Path, text_file: Path, command: Command) -> None:
    result = command(
        "calibrate", float8_model, "--calibration", text_file, "--stream", "none", "--out", "x"
    )
    assert result.code == 2
    assert "must be layers or experts with a checkpoint in float8, got none" in result.err
