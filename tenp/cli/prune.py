# SPDX-License-Identifier: Apache-2.0
"""`tenp prune`: the whole job."""

from __future__ import annotations

from typing import Annotated

import typer

from tenp import pipeline
from tenp.cli import display, options
from tenp.distributed import Group
from tenp.planning import Budget


def command(
    model: options.Model,
    calibration: options.Calibration,
    keep: options.Keep,
    out: Annotated[
        options.Path | None, typer.Option(help="Where to write; must not exist.")
    ] = None,
    method: options.Method = "tenp",
    alpha: options.Alpha = None,
    shallow: options.Shallow = 1.0,
    deep: options.Deep = 2.0,
    width_multiple: options.WidthMultiple = None,
    neurons: options.Neurons = "projection",
    domain_weight: options.DomainWeight = [],  # noqa: B006 - typer copies it
    under_covered: options.UnderCovered = "warn",
    experts: options.Experts = None,
    activated: options.Activated = None,
    pool: options.Pool = "layer",
    floor: options.Floor = None,
    repair: options.Repair = "none",
    worst_domain: options.WorstDomain = False,
    dern_threshold: options.DernThreshold = 0.6,
    dern_init: options.DernInit = "max-gate",
    dern_weights: options.DernWeights = True,
    evaluate: Annotated[
        list[str],
        typer.Option(metavar="FILE...", help="Text to measure the model on, before and after."),
    ] = [],  # noqa: B006 - typer copies it
    samples: options.Samples = 128,
    max_length: options.MaxLength = None,
    batch_tokens: options.BatchTokens = 4096,
    seed: options.Seed = 0,
    dtype: options.DType = "auto",
    device: options.Device = "cpu",
    self_generate: options.SelfGenerate = 0,
    stream: options.Stream = None,
    memory: options.Memory = None,
    offload: options.Offload = None,
    work_dir: options.WorkDir = None,
    sequential: options.Sequential = False,
    against_dense: options.AgainstDense = False,
    weights: options.Weights = "keep",
    verify: options.Verify = True,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Prune a checkpoint: calibrate, plan, write, verify, measure."""
    budget = Budget(keep, method, alpha, shallow, deep, width_multiple, activated, pool, floor)
    run = pipeline.Run(
        samples or None,
        max_length,
        batch_tokens,
        seed,
        dtype,
        device,
        self_generate,
        options.execution(stream, memory, offload, work_dir, None, sequential, against_dense),
    )
    is_first = Group.from_environment().rank == 0
    if out is None and not dry_run:
        raise typer.BadParameter("--out is needed unless --dry-run is given")
    with display.progress(quiet or not is_first, json) as report:
        pruned = pipeline.prune(
            model,
            calibration,
            None if dry_run else out,
            budget,
            run,
            evaluate_on=evaluate,
            report=report,
            verify=verify,
            weights=options.weights(weights),
            neuron_criterion=neurons,
            domain_weights=options.parse_weights(domain_weight),
            under_covered=under_covered,
            expert_criterion=experts,
            refit=repair == "ls",
            worst_domain=worst_domain,
            seed=seed,
            dern_options=options.dern(dern_threshold, dern_init, dern_weights, seed),
        )
    if not is_first:
        return
    display.warn_of_coverage(pruned.statistics)
    if json:
        display.print_json(
            {
                "plan": display.applied_summary(pruned.plan, pruned.rounding, out),
                "before": display.evaluation_rows(pruned.before),
                "after": display.evaluation_rows(pruned.after),
            }
        )
        return
    display.print_plan(pruned.plan)
    display.print_rounding(pruned.rounding, out)
    if pruned.after:
        display.print_evaluations(pruned.after, pruned.before)
    if not dry_run:
        print(f"written to {out}")
