# SPDX-License-Identifier: Apache-2.0
"""Where tenp was uninstalled, its outputs are loaded rightly or not at all, by transformers and by vLLM.

`.ci/vllm` runs this after `pip uninstall tenp`, on what tests/test_vllm.py wrote while tenp was there.
"""

from __future__ import annotations

import importlib.util
import json
import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("tenp") is not None:
    pytest.skip("tenp is installed", allow_module_level=True)

from transformers import AutoModelForCausalLM

from support.vllm_runs import EXPECTED, KINDS, run_vllm, tokens_of, tokens_of_transformers

ROOT = Path(os.environ["TENP_TEST_MODELS"])
STOCK = [kind for kind in KINDS if kind != "ragged"]


@pytest.fixture(scope="module")
def expected() -> Any:
    return json.loads((ROOT / EXPECTED).read_text())


def test_no_plugin_is_left() -> None:
    groups = ("vllm.general_plugins", "sglang.srt.plugins")
    assert not [entry for group in groups for entry in entry_points(group=group, name="tenp")]


@pytest.mark.parametrize("kind", STOCK)
def test_transformers_computes_the_same(kind: str, expected: Any) -> None:
    assert tokens_of_transformers(ROOT / kind, expected["prompts"]) == expected["tokens"][kind]


@pytest.mark.parametrize("kind", STOCK)
def test_vllm_computes_the_same(kind: str, expected: Any, tmp_path: Path) -> None:
    result = run_vllm(ROOT / kind, expected["prompts"], tmp_path)
    assert tokens_of(result) == expected["tokens"][kind]


@pytest.mark.parametrize(
    ("trusted", "message"), [(False, "conversion of the weights"), (True, "not found.*: tenp")]
)
def test_transformers_refuses_different_widths(
    trusted: bool, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    with pytest.raises(Exception, match=message):
        AutoModelForCausalLM.from_pretrained(ROOT / "ragged", trust_remote_code=trusted)


def test_vllm_refuses_different_widths(expected: Any, tmp_path: Path) -> None:
    result = run_vllm(ROOT / "ragged", expected["prompts"], tmp_path)
    assert result.returncode != 0
    assert "Unknown quantization method: tenp" in result.stderr + result.stdout
    assert "TOKENS" not in result.stdout
