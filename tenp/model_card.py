# SPDX-License-Identifier: Apache-2.0
"""The README.md of a pruned checkpoint: what the Hub shows of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import yaml
from huggingface_hub import metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tenp.checkpoint import Checkpoint
from tenp.plan import Plan


class Cost(NamedTuple):
    """What pruning cost on the text of one domain; the figures are those of `tenp evaluate`."""

    domain: str
    tokens: int
    perplexity_before: float
    perplexity_after: float
    divergence: float


def model_card(
    checkpoint: Checkpoint,
    plan: Plan,
    needs_tenp: bool,
    costs: Sequence[Cost] = (),
    is_int8: bool = False,
) -> str:
    """Return the model card of what `plan` makes of `checkpoint`, as Markdown with front matter.

    Args:
        checkpoint: The dense model.
        plan: What was kept.
        needs_tenp: Whether the result is loaded by tenp; stock runtimes load the others.
        costs: What it cost, if that was measured.
        is_int8: Whether the experts' matrices were rounded to 8 bits on top of it.
    """
    name = _name(checkpoint)
    front_matter = {
        **_license(checkpoint),
        "base_model": name,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tenp", "pruned", "moe", "compressed"],
    }
    rows = "\n".join(
        f"| {layer} | {min(widths)} | {sorted(widths)[len(widths) // 2]} | {max(widths)} | "
        f"{sum(widths) / plan.keep[layer].numel():.1%} |"
        for layer, widths in plan.widths().items()
    )
    before, after = plan.source, plan
    versions = ", ".join(f"{package} {version(package)}" for package in _PACKAGES)
    return f"""\
---
{yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True)}---

# {name}, routed experts pruned to {plan.static_share():.1%}

{_HOW[plan.settings["method"]]}

| | before | after |
|---|---|---|
| parameters | {before.parameters:,} | {after.total_parameters():,} |
| bytes | {checkpoint.stored_bytes:,} | {after.total_bytes():,} |
| routed parameters kept | 100 % | {plan.static_share():.2%} |
| activated routed parameters kept | 100 % | {plan.activated_share:.2%} |
{"".join(_cost_rows(cost) for cost in costs)}
{_INT8 if is_int8 else ""}{_MEASURED if costs else _NOT_MEASURED}

{_USE}{_use(needs_tenp, is_int8)}

{_HOW_MADE}
```sh
{_command(name, plan.settings, plan.repair is not None, is_int8)}
```

TEXT is the calibration text, one file for each domain. A plan does not hold how the text was read, so
options like `--samples` and `--max-length` are not in the command. Versions: {versions}.
Settings: `{json.dumps(plan.settings, sort_keys=True)}`. The plan is in `tenp_plan.json`, made from statistics `{plan.statistics[:16]}…`
of checkpoint `{plan.source.fingerprint[:16]}…`.

| layer | narrowest | median | widest | kept |
|---|---|---|---|---|
{rows}

## Limits

- What an expert needs was judged on the calibration text. On text of other kinds the model may have
  lost more than on that, and what it can do for you is to be measured on your own task.
- Only routed experts are smaller. Attention, embeddings, shared experts and the cache of keys and
  values are as large as before.
- What limits the model it was made from limits this one too: see its card.
{_needs(plan) if needs_tenp else ""}"""


def padded_card(card: str) -> str:
    """Return the card of a padded copy, given that of the checkpoint it was made of.

    A card that somebody else wrote stays as it is.
    """
    before, title, rest = card.partition(_USE)
    _, how, rest = rest.partition(_HOW_MADE)
    if not (title and how):
        return card
    for reason in (_WIDTHS, _FIELDS):
        rest = rest.partition(reason)[0]
    return f"{before.replace(_INT8, '')}{_IS_PADDED}{_USE}{_STOCK}\n\n{_HOW_MADE}{rest}"


_USE, _HOW_MADE = "## Use\n\n", "## How it was made\n"

_IS_PADDED = """\
This is a padded copy (`tenp export --padded`): zeros fill every expert up to the full width. It
computes the same as the pruned model and needs no tenp, but it is as large as the model before.

"""

#: Whose versions decide the numbers in the files.
_PACKAGES = ("tenp", "torch", "transformers")

_NARROWED = """\
Every expert stays and the router is untouched; the experts were narrowed to the neurons that carry
their output"""

#: What each method did to the experts.
_HOW = {
    "tenp": f"{_NARROWED} (TENP, Findings of ACL 2026, arXiv 2606.09885).",
    "enp": f"{_NARROWED}, all to one width (ENP of TENP, Findings of ACL 2026, arXiv 2606.09885).",
    "best": f"{_NARROWED}, chosen by the error that their removal costs after a refit.",
    "drop": "Whole experts were dropped, and with them their rows of the routers.",
    "dern": """\
