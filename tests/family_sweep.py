# SPDX-License-Identifier: Apache-2.0
"""Takes every experts class of transformers through tenp, and writes the table of docs/models.md.

The classes are found, not listed: every class of `transformers.models` that carries
`@use_experts_implementation`, and every other one that is named like experts. For each a model type
is looked up that has it, a tiny random model is made, and what tenp promises is proved on it.

    python tests/family_sweep.py --write docs/models.md     # all, some minutes
    python tests/family_sweep.py mixtral gpt_oss            # some model types, to the screen
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from support.shrinking import VOCABULARY, tiny_configs
from support.tiny_models import stored_tensors
from tenp import adapter, calibration, evaluation, planning, pruning, scoring
from tenp.checkpoint import Checkpoint
from tenp.errors import Unsupported
from tenp.plan import Plan
from tenp.planning import Budget
from tenp.runtime import TenpExperts
from tenp.samples import Samples

_BEGIN, _END = "<!-- families: begin -->", "<!-- families: end -->"

_DECORATOR = "use_experts_implementation"


# ---- what there is ----


@dataclass(frozen=True)
class ExpertsClass:
    """One class of experts in transformers."""

    name: str
    module: str  # where it is defined
    is_decorated: bool
    model_types: tuple[str, ...]  # with a language model in the same module, text alone first


@functools.cache
def experts_classes() -> list[ExpertsClass]:
    """Return all experts classes of the installed transformers, by name."""
    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text()
        if not re.search(r"^class \w+Experts\b", text, flags=re.MULTILINE):
            continue  # parsing is slow
        classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
        names = {node.name for node in classes}
        for node in classes:
            is_decorated = any(_DECORATOR in ast.unparse(d) for d in node.decorator_list)
            if is_decorated or (node.name.endswith("Experts") and "Shared" not in node.name):
                module = f"transformers.models.{path.parent.name}.{path.stem}"
                found.append(ExpertsClass(node.name, module, is_decorated, _model_types(names)))
    return sorted(found, key=lambda experts: experts.name.lower())


def _model_types(classes: set[str]) -> tuple[str, ...]:
    """The model types of the language models among some classes, those of text alone first."""
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    found = [kind for names in mappings for kind, name in names.items() if name in classes]
    return tuple(sorted(dict.fromkeys(found), key=lambda kind: not kind.endswith("_text")))


def make_tiny(experts: ExpertsClass) -> tuple[str, PreTrainedModel]:
    """Return the first model type that has these experts, and a tiny model of it.

    Raises:
        Unsupported: tenp refuses it.
        Exception: transformers cannot build it from any config that was tried.
    """
    wanted = getattr(importlib.import_module(experts.module), experts.name)
    failure: Exception = Unsupported("no language model of transformers has these experts")
    for model_type in experts.model_types:
        for make in tiny_configs(model_type):
            try:
                config = make()
                empty = adapter.empty_model(config)
                if not any(isinstance(module, wanted) for module in empty.modules()):
                    continue  # switched off, or of another part of the family
                adapter.find_experts(empty)
                torch.manual_seed(0)
                model = adapter.model_of_config(config).eval()
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.ndim >= 2:
                            torch.nn.init.normal_(parameter, std=0.1)
                    _logits(model)
                return model_type, model
            except Exception as error:
                failure = error
                if isinstance(error, Unsupported):
                    break
    raise failure


def token_ids(tokens: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY - 20, (2, tokens), generator=generator)


# ---- what is proved ----


@dataclass
class Subject:
    """One family on its way through tenp."""

    root: Path
    dense: Checkpoint
    plan: Plan
    enp: Plan
    masked: PreTrainedModel  # the dense model, its pruned neurons silenced
    logits: Tensor  # its

    @property
    def is_of_hub(self) -> bool:
        """Whether the dense checkpoint is in the Hub's format, and not in the model's own."""
        return self.dense.directory.name == "hub"

    def load(self, name: str = "pruned", **options: object) -> PreTrainedModel:
        return adapter.load_model(self.root / name, **{"dtype": torch.float32, **options})


def prepare(model: PreTrainedModel, root: Path) -> Subject:
    """Save, calibrate, plan and apply, to widths that include 0."""
    model.save_pretrained(root / "hub", max_shard_size="150KB")
    dense = Checkpoint(root / "hub")
    try:
        source = pruning.source_of(dense)
    except Unsupported:  # says that this helps
        model.save_pretrained(root / "own", max_shard_size="150KB", save_original_format=False)
        dense = Checkpoint(root / "own")
        source = pruning.source_of(dense)
    generator = torch.Generator().manual_seed(0)
    ids = tuple(torch.randint(3, VOCABULARY - 20, (n,), generator=generator) for n in (20, 33, 9))
    masked = adapter.load_model(dense.directory, torch.float32)
    statistics = calibration.collect(masked, [Samples("text", ids)], source, batch_tokens=60)
    scores = scoring.score(statistics)
    plan = planning.plan(scores, statistics, Budget(0.5, alpha=0.4, width_multiple=1))
    for keep in plan.keep.values():
        keep[1] = False
    enp = planning.plan(scores, statistics, Budget(0.5, method="enp", width_multiple=4))
    pruning.apply(dense, plan, root / "pruned")
    evaluation.mask_neurons(masked, plan)
    return Subject(root, dense, plan, enp, masked, _logits(masked))


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(token_ids(), use_cache=False).logits.float()


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def _require_equal(found: Tensor, expected: Tensor) -> None:
    difference = float((found - expected).abs().max() / expected.abs().max())
    _require(difference <= 1e-5, f"logits differ by {difference:.1e}")


def loads(subject: Subject) -> None:
    """Every experts module is tenp's and has the planned widths."""
    modules = [m for m in subject.load().modules() if isinstance(m, TenpExperts)]
    widths = [m.widths for m in modules]
    _require(widths == list(subject.plan.widths().values()), f"widths {widths}")
    _require(min(map(min, widths)) == 0, "no expert has width 0")


