# SPDX-License-Identifier: Apache-2.0
"""What docs/gguf.md says: stock outputs fit the GGUF format, experts of different widths do not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from support.fixtures import Tiny
from support.tiny_models import stored_tensors
from tenp import dropping, planning, pruning
from tenp.checkpoint import Checkpoint
from tenp.planning import Budget

gguf = pytest.importorskip("gguf")


def write_gguf(directory: Path, path: Path) -> dict[str, torch.Tensor]:
    """Write the tensors under the names of GGUF, the experts of a layer in one; return them."""
    checkpoint = Checkpoint(directory)
    config: dict[str, Any] = checkpoint.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2MOE, config["num_hidden_layers"])
    tensors: dict[str, Any] = {}
    for name, tensor in stored_tensors(checkpoint).items():
        expert = re.fullmatch(r"(.*\.experts)\.\d+\.(.*)", name)
        if expert is None:
            tensors[name] = tensor
        else:
            tensors.setdefault(f"{expert[1]}.{expert[2]}", []).append(tensor)
    tensors = {
        names.get_name(name, (".weight", ".bias")): torch.stack(value)
        if isinstance(value, list)
        else value
        for name, value in tensors.items()
    }
    writer = gguf.GGUFWriter(path, "qwen2moe")
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("kind", ["one width", "padded", "fewer experts"])
def test_stock_outputs_fit(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "padded":
        pruning.export_padded(Checkpoint(tiny.pruned), out)
    else:
        method = "enp" if kind == "one width" else "drop"
        budget = Budget(0.5, method=method, width_multiple=4 if method == "enp" else None)
        plan = planning.plan(tiny.scores, tiny.statistics, budget)
        write = pruning.apply if method == "enp" else dropping.apply
        write(tiny.checkpoint, plan, out)
    written = write_gguf(out, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    read = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], written[name]) for name in written)
    experts, width, _ = read["blk.0.ffn_gate_exps.weight"].shape
    fields = {name: reader.fields[name].contents() for name in reader.fields}
    assert fields["qwen2moe.expert_count"] == experts
    assert fields["qwen2moe.expert_feed_forward_length"] == width


def test_experts_of_different_widths_do_not(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        write_gguf(tiny.pruned, tmp_path / "model.gguf")
