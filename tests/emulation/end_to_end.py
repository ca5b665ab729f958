# SPDX-License-Identifier: Apache-2.0
"""`tenp prune --device cuda` and `tenp evaluate --device cuda` against `--device cpu`.

The commands are run as a user does: on a GPU, or with the device of `cuda_device.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_device
import pytest
import torch

import tenp
from tenp import pipeline

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_MODEL = _ROOT / "examples/tiny-moe"
_EMULATION = os.environ.get(cuda_device.BUILD_VARIABLE)
#: Float64 sums of float32 products in another order; see tests/support/tolerance.py. On a GPU torch's own
#: products, six layers of them, are in another order, too.
_RELATIVE = 1e-5 if _EMULATION else 1e-4


def _tenp(device: str, *arguments: str | Path) -> Any:
    """Run a command on a device; return the JSON that it prints."""
    program = [sys.executable, "-m", "tenp"]
    environment = dict(os.environ)
    if _EMULATION:
        environment["PYTHONPATH"] = str(_ROOT)
        if device == "cuda":
            program = [sys.executable, str(_HERE / "cuda_device.py"), _EMULATION, "tenp"]
        else:  # sanitizers are preloaded, which the ordinary module does not have
            environment.pop("LD_PRELOAD", None)
    run = subprocess.run(
        [*program, *map(str, arguments), "--device", device, "--json", "--quiet"],
        env=environment, check=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    return json.loads(run.stdout)


def _is_exact(plan: tenp.Plan, layer: int) -> bool:
    """Whether what stays of a layer gives all calibration outputs, and rounding alone chose among equals."""
    if plan.repair is None:
        return False
    return plan.repair.errors[layer]["repaired"] < _RELATIVE**2  # of squared outputs


@pytest.mark.cuda
def test_the_commands_give_the_statistics_the_plan_and_the_result_of_the_cpu(
    tmp_path: Path,
) -> None:
    texts = []
    for name in ("prose", "code"):
        lines = (_ROOT / f"examples/calibration/{name}.jsonl").read_text().splitlines()[:2]
        texts.append(tmp_path / f"{name}.jsonl")
        texts[-1].write_text("\n".join(lines))

    # In float32: rounded to bfloat16, tokens that stand between two experts would go to either.
    running = ("--dtype", "float32", "--max-length", "24")
    statistics, plans, evaluations = [], [], []
    for device in ("cpu", "cuda"):
        work = tmp_path / f"{device}-work"
        _tenp(
            device, "prune", _MODEL, "--calibration", *texts, "--samples", "2", *running, "--keep", "0.6",
            "--method", "best", "--work-dir", work, "--out", tmp_path / device,
        )  # fmt: skip
        statistics.append(tenp.Statistics.load(work / "statistics.safetensors"))
        plans.append(tenp.Plan.load(tmp_path / device / "tenp_plan.json"))
        evaluations += _tenp(
            device, "evaluate", tmp_path / "cpu", "--reference", _MODEL, "--data", texts[0], *running
        )  # fmt: skip

    for layer, sums in statistics[0].layers.items():
        for name, expected in sums.items():
            actual = statistics[1].layers[layer][name]
            # Signed sums cancel: what counts is their size beside those of their expert.
            bound = _RELATIVE * expected.abs().amax(-1, keepdim=True)
            assert ((actual - expected).abs() <= bound + _RELATIVE * expected.abs()).all(), name
    papers = [pipeline.plan(each, tenp.Budget(keep=0.6)) for each in statistics]
    for method, (cpu, cuda) in {"tenp": papers, "best": plans}.items():
        assert cpu.keep.keys() == cuda.keep.keys()
        for layer, keep in cpu.keep.items():
            if not _is_exact(cpu, layer):
                assert torch.equal(cuda.keep[layer], keep), (method, layer)
            else:
                assert _is_exact(cuda, layer), (method, layer)
    on_cpu, on_cuda = evaluations
    assert on_cuda["perplexity"] == pytest.approx(on_cpu["perplexity"], rel=1e-4)
    # A mean of differences of log-probabilities in float32, which round at 1e-6.
    assert on_cuda["divergence"] == pytest.approx(on_cpu["divergence"], abs=1e-6)