Whole experts were dropped, and with them their rows of the routers; the others were rebuilt with the
dropped experts' neurons (DERN, Findings of EMNLP 2025, arXiv 2509.10377).""",
}

_MEASURED = """\
Perplexity and KL are means over the tokens of one file each. KL is that of the next-token
distribution of the model before from that of the one after, in nats per token."""

_INT8 = """\
The kept matrices of the experts are stored in 8 bits with a scale for each neuron (`--weights
int8`), which the sizes above leave out.

"""

_NOT_MEASURED = "What this cost on text was not measured when it was made."

_WITH_TENP = """\
With tenp installed:

```python
import tenp  # registers the loader; without it loading fails
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/model")
```

`trust_remote_code=True` does instead of the import: the code in this repository only imports tenp.
"""

_WITH_VLLM = """
In vLLM, tenp is a plugin that needs no import:

```sh
vllm serve path/to/this/model
```
"""

_STOCK = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/model")
```

```sh
vllm serve path/to/this/model
```

All experts have one width, so any runtime that knows the architecture loads it."""

#: Why it needs tenp: there are several widths, or no field for the one.
_WIDTHS = "- Experts of different widths need tenp."
_FIELDS = """\
- All experts have one width, but no config field gives it to them in this format and leaves the
  other layers as they are, so they need tenp."""

_PADDED = """\
Runtimes that know one width only can load what
  `tenp export --padded` writes of this model, which computes the same and is as large as before.
"""


def _needs(plan: Plan) -> str:
    """Why it needs tenp, and what does not."""
    return f"{_WIDTHS if plan.uniform_width() is None else _FIELDS} {_PADDED}"


def _use(needs_tenp: bool, is_int8: bool) -> str:
    if not needs_tenp:
        return _STOCK
    # The plugins for servers take floating-point weights only.
    return (_WITH_TENP + ("" if is_int8 else _WITH_VLLM)).rstrip("\n")


def _name(checkpoint: Checkpoint) -> str:
    """The dense model's name on the Hub if that can be known, else that of its directory."""
    directory = checkpoint.directory.resolve()
    if directory.parent.name == "snapshots":  # of the Hub's cache: models--ORGANISATION--NAME
        return directory.parent.parent.name.removeprefix("models--").replace("--", "/")
    name = str(checkpoint.config.get("_name_or_path") or "")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return directory.name
    return name


def _license(checkpoint: Checkpoint) -> dict[str, Any]:
    """The licence fields of the dense model's card: what is made from it stays under them."""
    card = checkpoint.directory / "README.md"
    try:
        metadata = (metadata_load(card) if card.exists() else None) or {}
    except (ValueError, yaml.YAMLError):
        metadata = {}
    fields = ("license", "license_name", "license_link")
    return {field: metadata[field] for field in fields if field in metadata}


def _cost_rows(cost: Cost) -> str:
    return (
        f"| perplexity, {cost.domain} ({cost.tokens:,} tokens) | {cost.perplexity_before:.3f} | "
        f"{cost.perplexity_after:.3f} |\n"
        f"| KL, {cost.domain} | 0 | {cost.divergence:.4f} |\n"
    )


def _command(name: str, settings: Mapping[str, Any], repaired: bool, is_int8: bool) -> str:
    """The `tenp prune` that decides by these settings."""
    given = dict(settings)
    dern = given.pop("dern", {})
    given |= {f"dern_{option}": dern[option] for option in ("threshold", "init") if dern}
    if dern.get("init") == "random":
        given["seed"] = dern["seed"]
    words = ["tenp", "prune", name, "--calibration", "TEXT..."]
    for option in _OPTIONS:
        if given.get(option) is not None:
            words += [f"--{option.replace('_', '-')}", f"{given[option]}"]
    for domain, weight in given.get("domain_weights", {}).items():
        words += ["--domain-weight", f"{domain}={weight}"]
    if repaired and given["method"] != "best":
        words += ["--repair", "ls"]
    if given.get("worst_domain"):
        words.append("--worst-domain")
    if "sequential" in given:
        words.append("--sequential")
        words += ["--against-dense"] if given["sequential"]["against_dense"] else []
    if not dern.get("weighted", True):
        words.append("--no-dern-weights")
    if is_int8:
        words += ["--weights", "int8"]
    return " ".join(map(shlex.quote, [*words, "--out", "DIR"]))


#: Settings that have an option of their name.
_OPTIONS = (
    "keep",
    "method",
    "alpha",
    "shallow",
    "deep",
    "width_multiple",
    "activated",
    "pool",
    "floor",
    "experts",
    "neurons",
    "under_covered",
    "dern_threshold",
    "dern_init",
    "seed",
)
