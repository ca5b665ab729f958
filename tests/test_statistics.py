# SPDX-License-Identifier: Apache-2.0
"""Statistics merge like the sums they are, and their file is the same for the same sums."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from support.fixtures import Tiny, of_other_text
from tenp import adapter, calibration
from tenp.errors import DataError, InvalidArgument
from tenp.samples import Samples
from tenp.statistics import STATISTICS, Statistics, merge


def _assert_equal(ours: Statistics, theirs: Statistics) -> None:
    assert ours.source == theirs.source
    assert ours.layers.keys() == theirs.layers.keys()
    for layer, tensors in theirs.layers.items():
        assert tensors.keys() == STATISTICS.keys()
        for name, tensor in tensors.items():
            assert torch.equal(ours.layers[layer][name], tensor), (layer, name)


def _sample_by_sample(tiny: Tiny) -> tuple[Statistics, Statistics, Statistics]:
    """Statistics of two halves and of the whole, every pass over the same batches."""
    model = adapter.load_model(tiny.directory)
    ordered = sorted(tiny.samples[0].ids, key=len, reverse=True)
    halves = [Samples("prose", tuple(ordered[:2])), Samples("prose", tuple(ordered[2:3]))]
    whole = Samples("prose", tuple(ordered[:3]))
    first, second, all_ = (
        calibration.collect(model, [part], tiny.source, batch_tokens=1) for part in (*halves, whole)
    )
    return first, second, all_


def test_two_halves_merge_to_the_whole_bit_for_bit(tiny: Tiny) -> None:
    first, second, whole = _sample_by_sample(tiny)
    # The order of floating-point sums matters: (a + b) + c is the whole, so the parts are one batch each.
    model = adapter.load_model(tiny.directory)
    ordered = sorted(tiny.samples[0].ids, key=len, reverse=True)[:3]
    parts = [
        calibration.collect(model, [Samples("prose", (ids,))], tiny.source, batch_tokens=1)
        for ids in ordered
    ]
    merged = merge(parts)
    _assert_equal(merged, whole)
    _assert_equal(merge([first, second]), whole)
    assert merged.domains[0].tokens == whole.domains[0].tokens
    assert merged.domains[0].samples == whole.domains[0].samples
    assert len(merged.domains[0].sources) == 3


def test_domains_of_other_names_stand_side_by_side(tiny: Tiny) -> None:
    model = adapter.load_model(tiny.directory)
    apart = [calibration.collect(model, [s], tiny.source, batch_tokens=100) for s in tiny.samples]
    merged = merge(apart)
    assert [domain.name for domain in merged.domains] == ["prose", "code"]
    _assert_equal(merged, tiny.statistics)


def test_merging_one_part_changes_nothing(tiny: Tiny) -> None:
    merged = merge([tiny.statistics])
    assert merged.digest() == tiny.statistics.digest()


def test_sums_double_and_maxima_stay_when_tokens_double(tiny: Tiny) -> None:
    twice = merge([tiny.statistics, of_other_text(tiny.statistics)])
    for layer, tensors in tiny.statistics.layers.items():
        for name, statistic in STATISTICS.items():
            factor = 2 if statistic.merge == "sum" else 1
            assert torch.equal(twice.layers[layer][name], factor * tensors[name]), name


def test_statistics_of_other_checkpoints_do_not_merge(tiny: Tiny) -> None:
    source = dataclasses.replace(tiny.source, fingerprint="0" * 64)
    other = dataclasses.replace(tiny.statistics, source=source)
    with pytest.raises(InvalidArgument, match="must be of one checkpoint, got fingerprints"):
        merge([tiny.statistics, other])


def test_the_same_text_is_not_counted_twice(tiny: Tiny) -> None:
    with pytest.raises(InvalidArgument, match="counted once, got the same samples of domain"):
        merge([tiny.statistics, tiny.statistics])


def test_nothing_to_merge_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least one"):
        merge([])


def test_merging_records_the_settings_of_both_when_they_differ(tiny: Tiny) -> None:
    other = dataclasses.replace(of_other_text(tiny.statistics), settings={"seed": 1})
    assert merge([tiny.statistics, other]).settings == {
        "merged": [tiny.statistics.settings, {"seed": 1}]
    }


def test_a_file_gives_back_what_was_saved(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    tiny.statistics.save(path)
    loaded = Statistics.load(path)
    _assert_equal(loaded, tiny.statistics)
    assert loaded.domains == tiny.statistics.domains
    assert loaded.settings == tiny.statistics.settings


def test_equal_statistics_give_byte_identical_files(tiny: Tiny, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    tiny.statistics.save(first)
    Statistics.load(first).save(second)
    assert first.read_bytes() == second.read_bytes()


def test_the_file_is_plain_safetensors_with_documented_names(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    tiny.statistics.save(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["tenp"])
        names = set(file.keys())
        assert file.get_tensor("layers.0.projection").shape == (2, 6, 24)
        assert file.get_tensor("layers.0.counts").dtype == torch.int64
    assert (header["format"], header["format_version"]) == ("tenp.statistics", 1)
    assert header["source"]["fingerprint"] == tiny.checkpoint.fingerprint
    assert names == {f"layers.{layer}.{name}" for layer in range(3) for name in STATISTICS}


def test_saving_leaves_only_the_file(tiny: Tiny, tmp_path: Path) -> None:
    tiny.statistics.save(tmp_path / "new" / "statistics.safetensors")
    assert [path.name for path in tmp_path.rglob("*.*")] == ["statistics.safetensors"]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda raw: raw[: len(raw) // 2], id="truncated"),
        pytest.param(lambda raw: b"", id="empty"),
        pytest.param(lambda raw: b"hello, this is text\n" * 10, id="text"),
        pytest.param(lambda raw: raw.replace(b'format_version\\": 1', b'format_versiom\\": 1'), id="no version"),
        pytest.param(lambda raw: raw.replace(b'fingerprint\\"', b'fingerprimt\\"'), id="source"),
        pytest.param(lambda raw: raw.replace(b"layers.1.counts", b"layers.1_counts"), id="name"),
        pytest.param(lambda raw: raw.replace(b"layers.1.counts", b"layers.1.cuonts"), id="missing"),
        pytest.param(lambda raw: raw.replace(b'domains\\": [{', b'domains\\": [ '), id="header"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(tiny: Tiny, tmp_path: Path, damage) -> None:
    path = tmp_path / "statistics.safetensors"
    tiny.statistics.save(path)
    raw = path.read_bytes()
    assert damage(raw) != raw
    path.write_bytes(damage(raw))
    with pytest.raises(DataError, match="statistics.safetensors must "):
        Statistics.load(path)


def test_a_tensor_of_another_shape_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    with safe_open(_saved(tiny, path), "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["layers.2.projection"] = tensors["layers.2.projection"][:, :5].contiguous()
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(DataError, match=r"projection .*\(2, 6, 24\).*got .*\(2, 5, 24\)"):
        Statistics.load(path)


def _saved(tiny: Tiny, path: Path) -> Path:
    tiny.statistics.save(path)
    return path


def test_statistics_of_no_layer_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    dataclasses.replace(tiny.statistics, layers={}).save(path)
    with pytest.raises(DataError, match="damaged one: no layers"):
        Statistics.load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none.safetensors must be a statistics file"):
        Statistics.load(tmp_path / "none.safetensors")


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(DataError, match="got another safetensors file"):
        Statistics.load(tmp_path / "weights.safetensors")


def test_another_format_version_is_named(tiny: Tiny, tmp_path: Path) -> None:
    path = _saved(tiny, tmp_path / "statistics.safetensors")
    path.write_bytes(path.read_bytes().replace(b'format_version\\": 1', b'format_version\\": 7'))
    with pytest.raises(DataError, match="must have statistics format 1, got 7"):
        Statistics.load(path)
