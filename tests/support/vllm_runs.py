# SPDX-License-Identifier: Apache-2.0
"""What vLLM and transformers generate, greedily in float32. Imports nothing of tenp, so it works without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

NEW_TOKENS = 16
TIMEOUT = 1500  # seconds; compiling takes minutes on a small machine

#: Every kind of output that tenp writes.
KINDS = ("ragged", "padded", "uniform", "dropped")

#: Prompts and, for every kind, the tokens that follow; beside the models.
EXPECTED = "expected.json"

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


def environment(**more: str) -> dict[str, str]:
    """The environment variables of a process of vLLM on a CPU."""
    few = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**os.environ, "HF_HUB_OFFLINE": "1", **few, **more}


def run_vllm(
    model: Path, prompts: list[list[int]], scratch: Path, compiled: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Generate with `LLM(model)`, in a process that imports vLLM alone.

    Args:
        model: The checkpoint.
        prompts: Token numbers.
        scratch: A directory to run in.
        compiled: Let vLLM compile the model and start processes of its own, as it does by default.
        options: More arguments of `LLM`.
    """
    child = scratch / "child.py"
    child.write_text(_CHILD)
    options = {"enforce_eager": not compiled, **options}
    job = {"model": str(model), "options": options, "prompts": prompts, "new_tokens": NEW_TOKENS}
    in_process = {} if compiled else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return subprocess.run(
        [sys.executable, child, json.dumps(job)],
        env=environment(**in_process),
        cwd=scratch,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def tokens_of(result: subprocess.CompletedProcess[str]) -> list[list[int]]:
    """Return the tokens that `run_vllm` generated."""
    lines = [line for line in result.stdout.split("\n") if line.startswith("TOKENS ")]
    assert lines, f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return json.loads(lines[0].removeprefix("TOKENS "))


def tokens_of_transformers(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Return what transformers generates."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = []
    for prompt in prompts:
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
