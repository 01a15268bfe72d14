"""Prompts: structure checked token by token with plain Python."""

import pydoc_data.topics

import pytest
import torch

from utils.prompts import (
    check_tokens,
    induction_prompts,
    long_texts,
    ordinary_tokens,
    repeated_tokens,
    start_token,
)


@pytest.fixture(params=["smollm2", "random_gpt2", "toy2"])
def model(request):
    return request.getfixturevalue(request.param)


def copy_what_followed(row):
    """An ideal induction head: the token after the last earlier copy of the final token."""
    *before, last = row
    return max((i, row[i + 1]) for i, token in enumerate(before) if token == last)[1]


def test_start_token_is_the_one_the_model_prepends(smollm2):
    assert start_token(smollm2) == smollm2.to_tokens("Hello there")[0, 0].item()


def test_ordinary_tokens_are_neither_special_nor_outside_the_vocabulary(model):
    tokens = ordinary_tokens(model).tolist()
    assert len(set(tokens)) == len(tokens) > 50
    assert max(tokens) < model.cfg.d_vocab
    special = [] if model.tokenizer is None else model.tokenizer.all_special_ids
    assert not {start_token(model), *special} & set(tokens)


@pytest.mark.parametrize("n_repeats", [2, 4])
def test_repeated_tokens_are_distinct_tokens_said_again(model, n_repeats):
    rows = repeated_tokens(model, n_prompts=5, seq_len=7, n_repeats=n_repeats).tolist()
    assert len({tuple(row) for row in rows}) == 5
    for start, *rest in rows:
        assert start == start_token(model)
        assert rest == rest[:7] * n_repeats
        assert len(set(rest)) == 7
        assert set(rest) <= set(ordinary_tokens(model).tolist())


def test_repeated_tokens_depend_on_the_seed_alone(model):
    torch.manual_seed(1)
    first = repeated_tokens(model, 3, 10, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, repeated_tokens(model, 3, 10, seed=5))
    assert not torch.equal(first, repeated_tokens(model, 3, 10, seed=6))


@pytest.mark.parametrize("seq_len", [7, 10])
def test_induction_prompts_flip_the_answer_by_the_stated_positions_alone(model, seq_len):
    clean, corrupted, answers, at = induction_prompts(model, n_prompts=6, seq_len=seq_len)
    rows, (right, wrong) = clean.tolist(), answers.T.tolist()
    assert (answers[:, 0] != answers[:, 1]).all()
    assert [copy_what_followed(row) for row in rows] == right
    for row in rows:
        assert row[0] == start_token(model)
        assert row[1 + seq_len :] == row[1 : len(row) - seq_len]
    assert at["END"] == clean.shape[1] - 1
    assert torch.equal(answers, clean[:, [at["B"], at["D"]]])
    changed = {"query": ["END"], "key": ["A", "C"], "value": ["B", "D"]}
    assert set(corrupted) == set(changed)
    for name, places in changed.items():
        assert [copy_what_followed(row) for row in corrupted[name].tolist()] == wrong
        different = (corrupted[name] != clean).any(0).nonzero().flatten().tolist()
        assert different == sorted(at[place] for place in places)
    assert torch.equal(corrupted["query"][:, -1], clean[:, at["C"]])
    assert torch.equal(corrupted["key"][:, at["A"]], clean[:, at["C"]])
    assert torch.equal(corrupted["value"][:, at["D"]], clean[:, at["B"]])


def test_long_texts_are_stretches_of_the_manual_each_used_once(smollm2):
    tokens = long_texts(smollm2, n_texts=6, n_tokens=100)
    assert tokens.shape == (6, 100)
    assert tokens[:, 0].eq(start_token(smollm2)).all()
    manual = " ".join(" ".join(pydoc_data.topics.topics.values()).split())
    rows = tokens[:, 1:].tolist()
    for text in smollm2.tokenizer.batch_decode(rows):
        for paragraph in text.split("\n\n"):  # the first and last word may be cut
            assert " ".join(paragraph.split()[1:-1]) in manual
    assert len({tuple(row[i : i + 20]) for row in rows for i in range(80)}) == 6 * 80


@pytest.mark.parametrize(
    ("make", "counts", "message"),
    [
        (repeated_tokens, [0, 5], "n_prompts must be at least 1, got 0"),
        (repeated_tokens, [1, 0], "seq_len must be at least 1, got 0"),
        (repeated_tokens, [1, 5, 0], "n_repeats must be at least 1, got 0"),
        (repeated_tokens, [1, 200], "prompts of 401 tokens exceed the context of 256"),
        (induction_prompts, [0], "n_prompts must be at least 1, got 0"),
        (induction_prompts, [1, 6], "seq_len must be at least 7"),
        (induction_prompts, [1, 150], "exceed the context of 256"),
        (long_texts, [0, 50], "n_texts must be at least 1, got 0"),
        (long_texts, [1, 1], "n_tokens must be at least 2, got 1"),
        (long_texts, [1, 300], "texts of 300 tokens exceed the context of 256"),
        (long_texts, [9999, 200], r"only \d+ texts of 200 tokens exist, got n_texts=9999"),
    ],
)
def test_bad_counts_are_named(random_gpt2, make, counts, message):
    with pytest.raises(ValueError, match=message):
        make(random_gpt2, *counts)


def test_a_toy_has_few_tokens_and_no_tokenizer(toy2, monkeypatch):
    monkeypatch.setattr(toy2.cfg, "n_ctx", 1000)
    with pytest.raises(ValueError, match=r"seq_len must be at most 63 .*, got 128"):
        repeated_tokens(toy2, 1, 128)
    with pytest.raises(ValueError, match="needs a model with a tokenizer"):
        long_texts(toy2, 1, 20)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([1, 2], TypeError, "tokens must be Int.* got .*list"),
        (torch.ones(2, 3), TypeError, "tokens must be Int"),
        (torch.ones(3).long(), TypeError, r"'prompt pos'.* of shape \[3\]"),
        (torch.ones(0, 3).long(), ValueError, "is empty"),
        (torch.ones(1, 300).long(), ValueError, "exceed the context of 256"),
        (torch.tensor([[1, 10**6]]), ValueError, "must lie in 0..49151, got 1..1000000"),
        (torch.tensor([[1, -2]]), ValueError, "got -2..1"),
        (torch.tensor([[1, 4], [2, 4]]), ValueError, r"prompt 1 begins with padding \(token 2\)"),
    ],
)
def test_check_tokens_names_what_is_wrong(random_gpt2, tokens, error, message):
    assert random_gpt2.tokenizer.pad_token_id == 2
    with pytest.raises(error, match=message):
        check_tokens(random_gpt2, tokens)


def test_where_padding_is_the_start_token_one_of_them_is_a_start(random_gpt2):
    tokenizer = random_gpt2.tokenizer
    before, tokenizer.pad_token = tokenizer.pad_token, tokenizer.bos_token
    try:
        for fine in ([[1, 4, 5]], [[1, 1]]):
            check_tokens(random_gpt2, torch.tensor(fine))
        with pytest.raises(ValueError, match="prompt 1 begins with padding"):
            check_tokens(random_gpt2, torch.tensor([[1, 4, 5], [1, 1, 5]]))
    finally:
        tokenizer.pad_token = before
