# SPDX-License-Identifier: Apache-2.0
"""Quality against sparsity, for every method: one command fills the whole table.

    python benchmarks/quality.py

Calibration and evaluation text are disjoint. Every (seed, share, method) is one row of a JSON file:
perplexity, KL from the dense model in nats and agreement of the likeliest token, per domain. Rows
that the file has already are not computed again, so a stopped run goes on where it was. With
--left-out every domain is left out of calibration in turn, and measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import tenp
from tenp import adapter, calibration, dern, pipeline, pruning, second_pass
from tenp.checkpoint import Checkpoint
from tenp.plan import Plan
from tenp.planning import Budget
from tenp.refitting import Refitting
from tenp.samples import Samples, tokenize
from tenp.statistics import Statistics, select
from tenp.text import read_domains

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

#: The paper's shares of whole experts, where it gives them.
ALPHA = {0.6: 0.3, 0.3: 0.05}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: Of the row.
        budget: Keyword arguments of `Budget` beside the share.
        options: Keyword arguments of `pipeline.plan`.
        held: Whether the activated share is held to that of TENP.
    """

    name: str
    budget: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    held: bool = False


def _drop(criterion: str) -> Method:
    return Method(f"drop experts: {criterion}", {"method": "drop"}, {"expert_criterion": criterion})


def _enp(criterion: str) -> Method:
    return Method(f"ENP: {criterion}", {"method": "enp"}, {"neuron_criterion": criterion})


METHODS = (
    Method("TENP", {}),
    Method("TENP + repair", {}, {"refit": True}),
    Method("best", {"method": "best"}),
    Method("best, TENP's activated share", {"method": "best"}, held=True),
    Method("TENP, rectangle", {"shallow": 1.0, "deep": 1.0}),
    Method("TENP, random experts", {}, {"expert_criterion": "random"}),
    _enp("projection"),
    _enp("l2"),
    _drop("direction-change"),
    _drop("reap"),
    _drop("frequency"),
    Method("DERN, threshold 0.6", {"method": "dern"}),
    Method(
        "DERN, its dropping step",
        {"method": "dern"},
        {"dern_options": dern.Options(threshold=1.0)},
    ),
    _drop("easy-ep"),
    _drop("gating-score"),
    _drop("weighted-ean"),
    _drop("ean"),
    _drop("aimer"),
    _drop("random"),
    _enp("camera"),
    _enp("wanda"),
    _enp("heapr"),
    _enp("random"),
    Method("ENP: projection + repair", {"method": "enp"}, {"refit": True}),
    Method(
        "DERN, threshold 0.4", {"method": "dern"}, {"dern_options": dern.Options(threshold=0.4)}
    ),
)


class Reference:
    """The dense model on the held-out text, to compare with."""

    def __init__(self, model: PreTrainedModel, samples: Sequence[Samples]) -> None:
        self._batches = [
            (domain.domain, ids, mask) for domain in samples for ids, mask in domain.batches(2048)
        ]
        self._dense = [_log_probabilities(model, ids, mask) for _, ids, mask in self._batches]
        self._likeliest = [dense.argmax(1) for dense in self._dense]

    def measure(self, model: PreTrainedModel) -> dict[str, dict[str, float]]:
        """Return perplexity, KL and agreement per domain."""
        sums: dict[str, list[float]] = {}
        for (domain, ids, mask), dense, likeliest in zip(
            self._batches, self._dense, self._likeliest, strict=True
        ):
            ours = _log_probabilities(model, ids, mask)
            targets = ids[:, 1:][mask[:, 1:].bool()]
            divergence = F.kl_div(ours, dense, log_target=True, reduction="none").sum(dim=1)
            values = (
                float(len(targets)),
                -ours.gather(1, targets[:, None]).double().sum().item(),
                divergence.double().sum().item(),
                (ours.argmax(1) == likeliest).double().sum().item(),
            )
            kept = sums.setdefault(domain, [0.0] * 4)
            sums[domain] = [a + b for a, b in zip(kept, values, strict=True)]
        return {
            domain: {
                "tokens": n,
                "perplexity": float(torch.tensor(loss / n).exp()),
                "kl": kl / n,
                "agreement": agreed / n,
            }
            for domain, (n, loss, kl, agreed) in sums.items()
        }


