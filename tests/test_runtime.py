# SPDX-License-Identifier: Apache-2.0
"""A pruned checkpoint behaves like any other model of transformers, after `import tenp` and only then."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    pipeline,
)

from support.fixtures import Tiny
from support.tiny_models import token_ids
from tenp import adapter, devices, planning, pruning
from tenp import pipeline as pipeline_of_tenp
from tenp.checkpoint import Checkpoint
from tenp.errors import CheckpointError
from tenp.planning import Budget
from tenp.runtime import TenpConfig, TenpExperts, TenpQuantizer


def _load(directory: Path, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def _experts(model: nn.Module) -> list[TenpExperts]:
    return [module for module in model.modules() if isinstance(module, TenpExperts)]


@pytest.fixture(scope="module")
def model(tiny: Tiny):
    return _load(tiny.pruned)


def test_experts_have_the_planned_widths(tiny: Tiny, model) -> None:
    assert [experts.widths for experts in _experts(model)] == list(tiny.plan.widths().values())
    assert "widths=0..24" in repr(_experts(model)[0])


def test_memory_holds_the_kept_neurons_and_less_than_16_rows_of_padding_an_expert(model) -> None:
    for experts in _experts(model):
        padding = experts.down_proj.shape[0] - sum(experts.widths)
        assert 0 <= padding < 16 * len(experts.widths)


def test_it_generates(tiny: Tiny, model) -> None:
    ids = token_ids(8)[:1]
    out = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 14)
    assert torch.equal(out[:, :8], ids)
    # Step by step without a cache gives the same tokens.
    grown = ids
    for _ in range(6):
        with torch.no_grad():
            grown = torch.cat([grown, model(grown, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, grown)


def test_a_pipeline_runs(tiny: Tiny) -> None:
    generate = pipeline("text-generation", model=str(tiny.pruned), device="cpu")
    [result] = generate("hello", max_new_tokens=3, do_sample=False)
    assert result["generated_text"].startswith("hello")


def test_saving_and_loading_changes_nothing(tiny: Tiny, model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a", max_shard_size="150KB")
    again = _load(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    widths = {str(k): ",".join(map(str, v)) for k, v in tiny.plan.widths().items()}
    assert config["quantization_config"]["widths"] == widths
    assert not any(name.endswith("_plan") for name in config)


def test_bfloat16_differs_by_its_rounding_only(tiny: Tiny) -> None:
    ours, masked = _load(tiny.pruned, dtype=torch.bfloat16), _masked(tiny, torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        logits = ours(token_ids()).logits
        same_dtype = masked(token_ids()).logits
        exact = _masked(tiny, torch.float32)(token_ids()).logits
    assert logits.dtype == torch.bfloat16
    # Routers may choose differently in 16 bit, so the mean decides: as good as torch's own bfloat16.
    assert (logits - exact).abs().mean() <= 2 * (same_dtype - exact).abs().mean()


def _masked(tiny: Tiny, dtype: torch.dtype):
    from tenp import evaluation

    masked = adapter.load_model(tiny.directory, dtype)
    evaluation.mask_neurons(masked, tiny.plan)
    return masked


def test_device_map_auto(tiny: Tiny, model) -> None:
    spread = _load(tiny.pruned, device_map="auto")
    with torch.no_grad():
        logits = spread(token_ids().to(spread.device)).logits.cpu()
        torch.testing.assert_close(logits, model(token_ids()).logits, rtol=1e-5, atol=1e-4)


def test_layers_on_disk(tiny: Tiny, model, tmp_path: Path) -> None:
    where = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm"), "cpu")
    where |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.2": "cpu"}
    where["model.layers.1"] = "disk"
    spread = _load(tiny.pruned, device_map=where, offload_folder=tmp_path)
    with torch.no_grad():
        assert torch.equal(spread(token_ids()).logits, model(token_ids()).logits)


def test_moving_a_model_moves_its_experts(model) -> None:
    copy = _experts(model)[0].to(torch.float64)
    assert copy.down_proj.dtype == torch.float64
    _experts(model)[0].to(torch.float32)


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_torch_computes_what_the_kernel_does(model, tokens: int) -> None:
    experts = _experts(model)[1]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 32, generator=generator)
    index = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(tokens)])
    index[0, 0] = 6  # names no expert
    weights = torch.rand(tokens, 2, generator=generator)
    with torch.no_grad():
        kernel = experts(hidden, index, weights)
    plain = experts._forward_in_torch(hidden, index, weights)
    torch.testing.assert_close(kernel, plain, rtol=1e-5, atol=1e-5)


class _OnGpu(torch.Tensor):
    is_cuda = True


def test_on_a_gpu_that_has_no_kernel_torch_computes(model, monkeypatch) -> None:
    experts = _experts(model)[0]
    arguments = (torch.randn(3, 32), torch.tensor([[0, 2], [3, 4], [5, 0]]), torch.rand(3, 2))
    with torch.no_grad():
        expected = experts._forward_in_torch(*arguments)
        monkeypatch.setattr(devices, "_cuda_trouble", lambda: "there are no kernels")
        monkeypatch.setattr("tenp.runtime.experts.expert_gemm", pytest.fail)
        found = experts(arguments[0].as_subclass(_OnGpu), *arguments[1:])
    assert torch.equal(found, expected)


def test_compiled_code_can_ask_whether_there_are_kernels() -> None:
    """It is asked once, when the code is traced: the answer must not cut the graph in two."""

    def chosen(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if devices.has_cuda() else x

    expected = chosen(torch.zeros(2))
    assert torch.equal(
        torch.compile(chosen, backend="eager", fullgraph=True)(torch.zeros(2)), expected
    )


def test_generate_compiles_with_a_static_cache(model) -> None:
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        nonlocal graphs
        graphs += 1
        return graph.forward

    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    ids = token_ids(8)[:1]
    expected = model.generate(ids, **options)
    compile_config = CompileConfig(backend=backend, mode="default", fullgraph=True)
    compile_config._compile_all_devices = True  # on a GPU that is so by itself
    found = model.generate(
        ids, **options, cache_implementation="static", compile_config=compile_config
    )
    assert graphs > 0
    assert torch.equal(found, expected)


def test_the_packed_experts_stay_whole_in_a_parallel_model() -> None:
    """Whichever way a version of transformers asks: with the plan or with the config."""
    config = AutoConfig.for_model("qwen3_moe")
    before = dict(type(config).base_model_tp_plan)
    quantizer = TenpQuantizer(TenpConfig())
    asked = dict(before)
    quantizer.update_parallel_plan(None, asked)
    quantizer.update_tp_plan(config)
    assert config.base_model_tp_plan == asked
    assert asked.keys() == {name for name in before if ".experts" not in name} != before.keys()
    assert type(config).base_model_tp_plan == before
    routed = {"layers.*.mlp.gate": "ep_router", "layers.*.mlp.experts": "moe_tp_experts"}
    quantizer.update_parallel_plan(None, routed)
    assert not routed


def test_all_weights_can_be_trained_and_get_the_gradients_of_the_masked_model(tiny: Tiny) -> None:
    model = _load(tiny.pruned)
    assert all(parameter.requires_grad for parameter in model.parameters())
    masked = _masked(tiny, torch.float32).requires_grad_()
    for trained in (model, masked):
        trained(token_ids(), labels=token_ids()).loss.backward()
    layers = adapter.find_experts(masked)
    for experts, dense, keep in zip(_experts(model), layers, tiny.plan.keep.values(), strict=True):
        _, up = dense.module.gate_up_proj.grad.chunk(2, dim=1)  # [E, I, H]
        down = dense.module.down_proj.grad.mT  # [E, I, H]
        rows = len(experts.down_proj)
        for expert, (begin, width) in enumerate(
            zip(experts._offsets, experts.widths, strict=False)
        ):
            ours = slice(begin, begin + width)
            for packed, fused in (
                (experts.gate_up_proj.grad[rows:][ours], up),
                (experts.down_proj.grad[ours], down),
            ):
                torch.testing.assert_close(
                    packed, fused[expert, keep[expert]], rtol=1e-4, atol=1e-6
                )


def test_a_token_without_an_expert_gives_zero(model) -> None:
    experts = _experts(model)[0]
    with torch.no_grad():
        out = experts(torch.ones(2, 32), torch.tensor([[6, 6], [1, 6]]), torch.ones(2, 2))
    assert not out.any()  # expert 1 has width 0


# ---- what does not load ----


def _python(
    code: str, *arguments: object, directory: Path | None = None, **environment: object
) -> str:
    """Run code in a process that has not imported tenp, and return what it prints."""
    settings = {name: str(value) for name, value in environment.items()}
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **settings},
        cwd=directory,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def _uninstalled(directory: Path) -> Path:
    """Return a directory that, on the path, makes tenp as good as not installed."""
    (directory / "tenp").mkdir(parents=True)
    (directory / "tenp" / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'tenp'\")\n"
    )
    return directory


def test_without_tenp_stock_checkpoints_are_right_and_a_ragged_one_fails(
    tiny: Tiny, tmp_path: Path
) -> None:
    for name, method in (("uniform", "enp"), ("dropped", "drop")):
        budget = Budget(0.5, method=method, width_multiple=4 if method == "enp" else None)
        plan = planning.plan(tiny.scores, tiny.statistics, budget)
        pipeline_of_tenp.apply(tiny.checkpoint, plan, tmp_path / name, verify=False)
    pruning.export_padded(Checkpoint(tiny.pruned), tmp_path / "padded")
    stock = [tmp_path / name for name in ("uniform", "dropped", "padded")]
    with torch.no_grad():
        for directory in stock:
            logits = adapter.load_model(directory)(token_ids()).logits
            torch.save(logits, directory / "logits.pt")
        ragged = adapter.load_model(tiny.pruned)(token_ids()).logits
    torch.testing.assert_close(torch.load(stock[2] / "logits.pt"), ragged, rtol=1e-4, atol=1e-4)
    torch.save(token_ids(), tmp_path / "ids")
    said = _python(
        """