def logits(subject: Subject) -> None:
    """The pruned model computes what the masked dense one does, to 1e-5 of the largest logit."""
    _require_equal(_logits(subject.load()), subject.logits)


def generate(subject: Subject) -> None:
    """Greedy tokens are those of the masked dense model."""
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    ours, theirs = (m.generate(token_ids(), **options) for m in (subject.load(), subject.masked))
    _require(torch.equal(ours, theirs), "other tokens")


def resave(subject: Subject) -> None:
    """What `save_pretrained` writes holds the same tensors, and computes the same."""
    subject.load().save_pretrained(subject.root / "again", max_shard_size="150KB")
    _require_equal(_logits(subject.load("again")), subject.logits)
    if subject.is_of_hub:
        ours, theirs = (Checkpoint(subject.root / name) for name in ("again", "pruned"))
        ours, theirs = (stored_tensors(checkpoint) for checkpoint in (ours, theirs))
        differ = ours.keys() ^ theirs.keys()
        _require(not differ, f"other names {sorted(differ)[:2]}")
        differ = {name for name, tensor in theirs.items() if not torch.equal(tensor, ours[name])}
        _require(not differ, f"other values {sorted(differ)[:2]}")


def bfloat16(subject: Subject) -> None:
    """As near to float32 as the masked dense model is in bfloat16, on average."""
    ours = subject.load(dtype=torch.bfloat16)
    experts = [m for m in ours.modules() if isinstance(m, TenpExperts)]
    _require({m.down_proj.dtype for m in experts} == {torch.bfloat16}, "experts of another dtype")
    stock = adapter.load_model(subject.dense.directory, torch.bfloat16)
    evaluation.mask_neurons(stock, subject.plan)
    off, stock_off = ((_logits(m) - subject.logits).abs().mean() for m in (ours, stock))
    _require(bool(off <= 2 * stock_off), f"off by {off:.1e}, the dense model by {stock_off:.1e}")


#: Parts of the names of linear layers that get no LoRA here: PEFT refuses the output of Mamba layers, and
#: does not load what it saved of the shared experts of some families, pruned or not.
_NO_LORA = ("mlp", "feed_forward", "moe", "expert", "out_proj", "vision")


def lora(subject: Subject) -> None:
    """LoRA on the linear layers of attention learns, and is the same when it is loaded again."""
    import peft

    model = subject.load()
    linear = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and "layers." in name
        and not any(part in name for part in _NO_LORA)
    ]
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=linear, r=4))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(8):
        loss = _loss(model)
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _require(losses[-1] < losses[0], f"losses {losses}")
    model.eval().save_pretrained(subject.root / "lora")
    again = peft.PeftModel.from_pretrained(subject.load(), subject.root / "lora")
    _require_equal(_logits(again), _logits(model))


