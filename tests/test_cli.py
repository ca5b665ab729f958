# SPDX-License-Identifier: Apache-2.0
"""Every command does its stage, speaks JSON when asked, and writes nothing when told not to."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import tenp
from support.fixtures import EXAMPLES, Command, Tiny, files_of
from support.tiny_models import logit_difference
from tenp import adapter
from tenp.checkpoint import Checkpoint
from tenp.plan import Plan
from tenp.statistics import Statistics


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Three small domains."""
    for name in ("a", "b", "c"):
        lines = (json.dumps({"text": f"{name} is line {number}"}) for number in range(6))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return [tmp_path / f"{name}.jsonl" for name in ("a", "b", "c")]


def _prune(tiny: Tiny, texts: list[Path], out: Path) -> list[object]:
    return [
        "prune", tiny.directory, "--calibration", *texts, "--keep", 0.5, "--out", out, "--quiet"
    ]  # fmt: skip


def test_the_stages_one_by_one_do_what_prune_does(
    command: Command, tiny: Tiny, texts: list[Path], tmp_path: Path
) -> None:
    statistics, plan = tmp_path / "statistics.safetensors", tmp_path / "plan.json"
    stages = (
        ("calibrate", tiny.directory, "--calibration", *texts, "--out", statistics, "--quiet"),
        ("plan", statistics, "--keep", 0.5, "--out", plan),
        ("apply", tiny.directory, plan, "--out", tmp_path / "by-stages"),
        _prune(tiny, texts, tmp_path / "at-once"),
    )
    for arguments in stages:
        assert command(*arguments).code == 0
    assert files_of(tmp_path / "by-stages") == files_of(tmp_path / "at-once")
    assert [domain.name for domain in Statistics.load(statistics).domains] == ["a", "b", "c"]


def test_options_may_be_repeated_or_take_several_values(
    command: Command, tiny: Tiny, texts: list[Path], tmp_path: Path
) -> None:
    a, b, c = texts
    together = ("--calibration", a, b, c)
    apart = ("--calibration", a, "--calibration", b, f"--calibration={c}")
    for number, spelled in enumerate((together, apart)):
        out = tmp_path / f"{number}.safetensors"
        assert command("calibrate", tiny.directory, *spelled, "--out", out, "--quiet").code == 0
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()


def test_merging_shards_of_text_gives_what_the_stages_need(
    command: Command, tiny: Tiny, texts: list[Path], tmp_path: Path
) -> None:
    for path in texts[:2]:
        out = path.with_suffix(".safetensors")
        command("calibrate", tiny.directory, "--calibration", path, "--out", out, "--quiet")
    out = tmp_path / "merged.safetensors"
    parts = [path.with_suffix(".safetensors") for path in texts[:2]]
    result = command("merge", *parts, "--out", out, "--json")
    assert [domain["name"] for domain in result.json()["domains"]] == ["a", "b"]
    assert command("plan", out, "--keep", 0.4, "--dry-run", "--json").json()["static_share"] <= 0.4


def test_prune_prints_one_json_document(
    command: Command, tiny: Tiny, texts: list[Path], tmp_path: Path
) -> None:
    evaluate = ("--evaluate", texts[0], "--json")
    content = command(*_prune(tiny, texts, tmp_path / "out"), *evaluate).json()
    assert content["plan"]["static_share"] <= 0.5
    assert content["plan"]["parameters"]["after"] == Checkpoint(tmp_path / "out").parameters
    assert content["before"][0]["domain"] == content["after"][0]["domain"] == "a"
    assert content["before"][0]["divergence"] is None
    assert content["after"][0]["divergence"] > 0
    assert 0 <= content["after"][0]["agreement"] <= 1


def test_the_card_has_what_it_cost(
    command: Command, tiny: Tiny, texts: list[Path], tmp_path: Path
) -> None:
    measured = ("--evaluate", texts[0], "--json")
    content = command(*_prune(tiny, texts, tmp_path / "out"), *measured).json()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| {content['before'][0]['perplexity']:.3f} " in card
    assert f"| {content['after'][0]['divergence']:.4f} " in card


