# SPDX-License-Identifier: Apache-2.0
"""Samples are cut, chosen and batched the same way in every run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.fixtures import Tiny
from support.tiny_models import VOCABULARY, make_tokenizer
from tenp import adapter
from tenp.errors import DataError
from tenp.samples import Samples, generate_answers, tokenize
from tenp.text import TextDomain

_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role[0] }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<s>a{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def _texts(*texts: str) -> TextDomain:
    return TextDomain("d", tuple({"text": text} for text in texts))


def _decoded(samples: Samples, tokenizer) -> list[str]:
    return [tokenizer.decode(ids) for ids in samples.ids]


def test_records_are_cut_off(tokenizer) -> None:
    samples = tokenize(_texts("abcdef", "gh"), tokenizer, max_length=4)
    assert _decoded(samples, tokenizer) == ["abcd", "gh"]
    assert samples.tokens() == 6


def test_a_document_is_cut_into_pieces(tokenizer) -> None:
    domain = TextDomain("d", ({"text": "abcdefg"},), is_document=True)
    assert _decoded(tokenize(domain, tokenizer, 3), tokenizer) == ["abc", "def", "g"]


def test_a_response_follows_its_prompt(tokenizer) -> None:
    domain = TextDomain("d", ({"prompt": "ab", "response": "cd"}, {"prompt": "e"}))
    assert _decoded(tokenize(domain, tokenizer, 9), tokenizer) == ["abcd", "e"]


def test_messages_go_through_the_chat_template(tokenizer) -> None:
    templated = make_tokenizer()
    templated.chat_template = _TEMPLATE
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    samples = tokenize(TextDomain("d", ({"messages": turns},)), templated, 20)
    assert _decoded(samples, templated) == ["<s>uhi<s>ayo"]


def test_messages_without_a_template_are_refused(tokenizer) -> None:
    domain = TextDomain("d", ({"messages": [{"role": "user", "content": "hi"}]},))
    with pytest.raises(DataError, match="messages need a tokenizer with a chat template"):
        tokenize(domain, tokenizer, 20)


def test_a_template_that_refuses_the_messages_is_an_error_of_the_data() -> None:
    templated = make_tokenizer()
    templated.chat_template = "{{ raise_exception('roles must alternate') }}"
    domain = TextDomain("d", ({"messages": [{"role": "user", "content": "hi"}]},))
    with pytest.raises(DataError, match="chat template, which says: roles must alternate"):
        tokenize(domain, templated, 20)


def test_the_seed_chooses_the_samples_and_keeps_their_order(tokenizer) -> None:
    domain = _texts(*"abcdefghij")
    chosen = [_decoded(tokenize(domain, tokenizer, 9, 4, seed), tokenizer) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[0] == sorted(chosen[0])
    assert len(chosen[0]) == 4


def test_more_samples_than_there_are_take_all(tokenizer) -> None:
    assert len(tokenize(_texts("a", "b"), tokenizer, 9, samples=128).ids) == 2


def test_a_domain_without_tokens_is_refused(tokenizer) -> None:
    with pytest.raises(DataError, match="domain d must give at least one token, got none"):
        tokenize(_texts("", ""), tokenizer, 9)


def test_the_tokenizer_of_another_model_is_noticed() -> None:
    other = make_tokenizer(more_tokens=50)
    highest = other.convert_tokens_to_ids("Ġword49")
    domain = _texts("a")
    other.add_tokens(["zzz"])
    with pytest.raises(
        DataError, match=rf"model's {VOCABULARY} embeddings, got token id {highest + 1}"
    ):
        tokenize(_texts("zzz"), other, 9, vocabulary=VOCABULARY)
    assert tokenize(domain, other, 9, vocabulary=VOCABULARY).tokens() == 1


def test_a_digest_tells_samples_apart(tokenizer) -> None:
    digests = {
        tokenize(_texts(*texts), tokenizer, 9).digest()
        for texts in (("ab", "c"), ("a", "bc"), ("abc",))
    }
    assert len(digests) == 3


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 60))
@settings(max_examples=80, deadline=None)
def test_batches_hold_every_sample_once_within_the_limit(lengths: list[int], limit: int) -> None:
    ids = tuple(torch.arange(n) + 100 * row for row, n in enumerate(lengths))
    seen = []
    for batch, mask in Samples("d", ids).batches(limit):
        assert batch.shape == mask.shape
        assert batch.numel() <= limit or len(batch) == 1
        assert mask.any(dim=0).all()  # no column is only padding
        seen += [tuple(row[: int(m.sum())].tolist()) for row, m in zip(batch, mask, strict=True)]
        assert all((m.diff() <= 0).all() for m in mask)  # padding is on the right
    assert sorted(seen) == sorted(tuple(sample.tolist()) for sample in ids)


# ---- answers of the model ----


def test_the_model_answers_the_prompts(tiny: Tiny, tokenizer) -> None:
    model = adapter.load_model(tiny.directory)
    domain = TextDomain("d", ({"prompt": "abc", "response": "left out"}, {"prompt": "de"}))
    runs = [generate_answers(domain, model, tokenizer, 20, 6, seed=0) for _ in range(2)]
    assert runs[0].digest() == runs[1].digest()
    for ids, prompt in zip(runs[0].ids, ("abc", "de"), strict=True):
        assert tokenizer.decode(ids[: len(prompt)]) == prompt
        assert len(prompt) < len(ids) <= len(prompt) + 6


def test_the_last_given_answer_of_a_chat_is_left_out(tiny: Tiny) -> None:
    templated = make_tokenizer()
    templated.chat_template = _TEMPLATE
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant") * 2]
    model = adapter.load_model(tiny.directory)
    samples = generate_answers(TextDomain("d", ({"messages": turns},)), model, templated, 20, 2)
    prompt = "<s>uu<s>aa<s>uu<s>a"
    assert templated.decode(samples.ids[0]).startswith(prompt)
    assert len(samples.ids[0]) <= 4 * 3 - 1 + 2  # a token a letter and a special one a turn


def test_a_record_without_a_prompt_cannot_be_answered(tiny: Tiny, tokenizer) -> None:
    with pytest.raises(DataError, match="must have prompts for the model to answer"):
        generate_answers(_texts("a"), adapter.load_model(tiny.directory), tokenizer, 20, 2)


def test_a_prompt_of_another_models_tokenizer_is_noticed(tiny: Tiny) -> None:
    other = make_tokenizer(more_tokens=50)
    other.add_tokens(["zzz"])
    domain = TextDomain("d", ({"prompt": "zzz"},))
    with pytest.raises(DataError, match="belongs to another model"):
        generate_answers(domain, adapter.load_model(tiny.directory), other, 20, 2)