@torch.no_grad()
def _log_probabilities(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return F.log_softmax(logits[mask[:, 1:].bool()].float(), dim=-1)


class Bench:
    """A model, its text, and one set of statistics at a time."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.checkpoint = Checkpoint.resolve(arguments.model)
        self.source = pruning.source_of(self.checkpoint)
        self.model = adapter.load_model(self.checkpoint.directory, torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(self.checkpoint.directory)
        self.layers = adapter.find_experts(self.model)
        self.dense = {experts.layer: experts.down.clone() for experts in self.layers}
        heldout = self._read(arguments.heldout, arguments.heldout_samples, 0)
        self.reference = Reference(self.model, heldout)

    def _read(self, files: Sequence[str], samples: int | None, seed: int) -> list[Samples]:
        limit = self.model.config.get_text_config().max_position_embeddings
        vocabulary = adapter.vocabulary(self.model)
        return [
            tokenize(domain, self.tokenizer, min(limit, 2048), samples, seed, vocabulary)
            for domain in read_domains(files)
        ]

    def calibrate(self, seed: int) -> Statistics:
        """Return statistics with all that any method needs."""
        settings = {"seed": seed, "samples": self.arguments.samples}
        cache = self.arguments.cache
        path = Path(cache) / f"{seed}.safetensors" if cache else None
        if path is not None and path.exists():
            return Statistics.load(path)
        samples = self._read(self.arguments.calibration, self.arguments.samples, seed)
        statistics = calibration.collect(
            self.model, samples, self.source, settings, second_moments=True
        )
        second_pass.collect(self.model, samples, statistics)
        if path is not None:
            statistics.save(path)
        return statistics

    def plan(self, statistics: Statistics, method: Method, share: float) -> Plan:
        """Plan a method at a share."""
        budget = Budget(share, **{"alpha": ALPHA.get(share), **method.budget})
        if budget.method != "tenp":
            budget = dataclasses.replace(budget, alpha=None)
        if method.held:
            tenp_plan = pipeline.plan(statistics, Budget(share, alpha=ALPHA.get(share)))
            budget = dataclasses.replace(budget, activated=tenp_plan.activated_share)
        return pipeline.plan(
            statistics,
            budget,
            checkpoint=self.checkpoint,
            seed=statistics.settings["seed"],
            **method.options,
        )

    def measure(self, statistics: Statistics, decided: Plan) -> dict[str, dict[str, float]]:
        """Measure a plan: of the model in memory, or of what is written when routers change."""
        if decided.experts is not None:
            with tempfile.TemporaryDirectory() as directory:
                out = Path(directory) / "model"
                pipeline.apply(self.checkpoint, decided, out, False, statistics=statistics)
                return self.reference.measure(adapter.load_model(out, torch.float32))
        refit = (
            Refitting(self.checkpoint, decided, statistics) if decided.repair is not None else None
        )
        for experts in self.layers:
            experts.down.copy_(self.dense[experts.layer])
            if refit is not None:
                refit.fill(experts)
            experts.down.mul_(decided.keep[experts.layer].unsqueeze(1))
        measured = self.reference.measure(self.model)
        for experts in self.layers:
            experts.down.copy_(self.dense[experts.layer])
        return measured

    def dense_row(self) -> dict[str, dict[str, float]]:
        """Measure the dense model."""
        return self.reference.measure(self.model)


def rows(bench: Bench, known: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any]]:
    """Yield every row that is not known yet."""
    arguments = bench.arguments
    left_out = [None]
    methods = [method for method in METHODS if not arguments.only or method.name in arguments.only]
    if arguments.left_out:
        left_out = [Path(file).stem for file in arguments.calibration]
    if not known({"method": "dense"}):
        yield {"method": "dense", "domains": bench.dense_row()}
    for seed in arguments.seeds:
        whole = None
        for without in left_out:
            keys = [
                (
                    method,
                    share,
                    {"method": method.name, "share": share, "seed": seed}
                    | ({"left_out": without} if without else {}),
                )
                for share in arguments.shares
                for method in methods
            ]
            todo = [key for key in keys if not known(key[2])]
            if not todo:
                continue
            whole = whole or bench.calibrate(seed)
            names = [domain.name for domain in whole.domains if domain.name != without]
            statistics = select(whole, names)
            for method, share, key in todo:
                begin = time.monotonic()
                decided = bench.plan(statistics, method, share)
                seconds = time.monotonic() - begin
                yield {
                    **key,
                    "samples": arguments.samples,
                    "static_share": decided.static_share(),
                    "activated_share": decided.activated_share,
                    "plan_seconds": round(seconds, 2),
                    "domains": bench.measure(statistics, decided),
                }


def table(results: dict[str, Any]) -> str:
    """Return the mean KL (and perplexity) over domains and seeds, as Markdown, best first."""
    found = [row for row in results["rows"] if "share" in row and "left_out" not in row]
    shares = sorted({row["share"] for row in found}, reverse=True)
    dense = next(row for row in results["rows"] if row["method"] == "dense")
    lines = [
        "| method | " + " | ".join(f"{share:g}: KL, perplexity" for share in shares) + " |",
        "|---|" + "---|" * len(shares),
        "| dense | " + " | ".join(f"0, {_perplexity(dense):.2f}" for _ in shares) + " |",
    ]
    names = sorted(
        {row["method"] for row in found},
        key=lambda name: _mean(
            [_kl(r) for r in found if (r["method"], r["share"]) == (name, shares[-1])]
        ),
    )
    for name in names:
        cells = []
        for share in shares:
            mine = [row for row in found if (row["method"], row["share"]) == (name, share)]
            if not mine:
                cells.append("")
                continue
            kls = [_kl(row) for row in mine]
            spread = f" ± {(max(kls) - min(kls)) / 2:.4f}" if len(kls) > 1 else ""
            perplexity = _mean([_perplexity(row) for row in mine])
            cells.append(f"{_mean(kls):.4f}{spread}, {perplexity:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _kl(row: dict[str, Any]) -> float:
    return _mean([domain["kl"] for domain in row["domains"].values()])


def _perplexity(row: dict[str, Any]) -> float:
    logs = [torch.tensor(domain["perplexity"]).log() for domain in row["domains"].values()]
    return float(torch.stack(logs).mean().exp())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(EXAMPLES / "tiny-moe"))
    for kind in ("calibration", "heldout"):
        files = sorted(map(str, (EXAMPLES / kind).glob("*.jsonl")))
        parser.add_argument(f"--{kind}", nargs="+", default=files)
    parser.add_argument("--samples", type=int, default=64, help="calibration samples per domain")
    parser.add_argument(
        "--heldout-samples", type=int, default=None, help="per domain; all if absent"
    )
    parser.add_argument("--shares", nargs="+", type=float, default=[0.6, 0.3, 0.75, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of methods")
    parser.add_argument("--left-out", action="store_true", help="leave out every domain in turn")
    parser.add_argument("--cache", help="directory for statistics")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "quality.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"rows": []}
    if out.exists():
        results = json.loads(out.read_text())
    bench = Bench(arguments)
    results["settings"] = {
        "model": bench.source.fingerprint,
        "samples": arguments.samples,
        "heldout_samples": arguments.heldout_samples,
        "tenp": tenp.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }

    def known(key: dict[str, Any]) -> bool:
        return any(
            all(row.get(name) == value for name, value in key.items())
            and row.get("left_out") == key.get("left_out")
            for row in results["rows"]
        )

    for row in rows(bench, known):
        results["rows"].append(row)
        label = " ".join(str(row[k]) for k in ("seed", "share", "left_out", "method") if k in row)
        print(f"{label}: KL {_kl(row):.5f}, perplexity {_perplexity(row):.3f}", flush=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
