# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: the contracts of pyproject.toml, and what import-linter cannot see."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tenp"


def _imports(path: Path) -> Iterator[str]:
    """Full names of everything that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files_importing(prefix: str) -> set[str]:
    return {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        for name in _imports(path)
        if f"{name}.".startswith(f"{prefix}.")
    }


def test_only_ops_knows_the_native_module() -> None:
    assert _files_importing("tenp._C") == {"ops"}


@pytest.mark.parametrize("library", ["rich", "typer"])
def test_only_the_command_line_draws(library: str) -> None:
    assert _files_importing(library) == {"cli"}


def test_the_layers_hold() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    if not command.exists() and shutil.which("lint-imports") is None:
        pytest.skip("import-linter is not installed")
    result = subprocess.run(
        [command if command.exists() else "lint-imports", "--no-cache"],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


def test_the_layers_are_those_of_the_documentation() -> None:
    root = PACKAGE.parent
    contract = re.search(
        r"^layers = \[\n(.*?)^\]", (root / "pyproject.toml").read_text(), re.M | re.S
    )
    page = re.search(
        r"^```\n(lm_eval\n.*?)^```", (root / "docs/architecture.md").read_text(), re.M | re.S
    )
    assert contract is not None and page is not None
    stated, shown = (
        [set(re.findall(r"\w+", line)) for line in text[1].splitlines()]
        for text in (contract, page)
    )
    assert shown == stated[1:]  # without __main__
