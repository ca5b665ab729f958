# SPDX-License-Identifier: Apache-2.0
"""`tenp prune` and `evaluate` through the CUDA kernels, against the CPU backend.

`run_op_tests.py` runs this file in a process whose native module emulates the kernels; the same job
is done by the ordinary module in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tenp
from tenp import pipeline

_ROOT = Path(__file__).parents[2]
_MODEL = _ROOT / "examples/tiny-moe"
#: Float64 sums of float32 products in another order; see tests/support/tolerance.py.
_RELATIVE = 1e-5


def do(out: Path, work: str) -> None:
    """Prune the small model on a little text, measure it, and keep all that came of it."""
    texts = []
    for name in ("prose", "code"):
        lines = (_ROOT / f"examples/calibration/{name}.jsonl").read_text().splitlines()[:2]
        texts.append(out.with_name(f"{work}-{name}.jsonl"))
        texts[-1].write_text("\n".join(lines))
    run = tenp.Run(samples=2, max_length=24, batch_tokens=64)
    result = pipeline.prune(
        _MODEL, texts, out.with_name(f"{work}-pruned"), tenp.Budget(keep=0.6, method="best"), run,
        evaluate_on=texts[:1], verify=False,
    )  # fmt: skip
    paper = pipeline.plan(result.statistics, tenp.Budget(keep=0.6))
    kept = {
        "statistics": result.statistics.layers,
        "best": result.plan.keep,
        "tenp": paper.keep,
        "perplexity": [domain.perplexity for domain in result.after],
    }
    torch.save(kept, out)


def test_the_kernels_give_the_statistics_the_plan_and_the_result_of_the_cpu(
    tmp_path: Path,
) -> None:
    if "emulation" not in str(sys.modules["tenp._C"].__file__):
        pytest.skip("run_op_tests.py runs this")
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    environment.pop("LD_PRELOAD", None)  # of sanitizers, which the ordinary module does not have
    code = (
        "import runpy, pathlib; "
        f"runpy.run_path({str(__file__)!r})['do'](pathlib.Path({str(tmp_path / 'cpu.pt')!r}), 'cpu')"
    )
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    do(tmp_path / "cuda.pt", "cuda")
    cpu, cuda = (torch.load(tmp_path / f"{name}.pt") for name in ("cpu", "cuda"))

    for layer, sums in cpu["statistics"].items():
        for name, expected in sums.items():
            actual = cuda["statistics"][layer][name]
            # Signed sums cancel: what counts is their size beside those of their expert.
            bound = _RELATIVE * expected.abs().amax(-1, keepdim=True)
            assert ((actual - expected).abs() <= bound + _RELATIVE * expected.abs()).all(), name
    for method in ("tenp", "best"):
        assert cpu[method].keys() == cuda[method].keys()
        for layer, keep in cpu[method].items():
            assert torch.equal(cuda[method][layer], keep), (method, layer)
    assert cuda["perplexity"] == pytest.approx(cpu["perplexity"], rel=1e-4)
    widths = json.loads((tmp_path / "cuda-pruned/config.json").read_text())
    assert widths["quantization_config"]["quant_method"] == "tenp"
