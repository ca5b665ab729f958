# SPDX-License-Identifier: Apache-2.0
"""The gradient of expert_gemm against torch's own gradient of the reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from support.op_cases import (
    ACTIVATION_CASES,
    FLOAT_DTYPES,
    ExpertGemmCase,
    ExpertGemmInputs,
    make_expert_gemm,
)
from support.tolerance import assert_close, assert_similar, sum_tolerance, unit_roundoff
from tenp.errors import Unsupported
from tenp.ops import expert_gemm, reference

#: In the order of the argument `wanted`.
DIFFERENTIABLE = ("hidden", "gates", "gate_up", "down", "gate_up_bias", "down_bias")
BACKWARD = torch.ops.tenp.expert_gemm_backward.default
ALL_ARGUMENTS = ExpertGemmCase(
    tokens=17, pattern="duplicates", activation="swiglu_oai", bias=True, limit=1.0, alpha=1.702
)


def weights_of_outputs(inputs: ExpertGemmInputs) -> Tensor:
    """What the outputs are multiplied by in the sum that is differentiated; `[T, H]`, float64."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(inputs.hidden.shape, generator=generator, dtype=torch.float64)


def converted(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def differentiable(arguments: dict[str, Any]) -> list[str]:
    return [name for name in DIFFERENTIABLE if arguments[name] is not None]


def of_the_reference(inputs: ExpertGemmInputs) -> dict[str, Tensor]:
    arguments = converted(inputs.arguments(), torch.float64)
    names = differentiable(arguments)
    wrt = [arguments[name].requires_grad_() for name in names]
    out = reference.expert_gemm(**arguments)
    return dict(zip(names, torch.autograd.grad(out, wrt, weights_of_outputs(inputs)), strict=True))


def through_the_op(
    inputs: ExpertGemmInputs, device: torch.device, names: list[str] | None = None
) -> dict[str, Tensor]:
    arguments = inputs.to(device).arguments()
    names = names or differentiable(arguments)
    wrt = [arguments[name].requires_grad_() for name in names]
    out = expert_gemm(**arguments)
    found = torch.autograd.grad(out, wrt, weights_of_outputs(inputs).to(out))
    for name, gradient, argument in zip(names, found, wrt, strict=True):
        assert gradient.dtype == argument.dtype, name
    return dict(zip(names, (gradient.cpu() for gradient in found), strict=True))


@pytest.mark.parametrize("case", ACTIVATION_CASES)
def test_in_float64_it_is_that_of_the_reference(case: ExpertGemmCase) -> None:
    inputs = make_expert_gemm(replace(case, pattern="duplicates"))
    arguments = converted(inputs.arguments(), torch.float64)
    wanted = [arguments[name] is not None for name in DIFFERENTIABLE]
    found = BACKWARD(weights_of_outputs(inputs), **arguments, wanted=wanted)
    expected = of_the_reference(inputs)
    terms = 2 * case.hidden_size + 2 * max(case.widths) + case.tokens
    for (name, exact), gradient in zip(expected.items(), found, strict=True):
        # Of the largest: terms of any element are of about that size.
        tolerance = sum_tolerance(torch.float64, terms) * exact.abs().max()
        assert_close(name, gradient, exact, tolerance)


class _ReferenceWithOurGradient(torch.autograd.Function):
    """The op takes no float64; its gradient does."""

    @staticmethod
    def forward(ctx: Any, arguments: dict[str, Any], *tensors: Tensor) -> Tensor:
        ctx.arguments = {**arguments, **dict(zip(DIFFERENTIABLE, tensors, strict=True))}
        return reference.expert_gemm(**ctx.arguments)

    @staticmethod
    def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *BACKWARD(of_out, **ctx.arguments, wanted=[True] * 6)


def test_gradcheck() -> None:
    case = replace(ALL_ARGUMENTS, tokens=4, hidden_size=3, widths=(2, 0, 3), experts_per_token=2)
    arguments = converted(make_expert_gemm(case).arguments(), torch.float64)
    tensors = [arguments[name].requires_grad_() for name in DIFFERENTIABLE]
    assert torch.autograd.gradcheck(
        lambda *tensors: _ReferenceWithOurGradient.apply(arguments, *tensors), tensors
    )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_computed_in_float32_and_rounded_once(
    bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    case = ExpertGemmCase(tokens=129, bias=bias, dtype=dtype)
    inputs = make_expert_gemm(case)
    terms = 2 * case.hidden_size + 2 * max(case.widths) + case.tokens
    # Rounded besides the result: m, and the weights of the outputs.
    tolerance = 3 * unit_roundoff(dtype) + sum_tolerance(torch.float32, terms)
    expected = of_the_reference(inputs)
    for name, gradient in through_the_op(inputs, device).items():
        assert_similar(name, gradient, expected[name], tolerance)


def test_only_what_is_wanted_is_computed_and_the_rest_changes_nothing(
    device: torch.device,
) -> None:
    inputs = make_expert_gemm(ALL_ARGUMENTS)
    together = through_the_op(inputs, device)
    assert list(together) == list(DIFFERENTIABLE)
    for name, expected in together.items():
        alone = through_the_op(make_expert_gemm(ALL_ARGUMENTS), device, [name])
        assert torch.equal(alone[name], expected), name


def test_strides_change_nothing(device: torch.device) -> None:
    expected = through_the_op(make_expert_gemm(ALL_ARGUMENTS), device)
    inputs = make_expert_gemm(ALL_ARGUMENTS)
    inputs.hidden = torch.cat([inputs.hidden, inputs.hidden], dim=1)[:, :48]
    inputs.gates = inputs.gates.T.contiguous().T
    inputs.expert_ids = inputs.expert_ids.long().T.contiguous().T
    for name, gradient in through_the_op(inputs, device).items():
        assert torch.equal(gradient, expected[name]), name


def test_it_compiles_with_its_gradient_into_one_graph(device: torch.device) -> None:
    inputs = make_expert_gemm(ALL_ARGUMENTS).to(device)

    def loss(hidden: Tensor, gates: Tensor, gate_up: Tensor) -> Tensor:
        arguments = {**inputs.arguments(), "hidden": 2 * hidden, "gates": gates, "gate_up": gate_up}
        return expert_gemm(**arguments).square().sum()

    wrt = [tensor.requires_grad_() for tensor in (inputs.hidden, inputs.gates, inputs.gate_up)]
    expected = torch.autograd.grad(loss(*wrt), wrt)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, eager in zip(torch.autograd.grad(compiled(*wrt), wrt), expected, strict=True):
        assert torch.equal(found, eager)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_it_is_the_same_inside_autocast(dtype: torch.dtype, device: torch.device) -> None:
    inputs = make_expert_gemm(replace(ALL_ARGUMENTS, dtype=dtype))
    expected = through_the_op(inputs, device)
    with torch.autocast(device.type, torch.bfloat16):
        found = through_the_op(inputs, device)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_a_second_derivative_is_refused(device: torch.device) -> None:
    inputs = make_expert_gemm(ExpertGemmCase()).to(device)
    inputs.hidden.requires_grad_()
    out = expert_gemm(**inputs.arguments())
    [first] = torch.autograd.grad(out.square().sum(), [inputs.hidden], create_graph=True)
    with pytest.raises(Unsupported, match="first derivatives only"):
        first.sum().backward()
