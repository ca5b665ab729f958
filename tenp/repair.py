# SPDX-License-Identifier: Apache-2.0
"""Refits the down projection of what is kept, so that it also does the work of what is pruned.

For the kept neurons S the refitted columns are W~ = W T with T = (C_:S + r I_:S) (C_SS + r I)^-1: the
ridge solution that pulls back to the original columns; r = 0 is least squares. T and every error are
functions of C and W^T W alone, so they are known before any weight is read. Shapes and dtypes stay,
so nothing changes when the model runs. In families with a down bias the bias is a last neuron of
activation 1 that is always kept: its new column is the new bias. All in float64.

What is kept can also be refitted to what the expert puts out in the dense model, W m', when m is
measured on the output of layers that are pruned already: T = (X_:S + r I_:S) (C_SS + r I)^-1 with
X = sum g^2 m' m^T, so that every layer makes up for the ones before (*asymmetric calibration*, as in
GPTAQ, arXiv 2504.02692, for quantization).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenp.errors import InvalidArgument
from tenp.moments import FOLDS, unpack, unpacked_size
from tenp.statistics import LayerStatistics, Statistics, domain_weights_of

#: Ridges to choose from, as shares of the mean diagonal of C_SS; the last one is no repair at all.
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e12)


@dataclass(frozen=True)
class Target:
    """What the output is fitted to, if that is another than the expert's own on the same input.

    Attributes:
        cross: `[n, n]`, float64. X = sum g^2 m' m^T.
        energy: sum g^2 |W m'|^2.
    """

    cross: Tensor
    energy: float

    def __add__(self, other: Target) -> Target:
        """Of the tokens of both."""
        return Target(self.cross + other.cross, self.energy + other.energy)


@dataclass(frozen=True)
class LayerMoments:
    """What repair, selection and allocation know of a layer.

    Attributes:
        gram: `[E, n, n]`, float64. W^T W, n the width, and one more where there is a down bias.
        folds: `[2, E, n, n]`, float64. C of the two halves of the calibration samples.
        width: The neurons among the n variables.
        cross: `[2, E, n, n]`, float64. X of the halves, or None: the expert's own output is fitted.
        energies: `[2, E]`, float64. With X the squared output that is fitted.
    """

    gram: Tensor
    folds: Tensor
    width: int
    cross: Tensor | None = None
    energies: Tensor | None = None

    def targets(self, expert: int) -> list[Target] | None:
        """Return what an expert's output is fitted to, in each half; None for its own."""
        if self.cross is None or self.energies is None:
            return None
        pairs = zip(self.cross[:, expert], self.energies[:, expert].tolist(), strict=True)
        return [Target(cross, energy) for cross, energy in pairs]

    def target(self, expert: int) -> Target | None:
        """Return the same of all samples."""
        halves = self.targets(expert)
        return None if halves is None else halves[0] + halves[1]

    def fitted_energy(self) -> float:
        """Return the squared output that is fitted, of all experts."""
        own = energy(self.gram, self.moment) if self.energies is None else self.energies
        return float(own.sum())

    @property
    def moment(self) -> Tensor:
        """`[E, n, n]`: C of all samples."""
        return self.folds.sum(dim=0)

    def fixed(self) -> Tensor:
        """Return `[n]` bool: the down bias, which is always kept."""
        return torch.arange(self.gram.shape[-1]) >= self.width

    def with_bias(self, keep: Tensor) -> Tensor:
        """Return `[E, n]` for a mask `[E, I]`."""
        return torch.nn.functional.pad(keep, (0, self.gram.shape[-1] - self.width), value=True)


def require_moments(statistics: Statistics) -> None:
    """Check that the statistics hold second moments.

    Raises:
        InvalidArgument: They do not.
    """
    if not all("second_moment" in layer for layer in statistics.layers.values()):
        raise InvalidArgument(
            "repair and the method best need statistics with second moments, got some without; "
            "calibrate with --second-moments"
        )


