# SPDX-License-Identifier: Apache-2.0
"""Which neurons an expert loses first, when every loss is compensated by the neurons that stay.

Removing neuron k from the down projection W and refitting the others changes the expert's output by
|w_k|^2 / [C^-1]_kk, summed over the tokens of C = sum g^2 m m^T; then the neuron is taken out of C^-1
and the refitted W is the new W (Hassibi and Stork's optimal brain surgeon, for a linear layer of many
outputs). Taking out the cheapest neuron again and again gives the expert's error for every width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Neurons that are taken out before the large matrices are brought up to date, in one product.
_BLOCK = 64

#: The ridge, as a share of the mean diagonal of C. It bounds the condition number of an expert that
#: saw fewer tokens than it has neurons; on tiny-moe the choice between 1e-5 and 1e-3 does not matter.
RIDGE = 1e-4


@dataclass(frozen=True)
class Elimination:
    """The order in which some experts lose their neurons.

    Attributes:
        order: `[E, n]`, int64. The neurons, the first to go first; fixed ones are never in it.
        costs: `[E, n]`, float64. What each removal adds to the expert's squared output error.
    """

    order: Tensor
    costs: Tensor


def eliminate(
    gram: Tensor,
    moment: Tensor,
    ridge: float = RIDGE,
    fixed: Tensor | None = None,
    protected: Tensor | None = None,
) -> Elimination:
    """Take all neurons out of some experts, the cheapest first.

    With H = C + r I the costs are exact for H: they sum up to tr[(W - W~) H (W - W~)^T].

    Args:
        gram: `[E, n, n]`, float64. W^T W; of W nothing else is needed.
        moment: `[E, n, n]`, float64. C.
        ridge: r as a share of the mean diagonal of C. An expert with C = 0 costs nothing.
        fixed: `[n]`, bool. Variables that never go, as a bias.
        protected: `[E, n]`, bool. Neurons that go last.

    Returns:
        As many removals as there are variables that are not fixed.

    Note:
        2 n^3 FLOPs per expert and 32 n^2 bytes; deterministic. Ties go to the lower index.
    """
    experts, size = gram.shape[:2]
    scale = moment.diagonal(dim1=1, dim2=2).mean(dim=1)
    used = scale > 0
    # Relative to the scale the numbers are the same for every expert, and an unused one gets I.
    relative = moment / torch.where(used, scale, 1.0)[:, None, None]
    relative.diagonal(dim1=1, dim2=2).add_(torch.where(used, ridge, 1.0)[:, None])
    inverse = _inverse(relative)  # [E, n, n]
    gram = gram.clone()

    members = torch.arange(size).repeat(experts, 1)  # [E, remaining]: who the rows are
    barrier = torch.zeros(experts, size, dtype=torch.float64)  # added to the costs
    if protected is not None:
        barrier[protected] = torch.finfo(torch.float64).max / 4
    if fixed is not None:
        barrier[:, fixed] = torch.inf
    total = size - (0 if fixed is None else int(fixed.sum()))
    order = torch.empty(experts, total, dtype=torch.int64)
    costs = torch.empty(experts, total, dtype=torch.float64)
    everyone = torch.arange(experts)

    done = 0
    while done < total:
        count = min(_BLOCK, total - done)
        remaining = members.shape[1]
        # Of the removals in this block: H^-1 loses U U^T, W^T W loses U B^T + B U^T.
        u = torch.zeros(experts, remaining, count, dtype=torch.float64)
        b = torch.zeros_like(u)
        diagonal = inverse.diagonal(dim1=1, dim2=2).clone()
        norms = gram.diagonal(dim1=1, dim2=2).clone()
        gone = torch.zeros(experts, remaining, dtype=torch.bool)
        for step in range(count):
            cost = norms.clamp(min=0) / diagonal.clamp(min=1e-300) + barrier
            pick = cost.masked_fill(gone, torch.inf).argmin(dim=1)
            # argmin of a row that is inf everywhere may name who is gone already; none is here.
            order[:, done + step] = members[everyone, pick]
            pivot = diagonal[everyone, pick].clamp(min=1e-300)
            costs[:, done + step] = norms[everyone, pick].clamp(min=0) / pivot
            gone[everyone, pick] = True
            u_row, b_row = u[everyone, pick, :step], b[everyone, pick, :step]
            column = inverse[everyone, :, pick] - _times(u[..., :step], u_row)
            column /= pivot.sqrt()[:, None]
            products = gram[everyone, :, pick] - _times(u[..., :step], b_row)
            products = (products - _times(b[..., :step], u_row)) / pivot.sqrt()[:, None]
            length = products[everyone, pick] / pivot.sqrt()  # |w_k|^2 / [H^-1]_kk
            products -= column * (length / 2)[:, None]
            u[..., step], b[..., step] = column, products
            diagonal -= column.square()
            norms -= 2 * column * products
        keep = torch.nonzero(~gone)[:, 1].view(experts, remaining - count)
        done += count
        if done < total:
            u, b = _rows(u, keep), _rows(b, keep)
            inverse = torch.baddbmm(_square(inverse, keep), u, u.mT, alpha=-1)
            gram = torch.baddbmm(_square(gram, keep), u, b.mT, alpha=-1)
            gram.baddbmm_(b, u.mT, alpha=-1)
            members, barrier = members.gather(1, keep), barrier.gather(1, keep)
    return Elimination(order, costs * (scale * used)[:, None])


def _inverse(matrices: Tensor) -> Tensor:
    """The inverse of positive definite matrices `[E, n, n]`, symmetric to the last bit."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrices))
    return (inverse + inverse.mT) / 2


def _times(matrix: Tensor, row: Tensor) -> Tensor:
    """`[E, n, s]` times `[E, s]`: `[E, n]`."""
    return torch.bmm(matrix, row.unsqueeze(2)).squeeze(2)


def _rows(matrix: Tensor, keep: Tensor) -> Tensor:
    return matrix.gather(1, keep.unsqueeze(2).expand(-1, -1, matrix.shape[2]))


def _square(matrix: Tensor, keep: Tensor) -> Tensor:
    rows = _rows(matrix, keep)
    return rows.gather(2, keep.unsqueeze(1).expand(-1, rows.shape[1], -1))
