# SPDX-License-Identifier: Apache-2.0
"""What a plan predicts that the experts' outputs lose, and what they lose on text it has not seen.

    python benchmarks/prediction.py

A plan with repair has two errors of every layer, both from the calibration text alone: `repaired`, on
the text that its columns are fitted to, and `crossed`, on each half of it when fitted on the other. Both
are exact for that text. Second moments of the held-out text give the error there. All are squared
errors over squared outputs, means over layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from tenp import adapter, calibration, pipeline, pruning, repair
from tenp.checkpoint import Checkpoint
from tenp.plan import Plan
from tenp.planning import Budget
from tenp.samples import tokenize
from tenp.statistics import Statistics
from tenp.text import read_domains

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

#: Name and share to the budget, as in benchmarks/quality.py.
BUDGETS = {
    ("TENP + repair", 0.6): Budget(0.6, alpha=0.3),
    ("best", 0.6): Budget(0.6, "best"),
    ("TENP + repair", 0.3): Budget(0.3, alpha=0.05),
    ("best", 0.3): Budget(0.3, "best"),
}


def error_on(text: Statistics, decided: Plan, statistics: Statistics) -> float:
    """Return what a repaired plan loses on some text.

    Args:
        text: Second moments of the text.
        decided: The plan.
        statistics: The ones that its columns are fitted to.
    """
    assert decided.repair is not None
    weights = repair.moment_weights(text)
    errors = []
    for layer, keep in decided.keep.items():
        fitted_on = repair.layer_moments(statistics, layer, decided.repair.weights)
        seen = repair.layer_moments(text, layer, weights)
        lost = 0.0
        for expert, mask in enumerate(fitted_on.with_bias(keep)):
            ridge = decided.repair.ridges[layer][expert]
            transform = repair.refit(fitted_on.moment[expert], mask, ridge)
            lost += repair.residual(seen.gram[expert], seen.moment[expert], mask, transform)
        errors.append(lost / float(repair.energy(seen.gram, seen.moment).sum()))
    return sum(errors) / len(errors)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(EXAMPLES / "tiny-moe"))
    for kind in ("calibration", "heldout"):
        files = sorted(map(str, (EXAMPLES / kind).glob("*.jsonl")))
        parser.add_argument(f"--{kind}", nargs="+", default=files)
    parser.add_argument("--samples", type=int, default=64, help="calibration samples per domain")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    checkpoint = Checkpoint.resolve(arguments.model)
    source = pruning.source_of(checkpoint)
    model = adapter.load_model(checkpoint.directory, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
    limit = min(model.config.get_text_config().max_position_embeddings, 2048)

    def moments(files: Sequence[str], samples: int | None, seed: int) -> Statistics:
        domains = [
            tokenize(domain, tokenizer, limit, samples, seed, adapter.vocabulary(model))
            for domain in read_domains(files)
        ]
        return calibration.collect(model, domains, source, {}, second_moments=True)

    heldout = moments(arguments.heldout, None, 0)
    print("| method | share | seed | repaired | crossed | held-out | held-out / crossed |")
    print("|---|---|---|---|---|---|---|")
    for seed in arguments.seeds:
        statistics = moments(arguments.calibration, arguments.samples, seed)
        for (name, share), budget in BUDGETS.items():
            decided = pipeline.plan(statistics, budget, refit=True)
            assert decided.repair is not None
            errors = list(decided.repair.errors.values())
            repaired, crossed = (
                sum(error[key] for error in errors) / len(errors) for key in ("repaired", "crossed")
            )
            found = error_on(heldout, decided, statistics)
            cells = [
                name,
                f"{share:g}",
                str(seed),
                *(f"{e:.5f}" for e in (repaired, crossed, found)),
            ]
            print(f"| {' | '.join(cells)} | {found / crossed:.3f} |", flush=True)


if __name__ == "__main__":
    main()
