"""Prompts: structure checked token by token with plain Python."""

import pydoc_data.topics
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch

from utils.checks import check_tokens
from utils.prompts import (
    WORDS,
    induction_prompts,
    kind_prompts,
    long_texts,
    ordinary_tokens,
    repeated_tokens,
    start_token,
)


@pytest.fixture(params=["random_gpt2", "toy2"])
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


def test_long_texts_are_prose_of_topics_and_modules_by_turns(smollm2):
    tokens = long_texts(smollm2, n_texts=6, n_tokens=100)
    assert tokens.shape == (6, 100)
    assert tokens[:, 0].eq(start_token(smollm2)).all()
    manual = [" ".join(text.split()) for text in pydoc_data.topics.topics.values()]
    library = Path(sysconfig.get_paths()["stdlib"]).glob("*.py")
    modules = [" ".join(path.read_text("utf-8", "replace").split()) for path in library]
    used = set()
    for i, text in enumerate(smollm2.tokenizer.batch_decode(tokens[:, 1:].tolist())):
        sources = (manual, modules)[i % 2]
        # the first and last word may be cut, and what a string literal escapes reads otherwise
        parts = [" ".join(paragraph.split()[1:-1]) for paragraph in text.split("\n\n")]
        parts = [part for part in parts if "\\" not in part]
        found = [n for n, source in enumerate(sources) if all(part in source for part in parts)]
        assert found and len(parts) > 0
        used.add((i % 2, found[0]))
    assert len(used) == 6  # each of another topic or module
    other = long_texts(smollm2, n_texts=6, n_tokens=100, seed=1)
    assert not torch.equal(tokens, other)
    assert torch.equal(tokens, long_texts(smollm2, n_texts=6, n_tokens=100))
    many = long_texts(smollm2, n_texts=28, n_tokens=512)  # the notebook's
    assert many.shape == (28, 512)
    paragraphs = [
        text.split("\n\n") for text in smollm2.tokenizer.batch_decode(many[:, 1:].tolist())
    ]
    whole = [paragraph for text in paragraphs for paragraph in text[:-1]]  # the last one is cut
    assert len(whole) == len(set(whole))  # though topics of the manual include each other


def test_lines_of_a_kind_share_a_label_and_no_word(smollm2):
    model, n_lines = smollm2, 12
    task = kind_prompts(model, n_prompts=5, n_lines=n_lines, seed=3)
    assert (task.tokens[:, 0] == start_token(model)).all()
    for row, same, answer in zip(task.tokens, task.same_kind, task.answers, strict=True):
        lines = model.tokenizer.decode(row[1:]).strip("\n").split("\n")
        assert len(lines) == n_lines + 1
        words = [line.split(":")[0].split() for line in lines]
        assert len({word for line in words for word in line}) == 2 * len(lines)
        kinds = [
            2 * (first in WORDS[1].split()) + (second in WORDS[3].split())
            for first, second in words
        ]
        labels = [line.split(": ")[1] for line in lines[:-1]]
        assert labels == ["ABCD"[kind] for kind in kinds[:-1]] and lines[-1].endswith(":")
        assert Counter(labels) == dict.fromkeys("ABCD", n_lines // 4)
        assert same.tolist() == [kind == kinds[-1] for kind in kinds[:-1]]
        shown = model.tokenizer.batch_decode(row[task.label_positions][:, None])
        assert [label.strip() for label in shown] == labels
        assert model.tokenizer.decode(answer).strip() == "ABCD"[kinds[-1]]
    assert len(set(task.answers.tolist())) > 1 and task.labels.shape == (4,)


@pytest.mark.parametrize(
    ("make", "counts", "message"),
    [
        (repeated_tokens, [1, 200], "prompts of 401 tokens exceed the context of 256"),
        (induction_prompts, [1, 6], "seq_len must be at least 7"),
        (induction_prompts, [1, 150], "exceed the context of 256"),
        (kind_prompts, [1, 6], "n_lines must be a multiple of 4, got 6"),
        (kind_prompts, [1, 24], "n_lines=24 needs more words than this tokenizer has"),
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
    with pytest.raises(ValueError, match="needs a model with a tokenizer"):
        kind_prompts(toy2, 1)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.ones(1, 300).long(), ValueError, "exceed the context of 256"),
        (torch.tensor([[1, 10**6]]), ValueError, "must lie in 0..49151, got 1..1000000"),
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
