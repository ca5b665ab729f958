# SPDX-License-Identifier: Apache-2.0
"""The documentation agrees with the code: its Python runs, its options exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from tenp.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").glob("*.md"),
    ]
)
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

#: The line before a Python block that is shown only.
NOT_RUN = "<!-- not run -->"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """Yield (number of its first line, text) of the fenced blocks in some languages."""
    fences = [f"```{language}" for language in languages]
    lines = page.read_text().split("\n")
    opened: int | None = None
    for number, line in enumerate(lines):
        if opened is not None and line.strip() == "```":
            if lines[opened - 1].strip() in fences and lines[opened - 2] != NOT_RUN:
                yield opened + 1, "\n".join(lines[opened:number])
            opened = None
        elif opened is None and line.lstrip().startswith("```"):
            opened = number + 1


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def options_of(command: str) -> set[str]:
    return {
        spelling
        for option in COMMANDS[command].params
        for spelling in (*option.opts, *option.secondary_opts)
    } | {"--help"}


# ---- Python ----


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a directory with the examples as they are, but only a few samples of each text."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/tiny-moe").symlink_to(ROOT / "examples/tiny-moe")
    for text in (ROOT / "examples").glob("*/*.jsonl"):
        few = tmp_path / text.relative_to(ROOT)
        few.parent.mkdir(exist_ok=True)
        few.write_text("\n".join(text.read_text().split("\n")[:2]))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(blocks(page, "python"))], ids=name_of
)
def test_python_runs(page: Path, checkout: None) -> None:
    namespace: dict[str, Any] = {}
    for line, source in blocks(page, "python"):
        # Blank lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * (line - 1) + source, page, "exec"), namespace)


# ---- commands ----


def test_every_command_has_a_page() -> None:
    assert {page.stem for page in (ROOT / "docs/cli").glob("*.md")} == set(COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_options_of_its_page_exist(command: str) -> None:
    page = (ROOT / f"docs/cli/{command}.md").read_text()
    tables = "\n".join(re.findall(r"^\| (`--[^|]*)\|", page, flags=re.MULTILINE))
    named = set(re.findall(r"--[a-z][a-z-]*", tables))
    assert named, f"docs/cli/{command}.md must have a table of options"
    assert named <= options_of(command)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_anywhere_exist(page: Path) -> None:
    known = {option for command in COMMANDS for option in options_of(command)}
    known |= {"--version", "--cmake-dir"}
    # In prose an option stands alone in its code span; other programs' commands are longer.
    assert set(re.findall(r"`(--[a-z][a-z-]*)", prose(page))) <= known


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_shown_exist(page: Path) -> None:
    for _, script in blocks(page, "sh", "bash"):
        for line in script.replace("\\\n", " ").split("\n"):
            words = shlex.split(line, comments=True)
            if words[:1] != ["tenp"] or words[1].startswith("-"):
                continue
            given = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
            assert given <= options_of(words[1]), line


# ---- links ----


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link
