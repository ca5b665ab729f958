# SPDX-License-Identifier: Apache-2.0
"""A pruned model goes to the Hub as any other does; the Hub is a stand-in here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForCausalLM

from support.fixtures import Tiny, files_of
from support.tiny_models import token_ids


def test_what_push_to_hub_sends_loads_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = tmp_path / "sent"
    sent.mkdir()

    def create_repo(_: HfApi, repo_id: str, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def no_card(*_: Any, **__: Any) -> ModelCard:
        raise EntryNotFoundError("the stand-in has no card")

    def create_commit(
        _: HfApi, repo_id: str, operations: list[CommitOperationAdd], **__: Any
    ) -> None:
        assert repo_id == "acme/small-moe"
        for operation in operations:
            with operation.as_file() as file:
                (sent / operation.path_in_repo).write_bytes(file.read())

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(ModelCard, "load", no_card)
    model = AutoModelForCausalLM.from_pretrained(tiny.pruned)
    model.push_to_hub("acme/small-moe", tags=["tenp"])

    model.save_pretrained(tmp_path / "saved")
    expected = files_of(tmp_path / "saved")
    assert {name: data for name, data in files_of(sent).items() if name != "README.md"} == expected
    assert "tenp" in ModelCard((sent / "README.md").read_text()).data.tags
    again = AutoModelForCausalLM.from_pretrained(sent)
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
