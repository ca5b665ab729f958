# SPDX-License-Identifier: Apache-2.0
"""Calibration and evaluation text: files, one domain each.

JSON lines with `text`, `prompt` (and `response`) or chat `messages`; anything else is plain text.
Both may be gzipped. `hf:NAME[:CONFIG][:SPLIT]` names a Hugging Face dataset with such columns.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenp.errors import DataError, Unsupported

Record = dict[str, Any]

#: A record has one of these; the first that is there counts.
FIELDS = ("messages", "prompt", "text")


@dataclass(frozen=True)
class TextDomain:
    """One kind of text.

    Attributes:
        name: From the file name, or as given in `NAME=FILE`.
        records: Each has `text`, `prompt` (and maybe `response`) or `messages`.
        is_document: The one record is a long document, to be cut into samples of full length.
    """

    name: str
    records: tuple[Record, ...]
    is_document: bool = False


def read_domains(sources: Sequence[str | Path]) -> list[TextDomain]:
    """Read one domain per source.

    Args:
        sources: Paths, `NAME=PATH`, or `hf:NAME[:CONFIG][:SPLIT]`.

    Raises:
        DataError: A file is missing, empty, not UTF-8, or holds other records; two share a name.
    """
    if not sources:
        raise DataError("there must be at least one file of text, got none")
    domains = [_read(str(source)) for source in sources]
    names = [domain.name for domain in domains]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"every domain must have a name of its own, got {repeated[0]} twice; write NAME=FILE"
        )
    return domains


def _read(source: str) -> TextDomain:
    name, separator, path = source.partition("=")
    if not separator or Path(source).exists():
        name, path = "", source
    if path.startswith("hf:"):
        return _read_dataset(path.removeprefix("hf:"), name)
    stem = Path(path).name.removesuffix(".gz")
    name = name or stem.rpartition(".")[0] or stem
    content = _read_file(Path(path))
    if not content.strip():
        raise DataError(f"{path} must hold text, but is empty")
    if not stem.endswith((".jsonl", ".json")):
        return TextDomain(name, ({"text": content},), is_document=True)
    # Not splitlines(): JSON strings may hold other line separators of Unicode.
    lines = [
        (number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()
    ]
    return TextDomain(name, tuple(_parse(line, f"{path}, line {number}") for number, line in lines))


def _read_file(path: Path) -> str:
    try:
        raw = path.read_bytes()
        # utf-8-sig also takes UTF-8 without a byte order mark.
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} must be a text file, but there is none") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8, but byte {error.start} is not") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _parse(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} must be JSON: {error}") from error
    return _checked(record, where)


def _checked(record: Any, where: str) -> Record:
    if not isinstance(record, dict):
        raise DataError(
            f"{where} must have one of {', '.join(FIELDS)}, got {type(record).__name__}"
        )
    # Tables write a column that a row does not have as null.
    record = {key: value for key, value in record.items() if value is not None}
    field = next((field for field in FIELDS if field in record), None)
    if field is None:
        raise DataError(f"{where} must have one of {', '.join(FIELDS)}, got {list(record)}")
    for key in ("prompt", "response") if field == "prompt" else (field,):
        value = record.get(key, "")
        if key == "messages":
            if not isinstance(value, list) or not value or not all(map(_is_turn, value)):
                raise DataError(f"{where}: messages must be a list of turns with role and content")
        elif not isinstance(value, str):
            raise DataError(f"{where}: {key} must be a string, got {type(value).__name__}")
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:  # JSON can spell it, tokenizers cannot read it
            raise DataError(
                f"{where}: {key} must be Unicode text, got half of a surrogate pair"
            ) from None
    return record


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and "role" in turn and "content" in turn


def _read_dataset(identifier: str, name: str) -> TextDomain:
    try:
        from datasets import load_dataset
    except ImportError:
        raise Unsupported(
            f"hf:{identifier} needs the datasets package; install tenp[data]"
        ) from None
    dataset, *rest = identifier.split(":")
    config, split = ((rest[0] if len(rest) > 1 else None), (rest[-1] if rest else "train"))
    try:
        rows: Iterable[Record] = load_dataset(dataset, config, split=split)
    except Exception as error:
        raise DataError(f"hf:{identifier} cannot be loaded: {error}") from error
    records = tuple(
        _checked(row, f"hf:{identifier}, row {number}") for number, row in enumerate(rows)
    )
    return TextDomain(name or dataset.rpartition("/")[2], records)