@pytest.mark.parametrize(
    "chosen",
    [
        "--alpha 0.2 --deep 3 --neurons l2 --width-multiple 2 --domain-weight b=2",
        "--method enp --neurons random --seed 3",
        "--method best --pool model --floor 0.4 --domain-weight b=2",
        "--method best --activated 0.4 --worst-domain",
        "--method dern --experts random --dern-init random --seed 3",
    ],
)
def test_the_card_has_a_command_that_decides_the_same(
    command: Command, tiny: Tiny, texts: list[Path], tmp_path: Path, chosen: str
) -> None:
    arguments = [*_prune(tiny, texts, tmp_path / "out"), *chosen.split(), "--no-verify", "--json"]
    content = command(*arguments).json()
    card = (tmp_path / "out" / "README.md").read_text()
    [line] = re.findall(r"^tenp (prune .*)$", card, flags=re.MULTILINE)
    ours = {tiny.directory.name: [tiny.directory], "TEXT...": texts, "DIR": [tmp_path / "again"]}
    arguments = [value for word in shlex.split(line) for value in ours.get(word, [word])]
    again = command(*arguments, "--dry-run", "--json", "--quiet").json()
    assert again["plan"] == content["plan"]


def test_prune_shows_the_plan_and_what_it_cost(
    command: Command, tiny: Tiny, texts: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = command(*_prune(tiny, texts, out), "--evaluate", texts[0], texts[1])
    assert result.code == 0
    assert "routed parameters kept" in result.out
    assert "perplexity before" in result.out
    assert f"written to {out}" in result.out.replace("\n", "")
    assert "warning:" in result.err  # so little text does not cover the experts


@pytest.mark.parametrize("method", ["tenp", "enp"])
def test_a_dry_run_forecasts_what_the_run_gives_and_writes_nothing(
    command: Command, tiny: Tiny, texts: list[Path], tmp_path: Path, method: str
) -> None:
    before = files_of(tmp_path)
    arguments = [*_prune(tiny, texts, tmp_path / "out"), "--method", method, "--json"]
    forecast = command(*arguments, "--dry-run")
    assert files_of(tmp_path) == before
    done = command(*arguments)
    assert forecast.json()["plan"] == done.json()["plan"]
    assert forecast.json()["plan"]["bytes"]["after"] == Checkpoint(tmp_path / "out").bytes


def test_a_dry_run_needs_no_output_and_a_run_does(
    command: Command, tiny: Tiny, texts: list[Path]
) -> None:
    arguments = ("prune", tiny.directory, "--calibration", texts[0], "--keep", 0.5, "--quiet")
    assert command(*arguments, "--dry-run").code == 0
    result = command(*arguments)
    assert result.code == 2
    assert "--out is needed" in result.err


def test_plan_options_reach_the_plan(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    tiny.statistics.save(tmp_path / "s.safetensors")
    out = tmp_path / "plan.json"
    result = command(
        "plan", tmp_path / "s.safetensors", "--keep", 0.6, "--alpha", 0.2, "--shallow", 1,
        "--deep", 1, "--width-multiple", 2, "--neurons", "l2", "--domain-weight", "prose=2", "code=0",
        "--out", out, "--json",
    )  # fmt: skip
    settings = result.json()["settings"]
    assert settings["alpha"] == 0.2
    assert settings["width_multiple"] == 2
    widths = [width for layer in Plan.load(out).widths().values() for width in layer]
    assert sum(width == 24 for width in widths) == 4  # round(0.2 * 18)
    assert all(width % 2 == 0 for width in widths)


@pytest.mark.parametrize(
    "random",
    [
        ("--neurons", "random"),
        ("--experts", "random"),
        ("--method", "dern", "--dern-init", "random"),
    ],
)
def test_a_plan_with_random_choices_records_their_seed(
    command: Command, tiny: Tiny, tmp_path: Path, random: tuple[str, ...]
) -> None:
    tiny.statistics.save(tmp_path / "s.safetensors")
    arguments = ("plan", tmp_path / "s.safetensors", "--keep", 0.5, "--dry-run", "--json", *random)
    for seed in (1, 2):
        settings = command(*arguments, "--seed", seed).json()["settings"]
        assert settings.get("dern", settings)["seed"] == seed
    plain = command(*arguments[:6], "--seed", 1).json()["settings"]
    assert "seed" not in plain


def test_show_knows_every_file(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    tiny.statistics.save(tmp_path / "s.safetensors")
    tiny.plan.save(tmp_path / "p.json")
    shown = {name: command("show", tmp_path / name) for name in ("s.safetensors", "p.json")}
    assert "prose" in shown["s.safetensors"].out
    assert "0 of 24" in shown["p.json"].out or "0-" in shown["p.json"].out
    assert command("show", tiny.pruned).out == shown["p.json"].out


def test_show_speaks_json(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    tiny.statistics.save(tmp_path / "s.safetensors")
    content = command("show", tmp_path / "s.safetensors", "--json").json()
    assert [domain["name"] for domain in content["domains"]] == ["prose", "code"]
    assert sum(content["tokens_per_expert"]["0"]) == 2 * tiny.statistics.tokens()
    content = command("show", tiny.pruned, "--json").json()
    assert content["widths"] == {str(k): v for k, v in tiny.plan.widths().items()}


def test_evaluate_compares_with_a_reference(
    command: Command, tiny: Tiny, texts: list[Path]
) -> None:
    arguments = ("evaluate", tiny.pruned, "--data", *texts, "--quiet")
    content = command(*arguments, "--reference", tiny.directory, "--json").json()
    assert [row["domain"] for row in content] == ["a", "b", "c"]
    assert all(row["divergence"] > 0 for row in content)
    table = command(*arguments).out
    assert "perplexity" in table
    assert "mean" in table


def test_export_writes_a_stock_checkpoint(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "padded"
    assert command("export", tiny.pruned, "--padded", "--out", out).code == 0
    assert Checkpoint(out).config == tiny.checkpoint.config
    card = (out / "README.md").read_text()
    assert card.count("padded copy") == card.count("vllm serve") == 1
    assert "import tenp" not in card
    assert "need tenp" not in card
    ours, theirs = adapter.load_model(out), adapter.load_model(tiny.pruned)
    assert logit_difference(ours, theirs, torch.arange(3, 40)[None]) <= 1e-5


def test_the_model_can_answer_its_prompts_first(
    command: Command, tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "say a"}\n{"prompt": "say b"}\n')
    arguments = ("calibrate", tiny.directory, "--calibration", tmp_path / "p.jsonl", "--quiet")
    for name in ("one", "two"):
        more = ("--self-generate", 5, "--seed", 3, "--out", tmp_path / name)
        assert command(*arguments, *more).code == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    [domain] = Statistics.load(tmp_path / "one").domains
    assert 10 < domain.tokens <= 20


def test_the_version_is_the_packages(command: Command) -> None:
    assert command("--version").out.strip() == tenp.__version__


@pytest.mark.parametrize(
    "name", ["prune", "calibrate", "merge", "plan", "apply", "show", "evaluate", "export"]
)
def test_every_command_has_help(command: Command, name: str) -> None:
    result = command(name, "--help")
    assert result.code == 0
    assert "Usage: " in result.out


def test_help_shows_the_choices_of_an_option(command: Command) -> None:
    shown = command("prune", "--help").out
    for choices in ("tenp|enp|best|drop|dern", "projection|l2|camera", "none|layers|experts"):
        assert choices in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune",),
        ("nonsense",),
        ("prune", "model", "--calibration", "--keep", "0.5"),
        ("prune", "model", "--keep", "much", "--calibration", "a"),
        ("prune", "model", "--keep", "0.5", "--calibration", "a", "--method", "best"),
        ("prune", "model", "--keep", "0.5", "--calibration", "a", "--out", "x", "--method", "bets"),
        ("export", "model", "--out", "x"),
    ],
)
def test_a_command_spelled_wrong_exits_2(command: Command, arguments: tuple[str, ...]) -> None:
    result = command(*arguments)
    assert result.code == 2
    assert result.out == ""


# ---- the example of the README ----


def test_the_example_gives_the_same_bytes_in_two_runs(command: Command, tmp_path: Path) -> None:
    texts = sorted((EXAMPLES / "calibration").glob("*.jsonl"))
    assert len(texts) == 3
    arguments = [
        "prune", EXAMPLES / "tiny-moe", "--calibration", *texts, "--keep", 0.6,
        "--samples", 1, "--max-length", 64, "--quiet", "--json",
    ]  # fmt: skip
    runs = [command(*arguments, "--out", tmp_path / name) for name in ("one", "two")]
    content = runs[0].json()
    assert runs[0].out == runs[1].out
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    # 24 experts of 96 neurons in 6 layers, in steps of 4 neurons.
    assert 0.6 - 4 / (6 * 24 * 96) <= content["plan"]["static_share"] <= 0.6
    widths = content["plan"]["widths"].values()
    whole = [sum(width == 96 for width in layer) for layer in widths]
    assert whole == sorted(whole)  # the trapezoid
    assert sum(whole) == 43  # round(0.3 * 144)
