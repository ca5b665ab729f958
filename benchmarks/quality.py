# SPDX-License-Identifier: Apache-2.0
"""Quality against sparsity, for every method: one command fills the whole table.

    python benchmarks/quality.py

Calibration and evaluation text are disjoint. Every (samples, seed, share, method) is one row of a
JSON file: perplexity, KL from the dense model in nats and agreement of the likeliest token, per
domain, and how much its KL differs from that of another method on the same text, with the standard
error over the held-out samples. Rows that the file has already are not computed again, so a stopped
run goes on where it was. With --left-out every domain is left out of calibration in turn, and
measured; with other --samples the same file says what the calibration size does.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from quality_tables import SAMPLES, kl, perplexity, tables
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import tenp
from tenp import adapter, calibration, dern, pipeline, pruning, second_pass
from tenp.checkpoint import Checkpoint
from tenp.plan import Plan
from tenp.planning import Budget
from tenp.samples import Samples, tokenize
from tenp.statistics import Statistics, select
from tenp.text import read_domains

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

#: The paper's shares of whole experts, where it gives them.
ALPHA = {0.6: 0.3, 0.3: 0.05}

#: Tokens whose distributions are compared at a time; they stay in a core's cache.
_CHUNK = 128


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: Of the row.
        budget: Keyword arguments of `Budget` beside the share.
        options: Keyword arguments of `pipeline.plan`.
        held: Whether the activated share is held to that of TENP.
        against: The method it is compared with, sample by sample.
    """

    name: str
    budget: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    held: bool = False
    against: str = "TENP"


_DROPPING_STEP = "DERN, its dropping step"


def _drop(criterion: str) -> Method:
    return Method(f"drop experts: {criterion}", {"method": "drop"}, {"expert_criterion": criterion})


def _enp(criterion: str) -> Method:
    return Method(f"ENP: {criterion}", {"method": "enp"}, {"neuron_criterion": criterion})


