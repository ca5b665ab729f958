# SPDX-License-Identifier: Apache-2.0
"""The documentation agrees with the code: its Python runs, its options exist, its links lead somewhere."""

from __future__ import annotations

import glob
import inspect
import json
import operator
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import tenp
from support.fixtures import Command, Tiny
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

#: The line before a Python block that is shown only, and why.
NOT_RUN = "<!-- not run: "

#: Pages that need what those before them wrote.
IN_ORDER = [
    *(
        f"docs/cli/{name}.md"
        for name in ("calibrate", "merge", "plan", "apply", "show", "evaluate")
    ),
    *("docs/cli/export.md", "docs/cli/prune.md", "docs/cli/report.md"),
]

#: Programs of shell blocks that are not run here, and why.
ELSEWHERE = {
    "pip": "installs",
    "python3": "makes an environment",
    "pytest": "would run itself",
    "ruff": "CI runs it",
    "mypy": "CI runs it",
    "mkdocs": "CI runs it",
    "lint-imports": "CI runs it",
    "git": "formats the sources",
    "cmake": "tests/test_cpp_consumer.py and CI build the library",
    "build/consumer/consumer": "tests/test_cpp_consumer.py",
    "torchrun": "tests/test_distributed.py starts several processes",
    "python": "tests/test_lm_eval.py and tests/test_training.py run these",
    "for": "tests/test_lm_eval.py",
    "done": "tests/test_lm_eval.py",
    "hf": "uploads",
    "vllm": ".ci/vllm serves with it",
    ".ci/vllm": "needs vLLM",
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """Yield (number of its first line, text) of the fenced blocks in some languages."""
    fences = [f"```{language}" for language in languages]
    lines = page.read_text().split("\n")
    opened: int | None = None
    for number, line in enumerate(lines):
        if opened is not None and line.strip() == "```":
            if lines[opened - 1].strip() in fences and not lines[opened - 2].startswith(NOT_RUN):
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


API = ROOT / "docs/python.md"


def documented_calls() -> list[tuple[str, list[str]]]:
    """The functions of tenp and tenp.ops that the page shows with their arguments, but for `name(…)`."""
    spans = re.findall(r"`(?:tenp\.)?([\w.]+)\((?!…)([^`]*)\)`", prose(API))
    return [
        (name, arguments.split(", ") if arguments else [])
        for name, arguments in spans
        if hasattr(tenp, name.partition(".")[0]) or hasattr(tenp.ops, name)
    ]


def written(parameter: inspect.Parameter) -> str:
    default = parameter.default
    if parameter.kind is parameter.VAR_KEYWORD:
        return f"**{parameter.name}"
    if default is parameter.empty:
        return parameter.name
    value = json.dumps(default) if isinstance(default, str) else repr(default)
    return f"{parameter.name}={value}"


@pytest.mark.parametrize(("name", "arguments"), documented_calls())
def test_functions_take_what_the_page_says(name: str, arguments: list[str]) -> None:
    place = tenp if hasattr(tenp, name.partition(".")[0]) else tenp.ops
    signature = inspect.signature(operator.attrgetter(name)(place))
    expected = [written(parameter) for parameter in signature.parameters.values()]
    if arguments[-1:] == ["…"]:  # and more
        expected = [*expected[: len(arguments) - 1], "…"]
    assert arguments == expected


@pytest.mark.parametrize("kind", [tenp.Budget, tenp.Run, tenp.Pruned])
def test_the_page_names_every_field(kind: type) -> None:
    paragraphs = (text for text in prose(API).split("\n\n") if f"`{kind.__name__}`" in text)
    text = next(text for text in paragraphs if not text.startswith("|"))
    shown = {span.partition("=")[0]: span for span in re.findall(r"`([^`]*)`", text)}
    for parameter in inspect.signature(kind).parameters.values():
        assert parameter.name in shown
        if "=" in shown[parameter.name]:
            assert shown[parameter.name] == written(parameter)


# ---- commands ----


def commands(page: Path, *languages: str) -> Iterator[list[str]]:
    """Yield the words of every line of a page's blocks; without languages, of those for a shell."""
    for _, script in blocks(page, *(languages or ("sh", "bash"))):
        for line in script.replace("\\\n", " ").split("\n"):
            if languages and not line.startswith("tenp "):
                continue  # what a command prints
            if words := shlex.split(line, comments=True):
                yield words


def expanded(word: str) -> list[str]:
    """What a shell makes of a word: {a,b} and *."""
    if braces := re.search(r"\{([^}]*)\}", word):
        begin, end = word[: braces.start()], word[braces.end() :]
        return [path for part in braces[1].split(",") for path in expanded(begin + part + end)]
    return sorted(glob.glob(word)) or [word]  # noqa: PTH207 - relative, as a shell has it


def remove(path: Path) -> None:
    """Let another page write what a page before it wrote."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def test_shell_runs(checkout: None, tiny: Tiny, command: Command) -> None:
    """Every `tenp` command of the documentation, page by page, with a tiny model for speed."""
    pytest.importorskip("matplotlib")  # for `tenp report`
    examples = Path("examples")
    (examples / "tiny-moe").unlink()
    (examples / "tiny-moe").symlink_to(tiny.directory)
    Path("MODEL").symlink_to(tiny.directory)
    shutil.copy(examples / "calibration/prose.jsonl", "text.jsonl")
    others = [name_of(page) for page in PAGES if name_of(page) not in IN_ORDER]
    ran = 0
    for page in IN_ORDER + others:
        for words in commands(ROOT / page):
            if words[0] != "tenp":
                assert words[0] in ELSEWHERE, f"{page}: {words}"
                continue
            if "--out" in words:
                remove(Path(words[words.index("--out") + 1]))
            result = command(*(path for word in words[1:] for path in expanded(word)))
            assert result.code == 0, f"{page}: {words}: {result.err}"
            ran += 1
    assert ran >= 17


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
    for words in [*commands(page), *commands(page, "")]:
        if words[0] == "tenp" and words[1] in COMMANDS:
            given = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
            assert given <= options_of(words[1]), words


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
