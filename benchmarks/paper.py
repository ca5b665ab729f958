# SPDX-License-Identifier: Apache-2.0
"""The papers' own protocol on the real models, for a machine that has their weights.

    python benchmarks/paper.py Qwen/Qwen1.5-MoE-A2.7B --calibration math.jsonl code.jsonl --out results

Prunes with TENP at the papers' shares, and with `best`, and runs lm-eval's tasks on the dense and
every pruned model: GSM8K 8-shot, MBPP 3-shot, HumanEval 0-shot, ARC 25-shot for TENP (Findings of ACL
2026, arXiv 2606.09885); BoolQ, PIQA, HellaSwag, ARC, OpenBookQA, WinoGrande and MMLU for DERN (Findings
of EMNLP 2025, arXiv 2509.10377). A finished row is not computed again. On examples/tiny-moe the script
is exercised with the tasks of tests/lm_eval_tasks, which need no network:

    python benchmarks/paper.py examples/tiny-moe --calibration examples/calibration/*.jsonl --out results \
        --tasks '{"tenp_choice": 2, "tenp_generate": 2}' --task-directory tests/lm_eval_tasks

--text measures with tenp's own evaluation instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tenp
from tenp import pipeline
from tenp.checkpoint import Checkpoint
from tenp.planning import Budget
from tenp.statistics import Statistics

#: Task of lm-eval to its number of shots.
TENP_TASKS = {"gsm8k": 8, "mbpp": 3, "humaneval": 0, "arc_easy": 25, "arc_challenge": 25}
DERN_TASKS = dict.fromkeys(
    ["boolq", "piqa", "hellaswag", "arc_easy", "arc_challenge", "openbookqa", "winogrande", "mmlu"],
    0,
)

#: Model: the paper's shares with its alpha, the tasks, and the share of experts DERN keeps.
MODELS: dict[str, tuple[dict[float, float], dict[str, int], list[float]]] = {
    "Qwen/Qwen1.5-MoE-A2.7B": ({0.6: 0.3, 0.3: 0.05}, TENP_TASKS, []),
    "deepseek-ai/DeepSeek-V2-Lite": ({0.6: 0.2, 0.3: 0.05}, TENP_TASKS, []),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": ({0.6: 0.2, 0.3: 0.05}, TENP_TASKS, []),
    "mistralai/Mixtral-8x7B-v0.1": ({}, DERN_TASKS, [0.75, 0.5]),
    "Qwen/Qwen2-57B-A14B": ({}, DERN_TASKS, [0.75, 0.5]),
    "deepseek-ai/deepseek-moe-16b-base": ({}, DERN_TASKS, [0.875, 0.75]),
}
OTHERS = ({0.6: 0.3, 0.3: 0.05}, TENP_TASKS, [0.75, 0.5])


def budgets(model: str) -> list[tuple[str, Budget]]:
    """Return (name, budget) of every row of a model."""
    shares, _, dern = MODELS.get(model, OTHERS)
    found = []
    for share, alpha in shares.items():
        found.append((f"tenp {share:g}", Budget(share, alpha=alpha)))
        found.append((f"best {share:g}", Budget(share, "best")))
    return found + [(f"dern {share:g}", Budget(share, "dern")) for share in dern]


def run_tasks(directory: str, tasks: dict[str, int], arguments: argparse.Namespace) -> Any:
    """Run lm-eval on a model, and return its results by task."""
    import lm_eval  # `import tenp` above has taught transformers to load what was pruned
    from lm_eval.tasks import TaskManager

    own = arguments.task_directory
    manager = TaskManager(include_path=own, include_defaults=own is None)
    results = {}
    for task, shots in tasks.items():
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={directory},dtype=auto",
            tasks=[task],
            task_manager=manager,
            num_fewshot=shots,
            limit=arguments.limit,
            device=arguments.device,
            confirm_run_unsafe_code=True,  # MBPP and HumanEval run what the model writes
        )
        results[task] = found["results"][task]
    return results


def measure(arguments: argparse.Namespace, directory: str) -> Any:
    """Measure one model, by lm-eval or on text."""
    if arguments.text:
        run = pipeline.Run(device=arguments.device)
        reference = None if directory == arguments.model else arguments.model
        found = pipeline.evaluate(directory, arguments.text, run, reference)
        return {row.domain: dataclasses.asdict(row) for row in found}
    tasks = arguments.tasks or MODELS.get(arguments.model, OTHERS)[1]
    return run_tasks(directory, tasks, arguments)


def save(file: Path, results: dict[str, Any]) -> None:
    """Write the rows there are, so that a stopped run goes on after them."""
    file.write_text(json.dumps({**results, "tenp": tenp.__version__}, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a name of the Hub or a directory")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--out", required=True, help="directory for models and results")
    parser.add_argument("--text", nargs="+", help="measure on text instead of lm-eval's tasks")
    parser.add_argument("--tasks", type=json.loads, help='{"task": shots} instead of the papers\'')
    parser.add_argument("--task-directory", help="tasks of your own; lm-eval's are not read then")
    parser.add_argument("--limit", type=int, help="examples per task")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep-models", action="store_true", help="leave the pruned models there")
    arguments = parser.parse_args(argv)

    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    checkpoint = Checkpoint.resolve(arguments.model)
    statistics_file = out / "statistics.safetensors"
    if not statistics_file.exists():
        run = pipeline.Run(arguments.samples, device=arguments.device, second_moments=True)
        pipeline.calibrate(checkpoint, arguments.calibration, run).save(statistics_file)
    statistics = Statistics.load(statistics_file)
    if "dense" not in results:
        results["dense"] = {"results": measure(arguments, arguments.model)}
        save(file, results)
    for name, budget in budgets(arguments.model):
        if name in results:
            continue
        decided = pipeline.plan(statistics, budget)
        directory = out / name.replace(" ", "-")
        pipeline.apply(checkpoint, decided, directory, statistics=statistics)
        results[name] = {
            "static_share": decided.static_share(),
            "activated_share": decided.activated_share,
            "parameters": decided.total_parameters(),
            "results": measure(arguments, str(directory)),
        }
        save(file, results)
        print(name, json.dumps(results[name]), flush=True)
        if not arguments.keep_models:
            shutil.rmtree(directory)


if __name__ == "__main__":
    main()
