# SPDX-License-Identifier: Apache-2.0
"""Pruned models learn: with adapters of PEFT, through Trainer, and in the example that heals one."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from support.fixtures import EXAMPLES, Tiny
from support.tiny_models import token_ids
from tenp.runtime import TenpExperts


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(token_ids()).logits


def train(model: nn.Module, directory: Path, **options: Any) -> None:
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    ids = token_ids()
    Trainer(
        model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]
    ).train()


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_trainer_changes_every_weight_that_a_token_passed(
    tiny: Tiny, tmp_path: Path, bf16: bool
) -> None:
    model = load(tiny.pruned)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, tmp_path / "trainer", bf16=bf16)
    for name, value in model.state_dict().items():
        assert value.isfinite().all(), name
        assert not torch.equal(value, before[name]), name
    # Padding stays zero, so that what is saved is all there is.
    model.save_pretrained(tmp_path / "trained")
    for name, value in load(tmp_path / "trained").state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


#: Linear layers; and the packed experts, where each neuron has a row of its own in B and shares A.
ADAPTERS = [
    pytest.param({"target_modules": "all-linear"}, id="attention-and-shared-expert"),
    pytest.param(
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
        id="routed-experts",
    ),
]


@pytest.mark.parametrize("targets", ADAPTERS)
def test_adapters_train_save_load_and_merge(
    tiny: Tiny, tmp_path: Path, targets: dict[str, Any]
) -> None:
    peft = pytest.importorskip("peft")
    base = logits(load(tiny.pruned))
    model = peft.get_peft_model(load(tiny.pruned), peft.LoraConfig(r=4, **targets))
    train(model, tmp_path / "trainer")
    trained = logits(model)
    assert (trained - base).abs().max() > 1e-3

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tiny.pruned), tmp_path / "adapter")
    assert torch.equal(logits(again), trained)

    merged = again.merge_and_unload()
    assert any(isinstance(module, TenpExperts) for module in merged.modules())
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), trained, rtol=1e-4, atol=1e-4)


def test_the_example_heals(
    tiny: Tiny,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("peft")
    models = (tiny.directory, tiny.pruned, tmp_path / "healed")
    text = ("--text", text_file, "--heldout", text_file, "--block", "32")
    options = ("--epochs", 8)
    monkeypatch.setattr(sys, "argv", ["heal_with_lora.py", *map(str, (*models, *text, *options))])
    runpy.run_path(str(EXAMPLES / "heal_with_lora.py"), run_name="__main__")
    before, after = map(float, re.findall(r"KL from dense (\S+)", capsys.readouterr().out))
    assert after < 0.95 * before
    assert any(isinstance(module, TenpExperts) for module in load(tmp_path / "healed").modules())
