# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in MXFP4, gpt-oss's format, are read as the bfloat16 weights they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from support.fixtures import Command, files_of
from support.tiny_models import make_model, make_tokenizer
from tenp.checkpoint import Checkpoint
from tenp.reading import Reader, from_mxfp4


@pytest.fixture(scope="module")
def mxfp4_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss with random blocks and scales in place of its experts' weights."""
    directory = tmp_path_factory.mktemp("mxfp4") / "model"
    model = make_model("gpt_oss", hidden_size=64, intermediate_size=32).bfloat16()
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)

    def random(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

    stored = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        stored[f"{name}_blocks"] = random(0, 256, experts, rows, columns // 32, 16)
        stored[f"{name}_scales"] = random(119, 124, experts, rows, columns // 32)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_byte_holds_two_numbers_the_lower_half_first() -> None:
    blocks = torch.tensor([0x21, 0xF7] + [0] * 14, dtype=torch.uint8)[None, None, None]
    weight = from_mxfp4(blocks, torch.tensor([[[128]]], dtype=torch.uint8))
    assert weight.shape == (1, 32, 1)
    assert weight[0, :5, 0].tolist() == [1.0, 2.0, 12.0, -12.0, 0.0]


def test_weights_are_those_that_transformers_reads(mxfp4_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mxfp4_model, dtype=torch.bfloat16)
    checkpoint = Checkpoint(mxfp4_model)
    reader = Reader(checkpoint)
    assert checkpoint.tensors.keys() == model.state_dict().keys()
    for name, expected in model.state_dict().items():
        assert torch.equal(reader.read(name), expected), name
        if ".experts." in name:  # one after another, as streaming reads them
            alone = [reader.read(name, expert, 1) for expert in range(len(expected))]
            assert torch.equal(torch.cat(alone), expected)


@pytest.mark.parametrize("stream", ["none", "layers", "experts"])
def test_pruning_gives_what_it_gives_from_bfloat16(
    mxfp4_model: Path, text_file: Path, command: Command, tmp_path: Path, stream: str
) -> None:
    checkpoint = Checkpoint(mxfp4_model)
    reader = Reader(checkpoint)
    plain = tmp_path / "model"
    plain.mkdir()
    tensors = {name: reader.read(name) for name in checkpoint.tensors}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    (plain / "config.json").write_text(json.dumps(checkpoint.config))
    make_tokenizer().save_pretrained(plain)
    options = ["--calibration", text_file, "--keep", 0.5, "--samples", 2, "--quiet"]
    for source, out in ((mxfp4_model, "from4"), (plain, "from16")):
        stream_option = ["--stream", stream if out == "from4" else "none"]
        result = command("prune", source, *options, *stream_option, "--out", tmp_path / out)
        assert result.code == 0, result.err
    ours, theirs = files_of(tmp_path / "from4"), files_of(tmp_path / "from16")
    for name in ("config.json", "model.safetensors"):
        assert ours[name] == theirs[name]
