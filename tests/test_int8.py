# SPDX-License-Identifier: Apache-2.0
"""Experts in 8 bits: what is stored, what it computes, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.fixtures import Command, Tiny, files_of
from support.op_cases import FLOAT_DTYPES
from support.tiny_models import make_samples, save_model, stored_tensors, token_ids
from tenp import adapter, calibration, equivalence, pipeline, planning, pruning, rounding, scoring
from tenp.checkpoint import Checkpoint
from tenp.errors import CheckpointError, InvalidArgument, Unsupported
from tenp.execution import Execution
from tenp.planning import Budget
from tenp.quantization import Int8, dequantize, quantize
from tenp.running import Run
from tenp.runtime import TenpExperts


def _weights(dtype: torch.dtype) -> torch.Tensor:
    """[40, 24], with neurons of all sizes, one of them zero, some subnormal in float16."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-7, 3, 40)
    sizes[7] = 0
    return (torch.randn(40, 24, generator=generator) * sizes[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("neurons", [0, 1])
def test_weights_change_by_half_a_step_at_most(dtype: torch.dtype, neurons: int) -> None:
    weight = _weights(dtype)
    weight = weight.T if neurons else weight
    q, scale = quantize(weight, neurons)
    assert (q.dtype, q.shape, q.is_contiguous()) == (torch.int8, weight.shape, True)
    assert (scale.dtype, scale.shape) == (dtype, (40,))
    largest = weight.float().abs().amax(dim=1 - neurons)
    # Half a step of 1/127 of the largest, which the scale, rounded up to its dtype, may exceed.
    step = largest.double() / 127 * (1 + torch.finfo(dtype).eps) + 2.0**-24 * (
        dtype == torch.float16
    )
    error = (dequantize(q, scale, neurons).double() - weight.double()).abs().amax(dim=1 - neurons)
    assert (error <= step / 2 * (1 + 1e-4)).all()
    assert error[7] == 0


def test_the_error_is_that_of_all_weights() -> None:
    int8, weights = Int8(), [torch.tensor([[1.0, 127.4]]), torch.tensor([[-3.0, 127.0]])]
    for weight in weights:
        int8(weight, neurons=0)
    both = torch.cat(weights)
    changed = torch.cat([dequantize(*quantize(weight, 0), 0) for weight in weights])
    expected = (changed - both).norm() / both.norm()
    error = int8.error()
    assert error is not None
    assert error["relative_error"] == pytest.approx(expected.item(), rel=1e-6)
    assert 0 < error["largest_error_in_steps"] <= 0.5


def test_a_weight_that_is_no_number_is_refused() -> None:
    with pytest.raises(CheckpointError, match="within half a step"):
        Int8()(torch.tensor([[1.0, torch.nan]]), neurons=0)


@pytest.fixture(scope="module")
def int8(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's pruned checkpoint in 8 bits, written with verification."""
    out = tmp_path_factory.mktemp("int8") / "out"
    error = pipeline.apply(tiny.checkpoint, tiny.plan, out, weights="int8")
    assert error is not None
    assert 0.001 < error["relative_error"] < 0.01
    return out


def test_a_checkpoint_holds_the_kept_weights_rounded(tiny: Tiny, int8: Path) -> None:
    kept = Checkpoint(tiny.pruned)
    weights = stored_tensors(kept)
    stored = {name: tensor for path in int8.glob("*.safetensors") for name, tensor in load_file(path).items()}  # fmt: skip
    experts = [name for name in stored if stored[name].dtype == torch.int8]
    assert len(experts) == 3 * 3 * 6
    for name in experts:
        neurons = 1 if "down_proj" in name else 0
        q, scale = quantize(weights[name], neurons)
        assert torch.equal(stored[name], q)
        of_scale = stored[name.removesuffix("weight") + "scale"]
        assert torch.equal(of_scale, scale.unsqueeze(1 - neurons))
    assert json.loads((int8 / "config.json").read_text())["quantization_config"] == {
        **kept.config["quantization_config"],
        "version": 2,
        "weights": "int8",
    }


def test_it_is_shown_as_the_weights_that_it_stands_for(tiny: Tiny, int8: Path) -> None:
    shown, kept = Checkpoint(int8), Checkpoint(tiny.pruned)
    assert {name: entry.shape for name, entry in shown.tensors.items()} == {
        name: entry.shape for name, entry in kept.tensors.items()
    }
    assert {entry.dtype for entry in shown.tensors.values()} == {torch.float32}


def test_expert_by_expert_the_same_is_written_and_found_right(
    tiny: Tiny, int8: Path, tmp_path: Path
) -> None:
    run = Run(execution=Execution(memory=1 << 30))
    pipeline.apply(tiny.checkpoint, tiny.plan, tmp_path / "out", run=run, weights="int8")
    assert files_of(tmp_path / "out") == files_of(int8)


def test_saving_and_loading_changes_nothing(int8: Path, tmp_path: Path) -> None:
    model = adapter.load_model(int8)
    model.save_pretrained(tmp_path / "again", max_shard_size="150KB")
    again = adapter.load_model(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
    stored = [Checkpoint(directory) for directory in (int8, tmp_path / "again")]
    assert stored[0].tensors.keys() == stored[1].tensors.keys()
    before, after = (stored_tensors(c) for c in stored)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_16_bit_models_have_16_bit_scales(int8: Path) -> None:
    model = adapter.load_model(int8, torch.bfloat16)
    [experts, *_] = [module for module in model.modules() if isinstance(module, TenpExperts)]
    assert experts.gate_up_proj.dtype == experts.down_proj.dtype == torch.int8
    assert experts.gate_up_proj_scale.dtype == experts.down_proj_scale.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(token_ids()).logits.isfinite().all()


def test_torch_computes_what_the_kernel_does(int8: Path) -> None:
    model = adapter.load_model(int8)
    experts = [module for module in model.modules() if isinstance(module, TenpExperts)][1]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 32, generator=generator)
    index = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(7)])
    weights = torch.rand(7, 2, generator=generator)
    with torch.no_grad():
        kernel = experts(hidden, index, weights)
    hidden.requires_grad_(True)
    by_torch = experts(hidden, index, weights)
    assert by_torch.requires_grad
    torch.testing.assert_close(kernel, by_torch.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_other_names_and_layouts(family: str, tmp_path: Path) -> None:
    dense = Checkpoint(save_model(tmp_path / "dense", family, dtype=torch.bfloat16))
    statistics = calibration.collect(
        adapter.load_model(dense.directory, torch.float32),
        [make_samples()],
        pruning.source_of(dense),
    )
    plan = planning.plan(scoring.score(statistics), statistics, Budget(0.5, width_multiple=4))
    pipeline.apply(dense, plan, tmp_path / "out", weights="int8")  # verifies
    model = adapter.load_model(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    again = adapter.load_model(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


def test_verification_notices_a_wrong_scale(tiny: Tiny, int8: Path, tmp_path: Path) -> None:
    pruning.apply(tiny.checkpoint, tiny.plan, tmp_path / "out", int8=Int8())
    path = next(p for p in (tmp_path / "out").glob("*.safetensors") if ".scale" in str(load_file(p).keys()))  # fmt: skip
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("scale") and tensors[name].numel())
    tensors[name] *= 1.1
    save_file(tensors, path, metadata={"format": "pt"})
    change = rounding.change_of(tiny.checkpoint, None, is_int8=True)
    with pytest.raises(CheckpointError, match="must compute what the masked dense model does"):
        equivalence.check(tiny.checkpoint, tiny.plan, change, tmp_path / "out")


def test_the_command_reports_the_error(tiny: Tiny, tmp_path: Path, command: Command) -> None:
    tiny.plan.save(tmp_path / "plan.json")
    common = ("apply", tiny.directory, tmp_path / "plan.json", "--weights", "int8", "--no-verify")
    shown = command(*common, "--out", tmp_path / "a", "--json", "--quiet").json()
    assert shown["weights"]["dtype"] == "int8"
    assert 0.001 < shown["weights"]["relative_error"] < 0.01
    stored = sum(path.stat().st_size for path in (tmp_path / "a").glob("*.safetensors"))
    assert shown["bytes"]["after"] == stored
    table = command(*common, "--out", tmp_path / "b", "--quiet").out
    assert f"differ from the kept ones by {shown['weights']['relative_error']:.2%}" in table


def test_the_whole_job_writes_the_same_and_goes_on_after_its_end(
    tiny: Tiny, text_file: Path, tmp_path: Path, command: Command
) -> None:
    job = (
        "prune",
        tiny.directory,
        "--calibration",
        text_file,
        "--keep",
        "0.5",
        "--weights",
        "int8",
        "--no-verify",
        "--quiet",
    )
    once = (*job, "--out", tmp_path / "out", "--work-dir", tmp_path / "work", "--json")
    assert command(*once).json()["plan"]["weights"]["dtype"] == "int8"
    assert "weights" not in command(*once).json()["plan"]  # nothing was left to round
    plan = tmp_path / "out" / pruning.PLAN_FILE
    apply = ("apply", tiny.directory, plan, "--weights", "int8", "--no-verify", "--quiet")
    command(*apply, "--out", tmp_path / "applied")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "applied")


def test_what_cannot_be_quantized_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="weights must be int8 or None, got int4"):
        pipeline.apply(tiny.checkpoint, tiny.plan, tmp_path / "out", weights="int4")
    dropped = pipeline.plan(tiny.statistics, Budget(0.5, method="drop"))
    with pytest.raises(Unsupported, match="narrows experts, got one of method drop"):
        pipeline.apply(tiny.checkpoint, dropped, tmp_path / "out", weights="int8")
    assert not any(tmp_path.iterdir())


def test_one_width_for_all_needs_tenp_in_8_bits(tiny: Tiny, tmp_path: Path) -> None:
    plan = planning.plan(tiny.scores, tiny.statistics, Budget(0.5, method="enp", width_multiple=4))
    pipeline.apply(tiny.checkpoint, plan, tmp_path / "out", verify=False, weights="int8")
    assert "quantization_config" in Checkpoint(tmp_path / "out").config


def test_a_padded_export_has_the_weights_that_they_stand_for(int8: Path, tmp_path: Path) -> None:
    pruning.export_padded(Checkpoint(int8), tmp_path / "padded")
    with torch.no_grad():
        padded = adapter.load_model(tmp_path / "padded")(token_ids()).logits
        torch.testing.assert_close(
            padded, adapter.load_model(int8)(token_ids()).logits, rtol=1e-4, atol=1e-4
        )
