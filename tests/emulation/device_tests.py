# SPDX-License-Identifier: Apache-2.0
"""What the device of `cuda_device.py` promises, so that a program that runs on it runs on a GPU."""

import pytest
import torch

pytestmark = pytest.mark.cuda


def test_arrays_of_two_devices_do_not_mix() -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    for operation in (
        lambda: here + there,
        lambda: torch.cat([here, there]),
        lambda: there.index_add_(0, torch.tensor([0]), torch.ones(1, device="cuda")),
        lambda: torch.nn.functional.linear(here, there[None]),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            operation()


def test_single_numbers_and_indices_may_come_from_the_cpu() -> None:
    there = torch.arange(3.0, device="cuda")
    assert (there * torch.tensor(2.0)).tolist() == [0, 2, 4]
    assert there[torch.tensor([2, 0])].tolist() == [2, 0]


def test_results_stay_and_copies_go_over() -> None:
    there = torch.arange(6.0, device="cuda")
    assert there.sum().device == there.device == torch.device("cuda:0")
    assert (there.cpu().device, there.tolist()) == (torch.device("cpu"), [0, 1, 2, 3, 4, 5])
    there.view(2, 3)[1].mul_(10)
    assert there.tolist() == [0, 1, 2, 30, 40, 50]


def test_fresh_memory_is_nan() -> None:
    assert torch.empty(5, device="cuda").isnan().all()


def test_gradients_are_on_the_device() -> None:
    x = torch.ones(3, device="cuda", requires_grad=True)
    (x * x).sum().backward()
    assert x.grad is not None
    assert (x.grad.device, x.grad.tolist()) == (x.device, [2, 2, 2])