import sys, torch
from transformers import AutoModelForCausalLM
ids, ragged, *stock = sys.argv[1:]
for directory in stock:
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    logits = model(torch.load(ids)).logits
    torch.testing.assert_close(logits, torch.load(directory + "/logits.pt"), rtol=1e-4, atol=1e-4)
    print("stock loads")
for trust in (False, True):
    try:
        AutoModelForCausalLM.from_pretrained(ragged, trust_remote_code=trust)
    except Exception as error:
        print("ragged fails:", str(error).replace("\\n", " "))
assert "tenp" not in sys.modules
""",
        tmp_path / "ids",
        tiny.pruned,
        *stock,
        directory=tmp_path,  # away from the sources: the current directory comes first on the path
        PYTHONPATH=_uninstalled(tmp_path / "uninstalled"),
        HF_MODULES_CACHE=tmp_path / "modules",
    )
    assert said.count("stock loads") == 3
    assert said.count("ragged fails: ") == 2
    assert "requires the following packages" in said
    assert "not found in your environment: tenp" in said


def test_code_in_the_checkpoint_imports_tenp_for_those_who_trust_it(
    tiny: Tiny, model, tmp_path: Path
) -> None:
    with torch.no_grad():
        torch.save(model(token_ids()).logits, tmp_path / "logits")
    torch.save(token_ids(), tmp_path / "ids")
    _python(
        """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
