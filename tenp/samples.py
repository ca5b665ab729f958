# SPDX-License-Identifier: Apache-2.0
"""Text to token ids, and answers that the model writes itself."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tenp.errors import DataError
from tenp.text import Record, TextDomain

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Samples:
    """The token ids of one domain.

    Attributes:
        domain: Its name.
        ids: One `[n]` int64 tensor per sample, n >= 1.
    """

    domain: str
    ids: tuple[Tensor, ...]

    def tokens(self) -> int:
        """Return the number of tokens of all samples."""
        return sum(len(ids) for ids in self.ids)

    def digest(self) -> str:
        """Return the SHA-256 of all token ids, sample by sample."""
        digest = hashlib.sha256()
        for ids in self.ids:
            digest.update(len(ids).to_bytes(8, "little") + ids.numpy().tobytes())
        return digest.hexdigest()

    def batches(
        self, batch_tokens: int, device: torch.device = _CPU
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (ids, attention mask), each `[B, n]` int64, right-padded, the longest samples first.

        Samples of like length share a batch, so that little is padded; the order is the same in
        every run.

        Args:
            batch_tokens: A batch has at most so many positions, and at least one sample.
            device: Where the tensors go.
        """
        ordered = sorted(self.ids, key=len, reverse=True)
        while ordered:
            length = len(ordered[0])
            count = max(batch_tokens // length, 1)
            batch, ordered = ordered[:count], ordered[count:]
            ids = torch.zeros(len(batch), length, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, sample in enumerate(batch):
                ids[row, : len(sample)] = sample
                mask[row, : len(sample)] = 1
            yield ids.to(device), mask.to(device)


def tokenize(
    domain: TextDomain,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    samples: int | None = None,
    seed: int = 0,
    vocabulary: int | None = None,
) -> Samples:
    """Turn a domain into samples of at most `max_length` tokens.

    Args:
        domain: Records are cut off at `max_length`; a document is cut into pieces of that length.
        tokenizer: The model's own.
        max_length: Tokens per sample.
        samples: Take so many at random (in their order), or all if None or if there are fewer.
        seed: For the choice.
        vocabulary: Embeddings the model has, to notice a tokenizer of another model.

    Raises:
        DataError: The tokenizer does not match the model or cannot format chats, or nothing is left.
    """
    if domain.is_document:
        text = domain.records[0]["text"]
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
        pieces = list(ids.split(max_length))
        chosen = _choose(pieces, samples, seed)
    else:
        records = _choose(domain.records, samples, seed)
        chosen = [_token_ids(record, tokenizer)[:max_length] for record in records]
    chosen = [ids for ids in chosen if len(ids) > 0]
    if not chosen:
        raise DataError(f"domain {domain.name} must give at least one token, got none")
    _check_vocabulary(chosen, vocabulary)
    return Samples(domain.name, tuple(chosen))


@torch.no_grad()
def generate_answers(
    domain: TextDomain,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    new_tokens: int,
    samples: int | None = None,
    seed: int = 0,
) -> Samples:
    """Let the model answer the prompts of a domain; a sample is a prompt and its answer.

    Answers are sampled with the model's own generation settings, one prompt at a time.

    Args:
        domain: Records with `prompt` or `messages`; given responses are left out.
        model: Answers.
        tokenizer: Its tokenizer.
        max_length: Tokens of a prompt and its answer at most; a longer prompt loses its beginning,
            because its end asks for the answer.
        new_tokens: Tokens of an answer at most, fewer than `max_length`.
        samples: As in `tokenize`.
        seed: For the choice of prompts and for sampling.

    Raises:
        DataError: A record has no prompt, the tokenizer does not match the model, or answers are
            as long as samples may be.
    """
    if new_tokens >= max_length:
        raise DataError(
            f"answers must leave room for a prompt in {max_length} tokens, got {new_tokens} tokens an answer"
        )
    room = max_length - new_tokens
    prompts = [
        _token_ids(_prompt_only(record, domain.name), tokenizer, answer_follows=True)[-room:]
        for record in _choose(domain.records, samples, seed)
    ]
    prompts = [ids for ids in prompts if len(ids) > 0]
    if not prompts:
        raise DataError(f"domain {domain.name} must give at least one prompt, got none")
    embeddings: Any = model.get_input_embeddings()
    _check_vocabulary(prompts, embeddings.num_embeddings)
    torch.manual_seed(seed)
    answered = []
    generation: Any = model  # generate() comes from a mixin that the type does not show
    for prompt in prompts:
        ids = prompt[None].to(model.device)
        output = generation.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens
        )
        answered.append(output[0].cpu())
    return Samples(domain.name, tuple(answered))


def _check_vocabulary(samples: Sequence[Tensor], vocabulary: int | None) -> None:
    highest = max(int(ids.max()) for ids in samples)
    if vocabulary is not None and highest >= vocabulary:
        raise DataError(
            f"the tokenizer must match the model's {vocabulary} embeddings, got token id {highest}: "
            "it belongs to another model"
        )


def _prompt_only(record: Record, domain: str) -> Record:
    if "messages" in record:
        last = max(
            (at for at, turn in enumerate(record["messages"]) if turn.get("role") == "user"),
            default=-1,
        )
        if last >= 0:
            return {"messages": record["messages"][: last + 1]}
    elif "prompt" in record:
        return {"prompt": record["prompt"]}
    raise DataError(
        f"domain {domain} must have prompts for the model to answer, got a record without one"
    )


def _token_ids(
    record: Record, tokenizer: PreTrainedTokenizerBase, answer_follows: bool = False
) -> Tensor:
    if "messages" in record:
        if not tokenizer.chat_template:
            raise DataError(
                "messages need a tokenizer with a chat template, got one without; use text or prompt"
            )
        try:
            text = tokenizer.apply_chat_template(
                record["messages"], tokenize=False, add_generation_prompt=answer_follows
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"messages must fit the tokenizer's chat template, which says: {error}"
            ) from error
        # The template writes the special tokens itself.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        text = (
            record["prompt"] + record.get("response", "") if "prompt" in record else record["text"]
        )
        ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _choose(items: Sequence[Any], count: int | None, seed: int) -> list[Any]:
    if count is None or count >= len(items):
        return list(items)
    return [items[at] for at in sorted(random.Random(seed).sample(range(len(items)), count))]
