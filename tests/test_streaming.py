# SPDX-License-Identifier: Apache-2.0
"""Calibration layer by layer gives the bits of calibration in memory."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch

from support.fixtures import Command, Tiny, files_of, write_text
from support.tiny_models import FAMILIES, make_samples, save_model
from tenp import (
    adapter,
    calibration,
    devices,
    evaluation,
    memory,
    moments,
    pipeline,
    pruning,
    streamed_evaluation,
    streaming,
    verification,
)
from tenp.checkpoint import Checkpoint
from tenp.cli import display
from tenp.errors import CheckpointError
from tenp.layerwise import LayerwiseModel
from tenp.pipeline import Pruned
from tenp.planning import Budget
from tenp.reading import Reader
from tenp.statistics import Statistics
from tenp.storage import Storage


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_statistics_and_figures_are_those_of_a_run_in_memory(
    family: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "model", family))
    source = pruning.source_of(checkpoint)
    samples = [make_samples("prose", seed=0), make_samples("code", (25, 50), seed=1)]
    model = adapter.load_model(checkpoint.directory, torch.float32)
    expected = calibration.collect(model, samples, source, batch_tokens=100)
    figures = evaluation.evaluate(model, samples, batch_tokens=100)
    for stream in ("layers", "experts"):
        layerwise = LayerwiseModel(Reader(checkpoint), torch.float32)
        streamed = streaming.collect(layerwise, samples, source, batch_tokens=100, stream=stream)
        assert streamed.digest() == expected.digest()
        found = streamed_evaluation.evaluate(layerwise, samples, batch_tokens=100, stream=stream)
        for ours, theirs in zip(found, figures, strict=True):
            assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-6)


def test_what_stands_in_for_the_experts_is_let_go_afterwards(tiny: Tiny) -> None:
    """It refers to the weights of a layer: the next layer's would come on top of them."""
    model = adapter.load_model(tiny.directory)

    def function(*args: torch.Tensor) -> torch.Tensor:
        return args[1]

    kept = weakref.ref(function)
    with adapter.experts_replaced(model, function):
        pass
    del function
    assert kept() is None


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


def test_memory_is_forecast_for_the_layer_with_most_heads(tiny: Tiny) -> None:
    model = LayerwiseModel(Reader(tiny.checkpoint), torch.float32)
    setup = memory.Setup("layers", "ram", 4000)
    alike = memory.forecast(model, tiny.samples, setup)
    # Where layers differ, the config refuses to give one number.
    model.model.config.per_layer_config = {
        1: {"num_attention_heads": 8, "num_experts_per_tok": 1},
        2: {"num_attention_heads": 1},
    }
    assert memory.forecast(model, tiny.samples, setup).batch > alike.batch


@pytest.mark.parametrize("stream", ["layers", "experts"])
def test_what_batches_wait_with_in_several_processes_is_forecast(tiny: Tiny, stream: str) -> None:
    model = LayerwiseModel(Reader(tiny.checkpoint), torch.float32)
    setup = memory.Setup(stream, "ram", 100)

    def waiting(second_moments: bool, cross_moments: bool) -> int:
        """What the second of two processes holds beside the sums."""
        alone, shared = (
            memory.forecast(
                model, tiny.samples, setup, processes, second_moments, cross_moments
            ).statistics
            for processes in (1, 2)
        )
        return shared - alone

    experts = model.experts[0]
    batches = streaming.make_batches(moments.halves(tiny.samples), 100)
    count = (len(batches) + 1) // 2 * (experts.num_experts if stream == "layers" else 1)
    packed = experts.width * (experts.width + 1) // 2
    assert waiting(True, False) - waiting(False, False) >= 8 * count * packed
    assert waiting(True, True) - waiting(True, False) >= 8 * count * experts.width**2


def test_hidden_states_in_a_file_give_the_same(tiny: Tiny, tmp_path: Path) -> None:
    model = LayerwiseModel(Reader(tiny.checkpoint), torch.float32)
    storage = Storage("disk", directory=tmp_path)
    found = streaming.collect(
        model, tiny.samples, tiny.source, batch_tokens=100, stream="experts", storage=storage
    )
    assert found.digest() == tiny.statistics.digest()
    assert not list(tmp_path.iterdir())