assert "tenp" not in sys.modules
ragged, ids, logits, again = sys.argv[1:]
assert type(AutoConfig.from_pretrained(ragged, trust_remote_code=True)).__module__.startswith("transformers.")
model = AutoModelForCausalLM.from_pretrained(ragged, trust_remote_code=True)
assert type(model).__module__.startswith("transformers.")
assert torch.equal(model(torch.load(ids)).logits, torch.load(logits))
AutoModel.from_pretrained(ragged, trust_remote_code=True)
model.save_pretrained(again)
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
assert torch.equal(model(torch.load(ids)).logits, torch.load(logits))
""",
        tiny.pruned,
        tmp_path / "ids",
        tmp_path / "logits",
        tmp_path / "again",
        HF_MODULES_CACHE=tmp_path / "modules",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "must have format version 1, got 9"),
        ({"widths": {"0": "1,2,3,4,5,6"}}, r"widths for the layers \[0, 1, 2\], got \[0\]"),
        ({"widths": {str(layer): "1,2" for layer in range(3)}}, "6 widths for layer 0, got 2"),
        ({"widths": {str(layer): "a" for layer in range(3)}}, "widths .* must be numbers, got .*a"),
        (
            {"widths": {str(layer): "24,24,24,24,24,24" for layer in range(3)}},
            r"must be \(.*as config.json says",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    tiny: Tiny, tmp_path: Path, change: dict, message: str
) -> None:
    copy = Path(shutil.copytree(tiny.pruned, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"].update(change)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        adapter.load_model(copy)


def test_a_config_for_a_dense_model_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="tenp"):
        _load(tiny.directory, quantization_config=TenpConfig(widths={}))


def test_a_pruned_tokenizer_loads(tiny: Tiny) -> None:
    assert len(AutoTokenizer.from_pretrained(tiny.pruned)) == len(
        AutoTokenizer.from_pretrained(tiny.directory)
    )