def moment_weights(
    statistics: Statistics, domain_weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return a_d / T_d of every domain, so that errors are means over tokens, summed over domains.

    Args:
        statistics: One calibration.
        domain_weights: a_d by domain name, 1 if not given.

    Raises:
        InvalidArgument: A weight is not one.
    """
    domains = statistics.domains
    weights = domain_weights_of([domain.name for domain in domains], domain_weights or {})
    return {d.name: a / max(d.tokens, 1) for d, a in zip(domains, weights, strict=True)}


def layer_moments(statistics: Statistics, layer: int, weights: Mapping[str, float]) -> LayerMoments:
    """Unpack a layer's second moments, summed over domains.

    Args:
        statistics: With second moments.
        layer: Decoder layer index.
        weights: What each domain's C is multiplied by, by name.
    """
    sums: LayerStatistics = statistics.layers[layer]
    factor = torch.tensor([weights[d.name] for d in statistics.domains], dtype=torch.float64)

    def summed(name: str) -> Tensor:
        apart = sums[name].unflatten(0, (len(factor), FOLDS))
        return torch.einsum("d,df...->f...", factor, apart)

    has_target = "cross_moment" in sums
    return LayerMoments(
        unpack(sums["down_gram"]),
        unpack(summed("second_moment")),
        sums["down_norm"].shape[1],
        summed("cross_moment") if has_target else None,
        summed("target_energy") if has_target else None,
    )


def refit(moment: Tensor, keep: Tensor, ridge: float, target: Target | None = None) -> Tensor:
    """Return T `[n, |S|]`, which refits W to W~ = W T.

    Args:
        moment: `[n, n]`, float64. C.
        keep: `[n]`, bool. S.
        ridge: r as a share of the mean diagonal of C_SS, above 0. Where C_SS = 0, nothing is refitted.
        target: What is fitted; None is W m.
    """
    identity = torch.eye(len(keep), dtype=torch.float64)[:, keep]
    kept = moment[keep][:, keep]
    scale = kept.diagonal().mean() if keep.any() else torch.tensor(0.0)
    if not scale > 0:
        return identity
    kept = kept.clone()
    kept.diagonal().add_(ridge * scale)
    wanted = moment if target is None else target.cross
    right = wanted[:, keep] + ridge * scale * identity
    factor, info = torch.linalg.cholesky_ex(kept)
    if info:  # beyond float64: a tiny ridge on a singular matrix
        return torch.linalg.lstsq(kept, right.mT, driver="gelsd").solution.mT
    return torch.cholesky_solve(right.mT, factor).mT


def residual(
    gram: Tensor, moment: Tensor, keep: Tensor, transform: Tensor, target: Target | None = None
) -> float:
    """Return sum_t g^2 |W m - W~ m_S|^2 exactly: tr[W D C D^T W^T] with D = I - T E_S^T.

    With a target, sum_t g^2 |W m' - W~ m_S|^2 = energy - 2 tr[W X_:S T^T W^T] + tr[W T C_SS T^T W^T].

    Args:
        gram: `[n, n]`, float64. W^T W.
        moment: `[n, n]`, float64. C of the tokens to predict for, not only of those T was made of.
        keep: `[n]`, bool. S.
        transform: `[n, |S|]`. T.
        target: What is fitted; None is W m.
    """
    if target is not None:
        kept = moment[keep][:, keep]
        product = (transform @ kept - 2 * target.cross[:, keep]) @ transform.mT
        return max(target.energy + float((gram * product).sum()), 0.0)
    difference = torch.eye(len(keep), dtype=torch.float64)
    difference[:, keep] -= transform
    error = (gram * (difference @ moment @ difference.mT)).sum()
    return max(float(error), 0.0)


def masked_residual(
    gram: Tensor, moment: Tensor, keep: Tensor, target: Target | None = None
) -> float:
    """Return the error without repair, tr[W_P C_PP W_P^T] if the target is W m."""
    if target is not None:
        identity = torch.eye(len(keep), dtype=torch.float64)[:, keep]
        return residual(gram, moment, keep, identity, target)
    return float((gram[~keep][:, ~keep] * moment[~keep][:, ~keep]).sum())


def energy(gram: Tensor, moment: Tensor) -> Tensor:
    """Return `[E]`: sum_t g^2 |W m|^2, the error of keeping nothing, for `[E, n, n]` matrices."""
    return (gram * moment).sum(dim=(1, 2))


def sensitivity(statistics: Statistics, layer: int, weights: Mapping[str, float]) -> float:
    """Return the mean over tokens of |dL/dz|^2, z what the routed experts of a layer add up to.

    To first order an error of the layer's output of random direction changes the loss in proportion.

    Args:
        statistics: Of a calibration with the second pass.
        layer: Decoder layer index.
        weights: What each domain's sum is multiplied by, by name: those of its second moments.

    Raises:
        InvalidArgument: The statistics do not have it.
    """
    sums = statistics.layers[layer]
    if "output_sensitivity" not in sums:
        raise InvalidArgument(
            "widths pooled over the model need statistics with output_sensitivity, got some without; "
            "calibrate with --second-pass"
        )
    factor = torch.tensor([weights[d.name] for d in statistics.domains], dtype=torch.float64)
    return float(factor @ sums["output_sensitivity"])


def singular_experts(statistics: Statistics) -> dict[int, list[int]]:
    """Return the experts whose C is singular because they saw fewer tokens than it has rows, by layer.

    The rank of a sum of `tokens` outer products is at most `tokens`. Layers without such are left out.
    """
    found = {}
    for layer, sums in statistics.layers.items():
        size = unpacked_size(sums["down_gram"].shape[-1])
        few = sums["counts"].sum(dim=0) < size
        if few.any():
            found[layer] = torch.nonzero(few).flatten().tolist()
    return found


@dataclass(frozen=True)
class Fit:
    """How well one expert can be repaired.

    Attributes:
        ridge: The one that predicts the other half best.
        cross: The error under one half of what was fitted on the other, summed over both ways.
        error: The error on all calibration tokens of what is fitted on all.
        masked: The same without repair.
    """

    ridge: float
    cross: float
    error: float
    masked: float


def fit(
    gram: Tensor,
    folds: Sequence[Tensor],
    keep: Tensor,
    ridges: Sequence[float] = RIDGES,
    targets: Sequence[Target] | None = None,
) -> Fit:
    """Choose the ridge of one expert by cross-fit: fitted on one half, tested on the other.

    Args:
        gram: `[n, n]`, float64.
        folds: The two C `[n, n]`, float64.
        keep: `[n]`, bool.
        ridges: To choose from.
        targets: What is fitted in each half; None is W m.
    """
    moment = folds[0] + folds[1]
    first, second = targets or (None, None)
    target = first + second if first is not None and second is not None else None
    masked = masked_residual(gram, moment, keep, target)
    if not masked > 0:
        return Fit(ridges[0], 0.0, 0.0, masked)
    best, cross = ridges[-1], float("inf")
    for ridge in ridges:
        error = sum(
            residual(gram, folds[1 - half], keep, refit(folds[half], keep, ridge, fitted), tested)
            for half, (fitted, tested) in enumerate(((first, second), (second, first)))
        )
        if error < cross:
            best, cross = ridge, error
    transform = refit(moment, keep, best, target)
    return Fit(best, cross, residual(gram, moment, keep, transform, target), masked)


def fit_layer(moments: LayerMoments, keep: Tensor) -> list[Fit]:
    """Choose the ridges of a layer.

    Args:
        moments: Of the layer.
        keep: `[E, I]`, bool.
    """
    return [
        fit(
            moments.gram[expert],
            moments.folds[:, expert].unbind(),
            mask,
            targets=moments.targets(expert),
        )
        for expert, mask in enumerate(moments.with_bias(keep))
    ]


def relative_errors(moments: LayerMoments, fits: Sequence[Fit]) -> dict[str, float]:
    """Return the errors of a layer's experts as shares of the output that is fitted, as a plan has them.

    Args:
        moments: Of the layer.
        fits: Of its experts.
    """
    energy = moments.fitted_energy() or 1.0
    return {
        "repaired": sum(fit.error for fit in fits) / energy,
        "masked": sum(fit.masked for fit in fits) / energy,
        "crossed": sum(fit.cross for fit in fits) / energy,
    }


def refitted_down(
    down: Tensor,
    bias: Tensor | None,
    moment: Tensor,
    keep: Tensor,
    ridge: float,
    target: Target | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the refitted columns `[H, W]` of one expert and its bias `[H]`, in their dtypes.

    Args:
        down: `[H, I]`. W_d.
        bias: `[H]` or None.
        moment: `[n, n]`, float64.
        keep: `[n]`, bool; the bias is kept.
        ridge: As in `refit`.
        target: As in `refit`.
    """
    columns = down.double()
    if bias is not None:
        columns = torch.cat([columns, bias.double().unsqueeze(1)], dim=1)
    columns = columns @ refit(moment, keep, ridge, target)
    if bias is None:
        return columns.to(down.dtype), None
    return columns[:, :-1].to(down.dtype), columns[:, -1].to(bias.dtype)