def test_hidden_states_stay_on_a_gpu_that_has_room_for_them(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LayerwiseModel(Reader(tiny.checkpoint), torch.float32)
    assert memory.default_offload(model, tiny.samples, "experts", 100) == "ram"
    model.device = torch.device("cuda")
    found = memory.forecast(model, tiny.samples, memory.Setup("experts", "device", 100))
    least = found.weights + found.batch + found.between
    for free, expected in ((least, "ram"), (least + found.statistics, "device")):
        monkeypatch.setattr(devices, "free_bytes", lambda device, free=free: free)
        assert memory.default_offload(model, tiny.samples, "experts", 100) == expected


def test_where_rows_of_experts_begin_is_asked_of_the_device_once_a_batch(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once an expert: every time, the CPU would wait for all that the device has yet to do."""
    asked = 0
    read = torch.Tensor.tolist

    def tolist(self: torch.Tensor) -> object:
        nonlocal asked
        asked += self.dtype == torch.int32
        return read(self)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    model = LayerwiseModel(Reader(tiny.checkpoint), torch.float32)
    streaming.collect(model, tiny.samples, tiny.source, batch_tokens=100, stream="experts")
    batches = streaming.make_batches(tiny.samples, 100)
    assert asked == len(batches) * len(model.experts)


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
    options = ["prune", tiny.directory, "--calibration", text_file, "--keep", 0.5]
    options += ["--evaluate", text_file, "--quiet", "--json", "--out"]
    one = command(*options, tmp_path / "one").json()
    two = command(*options, tmp_path / "two", "--stream", "experts").json()
    assert one["plan"] == two["plan"]
    for when in ("before", "after"):
        assert two[when][0]["perplexity"] == pytest.approx(one[when][0]["perplexity"], rel=1e-6)
    files = [files_of(tmp_path / name) for name in ("one", "two")]
    for found in files:
        assert b"perplexity" in found.pop("README.md")
    assert files[0] == files[1]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def in_memory(tiny: Tiny, text: Path) -> Pruned:
    """What the commands below must find, whatever their options."""
    return pipeline.prune(tiny.directory, [text], None, Budget(0.5))


@pytest.mark.parametrize(
    "options",
    [
        "--stream none --work-dir WORK --quiet",
        "--stream layers --offload device",
        "--stream experts --offload disk --work-dir WORK",
        "--memory 2GiB --offload ram --quiet",
    ],
)
def test_calibrate_and_prune_take_the_same_options(
    tiny: Tiny, text: Path, in_memory: Pruned, command: Command, options: str, tmp_path: Path
) -> None:
    """`tests/test_distributed.py` has several processes, `tests/test_sequential.py` --sequential."""
    plan = json.loads(json.dumps(display.plan_summary(in_memory.plan)))
    for name in ("calibrate", "prune"):
        more = options.replace("WORK", str(tmp_path / f"work-{name}")).split(" ")
        more += ["--out", tmp_path / "s"] if name == "calibrate" else ["--keep", 0.5, "--dry-run"]
        result = command(name, tiny.directory, "--calibration", text, "--json", *more)
        assert result.code == 0
        events = [json.loads(line) for line in result.err.splitlines() if line.startswith("{")]
        assert bool(events) == ("--quiet" not in options)
        for event in events[-1:]:
            assert (event["stage"], event["done"]) == ("calibrate", event["total"])
        if name == "prune":
            assert result.json()["plan"] == plan
    assert Statistics.load(tmp_path / "s").digest() == in_memory.statistics.digest()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("calibrate", ["--second-pass"], "gradients need the whole model in memory"),
        ("calibrate", ["--self-generate", 4], "answers need the whole model in memory"),
        (
            "prune",
            ["--keep", 0.5, "--neurons", "heapr"],
            "gradients need the whole model in memory",
        ),
        ("prune", ["--keep", 0.5, "--self-generate", 4], "answers need the whole model in memory"),
    ],
)
def test_what_needs_the_whole_model_is_refused_when_it_is_streamed(
    tiny: Tiny,
    text: Path,
    command: Command,
    name: str,
    options: list[object],
    message: str,
    tmp_path: Path,
) -> None:
    given = [tiny.directory, "--calibration", text, "--stream", "layers", "--out", tmp_path / "out"]
    result = command(name, *given, *options)
    assert result.code == 2
    assert message in result.err
    assert not list(tmp_path.iterdir())


def test_a_pruned_model_is_evaluated_layer_by_layer(
    tiny: Tiny, text: Path, command: Command
) -> None:
    evaluate = ["evaluate", tiny.pruned, "--data", text, "--reference", tiny.directory, "--json"]
    [expected] = command(*evaluate, "--quiet").json()
    [layers] = command(*evaluate, "--quiet", "--stream", "layers").json()
    [experts] = command(*evaluate, "--quiet", "--stream", "experts").json()
    assert layers == experts
    assert layers.pop("domain") == expected.pop("domain")
    assert layers == pytest.approx(expected, rel=1e-4)
    assert expected["divergence"] > 1e-4
