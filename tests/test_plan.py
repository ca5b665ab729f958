# SPDX-License-Identifier: Apache-2.0
"""A plan's file gives back the plan, byte for byte the same, and nothing that does not agree with itself."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.fixtures import Tiny
from tenp.errors import PlanError
from tenp.plan import Plan
from tenp.source import Source

_SOURCE = Source("f" * 64, "Test", parameters=1000, bytes=2000, neuron_parameters=3, neuron_bytes=6)


def _plan(*rows: str) -> Plan:
    """A plan of one layer; `x` is a kept neuron."""
    keep = torch.tensor([[mark == "x" for mark in row] for row in rows])
    return Plan(_SOURCE, "s" * 64, {"keep": 0.5}, {1: keep}, 0.75)


def test_figures_of_a_plan() -> None:
    plan = _plan("xx..", "....", "xxxx")
    assert plan.widths() == {1: [2, 0, 4]}
    assert (plan.kept_neurons(), plan.neurons()) == (6, 12)
    assert plan.static_share() == 0.5
    assert plan.uniform_width() is None
    assert plan.total_parameters() == 1000 - 6 * 3
    assert plan.total_bytes() == 2000 - 6 * 6


def test_one_width_in_all_layers_is_uniform() -> None:
    assert _plan("x..", ".x.").uniform_width() == 1


@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_a_file_gives_back_any_mask(experts: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(experts, width, generator=generator) < 0.5
    plan = dataclasses.replace(_plan("x"), keep={4: keep})
    document = json.loads(plan._to_bytes())
    assert document["layers"][0]["widths"] == keep.sum(dim=1).tolist()
    assert all(len(mask) == 2 * ((width + 7) // 8) for mask in document["layers"][0]["keep"])


def test_a_file_gives_back_the_plan(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    tiny.plan.save(path)
    loaded = Plan.load(path)
    assert loaded.keep.keys() == tiny.plan.keep.keys()
    assert all(torch.equal(loaded.keep[layer], keep) for layer, keep in tiny.plan.keep.items())
    assert dataclasses.replace(loaded, keep={}) == dataclasses.replace(tiny.plan, keep={})
    assert loaded.digest() == tiny.plan.digest()


def test_bit_k_of_a_mask_is_neuron_k() -> None:
    document = json.loads(_plan("x......." + ".x")._to_bytes())
    assert document["layers"][0]["keep"] == ["8040"]


def test_a_plan_is_for_one_checkpoint() -> None:
    other = dataclasses.replace(_SOURCE, fingerprint="0" * 64, architecture="Other")
    _plan("x").validate(_SOURCE)
    with pytest.raises(PlanError, match=r"at hand \(Other, 0{12}\), got a plan for Test, f{12}"):
        _plan("x").validate(other)


def _change(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.__setitem__(key, value)


def _change_layer(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["layers"][0].__setitem__(key, value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(_change("format", "other"), "written by tenp, got other JSON", id="foreign"),
        pytest.param(_change("format_version", 9), "must have plan format 1, got 9", id="version"),
        pytest.param(lambda d: d.pop("format_version"), "format 1, got None", id="no version"),
        pytest.param(lambda d: d.pop("source"), "damaged one", id="no source"),
        pytest.param(_change("source", {}), "damaged one", id="empty source"),
        pytest.param(_change("layers", None), "damaged one", id="null for layers"),
        pytest.param(_change("layers", []), "damaged one: no layers", id="no layers"),
        pytest.param(_change("experts", []), "damaged one", id="experts without layers"),
        pytest.param(_change("repair", {"ridges": [1]}), "damaged one", id="ridges without layers"),
        pytest.param(_change_layer("keep", []), "damaged one", id="no experts"),
        pytest.param(_change_layer("keep", ["80"]), "widths and keep masks disagree", id="bits"),
        pytest.param(_change_layer("keep", ["xy", "c0"]), "damaged one", id="hex"),
        pytest.param(_change_layer("keep", ["", ""]), "must have 3 bits", id="short"),
        pytest.param(_change_layer("keep", ["81", "c0"]), "must have 3 bits", id="too many bits"),
        pytest.param(_change_layer("widths", [1, 1]), "widths and keep masks disagree", id="widths"),
        pytest.param(_change_layer("width", "3"), "damaged one", id="type"),
    ],
)  # fmt: skip
def test_a_damaged_plan_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    path = tmp_path / "plan.json"
    document = json.loads(_plan("x..", "xx.")._to_bytes())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"tenp.plan"'])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.json must be a plan"):
        Plan.load(tmp_path / "plan.json")


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.json must be a plan, but cannot be read"):
        Plan.load(tmp_path / "none.json")
