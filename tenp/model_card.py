# SPDX-License-Identifier: Apache-2.0
"""The README.md of a pruned checkpoint."""

from __future__ import annotations

import json

import yaml
from huggingface_hub import metadata_load

from tenp.checkpoint import Checkpoint
from tenp.plan import Plan

_LOAD_WITH_TENP = """\
```python
import tenp  # registers the loader; without it loading fails
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/model")
```"""

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

_LOAD_STOCK = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/model")
```

All experts have one width, so any runtime that knows the architecture loads it."""


def _license(checkpoint: Checkpoint) -> str:
    """The licence lines of the dense model's card: what is made from it stays under them."""
    card = checkpoint.directory / "README.md"
    try:
        metadata = (metadata_load(card) if card.exists() else None) or {}
    except (ValueError, yaml.YAMLError):
        metadata = {}
    fields = ("license", "license_name", "license_link")
    return "".join(f"{field}: {metadata[field]}\n" for field in fields if field in metadata)


def model_card(checkpoint: Checkpoint, plan: Plan, needs_tenp: bool) -> str:
    """Return the model card of what `plan` makes of `checkpoint`, as Markdown with front matter."""
    name = checkpoint.config.get("_name_or_path") or checkpoint.directory.resolve().name
    settings = plan.settings
    rows = "\n".join(
        f"| {layer} | {min(widths)} | {sorted(widths)[len(widths) // 2]} | {max(widths)} | "
        f"{sum(widths) / plan.keep[layer].numel():.1%} |"
        for layer, widths in plan.widths().items()
    )
    before, after = plan.source, plan
    return f"""\
---
{_license(checkpoint)}base_model: {name}
base_model_relation: quantized
library_name: transformers
pipeline_tag: text-generation
tags: [tenp, pruned, moe, compressed]
---

# {name}, routed experts pruned to {plan.static_share():.1%}

{_HOW[settings["method"]]}

| | before | after |
|---|---|---|
| parameters | {before.parameters:,} | {after.total_parameters():,} |
| bytes | {before.bytes:,} | {after.total_bytes():,} |
| routed parameters kept | 100 % | {plan.static_share():.2%} |
| activated routed parameters kept | 100 % | {plan.activated_share:.2%} |

## Use

{_LOAD_WITH_TENP if needs_tenp else _LOAD_STOCK}

## How it was made

Settings: `{json.dumps(settings, sort_keys=True)}`. The plan is in `tenp_plan.json`, made from statistics `{plan.statistics[:16]}…`
of checkpoint `{plan.source.fingerprint[:16]}…`.

| layer | narrowest | median | widest | kept |
|---|---|---|---|---|
{rows}
"""
