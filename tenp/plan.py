# SPDX-License-Identifier: Apache-2.0
"""A plan: which neurons of which expert are kept. It holds no weights and is a small JSON file.

How a plan is decided is in `tenp.planning`, how it is carried out in `tenp.pruning`;
`docs/formats.md` describes the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenp.errors import PlanError
from tenp.files import write_atomically
from tenp.source import Source

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Repair:
    """How the down projections of what is kept are refitted (`tenp.repair`).

    A plan holds no weights: with the statistics it was made from, this determines them.

    Attributes:
        ridges: Decoder layer index to the ridge of every expert, a share of the mean diagonal of C
            over its kept neurons.
        weights: What the second moments of each domain are multiplied by, by name.
        errors: Decoder layer index to the predicted squared output error of its experts, as shares
            of their squared output: `repaired` on all calibration tokens, `masked` without repair,
            `crossed` for one half of the samples when fitted on the other.
        singular: Decoder layer index to the experts that saw fewer tokens than they have neurons: their
            C is singular, and it is the ridge that decides. Layers without such are left out.
    """

    ridges: dict[int, list[float]]
    weights: dict[str, float]
    errors: dict[int, dict[str, float]]
    singular: dict[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Which neurons every expert keeps.

    Attributes:
        source: The checkpoint that the plan is for.
        statistics: SHA-256 of the statistics file it was made from.
        settings: Method and budget as asked for (keep, alpha, width multiple, criteria, ...).
        keep: Decoder layer index to `[E, I]`, bool.
        activated_share: Kept share of the routed parameters that the calibration tokens activate
            (A of docs/method.md), 0..1.
        repair: How what is kept is refitted, or None.
        experts: Decoder layer index to the experts that stay, ascending, when whole experts leave
            the model and its routers; None when all stay, if only with width 0.
    """

    source: Source
    statistics: str
    settings: dict[str, Any]
    keep: dict[int, Tensor]
    activated_share: float
    repair: Repair | None = None
    experts: dict[int, list[int]] | None = None

    def widths(self) -> dict[int, list[int]]:
        """Return the kept neurons of every expert, per layer."""
        return {layer: keep.sum(dim=1).tolist() for layer, keep in self.keep.items()}

    def kept_neurons(self) -> int:
        """Return the number of neurons kept in all experts."""
        return sum(int(keep.sum()) for keep in self.keep.values())

    def neurons(self) -> int:
        """Return the number of neurons of all experts before pruning."""
        return sum(keep.numel() for keep in self.keep.values())

    def static_share(self) -> float:
        """Return the kept share of the routed experts' parameters (E of docs/method.md), 0..1."""
        return self.kept_neurons() / self.neurons()

    def uniform_width(self) -> int | None:
        """Return the one width that all experts of all layers share, or None."""
        widths = {width for layer in self.widths().values() for width in layer}
        return widths.pop() if len(widths) == 1 else None

    def total_parameters(self) -> int:
        """Return the forecast of the pruned model's stored parameters."""
        removed = self.neurons() - self.kept_neurons()
        return self.source.parameters - removed * self.source.neuron_parameters

    def total_bytes(self) -> int:
        """Return the forecast of the pruned model's stored bytes."""
        removed = self.neurons() - self.kept_neurons()
        return self.source.bytes - removed * self.source.neuron_bytes

    def validate(self, source: Source) -> None:
        """Check that the plan was made for this checkpoint.

        Raises:
            PlanError: It was made for another one.
        """
        if source.fingerprint != self.source.fingerprint:
            raise PlanError(
                f"the plan must be for the checkpoint at hand ({source.architecture}, {source.fingerprint[:12]}), "
                f"got a plan for {self.source.architecture}, {self.source.fingerprint[:12]}"
            )

    def _to_bytes(self) -> bytes:
        document = {
            "format": "tenp.plan",
            "format_version": FORMAT_VERSION,
            "source": dataclasses.asdict(self.source),
            "statistics": self.statistics,
            "settings": self.settings,
            "activated_share": self.activated_share,
            "static_share": self.static_share(),
            "layers": [
                {
                    "layer": layer,
                    "width": keep.shape[1],
                    "widths": keep.sum(dim=1).tolist(),
                    "keep": [_to_hex(row) for row in keep],
                }
                for layer, keep in sorted(self.keep.items())
            ],
        }
        # Absent rather than null, so that plans without them are the same files as ever.
        if self.repair is not None:
            document["repair"] = dataclasses.asdict(self.repair)
        if self.experts is not None:
            document["experts"] = self.experts
        return (json.dumps(document, sort_keys=True) + "\n").encode()

    def digest(self) -> str:
        """Return the SHA-256 of the file that `save` writes."""
        return hashlib.sha256(self._to_bytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; equal plans give equal bytes, and a crash leaves no file."""
        write_atomically(Path(path), self._to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan written by `save`.

        Raises:
            PlanError: The file is missing, damaged, or does not agree with itself.
        """
        try:
            document = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise PlanError(f"{path} must be a plan, but cannot be read: {error}") from error
        if not isinstance(document, dict) or document.get("format") != "tenp.plan":
            raise PlanError(f"{path} must be a plan written by tenp, got other JSON")
        if document.get("format_version") != FORMAT_VERSION:
            raise PlanError(
                f"{path} must have plan format {FORMAT_VERSION}, got {document.get('format_version')}"
            )
        try:
            keep = {entry["layer"]: _read_layer(entry) for entry in document["layers"]}
            if not keep:
                raise ValueError("no layers")
            return cls(
                Source(**document["source"]),
                document["statistics"],
                document["settings"],
                keep,
                document["activated_share"],
                _read_repair(document.get("repair")),
                _by_layer(document["experts"]) if "experts" in document else None,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"{path} must be a whole plan, got a damaged one: {error}") from error


def _read_repair(entry: dict[str, Any] | None) -> Repair | None:
    if entry is None:
        return None
    return Repair(
        _by_layer(entry["ridges"]),
        entry["weights"],
        _by_layer(entry["errors"]),
        _by_layer(entry.get("singular", {})),
    )


def _by_layer(entry: dict[str, Any]) -> dict[int, Any]:
    """JSON knows no numbers as keys."""
    return {int(layer): value for layer, value in entry.items()}


def _read_layer(entry: dict[str, Any]) -> Tensor:
    if not entry["keep"]:
        raise ValueError(f"layer {entry['layer']}: no experts")
    keep = torch.stack([_from_hex(mask, entry["width"]) for mask in entry["keep"]])
    if keep.sum(dim=1).tolist() != entry["widths"]:
        raise ValueError(f"layer {entry['layer']}: widths and keep masks disagree")
    return keep


def _to_hex(keep: Tensor) -> str:
    """Bit k of the mask is bit 7 - k % 8 of byte k // 8: two hex digits for 8 neurons, in order."""
    return np.packbits(keep.numpy()).tobytes().hex()


def _from_hex(mask: str, width: int) -> Tensor:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(mask), dtype=np.uint8))
    if len(bits) < width or bits[width:].any():
        raise ValueError(f"a keep mask must have {width} bits, got {mask}")
    return torch.from_numpy(bits[:width].astype(bool))
