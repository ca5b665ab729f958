# SPDX-License-Identifier: Apache-2.0
"""Bad input gets one clear sentence and exit code 2, and leaves nothing behind."""

import builtins
import errno
import gzip
import json
import os
import re
import shutil
import signal
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

import tenp
from support.fixtures import Command, Result, Tiny, files_of
from support.tiny_models import make_tokenizer, save_model
from tenp import adapter, calibration, devices, files, streaming
from tenp.checkpoint import INDEX_FILE, ShardWriter
from tenp.errors import CheckpointError, InvalidArgument


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny.directory, tmp_path / "model"))


@pytest.fixture
def prune(command: Command, text_file: Path, tmp_path: Path) -> Callable[..., Result]:
    """`tenp prune MODEL --calibration TEXT --keep 0.5 --out OUT` with changes."""

    def run(model: object, *more: object, calibration: object = text_file, keep: object = 0.5):
        arguments = ("--calibration", calibration, "--keep", keep, "--out", tmp_path / "out")
        return command("prune", model, *arguments, "--quiet", *more)

    return run


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path):
    """After every test here: no output, no temporary file or directory."""
    yield
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob(".*"))


def _assert_refused(result: Result, *expected: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr that matches every pattern."""
    assert result.code == 2, result.err
    assert result.out == ""
    assert result.err.startswith("tenp: ")
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    for pattern in expected:
        assert re.search(pattern, result.err), result.err


# ---- the checkpoint ----


def test_a_missing_model(prune, tmp_path: Path) -> None:
    _assert_refused(prune(tmp_path / "none"), "must be a checkpoint directory or a model name")


def test_a_missing_shard(prune, copy: Path) -> None:
    sorted(copy.glob("*.safetensors"))[1].unlink()
    _assert_refused(prune(copy), "model-00002-.*must exist, as .* says, but is missing")


def test_a_truncated_shard(prune, copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 100)
    _assert_refused(prune(copy), r"model-00002-.* must have (\d+) bytes, .* got \d+: .*truncated")


def test_a_shard_damaged_in_its_header(prune, copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    raw = shard.read_bytes()
    shard.write_bytes(raw.replace(b'"shape"', b'"shame"', 1))
    _assert_refused(prune(copy), "model-00001-.* must be a safetensors file")


def test_an_index_that_is_not_the_files(prune, copy: Path) -> None:
    index = json.loads((copy / INDEX_FILE).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"]["model.other.weight"] = index["weight_map"][name]
    (copy / INDEX_FILE).write_text(json.dumps(index))
    _assert_refused(prune(copy), "must hold model.other.weight, as .* says, but does not")


def test_a_missing_weight(prune, copy: Path) -> None:
    # The index and the files agree that there is no norm; the config needs one.
    from safetensors.torch import load_file, save_file

    index = json.loads((copy / INDEX_FILE).read_text())
    shard = copy / index["weight_map"].pop("model.norm.weight")
    (copy / INDEX_FILE).write_text(json.dumps(index))
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    _assert_refused(prune(copy), "must hold model.norm.weight, but 1 weights are missing")


def test_weights_that_do_not_fit_the_config(prune, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 16}))
    _assert_refused(prune(copy), r"experts\..* must be \(.*16.*\), as config.json says, got \(.*24")


def test_a_dense_model(prune, tmp_path: Path) -> None:
    directory = save_model(tmp_path / "dense", "llama", with_tokenizer=True)
    result = prune(directory)
    _assert_refused(result, "LlamaForCausalLM must have routed experts to prune", "looked for")


def test_an_unknown_architecture(prune, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "future_moe", "architectures": ["FutureMoeForCausalLM"]}
    (copy / "config.json").write_text(json.dumps(config))
    _assert_refused(prune(copy), r"looked for its model_type", "future_moe")


def test_experts_of_an_unknown_kind(prune, tmp_path: Path) -> None:
    directory = save_model(tmp_path / "dense", "qwen3_moe", with_tokenizer=True)
    config = json.loads((directory / "config.json").read_text())
    config |= {"decoder_sparse_step": 99}  # the family is known, but no layer has experts
    (directory / "config.json").write_text(json.dumps(config))
    _assert_refused(prune(directory), "must have routed experts to prune", "down_proj")


def test_a_pruned_model(prune, tiny: Tiny) -> None:
    _assert_refused(prune(tiny.pruned), "is pruned already; prune the model it was made from")


# ---- the budget ----


@pytest.mark.parametrize(
    ("keep", "more", "message"),
    [
        (0, (), "keep must be above 0 and at most 1, got 0"),
        (1.5, (), "keep must be above 0 and at most 1, got 1.5"),
        (-1, (), "keep must be above 0"),
        ("nan", (), "keep must be a number, got nan"),
        (0.5, ("--alpha", 1.5), "alpha must be between 0 and 1, got 1.5"),
        (0.5, ("--alpha", -0.5), "alpha must be between 0 and 1, got -0.5"),
        (0.5, ("--alpha", 0.7), "alpha must be at most keep, .* 0.5 or less would fit"),
        (
            0.5,
            ("--method", "enp", "--alpha", 0.2),
            "alpha needs method tenp, got 0.2 with method enp",
        ),
        (0.5, ("--method", "drop", "--repair", "ls"), "cannot be repaired: .* got method drop"),
        (
            0.5,
            ("--method", "dern", "--under-covered", "keep"),
            "under_covered must be warn or fail",
        ),
        (0.5, ("--worst-domain",), "worst_domain needs method best, got method tenp"),
        (0.5, ("--width-multiple", 0), "width_multiple must be 1 or more, got 0"),
        (0.5, ("--domain-weight", "cod=2"), r"must be for \['text'\], got \['cod'\]"),
        (0.5, ("--domain-weight", "text"), "--domain-weight must be NAME=NUMBER, got text"),
        (0.5, ("--domain-weight", "text=-1"), "domain weights must be 0 or more"),
        (0.5, ("--max-length", 4096), "max_length must be between 1 and the model's 128, got 4096"),
        (
            0.5,
            ("--dtype", "float8"),
            "dtype must be auto, float32, bfloat16 or float16, got float8",
        ),
    ],
)
def test_an_option_out_of_range(prune, tiny: Tiny, monkeypatch, keep, more, message) -> None:
    monkeypatch.setattr(adapter, "load_model", _must_not_run)
    _assert_refused(prune(tiny.directory, *more, keep=keep), message)


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"neuron_criterion": "l3"}, InvalidArgument, "must be one of projection, .*, got l3"),
        ({"expert_criterion": "x"}, InvalidArgument, "must be one of direction-change, .*, got x"),
        ({"neuron_criterium": "l2"}, TypeError, "unexpected keyword argument 'neuron_criterium'"),
    ],
)
def test_an_option_of_python_that_is_none(
    tiny: Tiny, text_file: Path, tmp_path: Path, monkeypatch, option, error, message
) -> None:
    monkeypatch.setattr(adapter, "load_model", _must_not_run)
    with pytest.raises(error, match=message):
        tenp.prune(tiny.directory, [text_file], tmp_path / "out", tenp.Budget(0.5), **option)


def _must_not_run(*arguments: object, **options: object) -> None:
    raise AssertionError("the mistake must be found before the model is read")


def test_a_budget_that_the_experts_cannot_meet(prune, tiny: Tiny) -> None:
    # alpha 0.5 of 18 experts is 9, all of the budget of 0.5; 0.49 rounds to 9 and is too much.
    result = prune(tiny.directory, "--alpha", 0.49, keep=0.49)
    _assert_refused(result, "whole experts must fit the budget", "alpha 0.4444 or less would fit")


def test_experts_that_see_too_little_text(prune, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "little.txt").write_text("little")
    result = prune(tiny.directory, "--under-covered", "fail", calibration=tmp_path / "little.txt")
    _assert_refused(result, "must see 32 calibration tokens, got", "calibrate on more text")
    assert len(list(tmp_path.glob("out-*.safetensors"))) == 1


@pytest.mark.parametrize("device", ["cuda:99", "tpu9"])
@pytest.mark.parametrize("stream", ["none", "layers"])
def test_a_device_that_is_not_there(prune, tiny: Tiny, device: str, stream: str) -> None:
    _assert_refused(prune(tiny.directory, "--device", device, "--stream", stream), "device")


@pytest.mark.parametrize("stream", ["none", "layers", "experts"])
def test_a_gpu_that_this_build_cannot_use(prune, tiny: Tiny, monkeypatch, stream: str) -> None:
    monkeypatch.setattr(adapter, "load_model", _must_not_run)
    monkeypatch.setattr(streaming, "collect", _must_not_run)
    monkeypatch.setattr(devices, "_cuda_trouble", lambda: "there are no kernels")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    refused = "device cuda must be one that tenp has kernels for, but there are no kernels; use"
    _assert_refused(prune(tiny.directory, "--device", "cuda", "--stream", stream), refused)


def test_auto_spreads_no_model_over_gpus_that_this_build_cannot_use(
    tiny: Tiny, monkeypatch
) -> None:
    monkeypatch.setattr(devices, "_cuda_trouble", lambda: "there are no kernels")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert devices.resolve("auto") == "cpu"
    used = []

    def from_pretrained(*arguments, device_map: str, **options):
        used.append(device_map)
        raise OSError("stopped")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", from_pretrained)
    with pytest.raises(CheckpointError, match="stopped"):
        adapter.load_model(tiny.directory, device="auto")
    assert used == ["cpu"]


# ---- the text ----


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.txt", b"", "must hold text, but is empty", id="empty"),
        pytest.param("a.jsonl", b"\n \n", "must hold text, but is empty", id="blank"),
        pytest.param("a.txt", b"caf\xe9", "must be UTF-8, but byte 3 is not", id="latin-1"),
        pytest.param("a.jsonl.gz", b"{}", "cannot be read: Not a gzipped file", id="no gzip"),
        pytest.param("a.txt.gz", gzip.compress(b"abc" * 99)[:-10], "cannot be read", id="cut gzip"),
        pytest.param("a.jsonl", b"{'text': 1}", "line 1 must be JSON", id="no JSON"),
        pytest.param("a.jsonl", b'{"body": "x"}', "must have one of messages, prompt, text", id="key"),
        pytest.param("a.jsonl", b'{"text": ""}', "must give at least one token, got none", id="none"),
    ],
)  # fmt: skip
def test_a_bad_calibration_file(
    prune, tiny: Tiny, tmp_path: Path, monkeypatch, name, content, message
) -> None:
    monkeypatch.setattr(adapter, "load_model", _must_not_run)
    (tmp_path / name).write_bytes(content)
    _assert_refused(prune(tiny.directory, calibration=tmp_path / name), name.split(".")[0], message)


def test_a_missing_calibration_file(prune, tiny: Tiny, tmp_path: Path) -> None:
    result = prune(tiny.directory, calibration=tmp_path / "none.jsonl")
    _assert_refused(result, r"none\.jsonl must be a text file, but there is none")


def test_a_missing_evaluation_file_is_found_before_the_model_is_read(
    prune, tiny: Tiny, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(adapter, "load_model", _must_not_run)
    result = prune(tiny.directory, "--evaluate", tmp_path / "none.txt")
    _assert_refused(result, r"none\.txt must be a text file, but there is none")


# ---- the tokenizer ----


def test_the_tokenizer_of_another_model(prune, copy: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(adapter, "load_model", _must_not_run)
    other = make_tokenizer(more_tokens=500)
    other.add_tokens(["line"])
    other.save_pretrained(copy)
    _assert_refused(prune(copy), "tokenizer must match the model's 260 embeddings, got token id 7")


@pytest.mark.parametrize("content", [None, b"", b"{}", b"garbage"])
def test_a_tokenizer_that_cannot_be_loaded(prune, copy: Path, content: bytes | None) -> None:
    if content is None:
        (copy / "tokenizer.json").unlink()
        (copy / "tokenizer_config.json").unlink()
    else:
        (copy / "tokenizer.json").write_bytes(content)
    _assert_refused(prune(copy), "must hold a tokenizer, but it cannot be loaded")


# ---- the output ----


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_an_output_that_exists(prune, tiny: Tiny, tmp_path: Path, monkeypatch, kind: str) -> None:
    monkeypatch.setattr(adapter, "load_model", _must_not_run)
    out = tmp_path / "out"
    if kind == "directory":
        out.mkdir()
        (out / "precious.txt").write_text("mine")
    else:
        out.write_text("mine")
    before = files_of(tmp_path)
    _assert_refused(prune(tiny.directory), "out must not exist yet, got an existing path")
    assert files_of(tmp_path) == before
    shutil.rmtree(out) if kind == "directory" else out.unlink()


def test_a_full_disk_is_noticed_before_the_model_is_read(prune, tiny: Tiny, monkeypatch) -> None:
    monkeypatch.setattr(adapter, "load_model", _must_not_run)
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    _assert_refused(prune(tiny.directory), r"needs \d+\.\d MiB, but its disk has 0\.0 MiB free")


def _fill_disk(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    """Let `write` fail once so many bytes are written to safetensors files."""
    real_open = Path.open
    written = 0

    def open_(self: Path, mode: str = "r", *more, **options):
        file = real_open(self, mode, *more, **options)
        if "w" not in mode or "b" not in mode:
            return file
        real_write = file.write

        class Full:
            def write(self, data) -> int:
                nonlocal written
                written += len(data)
                if written > after:
                    raise error
                return real_write(data)

            def __getattr__(self, name: str):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *details) -> None:
                file.close()

        return Full()

    monkeypatch.setattr(Path, "open", open_)


@pytest.mark.parametrize("after", [0, 100_000, 200_000])
def test_a_disk_that_fills_up_on_the_way(
    command: Command, tiny: Tiny, tmp_path: Path, monkeypatch, after: int
) -> None:
    tiny.plan.save(tmp_path / "plan.json")
    _fill_disk(monkeypatch, after, OSError(errno.ENOSPC, "No space left on device"))
    result = command("apply", tiny.directory, tmp_path / "plan.json", "--out", tmp_path / "out")
    _assert_refused(result, "out cannot be written: No space left on device")


def test_statistics_outlive_an_output_that_cannot_be_written(
    prune, command: Command, tiny: Tiny, tmp_path: Path, monkeypatch
) -> None:
    def write(*arguments) -> None:  # what was written is removed, so there is room for statistics
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", write)
    result = prune(tiny.directory)
    _assert_refused(result, "out cannot be written: No space left on device; the statistics are ")
    (kept,) = tmp_path.glob("out-*.safetensors")
    assert str(kept) in result.err
    assert command("plan", kept, "--keep", 0.5, "--out", tmp_path / "plan.json").code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "enp", "--keep", 0.01), "every expert must keep a neuron"),
        (("--method", "drop", "--keep", 0.01), "every layer must keep an expert"),
        (("--method", "drop", "--keep", 0.5), "must have a config field for the number of experts"),
    ],
)
def test_statistics_outlive_a_plan_that_the_experts_do_not_allow(
    prune, command: Command, tiny: Tiny, tmp_path: Path, monkeypatch, options, message
) -> None:
    monkeypatch.setattr(adapter, "config_of_experts", lambda *arguments: None)
    _assert_refused(prune(tiny.directory, *options), message, "; the statistics are kept in ")
    (kept,) = tmp_path.glob("out-*.safetensors")
    assert command("plan", kept, "--keep", 0.5, "--out", tmp_path / "plan.json").code == 0


def test_a_disk_that_fills_up_while_other_files_are_copied(
    command: Command, tiny: Tiny, tmp_path: Path, monkeypatch
) -> None:
    def copyfile(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    tiny.plan.save(tmp_path / "plan.json")
    monkeypatch.setattr(shutil, "copyfile", copyfile)
    out = tmp_path / "new" / "deep" / "out"
    result = command("apply", tiny.directory, tmp_path / "plan.json", "--out", out)
    _assert_refused(result, "cannot be written: No space left on device")
    assert not (tmp_path / "new").exists()


def test_statistics_that_do_not_fit_on_the_disk(
    command: Command, tiny: Tiny, text_file: Path, tmp_path: Path, monkeypatch
) -> None:
    def fsync(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    result = command(
        "calibrate", tiny.directory, "--calibration", text_file, "--out", tmp_path / "out", "--quiet"
    )  # fmt: skip
    _assert_refused(result, "out cannot be written: No space left on device")


def test_an_output_where_nothing_may_be_written(prune, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    result = prune(tiny.directory, "--out", tmp_path / "file" / "out")
    _assert_refused(result, "file/out .*Not a directory")


def _raising(number: signal.Signals) -> Callable[..., None]:
    """Return what sends a signal when it is first called: several threads write, and a second one would come late."""
    first = threading.Lock()

    def send(*arguments: object, **options: object) -> None:
        if first.acquire(blocking=False):
            signal.raise_signal(number)

    return send


@pytest.mark.parametrize("stage", ["calibrate", "write", "verify"])
def test_ctrl_c_leaves_nothing_behind(
    prune, tiny: Tiny, tmp_path: Path, monkeypatch, stage: str
) -> None:
    interrupt = _raising(signal.SIGINT)
    if stage == "calibrate":
        monkeypatch.setattr(calibration.ops, "expert_statistics", interrupt)
    elif stage == "write":
        monkeypatch.setattr(ShardWriter, "write", interrupt)
    else:
        monkeypatch.setattr("tenp.evaluation.mask_neurons", interrupt)
    # A shell starts what runs in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert prune(tiny.directory).code not in (0, 2)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_polite_kill_leaves_nothing_behind(prune, tiny: Tiny, monkeypatch) -> None:
    monkeypatch.setattr(ShardWriter, "write", _raising(signal.SIGTERM))
    assert prune(tiny.directory).code == 128 + signal.SIGTERM


def test_memory_that_runs_out_is_an_error_with_advice(prune, tiny: Tiny, monkeypatch) -> None:
    import torch

    def out_of_memory(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.\nMore lines")

    monkeypatch.setattr(calibration.ops, "expert_statistics", out_of_memory)
    _assert_refused(prune(tiny.directory), "out of memory", "--batch-tokens")


def test_a_model_larger_than_its_device_is_not_called_damaged(
    prune, tiny: Tiny, monkeypatch
) -> None:
    import torch

    def out_of_memory(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.\nMore lines")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", out_of_memory)
    refused = "must fit the memory of the device cpu, but does not; use --stream layers"
    _assert_refused(prune(tiny.directory), refused)


# ---- plans ----


def _apply(command: Command, tiny: Tiny, plan: Path, tmp_path: Path) -> Result:
    return command("apply", tiny.directory, plan, "--out", tmp_path / "out")


def test_a_plan_for_another_checkpoint(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    tiny.plan.save(tmp_path / "plan.json")
    other = save_model(tmp_path / "other", rms_norm_eps=1e-5)
    result = command("apply", other, tmp_path / "plan.json", "--out", tmp_path / "out")
    _assert_refused(
        result, "the plan must be for the checkpoint at hand", "got a plan for Qwen2Moe"
    )


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda text: text[: len(text) // 2], id="cut"),
        pytest.param(lambda text: text.replace('"widths": [', '"widths": [9, ', 1), id="widths"),
        pytest.param(lambda text: text.replace('"keep": ["', '"keep": ["zz', 1), id="mask"),
        pytest.param(lambda text: "", id="empty"),
        pytest.param(lambda text: "[1, 2]", id="other JSON"),
    ],
)
def test_a_corrupt_plan(command: Command, tiny: Tiny, tmp_path: Path, damage) -> None:
    tiny.plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(damage(text))
    _assert_refused(_apply(command, tiny, tmp_path / "plan.json", tmp_path), r"plan\.json must be")


def test_a_missing_plan(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    _assert_refused(_apply(command, tiny, tmp_path / "none.json", tmp_path), r"none\.json must be")


def test_a_pruned_model_cannot_be_pruned_with_its_own_plan(
    command: Command, tiny: Tiny, tmp_path: Path
) -> None:
    plan = tiny.pruned / "tenp_plan.json"
    result = command("apply", tiny.pruned, plan, "--out", tmp_path / "out")
    _assert_refused(result, "is pruned already")


def test_statistics_of_different_models(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    import dataclasses

    source = dataclasses.replace(tiny.source, fingerprint="0" * 64)
    tiny.statistics.save(tmp_path / "a")
    dataclasses.replace(tiny.statistics, source=source).save(tmp_path / "b")
    result = command("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    _assert_refused(result, "merge: all statistics must be of one checkpoint")


def test_a_reference_of_another_vocabulary(
    command: Command, tiny: Tiny, text_file: Path, tmp_path: Path
) -> None:
    other = save_model(tmp_path / "other", vocab_size=300)
    result = command(
        "evaluate", tiny.directory, "--data", text_file, "--reference", other, "--quiet"
    )
    _assert_refused(result, "reference must have the vocabulary of the model, 260, got 300")


def test_a_file_without_an_error_number_is_not_a_crash(command: Command, tmp_path: Path) -> None:
    _assert_refused(command("show", tmp_path / "none.json"), r"none\.json must be a plan")
    _assert_refused(command("show", tmp_path / "none"), "none must be a statistics file")
    _assert_refused(command("show", tmp_path), "must be a checkpoint pruned by tenp")


def test_builtin_errors_are_what_tenps_errors_are() -> None:
    from tenp import errors

    for error in (errors.InvalidArgument, errors.PlanError, errors.DataError):
        assert issubclass(error, builtins.ValueError)
    assert issubclass(errors.CheckpointError, OSError)
    assert issubclass(errors.Unsupported, NotImplementedError)
    assert issubclass(errors.DeviceError, RuntimeError)
