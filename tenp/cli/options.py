# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, each described once."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from tenp import allocation, planning, scoring, storage, streaming
from tenp import dern as dern_method
from tenp import sequential as sequential_run
from tenp.errors import InvalidArgument
from tenp.execution import Execution
from tenp.memory import parse_bytes


class ManyValues(TyperCommand):
    """A command whose repeatable options also take several values at once: `--calibration a b c`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Spell `--option a b` as `--option a --option b` and go on as usual."""
        repeatable = {
            name
            for option in self.params
            if getattr(option, "multiple", False)
            for name in option.opts
        }
        spread: list[str] = []
        current: str | None = None
        for arg in args:
            if arg.startswith("-"):
                current = arg if arg in repeatable else None
                if current is None:
                    spread.append(arg)
            elif current is not None:
                spread += [current, arg]
            else:
                spread.append(arg)
        return super().parse_args(ctx, spread)


def execution(
    stream: streaming.Stream | None = None,
    memory: str | None = None,
    offload: storage.Offload | None = None,
    work_dir: Path | None = None,
    pruned: Path | None = None,
    sequential: bool = False,
    against_dense: bool = False,
) -> Execution:
    """Return the options that say how a model is run.

    Raises:
        InvalidArgument: They contradict each other.
    """
    if against_dense and not sequential:
        raise InvalidArgument("--against-dense needs --sequential, got it alone")
    return Execution(
        stream,
        parse_bytes(memory) if memory else None,
        offload,
        work_dir,
        pruned,
        sequential_run.Options(against_dense) if sequential else None,
    )


def parse_weights(pairs: list[str]) -> dict[str, float]:
    """Read `NAME=NUMBER` pairs.

    Raises:
        InvalidArgument: A pair is not one.
    """
    weights = {}
    for pair in pairs:
        name, separator, number = pair.rpartition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            separator = ""
        if not separator:
            raise InvalidArgument(f"--domain-weight must be NAME=NUMBER, got {pair}")
    return weights


def parse_shares(text: str) -> list[float]:
    """Read `0.9,0.8,0.7`.

    Raises:
        InvalidArgument: It is something else.
    """
    try:
        return [float(share) for share in text.split(",")]
    except ValueError:
        raise InvalidArgument(f"--frontier must be shares like 0.9,0.8,0.7, got {text}") from None


def dern(
    threshold: float, init: dern_method.Init, weighted: bool, seed: int
) -> dern_method.Options:
    """Return the settings of DERN.

    Raises:
        InvalidArgument: One is out of range.
    """
    if not -1 <= threshold <= 1:
        raise InvalidArgument(f"--dern-threshold must be between -1 and 1, got {threshold}")
    return dern_method.Options(threshold=threshold, init=init, weighted=weighted, seed=seed)


def weights(name: Literal["keep", "int8"]) -> str | None:
    """Return what the experts' weights become; None if they stay."""
    return None if name == "keep" else name


def _panel(title: str) -> Any:
    """An option that `--help` shows under a title of its own."""
    return functools.partial(typer.Option, rich_help_panel=title)


