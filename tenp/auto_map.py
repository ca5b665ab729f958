# SPDX-License-Identifier: Apache-2.0
"""Code in a pruned checkpoint, so that `trust_remote_code=True` loads it without `import tenp`.

transformers runs it only when it is told to, and before it chooses a model class. It stands for the
config, because every automatic class of transformers, and every program that builds on them, reads
the config first. When tenp is not installed, transformers says so in one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FILE = "configuration_tenp.py"

CODE = '''\
# SPDX-License-Identifier: Apache-2.0
"""Lets transformers load this pruned model with `trust_remote_code=True`, where tenp is installed.

The config and the model are transformers' own; tenp, when imported, teaches it to load them.
"""

import tenp  # noqa: F401
from transformers import AutoConfig


class PrunedConfig:
    """Stands where transformers looks for code, and hands over to the model's own config."""

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Nothing is to be registered."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Read the config as if there were no code."""
        return AutoConfig.from_pretrained(*args, **{**kwargs, "trust_remote_code": False})
'''

_ENTRY = "configuration_tenp.PrunedConfig"


def added(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json that names the code.

    It replaces code that the source names for its config and model, which does not know pruned
    experts; code for tokenizers stays.
    """
    others = {
        name: entry
        for name, entry in (config.get("auto_map") or {}).items()
        if not name.startswith(("AutoConfig", "AutoModel"))
    }
    return {**config, "auto_map": {"AutoConfig": _ENTRY, **others}}


def removed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json that does not name the code."""
    others = without_code(config.get("auto_map"))
    rest = {name: value for name, value in config.items() if name != "auto_map"}
    return {**rest, "auto_map": others} if others else rest


def without_code(entries: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the entries of an `auto_map` that do not name the code."""
    return {name: entry for name, entry in (entries or {}).items() if entry != _ENTRY}
