# SPDX-License-Identifier: Apache-2.0
"""Calibration layer by layer gives the bits of calibration in memory."""

from pathlib import Path

import pytest
import torch
from support.tiny_models import FAMILIES, make_samples, save_model

from tenp import adapter, calibration, pruning, streaming
from tenp.checkpoint import Checkpoint
from tenp.layerwise import LayerwiseModel
from tenp.reading import Reader


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_statistics_are_those_of_a_run_in_memory(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "model", family))
    source = pruning.source_of(checkpoint)
    samples = [make_samples("prose", seed=0), make_samples("code", (25, 50), seed=1)]
    model = adapter.load_model(checkpoint.directory, torch.float32)
    expected = calibration.collect(model, samples, source, batch_tokens=100)
    for stream in ("layers", "experts"):
        layerwise = LayerwiseModel(Reader(checkpoint), torch.float32)
        streamed = streaming.collect(layerwise, samples, source, batch_tokens=100, stream=stream)
        assert streamed.digest() == expected.digest()
