# SPDX-License-Identifier: Apache-2.0
"""The rows of quality.py as tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

#: Calibration samples per domain in the tables that do not compare sizes.
SAMPLES = 64

#: Methods that differ by little from what they are compared with.
PAIRED = ("TENP, rectangle", "best, worst domain", "DERN, threshold 0.6", "DERN, threshold 0.4")


def tables(results: dict[str, Any]) -> str:
    """Return what was found, as Markdown: means over seeds, ± half the range over them."""
    every = [row for row in results["rows"] if "share" in row]
    found = [row for row in every if "left_out" not in row]
    dense = next(row for row in results["rows"] if row["method"] == "dense")
    usual = _of(found, samples=SAMPLES)
    parts = [_quality(usual, dense), _paired(usual), _domains(usual)]
    if left_out := [row for row in every if "left_out" in row]:
        parts.append(_left_out(left_out))
    if len({row["samples"] for row in found}) > 1:
        parts.append(_sizes(found))
    return "\n".join(parts)


def _quality(found: list[dict[str, Any]], dense: dict[str, Any]) -> str:
    """KL and perplexity of every method at every share, best first at the share of most methods."""
    shares = sorted({row["share"] for row in found}, reverse=True)
    usual = max(shares, key=lambda share: len({row["method"] for row in _of(found, share=share)}))
    names = sorted(
        {row["method"] for row in found},
        key=lambda name: _mean([kl(row) for row in _of(found, method=name, share=usual)]),
    )
    lines = [["dense", *(f"0, {perplexity(dense):.2f}" for _ in shares)]]
    for name in names:
        cells = [_of(found, method=name, share=share) for share in shares]
        lines.append([name, *map(_kl_and_perplexity, cells)])
    return _markdown(["method", *(f"{share:g}: KL, perplexity" for share in shares)], lines)


def _paired(found: list[dict[str, Any]]) -> str:
    """What differs by little, compared sample by sample, seed by seed."""
    lines = []
    for row in sorted(found, key=lambda row: (row["method"], -row["share"], row["seed"])):
        if row["method"] not in PAIRED:
            continue
        against = row["against"]
        excess, error = against["kl"], against["standard_error"]
        lines.append(
            [
                row["method"],
                against["method"],
                f"{row['share']:g}",
                str(row["seed"]),
                f"{kl(row):.5f}",
                f"{excess:+.1e} ± {error:.1e}",
            ]
        )
    header = ["method", "against", "share", "seed", "KL", "difference ± its standard error"]
    return _markdown(header, lines)


def _domains(found: list[dict[str, Any]]) -> str:
    """KL per domain of the methods that choose between domains."""
    names = list(found[0]["domains"])
    lines = []
    for share in sorted({row["share"] for row in found}, reverse=True):
        for method in ("TENP", "best", "best, worst domain"):
            mine = _of(found, method=method, share=share)
            cells = [_spread([row["domains"][name]["kl"] for row in mine]) for name in names]
            lines.append([f"{share:g}", method, *cells])
    return _markdown(["share", "method", *(f"KL of {name}" for name in names)], lines)


def _left_out(found: list[dict[str, Any]]) -> str:
    """KL of the domain that was left out of calibration."""
    methods = list(dict.fromkeys(row["method"] for row in found))
    lines = []
    for share in sorted({row["share"] for row in found}, reverse=True):
        for domain in sorted({row["left_out"] for row in found}):
            cells = [
                [
                    row["domains"][domain]["kl"]
                    for row in _of(found, method=method, share=share, left_out=domain)
                ]
                for method in methods
            ]
            lines.append([f"{share:g}", domain, *map(_spread, cells)])
    return _markdown(["share", "domain left out", *(f"its KL: {m}" for m in methods)], lines)


def _sizes(found: list[dict[str, Any]]) -> str:
    """KL by the number of calibration samples per domain."""
    sizes = sorted({row["samples"] for row in found})
    lines = []
    for share in sorted({row["share"] for row in _of(found, samples=sizes[0])}, reverse=True):
        for method in dict.fromkeys(row["method"] for row in _of(found, samples=sizes[0])):
            cells = [_of(found, method=method, share=share, samples=size) for size in sizes]
            lines.append([f"{share:g}", method, *(_spread(map(kl, cell)) for cell in cells)])
    return _markdown(["share", "method", *(f"KL with {size}" for size in sizes)], lines)


def _of(found: list[dict[str, Any]], **key: object) -> list[dict[str, Any]]:
    return [row for row in found if all(row.get(name) == value for name, value in key.items())]


def kl(row: dict[str, Any]) -> float:
    return _mean([domain["kl"] for domain in row["domains"].values()])


def perplexity(row: dict[str, Any]) -> float:
    return math.exp(_mean([math.log(d["perplexity"]) for d in row["domains"].values()]))


def _kl_and_perplexity(found: list[dict[str, Any]]) -> str:
    return f"{_spread(map(kl, found))}, {_mean(map(perplexity, found)):.2f}" if found else ""


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / max(len(found), 1)


def _spread(values: Iterable[float]) -> str:
    found = list(values)
    digits = 4 if _mean(found) >= 0.01 else 5
    if len(found) < 2:
        return "".join(f"{value:.{digits}f}" for value in found)
    return f"{_mean(found):.{digits}f} ± {(max(found) - min(found)) / 2:.{digits}f}"


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
