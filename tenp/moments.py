# SPDX-License-Identifier: Apache-2.0
"""Second moments of an expert's neurons, C = sum g^2 m m^T, and what they cost in memory.

They are what repair, selection and allocation compute with. A symmetric matrix is kept packed: its
upper triangle row by row, n (n + 1) / 2 numbers, float64 both while it is added up and in the file.
In families with a down bias the bias counts as one more neuron of activation 1, the last.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tenp import devices
from tenp.adapter import Experts
from tenp.errors import InvalidArgument, Unsupported
from tenp.samples import Samples
from tenp.statistics import ALL_STATISTICS, Domain, LayerStatistics, Statistics, unpacked_size

#: Disjoint halves of the calibration samples: what is chosen on one is tested on the other.
FOLDS = 2


def packed_size(size: int) -> int:
    """Return how many numbers a symmetric `[size, size]` matrix is packed into."""
    return size * (size + 1) // 2


def pack(matrices: Tensor) -> Tensor:
    """Return the upper triangles `[..., P]` of symmetric matrices `[..., n, n]`, row by row."""
    size = matrices.shape[-1]
    return matrices.flatten(-2).index_select(-1, _upper(size).to(matrices.device))


def unpack(packed: Tensor) -> Tensor:
    """Return the symmetric matrices `[..., n, n]` of packed ones `[..., P]`."""
    size = unpacked_size(packed.shape[-1])
    matrices = packed.new_zeros(*packed.shape[:-1], size * size)
    upper = _upper(size).to(packed.device)
    matrices[..., upper] = packed
    # Transposed: where row and column change places.
    matrices[..., upper % size * size + upper // size] = packed
    return matrices.unflatten(-1, (size, size))


@lru_cache(maxsize=8)
def _upper(size: int) -> Tensor:
    rows, columns = torch.triu_indices(size, size)
    return rows * size + columns


def variables(experts: Experts) -> int:
    """Return n, the rows of C: the full width, and one more where there is a down bias."""
    return experts.width + int(experts.biases()[2] is not None)


def add_cross_moment(
    experts: Experts,
    sums: LayerStatistics,
    dense: Tensor,
    activations: Tensor,
    gates: Tensor,
) -> None:
    """Add what relates an expert's neurons to those of the dense model on the same tokens.

    Args:
        experts: The expert alone.
        sums: `cross_moment` `[1, n, n]` and `target_energy` `[1]`, added to.
        dense: `[S, I]`. m', what the expert computes in the dense model.
        activations: `[S, I]`. m.
        gates: `[S]`, of the model that is measured.
    """
    has_bias = experts.biases()[2] is not None
    target, mine = (_weighted(m, gates, has_bias) for m in (dense, activations))
    sums["cross_moment"][0] += target.t() @ mine
    sums["target_energy"][0] += (target @ _columns(experts, 0).t()).square().sum()


def _weighted(activations: Tensor, gates: Tensor, has_bias: bool) -> Tensor:
    """`[S, n]`, float64: g m, with g itself for the bias."""
    weights = gates.double().unsqueeze(1)
    weighted = weights * activations.double()
    return torch.cat([weighted, weights], dim=1) if has_bias else weighted


def _columns(experts: Experts, expert: int) -> Tensor:
    """`[H, n]`, float64: W_d, the down bias as a last column."""
    bias = experts.biases()[2]
    columns = experts.down[expert].double()
    return columns if bias is None else torch.cat([columns, bias[expert].double()[:, None]], dim=1)


def down_gram(experts: Experts) -> Tensor:
    """Return W_d^T W_d of every expert, `[E, P]` float64 packed, the down bias as a last column."""
    grams = []
    for expert in range(experts.num_experts):
        columns = _columns(experts, expert)
        grams.append(pack(columns.t() @ columns))
    return torch.stack(grams)


def empty(experts: Experts, rows: int, cross: bool = False) -> LayerStatistics:
    """Return the second moments of no token.

    Args:
        experts: Of one layer.
        rows: Folds times domains.
        cross: Also those with the dense model.
    """
    count, variables_ = experts.num_experts, variables(experts)
    shapes: dict[str, tuple[int, ...]] = {
        "second_moment": (rows, count, packed_size(variables_)),
        "down_gram": (count, packed_size(variables_)),
    }
    if cross:
        shapes["cross_moment"] = (rows, count, variables_, variables_)
        shapes["target_energy"] = (rows, count)
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}


def required_bytes(layers: Sequence[Experts], domains: int, cross: bool = False) -> int:
    """Forecast the bytes of the second moments, the largest statistics by far.

    8 bytes x (folds x domains + 1) x experts x n (n + 1) / 2, summed over layers; those with the
    dense model take 8 bytes x folds x domains x experts x n^2 more.
    """
    total = 0
    for experts in layers:
        n = variables(experts)
        numbers = (FOLDS * domains + 1) * packed_size(n) + FOLDS * domains * n * n * cross
        total += 8 * experts.num_experts * numbers
    return total


def check_memory(layers: Sequence[Experts], domains: int, cross: bool = False) -> None:
    """Refuse second moments that will not fit, before the run.

    All are in memory when the run ends, and while it lasts on the devices that hold the weights.
    Weights that are read layer by layer are nowhere yet, and then one layer's are on the device.

    Args:
        layers: The experts to be calibrated.
        domains: Calibration domains.
        cross: As in `required_bytes`.

    Raises:
        Unsupported: They would need more; the message has both numbers.
    """
    rooms = [(list(layers), available_bytes(), "memory", "calibrate fewer domains at a time")]
    for device in {experts.down.device for experts in layers if experts.down.is_cuda}:
        there = [experts for experts in layers if experts.down.device == device]
        rooms.append((there, devices.free_bytes(device), str(device), "use --stream layers"))
    for there, available, where, advice in rooms:
        needed = required_bytes(there, domains, cross)
        if needed > available:
            raise Unsupported(
                f"second moments of {domains} domains need {needed / 2**30:.2f} GiB of {where}, "
                f"but {available / 2**30:.2f} GiB are free; {advice}"
            )


def available_bytes() -> int:
    """Return the memory that is free for new work, in bytes."""
    try:
        with Path("/proc/meminfo").open() as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def halves(samples: Sequence[Samples]) -> list[Samples]:
    """Return every domain as two, one a fold: sample s of a domain goes to fold s % 2.

    Raises:
        InvalidArgument: A domain has one sample only.
    """
    apart = []
    for domain in samples:
        if len(domain.ids) < FOLDS:
            raise InvalidArgument(
                f"second moments need {FOLDS} samples per domain or more, got {len(domain.ids)} "
                f"for {domain.domain}"
            )
        apart += [
            Samples(f"{domain.domain}/{fold}", domain.ids[fold::FOLDS]) for fold in range(FOLDS)
        ]
    return apart


def join_halves(apart: Statistics) -> Statistics:
    """Return the statistics of `halves` as those of the domains: second moments keep the folds apart.

    Sums of the folds are added, maxima compared; what has folds, like `second_moment`, stays `[2 D, ...]`.
    """
    domains = []
    for first, second in zip(apart.domains[::2], apart.domains[1::2], strict=True):
        domains.append(
            Domain(
                first.name.rpartition("/")[0],
                first.samples + second.samples,
                first.tokens + second.tokens,
                first.sources + second.sources,
            )
        )
    layers = {}
    for layer, tensors in apart.layers.items():
        layers[layer] = dict(tensors)
        for name, tensor in tensors.items():
            statistic = ALL_STATISTICS[name]
            if statistic.merge == "weights" or statistic.has_folds:
                continue
            pairs = tensor.unflatten(0, (len(domains), FOLDS))
            layers[layer][name] = pairs.sum(1) if statistic.merge == "sum" else pairs.amax(1)
    return Statistics(apart.source, tuple(domains), layers, apart.settings)
