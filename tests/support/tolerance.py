# SPDX-License-Identifier: Apache-2.0
"""How far an op may be from its float64 oracle, derived from roundings and term counts.

Inputs are exact: the oracle reads the same float32, bfloat16 or float16 numbers. What differs is
how the op rounds on the way. The building blocks:

- One rounding to a format with p significant bits is off by at most u = 2^-p of the value
  (`unit_roundoff`): 2^-24 float32, 2^-11 float16, 2^-8 bfloat16.
- A sum of n terms in float32 rounds n - 1 partial sums, each at most A = sum |terms|. Worst case is
  (n - 1) u A; roundings of independent sign add up like a random walk, sqrt(n) u A. `SUM_FACTOR`
  times that is allowed: 2 standard deviations of a walk whose steps are all as long as they can be.
  Real partial sums are far below A and a rounding is u / sqrt(3) in the mean, so that even a
  plain loop stays a factor of 10 below. Products rounded before they are added count as another
  term each, hence sqrt(2 n).
- Sums over tokens are float64 by contract: same formula with u = 2^-53, and 2^-53 is negligible
  beside 2^-24, so only sums of exact terms use it.

Every bound is elementwise and uses the sum of the absolute values of the element's own terms, so a
wrong element cannot hide behind large ones.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from support.op_cases import BatchInputs, ExpertGemmCase, ExpertGemmInputs, StatisticsInputs
from tenp.ops import reference

SUM_FACTOR = 2.0


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding once to `dtype`."""
    return torch.finfo(dtype).eps / 2


def spacing(dtype: torch.dtype, values: Tensor) -> Tensor:
    """From each value to the next larger number in `dtype`; twice its rounding error at most."""
    limits = torch.finfo(dtype)
    mantissa, exponent = values.double().abs().clamp(min=limits.smallest_normal).frexp()
    return torch.ldexp(torch.full_like(mantissa, limits.eps / 2), exponent)


def sum_tolerance(dtype: torch.dtype, terms: int) -> float:
    """Relative to sum |terms|: the error of adding that many products in `dtype`."""
    return SUM_FACTOR * math.sqrt(2 * max(terms, 1)) * unit_roundoff(dtype)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: Tensor | float) -> None:
    """Assert |actual - expected| <= tolerance elementwise, inf and NaN in the same places."""
    actual, expected = actual.cpu().double(), expected.cpu().double()
    assert actual.shape == expected.shape, (
        f"{name} must be {list(expected.shape)}, got {list(actual.shape)}"
    )
    if actual.numel() == 0:
        return
    tolerance = torch.as_tensor(tolerance, dtype=torch.float64).expand(expected.shape)
    finite = expected.isfinite()
    same_where_not_finite = (actual == expected) | (actual.isnan() & expected.isnan())
    within = torch.where(finite, (actual - expected).abs() <= tolerance, same_where_not_finite)
    if within.all():
        return
    excess = torch.where(within, -1.0, ((actual - expected).abs() / tolerance).nan_to_num(math.inf))
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    raise AssertionError(
        f"{name}{list(worst)} must be {expected[worst]:.9g} within {tolerance[worst]:.3g}, "
        f"got {actual[worst]:.9g}; {int((~within).sum())} of {within.numel()} are outside"
    )