METHODS = (
    Method("TENP", {}),
    Method("TENP + repair", {}, {"refit": True}),
    Method("best", {"method": "best"}),
    Method("best, TENP's activated share", {"method": "best"}, held=True),
    Method("best, worst domain", {"method": "best"}, {"worst_domain": True}, against="best"),
    Method("TENP, rectangle", {"shallow": 1.0, "deep": 1.0}),
    Method("TENP, random experts", {}, {"expert_criterion": "random"}),
    _enp("projection"),
    _enp("l2"),
    _drop("direction-change"),
    _drop("reap"),
    _drop("frequency"),
    Method(_DROPPING_STEP, {"method": "dern"}, {"dern_options": dern.Options(threshold=1.0)}),
    Method("DERN, threshold 0.6", {"method": "dern"}, against=_DROPPING_STEP),
    Method(
        "DERN, threshold 0.4",
        {"method": "dern"},
        {"dern_options": dern.Options(threshold=0.4)},
        against=_DROPPING_STEP,
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
)


#: Columns of what is measured of a sample: predicted tokens, and the sums over them of the negative
#: log-likelihood, of the KL from the dense model and of agreements of the likeliest token.
TOKENS, LOSS, KL, AGREED = range(4)


class Reference:
    """The dense model on the held-out text, to compare with."""

    def __init__(self, model: PreTrainedModel, samples: Sequence[Samples]) -> None:
        self._batches = [
            (domain.domain, ids, mask) for domain in samples for ids, mask in domain.batches(2048)
        ]
        self._dense = [
            torch.cat([part.log_softmax(dim=1) for part in _logits(model, ids, mask)])
            for _, ids, mask in self._batches
        ]

    def measure(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return `[samples, 4]` float64 per domain, the columns of `TOKENS` and so on."""
        measured: dict[str, list[Tensor]] = {}
        for (domain, ids, mask), dense in zip(self._batches, self._dense, strict=True):
            sample, position = torch.nonzero(mask[:, 1:], as_tuple=True)
            parts = zip(
                _logits(model, ids, mask),
                dense.split(_CHUNK),
                ids[sample, position + 1].split(_CHUNK),
                strict=True,
            )
            values = torch.cat([_compare(*part) for part in parts])
            sums = torch.zeros(len(ids), 4, dtype=torch.float64)
            measured.setdefault(domain, []).append(sums.index_add_(0, sample, values))
        return {domain: torch.cat(parts) for domain, parts in measured.items()}


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
    """Return the logits of all predicted tokens, `_CHUNK` of them at a time."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return logits[mask[:, 1:].bool()].float().split(_CHUNK)


def _compare(logits: Tensor, dense: Tensor, targets: Tensor) -> Tensor:
    """Return `[n, 4]` float64, the columns of `TOKENS` and so on, of n tokens."""
    ours = logits.log_softmax(dim=1)
    divergence = (dense - ours).mul_(dense.exp()).sum(dim=1)
    columns = (
        torch.ones(len(targets)),
        -ours.gather(1, targets[:, None])[:, 0],
        divergence,
        ours.argmax(dim=1) == dense.argmax(dim=1),
    )
    return torch.stack([column.double() for column in columns], dim=1)


class Bench:
    """A model, its text, and one set of statistics at a time."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.checkpoint = Checkpoint.resolve(arguments.model)
        self.source = pruning.source_of(self.checkpoint)
        self.model = adapter.load_model(self.checkpoint.directory, torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(self.checkpoint.directory)
        heldout = self._read(arguments.heldout, arguments.heldout_samples, 0)
        self.reference = Reference(self.model, heldout)
        self._measured: dict[str, dict[str, Tensor]] = {}

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
        path = Path(cache) / f"{self.arguments.samples}-{seed}.safetensors" if cache else None
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

    def measure(self, statistics: Statistics, decided: Plan) -> dict[str, Tensor]:
        """Measure what is written for a plan; the same weights only once."""
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "model"
            pipeline.apply(self.checkpoint, decided, out, verify=False, statistics=statistics)
            files = sorted(out.glob("*.safetensors"))
            digest = hashlib.sha256(b"".join(map(Path.read_bytes, files))).hexdigest()
            if digest not in self._measured:
                model = adapter.load_model(out, torch.float32)
                self._measured[digest] = self.reference.measure(model)
            return self._measured[digest]

    def dense_row(self) -> dict[str, dict[str, float]]:
        """Measure the dense model."""
        return summary(self.reference.measure(self.model))


def summary(measured: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return perplexity, KL and agreement per domain, as means over its predicted tokens."""
    found = {}
    for domain, samples in measured.items():
        tokens, loss, kl, agreed = samples.sum(dim=0).tolist()
        found[domain] = {
            "tokens": tokens,
            "perplexity": math.exp(loss / tokens),
            "kl": kl / tokens,
            "agreement": agreed / tokens,
        }
    return found


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, float]:
    """Return by how much our mean KL over domains is above theirs, and its standard error.

    Both were measured on the same samples, which are what is drawn at random; a domain's KL is a ratio
    of sums over them.
    """
    means, variances = [], []
    for domain, mine in ours.items():
        excess, tokens = mine[:, KL] - theirs[domain][:, KL], mine[:, TOKENS]
        mean = excess.sum() / tokens.sum()
        residual = (excess - mean * tokens).square().sum()
        variances.append(residual * len(tokens) / (len(tokens) - 1) / tokens.sum().square())
        means.append(mean)
    return float(torch.stack(means).mean()), float(torch.stack(variances).sum().sqrt()) / len(means)


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
            for share in arguments.shares:
                common = {"samples": arguments.samples, "seed": seed, "share": share}
                if without:
                    common["left_out"] = without
                todo = [m for m in methods if not known({"method": m.name, **common})]
                if not todo:
                    continue
                whole = whole or bench.calibrate(seed)
                names = [domain.name for domain in whole.domains if domain.name != without]
                compared = Compared(bench, select(whole, names), share)
                for method in todo:
                    yield {"method": method.name, **common, **compared.row(method)}


class Compared:
    """Methods at one share, from one set of statistics."""

    def __init__(self, bench: Bench, statistics: Statistics, share: float) -> None:
        self._bench, self._statistics, self._share = bench, statistics, share
        self._measured: dict[str, dict[str, Tensor]] = {}

    def row(self, method: Method) -> dict[str, Any]:
        """Plan and measure a method, and the one it is compared with where that was not done yet."""
        begin = time.monotonic()
        decided = self._bench.plan(self._statistics, method, self._share)
        seconds = time.monotonic() - begin
        measured = self._bench.measure(self._statistics, decided)
        found = {
            "static_share": decided.static_share(),
            "activated_share": decided.activated_share,
            "plan_seconds": round(seconds, 2),
            "domains": summary(measured),
        }
        self._measured[method.name] = measured
        if method.against == method.name:
            return found
        if method.against not in self._measured:
            self.row(next(other for other in METHODS if other.name == method.against))
        excess, error = difference(measured, self._measured[method.against])
        return {
            **found,
            "against": {"method": method.against, "kl": excess, "standard_error": error},
        }


def _json(results: dict[str, Any]) -> str:
    """A row a line, eight digits."""
    rows = [
        json.dumps(
            json.loads(json.dumps(row), parse_float=lambda text: float(f"{float(text):.8g}"))
        )
        for row in results["rows"]
    ]
    settings, lines = json.dumps(results["settings"]), ",\n".join(rows)
    return f'{{"settings": {settings},\n"rows": [\n{lines}\n]}}\n'


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(EXAMPLES / "tiny-moe"))
    for kind in ("calibration", "heldout"):
        files = sorted(map(str, (EXAMPLES / kind).glob("*.jsonl")))
        parser.add_argument(f"--{kind}", nargs="+", default=files)
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, help="calibration samples per domain"
    )
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
        print(f"{label}: KL {kl(row):.5f}, perplexity {perplexity(row):.3f}", flush=True)
        out.write_text(_json(results))
    text = tables(results)
    out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
