# SPDX-License-Identifier: Apache-2.0
"""The device every op test runs on (the CPU always, CUDA where there is one), other fixtures."""

import pytest
import torch

from support.fixtures import command, text_file, tiny  # noqa: F401 - fixtures
from tenp import _C


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device; skipped where there is none")
    torch.set_num_threads(1)  # two runs that share a machine should not fight for its cores


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda":
        if not _C.cuda_is_available():
            pytest.skip(f"tenp has no CUDA here: {_C.cuda_unavailable_reason()}")
        if not torch.cuda.is_available():
            pytest.skip("this torch has no CUDA")
    return torch.device(request.param)