def assert_similar(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert 1 - 2<x, y> / (|x|^2 + |y|^2) <= tolerance^2, over the whole tensor.

    The left side is 0 when equal, 1 when unrelated, and d^2 / 2 for a relative error d of the
    whole: a bias too small for any single element shows here.
    """
    x, y = actual.cpu().double(), expected.cpu().double()
    denominator = float((x * x + y * y).sum())
    difference = float(((x - y) ** 2).sum()) / denominator if denominator else 0.0
    assert difference <= tolerance**2, f"{name} differs by {difference:.3g} of its squared length"


def assert_same_lowest_half(actual: Tensor, expected: Tensor) -> None:
    """Assert that 99.5 % of the lower half of every expert's neurons `[E, I]` are the same ones.

    They are what pruning to half of the width removes. Experts whose scores are all zero say
    nothing and do not count.
    """
    half = expected.shape[1] // 2
    used = expected.abs().sum(dim=1) > 0
    pairs = zip(actual.cpu()[used], expected.cpu()[used], strict=True)
    shared = sum(
        len({*mine.argsort()[:half].tolist()} & {*theirs.argsort()[:half].tolist()})
        for mine, theirs in pairs
    )
    total = int(used.sum()) * half
    assert total > 0
    assert shared >= 0.995 * total, f"{shared} of {total} neurons are the same"


def activation_stats_tolerance(inputs: StatisticsInputs) -> dict[str, Tensor]:
    """|y| is the root of a float32 sum of H squares, one rounding more; the root halves its error.

    The factor g, the product and the root itself: three roundings. max |y| errs like one |y|.
    """
    relative = sum_tolerance(torch.float32, inputs.hidden_size) + 3 * unit_roundoff(torch.float32)
    sums = inputs.zero_activation_stats()
    reference.accumulate_activation_stats(**inputs.activation_stats_arguments(), **sums)
    exact = sum_tolerance(torch.float64, inputs.max_rows)
    return {
        "counts": torch.zeros(inputs.num_experts),
        "gate_sum": exact * sums["gate_sum"],  # gates are not negative: sum |g| = sum g
        "norm_sum": relative * sums["norm_sum"],
        "gated_norm_sum": relative * sums["gated_norm_sum"],
        "norm_max": relative * sums["norm_max"],
    }


def direction_change_tolerance(inputs: StatisticsInputs) -> Tensor:
    """Of g |y| (1 - cos) = g (|y| - <x, y> / |x|): both terms are at most |y|.

    <x, y> errs relative to sum |x y| <= |x| |y|. Three float32 sums of H products and five more
    roundings, all against sum g |y|: where x and y point the same way the difference cancels and
    the absolute error stays.
    """
    relative = 3 * sum_tolerance(torch.float32, inputs.hidden_size)
    relative += 5 * unit_roundoff(torch.float32)
    sums = inputs.zero_activation_stats()
    reference.accumulate_activation_stats(**inputs.activation_stats_arguments(), **sums)
    return relative * sums["gated_norm_sum"]


def neuron_contribution_tolerance(inputs: StatisticsInputs) -> dict[str, Tensor]:
    """Q = <w_k, y> is a float32 sum of H products; |y| as above; m Q / |y| adds three roundings.

    magnitude adds exact numbers in float64. energy squares g m after one rounding: 3 u. peak: u.
    """
    magnitudes = inputs.zero_neuron_contribution()
    reference.accumulate_neuron_contribution(
        activations=inputs.activations.abs(),
        outputs=inputs.outputs.abs(),
        down=inputs.down.abs(),
        gates=inputs.gates,
        offsets=inputs.offsets,
        **magnitudes,
    )
    u = unit_roundoff(torch.float32)
    relative = 2 * sum_tolerance(torch.float32, inputs.hidden_size) + 3 * u
    exact = sum_tolerance(torch.float64, inputs.max_rows)
    return {
        "projection": relative * magnitudes["projection"],
        "magnitude": exact * magnitudes["magnitude"],
        "energy": 4 * u * magnitudes["energy"],
        "peak": 2 * u * magnitudes["peak"],
    }


def checksum_tolerance(inputs: StatisticsInputs) -> Tensor:
    """Of sum_k projection_k = sum_t |y_t|, per expert.

    y in the inputs is W_d m rounded to the dtype: y = W_d m + d with |d| <= u |y|, so that
    <W_d m, y> / |y| differs from |y| by at most |d| <= u |y|. Subnormal results are off by a fixed
    step instead: sqrt(H) times half the smallest subnormal. On top comes the op's own error.
    """
    dtype = inputs.outputs.dtype
    sums = inputs.zero_activation_stats()
    reference.accumulate_activation_stats(**inputs.activation_stats_arguments(), **sums)
    smallest_step = float(spacing(dtype, torch.zeros(())))
    rounding_of_y = unit_roundoff(dtype) * sums["norm_sum"]
    rounding_of_y += math.sqrt(inputs.hidden_size) * smallest_step / 2 * sums["counts"]
    own = neuron_contribution_tolerance(inputs)["projection"].sum(dim=1)
    return rounding_of_y + own


def expert_gemm_tolerance_of_the_whole(case: ExpertGemmCase) -> float:
    """Roundings of single elements are independent and at most u: together u / sqrt(3), for m and
    out. And two float32 sums, of H and of W_e products.
    """
    terms = case.hidden_size + max(case.widths)
    return unit_roundoff(case.dtype) + sum_tolerance(torch.float32, terms)


def expert_gemm_tolerance(
    case: ExpertGemmCase, inputs: ExpertGemmInputs, expected: Tensor
) -> Tensor:
    """The op's own error, a few steps of m, and the output rounded once."""
    errors = expert_gemm_errors(case, inputs)
    before_rounding = errors.of_float32 + 3 * errors.of_one_step_of_m
    return before_rounding + (spacing(case.dtype, expected.abs() + before_rounding)) / 2


def assert_rounded_once(
    case: ExpertGemmCase, inputs: ExpertGemmInputs, out: Tensor, expected: Tensor
) -> None:
    """Assert that nearly every bfloat16 element is the oracle's, rounded to bfloat16.

    Where float32 errs by d, the rounded result differs with probability d / spacing: at most a
    seventh of the elements here. An intermediate result or a gate that is rounded to bfloat16
    changes more than a quarter of them, though each by no more than its tolerance. (float16 is
    eight times closer to float32, too close to tell the two apart.)
    """
    error = expert_gemm_errors(case, inputs).of_float32
    expected_share = (error / spacing(case.dtype, expected)).clamp(max=1).mean()
    share = (out != expected.to(case.dtype)).double().mean()
    assert share <= expected_share, f"{share:.3%} differ, {expected_share:.3%} may"


class ExpertGemmErrors(NamedTuple):
    of_float32: Tensor
    """`[T, H]`. From everything that is computed in float32."""
    of_one_step_of_m: Tensor
    """`[T, H]`. What one m, rounded the other way, changes at most."""


def expert_gemm_errors(case: ExpertGemmCase, inputs: ExpertGemmInputs) -> ExpertGemmErrors:
    """The error of each stage, carried to the output by absolute values; see the comments."""
    # A scale is one more factor of every product.
    scaled = 1 if inputs.down_scale is not None else 0
    inputs = inputs.dequantized()
    num_rows = inputs.down.shape[0]
    of_float32 = torch.zeros(inputs.hidden.shape, dtype=torch.float64)
    of_one_step_of_m = torch.zeros(inputs.hidden.shape, dtype=torch.float64)

    def project(x: Tensor, first: int, width: int, absolute: bool) -> Tensor:
        weight = inputs.gate_up[first : first + width].double()
        bias = torch.zeros(width, dtype=torch.float64)
        if inputs.gate_up_bias is not None:
            bias = inputs.gate_up_bias[first : first + width].double()
        return x.abs() @ weight.abs().T + bias.abs() if absolute else x @ weight.T + bias

    for expert, width in enumerate(inputs.widths.tolist()):
        token, slot = (inputs.expert_ids == expert).nonzero(as_tuple=True)
        first = int(inputs.neuron_offsets[expert])
        first_up = first + (num_rows if case.gated else 0)
        x = inputs.hidden[token].double()
        up = project(x, first_up, width, absolute=False)
        gate = project(x, first, width, absolute=False) if case.gated else None

        # 1. The projections: float32 sums of H products and a bias.
        of_projection = sum_tolerance(torch.float32, case.hidden_size + 1 + scaled)
        up_error = of_projection * project(x, first_up, width, absolute=True)
        gate_error = of_projection * project(x, first, width, absolute=True)

        # 2. m, before it is rounded.
        m = reference.activate(gate, up, case.activation, case.limit, case.alpha)
        m_error = _activation_error(case.activation, m, gate, gate_error, up, up_error)

        # 3. Rounding m to the dtype. The oracle rounds too, but from a slightly different number:
        # where a boundary lies between the two, the results are one step apart. The probability
        # of that is m_error / step, so in the mean the error stays m_error.
        g = inputs.gates[token, slot, None].double().abs()
        down = inputs.down[first : first + width].double().abs()
        y_error = m_error @ down
        if width and len(token):
            # Row by row: all at once would be an array of rows x neurons x hidden.
            largest = [(step[:, None] * down).amax(dim=0) for step in spacing(case.dtype, m)]
            of_one_step_of_m.index_add_(0, token, g * torch.stack(largest))

        # 4. The down projection: a float32 sum of W_e products and a bias.
        y = m.abs() @ down
        if inputs.down_bias is not None:
            y = y + inputs.down_bias[expert].double().abs()
        y_error = y_error + sum_tolerance(torch.float32, width + 1 + scaled) * y

        # 5. The sum over k slots in float32.
        slot_error = sum_tolerance(torch.float32, case.experts_per_token) * y
        of_float32.index_add_(0, token, g * (y_error + slot_error))
    return ExpertGemmErrors(of_float32, of_one_step_of_m)


def _activation_error(
    activation: str,
    m: Tensor,
    gate: Tensor | None,
    gate_error: Tensor,
    up: Tensor,
    up_error: Tensor,
) -> Tensor:
    """An error of a projection times the slope of the activation, and evaluating it.

    The slope is at most 1.13 (gelu; silu and swiglu_oai 1.10, for any alpha) except relu2's 2 |x|.
    Evaluating exp, erf or tanh in float32: 8 u of the argument, which covers the cancellation in
    their tails (1 + erf -> 0) too. |act(x)| <= |x|, except relu2.
    """
    u = unit_roundoff(torch.float32)
    inner = up if gate is None else gate
    inner_error = up_error if gate is None else gate_error
    squares = activation == "relu2"
    slope = 2 * inner.abs() + inner_error if squares else 1.13
    act_error = slope * inner_error + 8 * u * inner.abs()
    act = inner.square() if squares else inner.abs()
    if gate is None:
        return act_error + 8 * u * m.abs()
    factor = up.abs() + 1 if activation == "swiglu_oai" else up.abs()
    return factor * act_error + (act + act_error) * up_error + 8 * u * m.abs()


def activations_tolerance(inputs: BatchInputs, activation: str, **limits: float) -> Tensor:
    """Of m, `[S, I]`: the projections, float32 sums of H products and a bias; the activation; and
    rounding once.
    """
    dtype, terms = inputs.hidden.dtype, inputs.hidden.shape[1] + 1
    tolerance = torch.zeros(inputs.activations.shape, dtype=torch.float64)
    for expert, (begin, end) in enumerate(itertools.pairwise(inputs.offsets.tolist())):
        x = inputs.hidden[inputs.slots[begin:end].long() // inputs.rows.shape[1]].double()

        def project(
            weight: Tensor | None, bias: Tensor | None
        ) -> tuple[Tensor | None, Tensor]:  # the projection and its error
            if weight is None:
                return None, torch.zeros(())
            w = weight[expert].double()  # noqa: B023
            b = torch.zeros(()) if bias is None else bias[expert].double()  # noqa: B023
            size = x.abs() @ w.abs().T + b.abs()  # noqa: B023
            return x @ w.T + b, sum_tolerance(torch.float32, terms) * size  # noqa: B023

        gate, gate_error = project(inputs.gate, inputs.gate_bias)
        up, up_error = project(inputs.up, inputs.up_bias)
        assert up is not None
        m = reference.activate(
            gate, up, activation, limits.get("limit", 0.0), limits.get("alpha", 0.0)
        )
        error = _activation_error(activation, m, gate, gate_error, up, up_error)
        tolerance[begin:end] = error + spacing(dtype, m.abs() + error) / 2
    return tolerance


def batch_tolerance(inputs: BatchInputs) -> dict[str, Tensor]:
    """Of expert_statistics, where y is exact: the ops of single statistics, and three sums more.

    out: a float32 sum of k terms g (y + b_d), three roundings a term. input_energy and
    normalized_gate_sum: float64 sums of exact or nearly exact terms, which are not negative.
    """
    rows = inputs.statistics()
    magnitudes = BatchInputs(
        **{
            name: value.abs() if name in ("activations", "down", "down_bias") and value is not None
            else value
            for name, value in vars(inputs).items()
        }
    )  # fmt: skip
    sums = magnitudes.zeros()
    sums["out"] = sums["out"].double()
    reference.expert_statistics(**magnitudes.statistics_arguments(), **sums)
    exact = 4 * sum_tolerance(torch.float64, rows.max_rows + inputs.rows.shape[1])
    of_out = sum_tolerance(torch.float32, inputs.rows.shape[1]) + 3 * unit_roundoff(torch.float32)
    return {
        "out": of_out * sums["out"],
        "normalized_gate_sum": exact * sums["normalized_gate_sum"],
        "input_energy": exact * sums["input_energy"],
        "direction_change": direction_change_tolerance(rows),
        **activation_stats_tolerance(rows),
        **neuron_contribution_tolerance(rows),
    }


def second_moment_tolerance(inputs: StatisticsInputs, has_bias: bool) -> Tensor:
    """g m rounds once to float32, its square has twice that; up to 64 products in float32."""
    sums = inputs.zero_second_moment(has_bias)
    reference.accumulate_second_moment(
        inputs.activations.abs(),
        inputs.gates,
        inputs.offsets,
        **sums,
        has_bias=has_bias,
    )
    relative = sum_tolerance(torch.float32, 64) + 2 * unit_roundoff(torch.float32)
    return relative * sums["second_moment"]
