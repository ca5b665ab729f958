# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs: what the pages need on the site and not in the repository.

Links are those of the repository. What they lead to outside of docs/ is put on the site under
`repository/`, and the links are bent to it. Mathematics becomes MathML, which browsers draw without
any script.
"""

import html
import posixpath
import re
from logging import getLogger
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
MATHS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

log = getLogger("mkdocs.hooks.site")  # a warning fails a strict build


def on_files(files: Files, config: Any) -> Files:
    """Add README.md, and everything outside of docs/ that a page leads to."""
    pages = [DOCS / file.src_uri for file in files.documentation_pages()] + [ROOT / "README.md"]
    for page in pages:  # grows
        if _uri(page) not in files.src_uris:
            source = str(page)
            files.append(File.generated(config, _uri(page), abs_src_path=source))
        if page.suffix == ".md":
            pages += [target for target in _targets(page) if target not in pages]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Bend links that leave docs/, or come from outside."""
    source = _path(page.file.src_uri)
    begin = posixpath.dirname(page.file.src_uri)

    def bent(link: re.Match[str]) -> str:
        target = (source.parent / link[1]).resolve()
        if "://" in link[1] or not target.is_file():
            return link[0]
        return posixpath.relpath(_uri(target), begin) + (link[2] or "")

    return LINK.sub(bent, markdown)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Write mathematics as MathML."""

    def written(formula: re.Match[str]) -> str:
        mathml = convert(
            html.unescape(formula[2]), display="block" if formula[1] == "div" else "inline"
        )
        if "\\" in html.unescape(mathml):
            log.warning(f"{page.file.src_uri}: this formula cannot be written: {formula[2]}")
        return mathml

    return MATHS.sub(written, content)


def _targets(page: Path) -> list[Path]:
    """The files of the repository that a page leads to."""
    links = [(page.parent / link[1]).resolve() for link in LINK.finditer(page.read_text())]
    return [target for target in links if target.is_file() and target.is_relative_to(ROOT)]


def _uri(path: Path) -> str:
    """Where a file of the repository is on the site."""
    inside = path.is_relative_to(DOCS)
    return str(path.relative_to(DOCS)) if inside else f"repository/{path.relative_to(ROOT)}"


def _path(uri: str) -> Path:
    """The file of the repository that is there on the site."""
    outside = uri.removeprefix("repository/")
    return DOCS / uri if outside == uri else ROOT / outside
