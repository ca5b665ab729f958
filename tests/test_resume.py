# SPDX-License-Identifier: Apache-2.0
"""A run that is stopped anywhere goes on with the same command, and gives the same bytes."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest

import tenp
from kill_sweep import sweep
from support.fixtures import Command, Tiny, files_of
from support.kills import STAGES, run_and_die
from tenp import adapter, devices, execution, pipeline
from tenp.errors import CheckpointError
from tenp.execution import Execution
from tenp.planning import Budget
from tenp.workdir import WorkDirectory


@pytest.fixture
def prune(tiny: Tiny, text_file: Path, tmp_path: Path) -> list[object]:
    """A command that prunes with a work directory."""
    arguments = ["prune", tiny.directory, "--calibration", text_file, "--keep", 0.5]
    arguments += ["--stream", "experts", "--batch-tokens", 300, "--quiet"]
    return [*arguments, "--work-dir", tmp_path / "work", "--out", tmp_path / "out"]


def _restart(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    shutil.rmtree(tmp_path / "work", ignore_errors=True)


def _stop_after_layer_1(
    prune: list[object], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = WorkDirectory.save_layer

    def stop(self: WorkDirectory, layer: int, *args: object) -> None:
        save(self, layer, *args)  # type: ignore[arg-type]
        if layer == 1:
            raise CheckpointError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(WorkDirectory, "save_layer", stop)
        assert "stopped" in command(*prune).err


def test_a_run_killed_in_any_stage_goes_on_to_the_same_bytes(
    prune: list[object], tmp_path: Path
) -> None:
    """`tests/kill_sweep.py` kills more often, and more commands."""
    directory = tmp_path / "runs"
    directory.mkdir()
    found = list(sweep(prune[: prune.index("--work-dir")], directory, 1, random.Random(0)))
    assert [(kill.stage, kill.wrong) for kill in found] == [(stage, "") for stage in STAGES]


@pytest.mark.parametrize("method", ["tenp", "drop"])
def test_a_killed_apply_goes_on_to_the_same_bytes(
    tiny: Tiny, command: Command, method: str, tmp_path: Path
) -> None:
    drop = pipeline.plan(tiny.statistics, Budget(0.5, "drop"))
    (tiny.plan if method == "tenp" else drop).save(tmp_path / "plan.json")
    apply = ["apply", tiny.directory, tmp_path / "plan.json", "--quiet", "--no-verify"]
    assert command(*apply, "--out", tmp_path / "expected").code == 0
    resumed = [*apply, "--work-dir", tmp_path / "work", "--out", tmp_path / "out"]
    _, moments = run_and_die(resumed)
    _restart(tmp_path)
    code, _ = run_and_die(resumed, moments - 4)
    assert code == -signal.SIGKILL
    shards = [path.stat() for path in tmp_path.glob(".out.*/*.safetensors")]
    assert shards
    code, left = run_and_die(resumed)
    assert code == 0
    assert left < moments
    assert {path.stat().st_ino for path in (tmp_path / "out").iterdir()} >= {
        shard.st_ino for shard in shards
    }
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    assert command(*resumed).code == 0  # finished: nothing to do
    (tmp_path / "other").mkdir()
    assert command(*resumed[:-1], tmp_path / "other").code == 2


def test_a_finished_command_can_be_repeated(
    prune: list[object], command: Command, tmp_path: Path
) -> None:
    assert command(*prune).code == 0
    before = files_of(tmp_path / "out")
    assert command(*prune).code == 0
    assert files_of(tmp_path / "out") == before


def test_another_budget_reuses_the_calibration(
    prune: list[object], command: Command, tmp_path: Path
) -> None:
    assert command(*prune).code == 0
    before = (tmp_path / "work" / "layer-0000.safetensors").stat()
    again = [0.7 if value == 0.5 else value for value in prune]
    assert command(*again).code == 2  # the output exists and is of another plan
    again[-1] = tmp_path / "other"
    assert command(*again).code == 0
    assert (tmp_path / "work" / "layer-0000.safetensors").stat() == before


@pytest.mark.parametrize(
    ("option", "value", "differs"),
    [
        ("--seed", 1, "settings.seed is 0 instead of 1"),
        ("--batch-tokens", 200, "settings.batch_tokens is 300 instead of 200"),
        ("--max-length", 9, "data is"),
    ],
)
def test_a_work_directory_of_another_run_is_refused(
    prune: list[object], command: Command, option: str, value: int, differs: str, tmp_path: Path
) -> None:
    assert command(*prune, "--dry-run").code == 0
    result = command(*prune, "--dry-run", option, value)
    assert result.code == 2
    assert f"work must belong to this run, but its {differs}" in result.err.replace("\n", " ")


@pytest.mark.parametrize("field", ["model", "tenp"])
def test_a_work_directory_of_another_model_or_version_is_refused(
    prune: list[object], command: Command, field: str, tmp_path: Path
) -> None:
    assert command(*prune, "--dry-run").code == 0
    path = tmp_path / "work" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: "another"}))
    result = command(*prune, "--dry-run")
    assert result.code == 2
    assert f"its {field} is" in result.err


def test_two_runs_in_one_work_directory_are_refused(
    prune: list[object], command: Command, tmp_path: Path
) -> None:
    with WorkDirectory(tmp_path / "work"):
        result = command(*prune)
    assert result.code == 2
    assert f"process {os.getpid()} uses it" in result.err


@pytest.mark.parametrize("name", ["layer-0001.safetensors", "hidden-0002.0.bin", "run.json"])
def test_a_truncated_work_file_is_told_and_nothing_is_lost(
    prune: list[object],
    command: Command,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _stop_after_layer_1(prune, command, monkeypatch)
    damaged = tmp_path / "work" / name
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    result = command(*prune)
    assert result.code == 2
    assert f"{name} must be whole" in result.err
    assert not (tmp_path / "out").exists()
    damaged.write_bytes(whole)
    assert command(*prune).code == 0


def test_a_shard_that_changes_in_the_middle_is_told(
    tiny: Tiny,
    prune: list[object],
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny.directory, model)
    shard = max(model.glob("*.safetensors"))
    whole = shard.read_bytes()
    prune[1] = model
    save = WorkDirectory.save_layer

    def cut_after_layer_1(self: WorkDirectory, layer: int, *args: object) -> None:
        save(self, layer, *args)  # type: ignore[arg-type]
        if layer == 1:
            shard.write_bytes(whole[: len(whole) // 2])

    monkeypatch.setattr(WorkDirectory, "save_layer", cut_after_layer_1)
    result = command(*prune)
    assert result.code == 2
    assert "must stay as it was when the run began" in result.err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    shard.write_bytes(whole)
    assert command(*prune).code == 0


def test_a_shard_that_vanishes_is_told(
    tiny: Tiny,
    prune: list[object],
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny.directory, model)
    prune[1] = model
    save = WorkDirectory.save_layer

    def remove(self: WorkDirectory, layer: int, *args: object) -> None:
        save(self, layer, *args)  # type: ignore[arg-type]
        for path in model.glob("*.safetensors"):
            path.unlink(missing_ok=True)

    monkeypatch.setattr(WorkDirectory, "save_layer", remove)
    result = command(*prune)
    assert result.code == 2
    assert "cannot be found" in result.err


def test_a_disk_that_fills_up_is_told_and_the_run_goes_on_later(
    prune: list[object], tmp_path: Path
) -> None:
    assert run_and_die(prune)[0] == 0
    expected = files_of(tmp_path / "out")
    largest = max(len(content) for content in expected.values())
    _restart(tmp_path)

    def limit() -> None:  # no file may grow beyond it: to the process that is a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1000, largest - 1000))

    code, _ = run_and_die(prune, prepare=limit, errors=tmp_path / "stderr")
    said = (tmp_path / "stderr").read_text().replace("\n", " ")
    assert code == 2, said
    assert "cannot be written" in said
    assert "run the same command again" in said
    assert not (tmp_path / "out").exists()
    assert run_and_die(prune)[0] == 0
    assert files_of(tmp_path / "out") == expected


def test_statistics_are_found_again_when_calibrate_was_stopped_after_saving(
    tiny: Tiny, text_file: Path, command: Command, tmp_path: Path
) -> None:
    arguments = ["calibrate", tiny.directory, "--calibration", text_file, "--out", tmp_path / "s"]
    arguments += ["--work-dir", tmp_path / "work", "--quiet"]
    assert command(*arguments).code == 0
    first = (tmp_path / "s").read_bytes()
    assert command(*arguments).code == 0
    assert (tmp_path / "s").read_bytes() == first
    (tmp_path / "s").write_bytes(b"something else")
    assert command(*arguments).code == 2


def test_statistics_of_answers_are_not_taken_for_those_of_text(tiny: Tiny, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a question"}\n{"prompt": "another"}\n')
    kept = Execution(work_dir=tmp_path / "work")
    pipeline.calibrate(tiny.checkpoint, [prompts], tenp.Run(self_generate=4, execution=kept))
    found = pipeline.calibrate(tiny.checkpoint, [prompts], tenp.Run(execution=kept))
    expected = pipeline.calibrate(tiny.checkpoint, [prompts], tenp.Run())
    assert found.digest() == expected.digest()


def test_a_run_on_another_kind_of_device_is_refused(
    tiny: Tiny, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is named or found: the sums of two kinds of device are not the same bits."""
    run = tenp.Run(device="auto", execution=Execution(work_dir=tmp_path / "work"))
    monkeypatch.setattr(devices, "resolve", lambda device: "cpu")
    pipeline.calibrate(tiny.checkpoint, [text_file], run)
    monkeypatch.setattr(devices, "resolve", lambda device: "cuda")
    with pytest.raises(CheckpointError, match='its device is "cpu" instead of "cuda"'):
        pipeline.calibrate(tiny.checkpoint, [text_file], run)


def test_in_memory_the_dtype_that_auto_stands_for_makes_a_run_the_same(
    tiny: Tiny, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Execution(work_dir=tmp_path / "work")
    expected = pipeline.calibrate(tiny.checkpoint, [text_file], tenp.Run(execution=kept))
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "load_model", pytest.fail)
        same = tenp.Run(dtype="float32", execution=kept)
        found = pipeline.calibrate(tiny.checkpoint, [text_file], same)
    assert found.digest() == expected.digest()
    with pytest.raises(CheckpointError, match='settings.dtype is "float32" instead of "bfloat16"'):
        other = tenp.Run(dtype="bfloat16", execution=kept)
        pipeline.calibrate(tiny.checkpoint, [text_file], other)


def test_a_work_directory_does_not_say_where_the_model_is(tiny: Tiny) -> None:
    """A work directory may be moved to another machine together with the model."""
    from tenp.distributed import Group

    found = execution.identity(tiny.source, tiny.samples, {}, "cpu", Group())
    assert str(tiny.directory) not in json.dumps(found)
    assert found["model"] == tiny.source.fingerprint
