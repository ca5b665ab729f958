# SPDX-License-Identifier: Apache-2.0
"""The sums that one calibration pass leaves behind, and their file.

Every statistic is a sum (or a maximum) over the tokens that reached an expert, kept apart per
calibration domain, so statistics of shards, domains and machines merge without loss. What is made
of them is decided in `tenp.scoring`; `docs/formats.md` describes the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isqrt
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tenp.errors import DataError, InvalidArgument
from tenp.files import write_atomically
from tenp.source import Source

FORMAT_VERSION = 1

LayerStatistics = dict[str, Tensor]


@dataclass(frozen=True)
class Statistic:
    """What one named statistic is, so that every reader treats it alike."""

    #: What there is one number for: shape [D, E], [D, E, I], [D, E, H] or [D]; of a "pair" of
    #: neurons [D, E, P] packed as in tenp.moments, of a "square" of them [D, E, n, n]. With two folds
    #: per domain 2 D stands for D. Facts of the weights have no domain axis.
    per: Literal[
        "expert", "neuron", "input", "layer", "pair", "fold pair", "fold square", "fold expert"
    ]
    merge: Literal["sum", "max", "weights"]  # "weights": a fact of the checkpoint, equal in all
    formula: str
    dtype: torch.dtype = torch.float64

    @property
    def has_folds(self) -> bool:
        """Whether the halves of the samples are kept apart (`tenp.moments`)."""
        return self.per.startswith("fold")


#: What every layer has. x is the input of the experts, y = W_d m the output of one expert
#: before its gate g, w_k column k of W_d; sums run over the attended tokens routed to the expert.
STATISTICS: Mapping[str, Statistic] = {
    "counts": Statistic("expert", "sum", "n_e", torch.int64),
    "gate_sum": Statistic("expert", "sum", "sum g"),
    "normalized_gate_sum": Statistic("expert", "sum", "sum g / (sum of the token's gates)"),
    "norm_sum": Statistic("expert", "sum", "sum |y|"),
    "gated_norm_sum": Statistic("expert", "sum", "sum g |y|"),
    "norm_max": Statistic("expert", "max", "max |y|"),
    "direction_change": Statistic("expert", "sum", "sum g |y| (1 - cos(x, y))"),
    "projection": Statistic("neuron", "sum", "sum m_k <w_k, y> / |y|"),
    "magnitude": Statistic("neuron", "sum", "sum |m_k|"),
    "energy": Statistic("neuron", "sum", "sum (g m_k)^2"),
    "peak": Statistic("neuron", "max", "max |g m_k|"),
    "input_energy": Statistic("input", "sum", "sum (g x_h)^2"),
    "down_norm": Statistic("neuron", "weights", "|w_k|"),
}

#: Statistics that a file has only if they were asked for, or if the pass could see what they need.
#: h is the residual stream before the layer's experts, z what all routed experts add to it, L the
#: summed loss of the next tokens.
OPTIONAL_STATISTICS: Mapping[str, Statistic] = {
    "residual_change": Statistic("expert", "sum", "sum g |y| max(0, 1 - cos(h, h + z))"),
    "second_moment": Statistic("fold pair", "sum", "sum g^2 m m^T"),
    "down_gram": Statistic("pair", "weights", "W_d^T W_d"),
    "cross_moment": Statistic("fold square", "sum", "sum g^2 m' m^T, m' of the dense model"),
    "target_energy": Statistic("fold expert", "sum", "sum g^2 |W_d m'|^2"),
    "activation_energy": Statistic("neuron", "sum", "sum m_k^2"),
    "gradient_energy": Statistic("neuron", "sum", "sum <w_k, dL/dy>^2"),
    "output_sensitivity": Statistic("layer", "sum", "sum |dL/dz|^2, over all attended tokens"),
}

ALL_STATISTICS: Mapping[str, Statistic] = {**STATISTICS, **OPTIONAL_STATISTICS}


@dataclass(frozen=True)
class Domain:
    """One named kind of calibration text."""

    name: str
    samples: int
    tokens: int  # attended tokens
    sources: tuple[str, ...]  # SHA-256 of the token ids of each run that was merged in


@dataclass
class Statistics:
    """Statistics of every MoE layer of one model.

    Attributes:
        source: The calibrated checkpoint.
        domains: The calibration domains, in the order of the leading axis `D` of every tensor.
        layers: Decoder layer index to `{name: tensor}` with the names of `STATISTICS`; shapes
            `[D, E]` per expert, `[D, E, I]` per neuron, `[E, I]` for facts of the weights.
        settings: How the pass was run (dtype, sequence length, seed, ...), for the record.
    """

    source: Source
    domains: tuple[Domain, ...]
    layers: dict[int, LayerStatistics]
    settings: dict[str, Any]

    @classmethod
    def zeros(
        cls,
        source: Source,
        domains: Iterable[Domain],
        shapes: Mapping[int, tuple[int, int]],
        settings: dict[str, Any],
        hidden: int = 0,
    ) -> Statistics:
        """Return statistics of no token at all.

        Args:
            source: The calibrated checkpoint.
            domains: The domains, which set `D`.
            shapes: Decoder layer index to (experts `E`, full width `I`).
            settings: Kept as they are.
            hidden: H, the hidden size.
        """
        domains = tuple(domains)

        def empty(statistic: Statistic, experts: int, width: int) -> Tensor:
            last = {"expert": (), "neuron": (width,), "input": (hidden,)}[statistic.per]
            shape: tuple[int, ...] = (experts, *last)
            if statistic.merge != "weights":
                shape = (len(domains), *shape)
            return torch.zeros(shape, dtype=statistic.dtype)

        layers = {
            layer: {name: empty(statistic, *shape) for name, statistic in STATISTICS.items()}
            for layer, shape in shapes.items()
        }
        return cls(source, domains, layers, settings)

    def tokens(self) -> int:
        """Return the number of attended calibration tokens of all domains."""
        return sum(domain.tokens for domain in self.domains)

    def _metadata(self) -> str:
        header = {
            "format": "tenp.statistics",
            "format_version": FORMAT_VERSION,
            "source": dataclasses.asdict(self.source),
            "domains": [dataclasses.asdict(domain) for domain in self.domains],
            "settings": self.settings,
        }
        return json.dumps(header, sort_keys=True)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"layers.{layer}.{name}": tensor.cpu().contiguous()
            for layer, tensors in sorted(self.layers.items())
            for name, tensor in sorted(tensors.items())
        }

    def _to_bytes(self) -> bytes:
        # One metadata key only: safetensors writes several in an order that changes from run to run.
        return save(self._tensors(), metadata={"tenp": self._metadata()})

    def digest(self) -> str:
        """Return the SHA-256 of the file that `save` writes."""
        return hashlib.sha256(self._to_bytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the statistics; equal statistics give equal bytes, and a crash leaves no file."""
        write_atomically(Path(path), self._to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read statistics written by `save`.

        Raises:
            DataError: The file is missing, damaged, or of another format version.
        """
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("tenp", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise DataError(
                f"{path} must be a statistics file, but cannot be read: {error}"
            ) from error
        if not isinstance(header, dict) or header.get("format") != "tenp.statistics":
            raise DataError(
                f"{path} must be a statistics file written by tenp, got another safetensors file"
            )
        if header.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{path} must have statistics format {FORMAT_VERSION}, got {header.get('format_version')}; "
                "calibrate again with this version of tenp"
            )
        try:
            return cls._from_file(header, tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path} must be a whole statistics file, got a damaged one: {error}"
            ) from error

    @classmethod
    def _from_file(cls, header: dict[str, Any], tensors: Mapping[str, Tensor]) -> Statistics:
        """Put together what the file holds; ValueError and the like if it does not fit together."""
        domains = tuple(
            Domain(**{**domain, "sources": tuple(domain["sources"])})
            for domain in header["domains"]
        )
        layers: dict[int, LayerStatistics] = {}
        for key, tensor in tensors.items():
            _, number, name = key.split(".")
            layers.setdefault(int(number), {})[name] = tensor
        layers = dict(sorted(layers.items()))
        if not layers:
            raise ValueError("no layers")
        for layer, found in layers.items():
            if missing := STATISTICS.keys() - found.keys():
                raise ValueError(f"layer {layer} lacks {', '.join(sorted(missing))}")
            if unknown := found.keys() - ALL_STATISTICS.keys():
                raise ValueError(f"layer {layer} has unknown {', '.join(sorted(unknown))}")
            for name in found:
                statistic = ALL_STATISTICS[name]
                expected = _shape(statistic, len(domains), found)
                actual = (tuple(found[name].shape), found[name].dtype)
                if actual != (expected, statistic.dtype):
                    raise ValueError(
                        f"{name} of layer {layer} must be {expected} {statistic.dtype}, got {actual[0]} {actual[1]}"
                    )
        return cls(Source(**header["source"]), domains, layers, header["settings"])


def _shape(statistic: Statistic, domains: int, layer: LayerStatistics) -> tuple[int, ...]:
    """What a statistic's shape must be, given the others of its layer."""
    experts, width = layer["down_norm"].shape
    pairs = layer["down_gram"].shape[1:] if "down_gram" in layer else ()
    size = unpacked_size(pairs[0]) if pairs else 0
    hidden = layer["input_energy"].shape[2:]
    expected = {
        "expert": (experts,),
        "neuron": (experts, width),
        "input": (experts, *hidden),
        "layer": (),
        "pair": (experts, *pairs),
        "fold pair": (experts, *pairs),
        "fold square": (experts, size, size),
        "fold expert": (experts,),
    }[statistic.per]
    if statistic.merge == "weights":
        return expected
    return (2 * domains if statistic.has_folds else domains, *expected)


def unpacked_size(size: int) -> int:
    """Return n of the symmetric `[n, n]` matrices that are packed into `size` numbers."""
    return (isqrt(8 * size + 1) - 1) // 2


def domain_weights_of(domains: Sequence[str], given: Mapping[str, float]) -> list[float]:
    """Return the weight of every domain: as given, or 1.

    Args:
        domains: Their names.
        given: Some weights by name.

    Raises:
        InvalidArgument: A weight is for a domain that is not there, is no number of 0 or more, or all
            are 0.
    """
    if unknown := given.keys() - set(domains):
        raise InvalidArgument(f"domain weights must be for {list(domains)}, got {sorted(unknown)}")
    weights = [given.get(name, 1.0) for name in domains]
    if not all(0 <= weight < inf for weight in weights) or not any(weights):
        raise InvalidArgument(f"domain weights must be 0 or more and not all 0, got {dict(given)}")
    return weights


def select(statistics: Statistics, names: Iterable[str]) -> Statistics:
    """Return the statistics of some domains only, as if the others had never been calibrated on.

    Args:
        statistics: Of more domains.
        names: Of those to keep, in the order wanted.

    Raises:
        InvalidArgument: There is no such domain.
    """
    rows = {domain.name: row for row, domain in enumerate(statistics.domains)}
    names = list(names)
    if unknown := set(names) - rows.keys():
        raise InvalidArgument(f"select: domains must be of {list(rows)}, got {sorted(unknown)}")
    kept = [rows[name] for name in names]
    folds = [2 * row + fold for row in kept for fold in range(2)]
    layers = {}
    for layer, tensors in statistics.layers.items():
        layers[layer] = {
            name: tensor
            if ALL_STATISTICS[name].merge == "weights"
            else tensor[folds if ALL_STATISTICS[name].has_folds else kept]
            for name, tensor in tensors.items()
        }
    domains = tuple(statistics.domains[row] for row in kept)
    return Statistics(statistics.source, domains, layers, statistics.settings)


def merge(parts: Iterable[Statistics]) -> Statistics:
    """Add statistics of the same model, for example of several machines.

    Domains of one name are added, others stand side by side in the order of first appearance. Sums
    are float64 and added in the order given: merging runs of one batch each equals one run over
    these batches bit for bit. Optional statistics that a part lacks are left out.

    Raises:
        InvalidArgument: The parts are of different models, or two of them count the same text.
    """
    parts = list(parts)
    if not parts:
        raise InvalidArgument("merge: parts must hold at least one Statistics, got none")
    first = parts[0]
    for part in parts[1:]:
        if part.source != first.source:
            raise InvalidArgument(
                f"merge: all statistics must be of one checkpoint, "
                f"got fingerprints {first.source.fingerprint[:12]} and {part.source.fingerprint[:12]}"
            )
    merged: dict[str, Domain] = {}
    for domain in (domain for part in parts for domain in part.domains):
        known = merged.get(domain.name)
        if known is not None:
            if repeated := set(known.sources) & set(domain.sources):
                raise InvalidArgument(
                    f"merge: every text must be counted once, got the same samples of domain {domain.name} "
                    f"twice ({min(repeated)[:12]})"
                )
            domain = Domain(
                domain.name,
                known.samples + domain.samples,
                known.tokens + domain.tokens,
                known.sources + domain.sources,
            )
        merged[domain.name] = domain
    row = {name: index for index, name in enumerate(merged)}
    optional = set(OPTIONAL_STATISTICS).intersection(
        *(tensors for part in parts for tensors in part.layers.values())
    )
    names = [*STATISTICS, *sorted(optional)]
    settings = (
        first.settings
        if all(part.settings == first.settings for part in parts)
        else {"merged": [part.settings for part in parts]}
    )
    layers: dict[int, LayerStatistics] = {}
    for layer, tensors in first.layers.items():
        layers[layer] = {
            name: torch.zeros(
                _shape(ALL_STATISTICS[name], len(merged), tensors),
                dtype=ALL_STATISTICS[name].dtype,
            )
            for name in names
        }
    for part in parts:
        rows = [row[domain.name] for domain in part.domains]
        folds = [2 * index + fold for index in rows for fold in range(2)]
        for layer, tensors in part.layers.items():
            for name in names:
                statistic = ALL_STATISTICS[name]
                mine, theirs = layers[layer][name], tensors[name]
                at = folds if statistic.has_folds else rows
                if statistic.merge == "weights":
                    mine.copy_(theirs)
                elif statistic.merge == "sum":
                    mine[at] += theirs
                else:
                    mine[at] = torch.maximum(mine[at], theirs)
    return Statistics(first.source, tuple(merged.values()), layers, settings)