_trapezoid = _panel("Shape of the plan")
_criteria = _panel("How experts and neurons are chosen")
_best = _panel("Method best")
_dern = _panel("Method dern")
_running = _panel("How the model runs")
_memory = _panel("Memory, and runs that go on after a stop")

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Checkpoint directory, or a model name on the Hub."),
]
Calibration = Annotated[
    list[str],
    typer.Option(
        metavar="FILE...",
        help="Calibration text, one domain a file: .jsonl with text, prompt/response or messages, or plain text; "
        "also .gz, NAME=FILE, hf:DATASET[:CONFIG][:SPLIT].",
    ),
]
Out = Annotated[Path, typer.Option(help="Where to write; must not exist.")]
Keep = Annotated[float, typer.Option(help="Share of the routed experts' parameters to keep, 0..1.")]
Method = Annotated[
    planning.Method,
    typer.Option(
        help="tenp: important experts whole, the others narrow. enp: all equally narrow. best: neurons go by what "
        "their loss costs after repair. drop: the least important experts go. dern: they hand on neurons first."
    ),
]
Alpha = Annotated[
    float | None,
    _trapezoid(help="Share of experts kept whole.", show_default="keep / 2"),
]
Shallow = Annotated[float, _trapezoid(help="Weight of the first MoE layer in the trapezoid.")]
Deep = Annotated[float, _trapezoid(help="Weight of the last MoE layer in the trapezoid.")]
WidthMultiple = Annotated[
    int | None,
    _trapezoid(help="Widths are multiples of this.", show_default="64, less for narrow experts"),
]
Neurons = Annotated[scoring.NeuronCriterion, _criteria(help="How neurons are scored.")]
Experts = Annotated[
    scoring.ExpertCriterion | None,
    _criteria(
        help="How experts are scored.",
        show_default="direction-change; normalized-gating-score for dern",
    ),
]
Activated = Annotated[
    float | None,
    _best(help="Share of activated routed parameters to keep at most, 0..1."),
]
Repair = Annotated[
    Literal["none", "ls"],
    _criteria(help="ls: refit the down projections of what is kept. best always does."),
]
Pool = Annotated[
    allocation.Pool,
    _best(help="Where experts compete for widths; model needs --second-pass."),
]
Floor = Annotated[
    float | None,
    _best(help="For --pool model: share that every layer keeps at least.", show_default="keep / 2"),
]
WorstDomain = Annotated[
    bool,
    _best("--worst-domain", help="Minimise the worst domain's relative error."),
]
DernThreshold = Annotated[float, _dern(help="Cosine above which a neuron is handed on.")]
DernInit = Annotated[dern_method.Init, _dern(help="Where the centres start.")]
DernWeights = Annotated[
    bool,
    _dern(help="Weight neurons by the router mass that comes with them."),
]
SecondMoments = Annotated[
    bool,
    typer.Option("--second-moments", help="Also collect what --method best and --repair need."),
]
SecondPass = Annotated[
    bool,
    typer.Option(
        "--second-pass",
        help="Also run with gradients, for the criteria heapr and easy-ep.",
    ),
]
StatisticsFile = Annotated[
    Path | None,
    typer.Option(help="The statistics of the plan; needed when it repairs or rebuilds weights."),
]
DomainWeight = Annotated[
    list[str],
    _criteria(metavar="NAME=NUMBER", help="Weight of a domain, 1 if not given."),
]
UnderCovered = Annotated[
    planning.UnderCovered,
    _criteria(help="What to do with experts that saw fewer than 32 calibration tokens."),
]
Samples = Annotated[int, _running(help="Samples per domain, chosen at random; 0 takes all.", min=0)]
MaxLength = Annotated[
    int | None,
    _running(help="Tokens per sample.", show_default="the model's maximum, 2048 at most"),
]
BatchTokens = Annotated[int, _running(help="Token positions per forward pass.", min=1)]
Seed = Annotated[int, _running(help="For every random choice.")]
DType = Annotated[
    str,
    _running(
        help="auto, float32, bfloat16 or float16; auto is float32 on a CPU, else the checkpoint's."
    ),
]
Device = Annotated[str, _running(help="A torch device, or auto to spread the model.")]
SelfGenerate = Annotated[
    int,
    _running(
        help="Let the model answer every prompt with so many tokens first.",
        min=0,
        metavar="N",
    ),
]
Stream = Annotated[
    streaming.Stream | None,
    _memory(
        help="What is in memory at a time: none holds the whole model, layers one decoder layer, experts one "
        "layer without its routed experts. The result is the same.",
        show_default="what fits --memory, else none",
    ),
]
EvaluationStream = Annotated[
    streaming.Stream | None,
    _memory(
        help="What is in memory at a time: none holds the whole model and its reference, layers one decoder layer, "
        "experts one layer without its routed experts.",
        show_default="none",
    ),
]
Memory = Annotated[
    str | None,
    _memory(
        metavar="AMOUNT",
        help="Memory that may be held, like 4GiB; picks --stream, --offload and smaller batches.",
    ),
]
Offload = Annotated[
    storage.Offload | None,
    _memory(
        help="Where hidden states stay between layers when streaming: device, ram, or a file on disk.",
        show_default="ram; disk if --memory needs it; a GPU without --memory that has room",
    ),
]
WorkDir = Annotated[
    Path | None,
    _memory(
        help="Keep what is finished here, so that the same command goes on after it was stopped."
    ),
]
Pruned = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="A checkpoint pruned from the model: calibrate every layer on what the pruned layers before it put "
        "out, instead of the dense ones.",
    ),
]
Weights = Annotated[
    Literal["keep", "int8"],
    typer.Option(
        help="keep: the experts' weights stay in their dtype. int8: 8 bits and a scale per neuron."
    ),
]
Sequential = Annotated[
    bool,
    _criteria(
        "--sequential",
        help="Choose and refit the neurons of every layer on what the layers before it, pruned already, put out.",
    ),
]
AgainstDense = Annotated[
    bool,
    _criteria(
        "--against-dense",
        help="With --sequential: refit to what the dense model's experts put out.",
    ),
]
Verify = Annotated[
    bool,
    typer.Option(help="Reload what was written and compare it with the masked dense model."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Show the plan and its forecast, write nothing."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
