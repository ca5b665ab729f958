# SPDX-License-Identifier: Apache-2.0
"""`tenp calibrate`: text to statistics."""

from __future__ import annotations

from tenp import pipeline
from tenp.checkpoint import Checkpoint
from tenp.cli import display, options
from tenp.distributed import Group
from tenp.files import require_absent


def command(
    model: options.Model,
    calibration: options.Calibration,
    out: options.Out,
    samples: options.Samples = 128,
    max_length: options.MaxLength = None,
    batch_tokens: options.BatchTokens = 4096,
    seed: options.Seed = 0,
    dtype: options.DType = "auto",
    device: options.Device = "cpu",
    self_generate: options.SelfGenerate = 0,
    second_moments: options.SecondMoments = False,
    second_pass: options.SecondPass = False,
    stream: options.Stream = None,
    memory: options.Memory = None,
    offload: options.Offload = None,
    work_dir: options.WorkDir = None,
    pruned: options.Pruned = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run the dense model over text once and keep the sums that every plan is made from."""
    execution = options.execution(stream, memory, offload, work_dir, pruned)
    if work_dir is None:
        require_absent(out)
    run = pipeline.Run(
        samples or None,
        max_length,
        batch_tokens,
        seed,
        dtype,
        device,
        self_generate,
        execution,
        second_moments,
        second_pass,
    )
    is_first = Group.from_environment().rank == 0
    with display.progress(quiet or not is_first, json) as report:
        statistics = pipeline.calibrate(Checkpoint.resolve(model), calibration, run, report)
    if not is_first:
        return
    pipeline.save_statistics(statistics, out)
    display.warn_of_coverage(statistics)
    display.show_statistics(statistics, json)