def _loss(model: nn.Module) -> Tensor:
    ids = token_ids()
    logits = model(ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def one_width(subject: Subject) -> None:
    """One width for all experts gives a stock checkpoint."""
    pruning.apply(subject.dense, subject.enp, subject.root / "enp")
    model = subject.load("enp")
    masked = adapter.load_model(subject.dense.directory, torch.float32)
    evaluation.mask_neurons(masked, subject.enp)
    _require_equal(_logits(model), _logits(masked))
    if any(isinstance(module, TenpExperts) for module in model.modules()):
        raise Unsupported("loads with tenp")


def padded(subject: Subject) -> None:
    """The padded export is a stock checkpoint with the names and shapes of the Hub's format."""
    pruning.export_padded(Checkpoint(subject.root / "pruned"), subject.root / "padded")
    if subject.is_of_hub:
        shapes = [
            {name: entry.shape for name, entry in checkpoint.tensors.items()}
            for checkpoint in (Checkpoint(subject.root / "padded"), subject.dense)
        ]
        _require(shapes[0] == shapes[1], "other names or shapes")
    model = subject.load("padded")
    _require(not any(isinstance(m, TenpExperts) for m in model.modules()), "not stock")
    _require_equal(_logits(model), subject.logits)


#: Column of the table to what proves it.
PROOFS: dict[str, Callable[[Subject], None]] = {
    "loads": loads,
    "equal logits": logits,
    "generate": generate,
    "re-save": resave,
    "bf16": bfloat16,
    "LoRA": lora,
    "one width": one_width,
    "padded": padded,
}


# ---- the table ----


@dataclass
class Row:
    """What became of one experts class."""

    experts: ExpertsClass
    model_type: str = ""
    passed: dict[str, bool] = field(default_factory=dict)
    reason: str = ""  # of a refusal, or of what failed


def prove(experts: ExpertsClass) -> Row:
    """Build a tiny model and run all proofs."""
    row = Row(experts, ", ".join(experts.model_types))
    try:
        row.model_type, model = make_tiny(experts)
        with tempfile.TemporaryDirectory() as directory:
            subject = prepare(model, Path(directory))
            for column, proof in PROOFS.items():
                try:
                    proof(subject)
                    row.passed[column] = True
                except Exception as error:
                    row.passed[column] = False
                    if not isinstance(error, Unsupported):
                        row.reason += f"{column}: {type(error).__name__} {_first_line(error)} "
    except Unsupported as error:
        row.reason = _first_line(error)
    except Exception as error:
        row.reason = f"{type(error).__name__}: {_first_line(error)}"
        if "-v" in sys.argv:
            traceback.print_exc()
    return row


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _line(row: Row) -> str:
    if not row.passed:
        return f"| {row.experts.name} | {row.reason.replace('|', '/')} |"
    marks = ("✓" if row.passed[column] else "no" for column in PROOFS)
    return f"| {row.experts.name} | `{row.model_type}` | {' | '.join(marks)} |"


def lines_of_tables(page: Path) -> dict[str, str]:
    """Return the classes that the tables of a page have rows for, with their lines."""
    _, _, rest = page.read_text().partition(_BEGIN)
    lines = [line for line in rest.partition(_END)[0].split("\n") if line.startswith("| ")]
    found = {line.split("|")[1].strip(): line for line in lines}
    return {name: line for name, line in found.items() if name != "experts class"}


def write(page: Path, rows: list[Row]) -> None:
    """Put rows into the two tables of a page, of what works and what is refused; others stay."""
    lines = lines_of_tables(page) | {row.experts.name: _line(row) for row in rows}
    ordered = [lines[name] for name in sorted(lines, key=str.lower)]
    works = [line for line in ordered if line.count("|") > 3]
    decorated = {experts.name for experts in experts_classes() if experts.is_decorated}
    serves = sum(name in decorated for name in lines if lines[name] in works)
    text = [
        f"Of the {len(decorated)} experts classes in transformers {transformers.__version__} that have the interface, "
        f"these {serves} work:",
        "",
        f"| experts class | `model_type` | {' | '.join(PROOFS)} |",
        "|---" * (2 + len(PROOFS)) + "|",
        *works,
        "",
        "The others, and the classes without the interface, are refused, or no tiny model of them could be made:",
        "",
        "| experts class | why |",
        "|---|---|",
        *(line for line in ordered if line not in works),
    ]
    before, _, rest = page.read_text().partition(_BEGIN)
    after = rest.partition(_END)[2]
    page.write_text("\n".join([before + _BEGIN, "", *text, "", _END + after]))


def _chosen(names: list[str]) -> Iterator[ExpertsClass]:
    for experts in experts_classes():
        if not names or {experts.name, *experts.model_types} & set(names):
            yield experts


def main() -> None:
    parser = argparse.ArgumentParser(description="Prove what docs/models.md says of families.")
    parser.add_argument("names", nargs="*", help="model types or classes; all if none")
    parser.add_argument("--write", type=Path, help="the page whose tables get the rows")
    parser.add_argument("-v", action="store_true", help="show where it failed")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for experts in _chosen(options.names):
        row = prove(experts)
        marks = "".join("✓" if passed else "x" for passed in row.passed.values())
        print(f"{experts.name:34} {row.model_type:28} {marks:10} {row.reason}", flush=True)
        if options.write is not None:
            write(options.write, [row])


if __name__ == "__main__":
    main()
