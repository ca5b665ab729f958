# SPDX-License-Identifier: Apache-2.0
"""With `autoload/` installed nobody imports tenp, and who does not use transformers pays nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.fixtures import Tiny

AUTOLOAD = Path(__file__).parents[1] / "autoload"


def run(program: str, *arguments: object, directory: Path | None = None) -> str:
    """Run a program in a Python that reads the .pth file; return what it says when it fails."""
    start = f"import site; site.addsitedir({str(AUTOLOAD)!r})\n"
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", start + program, *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=directory,
        capture_output=True,
        text=True,
    )
    return result.stderr if result.returncode else ""


def test_a_pruned_model_loads(tiny: Tiny) -> None:
    program = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "tenp" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp.experts).__name__ == "TenpExperts"
"""
    assert not run(program, tiny.pruned)


#: The first of the two that a program imports imports the other, or does not. tenp needs both.
_MODULES = {
    "transformers/__init__.py": "",
    "transformers/modeling_utils.py": "from transformers import quantizers\nModel = object",
    "transformers/quantizers/__init__.py": "register = print",
    "tenp.py": """
from transformers.modeling_utils import Model
from transformers.quantizers import register
""",
}


@pytest.mark.parametrize("first", ["modeling_utils", "quantizers"])
def test_whichever_module_is_imported_first_tenp_follows(tmp_path: Path, first: str) -> None:
    for name, code in _MODULES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    program = f"""
import sys
import transformers
assert "tenp" not in sys.modules
import transformers.{first}
assert sys.modules["tenp"].Model is object
"""
    assert not run(program, directory=tmp_path)
    (tmp_path / "tenp.py").write_text("import nothing_of_that_name")
    assert "UserWarning: tenp could not be imported" in run(program, directory=tmp_path)
