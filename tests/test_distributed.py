# SPDX-License-Identifier: Apache-2.0
"""Several processes give the bits of one."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import tenp
from support.fixtures import Command, Tiny, files_of
from support.processes import run_in_fork
from support.tiny_models import make_tokenizer, save_model
from tenp import devices, execution, running
from tenp.distributed import Group
from tenp.errors import InvalidArgument
from tenp.text import read_domains

PROCESSES = 2


def run_together(arguments: Sequence[object], processes: int = PROCESSES) -> list[int]:
    """Run `tenp` in forks of this process, with the environment that torchrun gives; return exit codes.

    What they say is shown with a test that fails.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    with tempfile.TemporaryFile("w+") as said:
        children = []
        for rank in range(processes):
            child = os.fork()
            if child == 0:
                os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
                run_in_fork(arguments, said.fileno())
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        said.seek(0)
        print(said.read())
    return codes


@pytest.mark.parametrize(
    ("stream", "repair"), [("layers", "none"), ("layers", "ls"), ("experts", "none")]
)
def test_two_processes_write_what_one_does(
    tiny: Tiny, text_file: Path, command: Command, tmp_path: Path, stream: str, repair: str
) -> None:
    more = text_file.with_name("more.jsonl")
    shutil.copy(text_file, more)
    arguments = ["prune", tiny.directory, "--calibration", text_file, more, "--keep", 0.5]
    arguments += ["--batch-tokens", 300, "--repair", repair, "--quiet", "--out"]
    assert command(*arguments, tmp_path / "one").code == 0
    work = ["--work-dir", tmp_path / "work"]
    codes = run_together([*arguments, tmp_path / "two", "--stream", stream, *work])
    assert codes == [0, 0]
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    # And again, from what the work directory keeps.
    for path in (tmp_path / "work" / "statistics.safetensors", tmp_path / "work" / "output.json"):
        path.unlink()
    codes = run_together([*arguments, tmp_path / "three", "--stream", stream, *work])
    assert codes == [0, 0]
    assert files_of(tmp_path / "three") == files_of(tmp_path / "one")


# One of each kind: experts stored one by one or all in one tensor, with biases, after dense layers.
# All families take the same way through the processes; test_streaming.py has them all.
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "gemma4_text"])
def test_two_processes_measure_what_one_does_in_a_family_of_each_kind(
    family: str, text_file: Path, command: Command, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", family)
    make_tokenizer().save_pretrained(model)
    arguments = ["calibrate", model, "--calibration", text_file, "--quiet"]
    arguments += ["--samples", 16, "--batch-tokens", 100]
    assert command(*arguments, "--out", tmp_path / "one").code == 0
    codes = run_together([*arguments, "--out", tmp_path / "two", "--stream", "experts"])
    assert codes == [0, 0]
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()


@pytest.mark.parametrize(
    ("tokens", "processes"),
    [([5], 1), ([1, 1], 2), ([9, 1, 1, 1], 3), ([1, 1, 1, 9], 3), ([3] * 10, 4), ([100, 1], 2)],
)
def test_stretches_share_out_all_batches(tokens: list[int], processes: int) -> None:
    stretches = [Group(rank, processes).stretch(tokens) for rank in range(processes)]
    assert [number for stretch in stretches for number in stretch] == list(range(len(tokens)))
    assert all(stretches)


def test_more_processes_than_batches_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="a batch for each of the 3 processes, got 2"):
        Group(0, 3).stretch([4, 4])


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_every_process_uses_the_gpu_of_its_local_rank(
    tiny: Tiny, text_file: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    used = []
    monkeypatch.setattr(devices, "_cuda_trouble", lambda: "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(execution, "calibrate_streamed", lambda *args, **_: used.append(args[6]))
    domains = read_domains([text_file])
    for rank in range(2):
        run, group = tenp.Run(device=device), Group(rank, 2, local_rank=rank)
        running.calibrate(tiny.checkpoint, tiny.source, domains, run, None, group, None)
    assert used == ["cuda:0", "cuda:1"]


def test_streaming_is_needed_with_several_processes(
    tiny: Tiny, text_file: Path, tmp_path: Path
) -> None:
    arguments = ["calibrate", tiny.directory, "--calibration", text_file, "--out", tmp_path / "s"]
    assert run_together([*arguments, "--stream", "none"]) == [2, 2]
