# SPDX-License-Identifier: Apache-2.0
"""Text files become domains, or one sentence says what is wrong with them and where."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from tenp.errors import DataError, Unsupported
from tenp.text import read_domains


def _write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_json_lines_are_records(tmp_path: Path) -> None:
    records = [
        {"text": "a"},
        {"prompt": "b", "response": "c"},
        {"prompt": "d"},
        {"messages": [{"role": "user", "content": "e"}]},
    ]
    [domain] = read_domains([_write(tmp_path / "mixed.jsonl", *records)])
    assert domain.name == "mixed"
    assert domain.records == tuple(records)
    assert not domain.is_document


def test_other_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("once\nupon\n")
    [domain] = read_domains([tmp_path / "book.txt"])
    assert (domain.name, domain.is_document) == ("book", True)
    assert domain.records == ({"text": "once\nupon\n"},)


def _gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)  # the same in every process that collects the tests


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
def test_gzipped_files_read_like_plain_ones(tmp_path: Path, name: str) -> None:
    plain = _write(tmp_path / name.removesuffix(".gz"), {"text": "täxt"})
    (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    assert read_domains([tmp_path / name]) == read_domains([plain])


def test_a_domain_can_be_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", {"text": "a"})
    assert [domain.name for domain in read_domains([f"x={path}", f"y={path}"])] == ["x", "y"]


def test_a_file_whose_name_has_an_equals_sign_is_a_file(tmp_path: Path) -> None:
    path = _write(tmp_path / "k=1.jsonl", {"text": "a"})
    assert read_domains([path])[0].name == "k=1"


def test_empty_lines_and_unicode_line_separators_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\u2028b"}\n\n  \n{"text": "c"}', encoding="utf-8")
    assert [record["text"] for record in read_domains([path])[0].records] == ["a\u2028b", "c"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert read_domains([tmp_path / "a.jsonl"])[0].records == ({"text": "a"},)


def test_null_columns_of_tables_are_left_out(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", {"messages": None, "prompt": "a", "response": None})
    assert read_domains([path])[0].records == ({"prompt": "a"},)


def test_two_domains_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    paths = [_write(tmp_path / place / "a.jsonl", {"text": "a"}) for place in (".", "sub")]
    with pytest.raises(DataError, match="a name of its own, got a twice; write NAME=FILE"):
        read_domains(paths)


def test_no_domain_is_refused() -> None:
    with pytest.raises(DataError, match="at least one"):
        read_domains([])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl must hold text, but is empty"),
        ("a.txt", b" \n\n ", r"a\.txt must hold text, but is empty"),
        ("a.txt", b"good\xff", r"a\.txt must be UTF-8, but byte 4 is not"),
        ("a.jsonl", b'{"text": "\xe4"}', r"a\.jsonl must be UTF-8, but byte 10 is not"),
        ("a.jsonl", b'{"text": "a"}\nno json', r"a\.jsonl, line 2 must be JSON"),
        ("a.jsonl", b'{"title": "a"}', r"line 1 must have one of messages, prompt, text, got \['title'\]"),
        ("a.jsonl", b"[1]", "line 1 must have one of messages, prompt, text, got list"),
        ("a.jsonl", b'{"text": 3}', "line 1: text must be a string"),
        ("a.jsonl", b'{"text": null}', r"line 1 must have one of messages, prompt, text, got \[\]"),
        ("a.jsonl", b'{"prompt": "a", "response": 1}', "line 1: response must be a string, got int"),
        ("a.jsonl", b'{"messages": "a"}', "line 1: messages must be a list"),
        ("a.jsonl", b'{"messages": []}', "line 1: messages must be a list of turns"),
        ("a.jsonl", b'{"messages": ["a"]}', "line 1: messages must be a list of turns"),
        ("a.jsonl", b'{"messages": [{"content": "a"}]}', "line 1: messages must be a list of turns"),
        ("a.jsonl", rb'{"text": "\ud800"}', "line 1: text must be Unicode"),
        ("a.jsonl", rb'{"messages": [{"role": "user", "content": "\ud800"}]}', "line 1: messages must be Unicode"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz cannot be read: Not a gzipped file"),
        ("a.txt.gz", _gzipped(b"x" * 1000)[:-9], r"a\.txt\.gz cannot be read"),
        ("a.txt.gz", _gzipped(b"xy" * 1000)[:12] + b"\xff" * 40, r"a\.txt\.gz cannot be read"),
        ("a.txt.gz", _gzipped(b"x")[:10] + b"\xff" * 40, r"a\.txt\.gz cannot be read"),
        ("a.txt.gz", _gzipped(b"x" * 1000)[:-4] + b"1234", r"a\.txt\.gz cannot be read"),
        ("a.txt.gz", _gzipped(b"\xff"), r"a\.txt\.gz must be UTF-8, but byte 0 is not"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_domains([tmp_path / name])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt must be a text file, but there is none"):
        read_domains([tmp_path / "none.txt"])


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_domains([tmp_path])


def test_a_dataset_without_the_package_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        Unsupported, match=r"hf:imdb needs the datasets package; install tenp\[data\]"
    ):
        read_domains(["hf:imdb"])


@pytest.mark.parametrize(
    ("identifier", "arguments"),
    [
        ("hf:org/name", ("org/name", None, "train")),
        ("hf:org/name:test", ("org/name", None, "test")),
        ("hf:org/name:en:test", ("org/name", "en", "test")),
    ],
)
def test_a_dataset_name_may_have_config_and_split(monkeypatch, identifier, arguments) -> None:
    class Datasets:
        @staticmethod
        def load_dataset(name, config, split):
            assert (name, config, split) == arguments
            return [{"text": "a", "more": 1}, {"text": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    [domain] = read_domains([identifier])
    assert domain.name == "name"
    assert [record["text"] for record in domain.records] == ["a", "b"]
    assert read_domains([f"x={identifier}"])[0].name == "x"
