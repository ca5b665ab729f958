# SPDX-License-Identifier: Apache-2.0
"""vLLM answers with the tokens of transformers. `.ci/vllm` runs this with vLLM installed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import tenp
from support.fixtures import EXAMPLES
from support.vllm_runs import (
    EXPECTED,
    KINDS,
    NEW_TOKENS,
    TIMEOUT,
    environment,
    run_vllm,
    tokens_of,
    tokens_of_transformers,
)
from tenp import pruning

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

PROMPTS = ["def read(path):", "The old man walked", "12 + 30 =", "Once upon a time there was"]


@dataclass(frozen=True)
class Pruned:
    """A checkpoint of different widths, prompts, and the tokens that transformers lets follow."""

    directory: Path
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    """Make every kind of output. `test_without_tenp.py` finds them where TENP_TEST_MODELS says."""
    root = Path(os.environ.get("TENP_TEST_MODELS") or tmp_path_factory.mktemp("models"))
    checkpoint = tenp.Checkpoint(EXAMPLES / "tiny-moe")
    text = [str(EXAMPLES / f"calibration/{name}.jsonl") for name in ("prose", "code")]
    statistics = tenp.calibrate(checkpoint, text, tenp.Run(samples=8))
    for name, method in (("ragged", "tenp"), ("uniform", "enp"), ("dropped", "drop")):
        plan = tenp.plan(statistics, tenp.Budget(keep=0.6, method=method))
        tenp.apply(checkpoint, plan, root / name)
    pruning.export_padded(tenp.Checkpoint(root / "ragged"), root / "padded")
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny-moe")
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    tokens = {kind: tokens_of_transformers(root / kind, prompts) for kind in KINDS}
    assert tokens["padded"] == tokens["ragged"]
    (root / EXPECTED).write_text(json.dumps({"prompts": prompts, "tokens": tokens}))
    return Pruned(root / "ragged", prompts, tokens["ragged"])


def test_offline_in_one_process(pruned: Pruned, tmp_path: Path) -> None:
    result = run_vllm(pruned.directory, pruned.prompts, tmp_path)
    assert tokens_of(result) == pruned.expected


def test_offline_compiled_in_several_processes(pruned: Pruned, tmp_path: Path) -> None:
    result = run_vllm(pruned.directory, pruned.prompts, tmp_path, compiled=True)
    assert tokens_of(result) == pruned.expected


@pytest.mark.parametrize(
    "parallel", [{}, {"enable_expert_parallel": True}], ids=["tensor", "expert"]
)
def test_two_processes_share_a_layer(
    pruned: Pruned, tmp_path: Path, parallel: dict[str, bool]
) -> None:
    result = run_vllm(
        pruned.directory, pruned.prompts, tmp_path, tensor_parallel_size=2, **parallel
    )
    assert tokens_of(result) == pruned.expected


@pytest.fixture(scope="module")
def server(pruned: Pruned, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `vllm serve` with the pruned model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = tmp_path_factory.mktemp("server")
    log = root / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("vllm"), "serve", pruned.directory),
                *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
                *("--max-model-len", "128", "--enforce-eager", "--served-model-name", "pruned"),
            ],
            env=environment(),
            cwd=root,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            end = time.monotonic() + TIMEOUT
            while not _is_up(address):
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
                time.sleep(1)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=60)


def _is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_the_openai_endpoint(pruned: Pruned, server: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pruned.directory)
    for prompt, expected in zip(pruned.prompts, pruned.expected, strict=True):
        body = {
            "model": "pruned",
            "prompt": prompt,
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"{server}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            choice = json.load(answer)["choices"][0]
        assert choice["token_ids"] == expected
        assert choice["text"] == tokenizer.decode(expected)
