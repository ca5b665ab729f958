# SPDX-License-Identifier: Apache-2.0
"""A pruned checkpoint holds the kept neurons of the dense one, bit for bit, and everything else as it was."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file, save_file

from support.fixtures import Tiny, files_of
from support.tiny_models import save_model, stored_tensors
from tenp import adapter, equivalence, moments, pipeline, planning, pruning
from tenp.checkpoint import INDEX_FILE, Checkpoint
from tenp.errors import CheckpointError, InvalidArgument, PlanError, Unsupported
from tenp.model_card import model_card
from tenp.plan import Plan
from tenp.planning import Budget

_EXPERT = re.compile(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj")


def test_experts_keep_their_neurons_and_nothing_else_changes(tiny: Tiny) -> None:
    pruned = Checkpoint(tiny.pruned)
    before = stored_tensors(tiny.checkpoint)
    after = stored_tensors(pruned)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        if found := _EXPERT.search(name):
            keep = tiny.plan.keep[int(found[1])][int(found[2])]
            tensor = tensor[:, keep] if found[3] == "down" else tensor[keep]
        assert torch.equal(after[name], tensor), name


def test_shards_and_index_agree(tiny: Tiny) -> None:
    index = json.loads((tiny.pruned / INDEX_FILE).read_text())
    stored = {
        name: path.name
        for path in tiny.pruned.glob("*.safetensors")
        for name in load_file(path)
    }  # fmt: skip
    assert index["weight_map"] == stored
    pruned = Checkpoint(tiny.pruned)
    assert index["metadata"]["total_size"] == pruned.bytes
    assert index["metadata"]["total_parameters"] == pruned.parameters


@pytest.mark.parametrize("method", ["tenp", "drop"])
def test_a_model_larger_than_memory_is_verified_without_loading_it(
    tiny: Tiny, tmp_path: Path, monkeypatch, method: str
) -> None:
    """Its calibration may have been on a GPU that holds it: verification is on the CPU, in float32."""
    monkeypatch.setattr(moments, "available_bytes", lambda: 4 * tiny.checkpoint.parameters - 1)
    monkeypatch.setattr(adapter, "load_model", _must_not_run)
    plan = tiny.plan if method == "tenp" else pipeline.plan(tiny.statistics, Budget(0.5, "drop"))
    pipeline.apply(tiny.checkpoint, plan, tmp_path / "out")
    monkeypatch.setattr(moments, "available_bytes", lambda: 4 * tiny.checkpoint.parameters)
    with pytest.raises(AssertionError, match="loaded"):
        pipeline.apply(tiny.checkpoint, plan, tmp_path / "again")


def _must_not_run(*arguments: object, **options: object) -> None:
    raise AssertionError("a model was loaded")


def test_the_config_says_what_to_load_it_with(tiny: Tiny) -> None:
    config = json.loads((tiny.pruned / "config.json").read_text())
    quantization = config.pop("quantization_config")
    code = config.pop("auto_map")["AutoConfig"].partition(".")[0]
    assert (tiny.pruned / f"{code}.py").exists()
    assert config == tiny.checkpoint.config
    assert quantization["quant_method"] == "tenp"
    widths = {int(k): list(map(int, v.split(","))) for k, v in quantization["widths"].items()}
    assert widths == tiny.plan.widths()


def test_files_beside_the_weights_are_copied(tmp_path: Path, tiny: Tiny) -> None:
    source = Path(shutil.copytree(tiny.directory, tmp_path / "dense"))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "pytorch_model.bin").write_text("old weights")
    (source / "folder").mkdir()
    pruning.apply(Checkpoint(source), tiny.plan, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"chat_template.jinja", "tokenizer.json", "generation_config.json"} <= names
    assert not {"pytorch_model.bin", "folder"} & names


def test_the_card_keeps_the_licence(tiny: Tiny, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    shutil.copytree(tiny.directory, dense)
    (dense / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# dense\n")
    card = model_card(Checkpoint(dense), tiny.plan, needs_tenp=True)
    assert "license: mit\n" in card
    assert "license" not in model_card(Checkpoint(tiny.directory), tiny.plan, needs_tenp=True)


def test_the_plan_and_a_card_lie_beside_the_weights(tiny: Tiny) -> None:
    assert Plan.load(tiny.pruned / pruning.PLAN_FILE).digest() == tiny.plan.digest()
    card = (tiny.pruned / "README.md").read_text()
    metadata = metadata_load(tiny.pruned / "README.md")
    assert metadata["base_model"] == tiny.directory.name
    assert metadata["base_model_relation"] == "quantized"
    assert {"library_name", "pipeline_tag", "tags"} <= metadata.keys()
    assert f"{tiny.plan.static_share():.2%}" in card
    assert "import tenp" in card
    assert "was not measured" in card


def test_the_card_names_the_model_on_the_hub(tiny: Tiny, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--acme--Small-MoE" / "snapshots" / "0123abcd"
    shutil.copytree(tiny.directory, snapshot)
    assert "base_model: acme/Small-MoE\n" in model_card(Checkpoint(snapshot), tiny.plan, True)


def test_two_runs_write_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    pruning.apply(tiny.checkpoint, tiny.plan, tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tiny.pruned)


def test_only_the_directory_is_left_behind(tiny: Tiny, tmp_path: Path) -> None:
    pruning.apply(tiny.checkpoint, tiny.plan, tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_the_source_is_not_touched(tiny: Tiny, tmp_path: Path) -> None:
    before = files_of(tiny.directory)
    pruning.apply(tiny.checkpoint, tiny.plan, tmp_path / "out")
    assert files_of(tiny.directory) == before


def test_keeping_everything_writes_the_dense_model(tiny: Tiny, tmp_path: Path) -> None:
    plan = planning.plan(tiny.scores, tiny.statistics, Budget(1.0))
    pruning.apply(tiny.checkpoint, plan, tmp_path / "out")
    written = Checkpoint(tmp_path / "out")
    assert written.config == tiny.checkpoint.config
    after = stored_tensors(written)
    for name, tensor in stored_tensors(tiny.checkpoint).items():
        assert torch.equal(after[name], tensor), name


def test_equal_widths_change_the_config_only_where_it_gives_the_width(
    tiny: Tiny, tmp_path: Path
) -> None:
    budget = Budget(0.5, method="enp", width_multiple=4)
    plan = planning.plan(tiny.scores, tiny.statistics, budget)
    pruning.apply(tiny.checkpoint, plan, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**tiny.checkpoint.config, "moe_intermediate_size": 12}


def test_no_directory_appears_before_it_was_verified(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def verify(written: Path) -> None:
        assert not out.exists()
        assert (written / "config.json").exists()
        raise CheckpointError("it differs")

    with pytest.raises(CheckpointError, match="it differs"):
        pruning.apply(tiny.checkpoint, tiny.plan, out, verify)
    assert not any(tmp_path.iterdir())


def test_verification_notices_a_wrong_expert(tiny: Tiny, tmp_path: Path) -> None:
    pruning.apply(tiny.checkpoint, tiny.plan, tmp_path / "out")
    _change(tmp_path / "out", "layers.1.mlp.experts.0.down_proj", lambda tensor: 1.01 * tensor)
    with pytest.raises(CheckpointError, match="must compute what the masked dense model does"):
        equivalence.check(tiny.checkpoint, tiny.plan, None, tmp_path / "out")


def test_verification_notices_a_wrong_router(tiny: Tiny, tmp_path: Path) -> None:
    pruning.apply(tiny.checkpoint, tiny.plan, tmp_path / "out")
    _change(tmp_path / "out", "layers.2.mlp.gate.weight", lambda tensor: tensor.flip(0))
    with pytest.raises(CheckpointError, match="other choices of the routers"):
        equivalence.check(tiny.checkpoint, tiny.plan, None, tmp_path / "out")


def _change(directory: Path, part: str, change) -> None:
    checkpoint = Checkpoint(directory)
    name = next(name for name in checkpoint.tensors if part in name)
    path = directory / checkpoint.tensors[name].shard
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_plan_of_another_checkpoint_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    source = dataclasses.replace(tiny.source, fingerprint="0" * 64)
    with pytest.raises(PlanError, match="the plan must be for the checkpoint at hand"):
        pruning.apply(
            tiny.checkpoint, dataclasses.replace(tiny.plan, source=source), tmp_path / "out"
        )
    assert not any(tmp_path.iterdir())


def test_a_plan_with_other_experts_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    plan = dataclasses.replace(tiny.plan, keep={0: tiny.plan.keep[0]})
    with pytest.raises(PlanError, match="the plan must have the experts and widths"):
        pruning.apply(tiny.checkpoint, plan, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_missing_expert_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny.directory, tmp_path / "dense"))
    index = json.loads((source / INDEX_FILE).read_text())
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    shard = source / index["weight_map"].pop(name)
    (source / INDEX_FILE).write_text(json.dumps(index))
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"expert of layer 1, but .*3.*up.* is missing"):
        pruning.source_of(Checkpoint(source))


def test_a_tensor_that_the_index_does_not_name_is_not_copied(tiny: Tiny, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny.directory, tmp_path / "dense"))
    shard = next(source.glob("*.safetensors"))
    tensors = {**load_file(shard), "model.left_over": torch.ones(3)}
    save_file(tensors, shard, metadata={"format": "pt"})
    checkpoint = Checkpoint(source)
    assert checkpoint.tensors.keys() == tiny.checkpoint.tensors.keys()
    pruning.rewrite(
        checkpoint, tmp_path / "out", checkpoint.config, lambda *piece: [piece], extra_files={}
    )
    stored = {name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path)}
    assert stored == tiny.checkpoint.tensors.keys()


def test_a_quantized_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny.directory, tmp_path / "dense"))
    config = {**tiny.checkpoint.config, "quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="must hold plain weights, got weights quantized by fp8"):
        pruning.source_of(Checkpoint(source))


def test_a_null_quantization_config_is_none(tiny: Tiny, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny.directory, tmp_path / "dense"))
    config = {**tiny.checkpoint.config, "quantization_config": None}
    (source / "config.json").write_text(json.dumps(config))
    assert pruning.source_of(Checkpoint(source)).parameters == tiny.source.parameters


def test_16_bit_weights_stay_what_they_are(tmp_path: Path) -> None:
    dense = Checkpoint(save_model(tmp_path / "dense", dtype=torch.bfloat16))
    source = pruning.source_of(dense)
    keep = {layer: torch.arange(24).expand(6, 24) % 2 == layer % 2 for layer in range(3)}
    keep[0][2] = False
    pruning.apply(dense, Plan(source, "", {"method": "tenp"}, keep, 0.5), tmp_path / "out")
    pruned = Checkpoint(tmp_path / "out")
    assert {entry.dtype for entry in pruned.tensors.values()} == {torch.bfloat16}
    assert source.neuron_bytes == 2 * source.neuron_parameters
    assert pruned.bytes == dense.bytes - source.neuron_bytes * sum(
        int((~mask).sum()) for mask in keep.values()
    )


def test_a_stock_checkpoint_cannot_be_exported(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="must be a checkpoint pruned to different widths"):
        pruning.export_padded(tiny.checkpoint, tmp_path / "out")
