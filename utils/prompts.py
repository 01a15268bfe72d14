"""Prompts: repeated random tokens, induction prompts, kinds of words, English text."""

import ast
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from utils.checks import check_count, check_length, generator_of, start_token
from utils.typed import checked

WORDS = (  # two that a line may begin with, two for its second word
    "January February March April May June July August September October November December",
    "red blue green yellow black white purple pink brown gray silver violet amber",
    "cat dog horse cow pig sheep bird fish lion tiger bear wolf mouse rabbit monkey frog snake",
    "apple banana lemon grape cherry peach mango pear plum berry olive coconut tomato fig lime",
)


class InductionPrompts(NamedTuple):
    """Clean and corrupted induction prompts of one length; see `induction_prompts`."""

    clean: Int[Tensor, "prompt pos"]
    corrupted: dict[str, Int[Tensor, "prompt pos"]]
    answers: Int[Tensor, "prompt 2"]
    positions: dict[str, int]


@checked
def ordinary_tokens(model: TransformerBridge) -> Int[Tensor, "token"]:
    """Tokens random prompts are drawn from: neither special, nor among the most or least common.

    A BPE vocabulary is numbered roughly by frequency, so this keeps the ids from 2 % to 20 % of
    the vocabulary (about 1,000 to 10,000 in GPT-2 and SmolLM2), as Olsson et al. 2022 (appendix)
    and Wang et al. 2022 (code) do. Without a tokenizer: every token but the start token.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        return torch.arange(1, model.cfg.d_vocab)
    size = min(len(tokenizer), model.cfg.d_vocab)
    special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return torch.tensor([t for t in range(size // 50, size // 5) if t not in special])


@checked
def repeated_tokens(
    model: TransformerBridge, n_prompts: int, seq_len: int, n_repeats: int = 2, seed: int = 0
) -> Int[Tensor, "prompt pos"]:
    """Start token, then `n_repeats` copies of `seq_len` random tokens (pos = 1 + copies).

    Tokens are distinct within a copy and drawn uniformly from `ordinary_tokens`, with a CPU
    generator, so a seed means the same data on every machine. Raises ValueError for counts below
    one, too few ordinary tokens, or prompts longer than the context.
    """
    for name, count in (("n_prompts", n_prompts), ("seq_len", seq_len), ("n_repeats", n_repeats)):
        check_count(name, count)
    check_length(model, 1 + seq_len * n_repeats, "prompts")
    pool = ordinary_tokens(model)
    if seq_len > len(pool):
        raise ValueError(f"seq_len must be at most {len(pool)} (distinct tokens), got {seq_len}")
    generator = generator_of(seed)
    rows = [torch.randperm(len(pool), generator=generator)[:seq_len] for _ in range(n_prompts)]
    return _with_start(model, pool[torch.stack(rows)].repeat(1, n_repeats))


@checked
def induction_prompts(
    model: TransformerBridge, n_prompts: int, seq_len: int = 10, seed: int = 0
) -> InductionPrompts:
    """Repeated random tokens, cut where the answer must be copied, with three corruptions.

    Clean: start token, `seq_len` distinct random tokens `x1 .. xk A B y C D z` and the beginning
    of a second copy, `x1 .. xk A`; what comes next is B (pos = 2 * seq_len - 4). The repeated
    `x1 .. xk` tell the model that it is reading a repeat: without them the effect is half as large.
    Each corruption makes D the answer, and touches one input of an induction head (Elhage et al.
    2021): the metric logit(B) - logit(D) changes sign in each of them.

    - `query`: the last token A becomes C, so the head looks for another token.
    - `key`: A and C are swapped in the first copy, so B now comes after C and D after A; the keys
      at B and D say so, through previous-token heads.
    - `value`: B and D are swapped in the first copy, so what is found after A is D.

    `answers` holds (B, D), `positions` the positions of A, B, C, D (first copy) and END.
    Raises ValueError as `repeated_tokens` does, and for `seq_len` below 7.
    """
    check_count("seq_len", seq_len, least=7)  # x A B y C D z
    a, b, c, d, end = seq_len - 5, seq_len - 4, seq_len - 2, seq_len - 1, 2 * seq_len - 5
    check_length(model, end + 1, "prompts")
    first = repeated_tokens(model, n_prompts, seq_len, n_repeats=1, seed=seed)
    clean = torch.cat([first, first[:, 1 : a + 1]], dim=1)
    corrupted = {name: clean.clone() for name in ("query", "key", "value")}
    corrupted["query"][:, end] = clean[:, c]
    corrupted["key"][:, [a, c]] = clean[:, [c, a]]
    corrupted["value"][:, [b, d]] = clean[:, [d, b]]
    positions = {"A": a, "B": b, "C": c, "D": d, "END": end}
    return InductionPrompts(clean, corrupted, clean[:, [b, d]], positions)


@checked
def long_texts(
    model: TransformerBridge, n_texts: int, n_tokens: int, seed: int = 0
) -> Int[Tensor, "text pos"]:
    """English prose, each text of another topic: start token, then `n_tokens - 1` tokens.

    By turns, from what every Python carries: a topic of the reference manual (what `help()` shows,
    `pydoc_data.topics`) and the docstrings of a module of the standard library; paragraphs of
    prose only, none in two texts (topics include each other). `seed` decides which, and in which
    order. Both differ a little between Python versions, and figures measured on them do too. Raises
    ValueError when the model has no tokenizer, the context is too short, or texts are too few.
    """
    check_count("n_texts", n_texts)
    check_count("n_tokens", n_tokens, least=2)
    check_length(model, n_tokens, "texts")
    if model.tokenizer is None:
        raise ValueError("long_texts needs a model with a tokenizer, got one without")

    used: set[str] = set()

    def stretches(texts: Mapping[str, Callable[[], str]]) -> Iterator[list[int]]:
        for name in sorted(texts, key=lambda name: zlib.crc32(f"{seed} {name}".encode())):
            fresh = [paragraph for paragraph in _prose(texts[name]()) if paragraph not in used]
            prose = "\n\n".join(fresh)
            ids = model.tokenizer(prose, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= n_tokens - 1:
                used.update(fresh)
                yield ids[: n_tokens - 1]

    by_turns = zip_longest(*map(stretches, (_manual_topics(), _module_docs())))
    found = list(islice((ids for pair in by_turns for ids in pair if ids), n_texts))
    if len(found) < n_texts:
        raise ValueError(
            f"only {len(found)} texts of {n_tokens} tokens exist, got n_texts={n_texts}"
        )
    return _with_start(model, torch.tensor(found))


class KindPrompts(NamedTuple):
    """Lines of two words and a label that says which kind they are; see `kind_prompts`."""

    tokens: Int[Tensor, "prompt pos"]
    same_kind: Bool[Tensor, "prompt line"]
    label_positions: list[int]
    answers: Int[Tensor, "prompt"]
    labels: Int[Tensor, "label"]


@checked
def kind_prompts(
    model: TransformerBridge, n_prompts: int, n_lines: int = 16, seed: int = 0
) -> KindPrompts:
    """A task in which nothing but the kind of a word helps (after Olsson et al. 2022, argument 4).

    Each line is a month or a colour, an animal or a fruit, and a label (A to D) for which of the
    four kinds of line it is; of the last line the label is missing. No word comes twice, there are
    as many lines of each kind, and all prompts have one layout: words take as many tokens as most
    of the list do. `same_kind` marks the lines of the last one's kind, `answers` are its labels.
    Raises ValueError unless `n_lines` is a multiple of four, when a tokenizer is missing or has
    too few such words, or prompts are too long.
    """
    check_count("n_prompts", n_prompts)
    if n_lines < 4 or n_lines % 4:
        raise ValueError(f"n_lines must be a multiple of 4, got {n_lines}")
    if model.tokenizer is None:
        raise ValueError("kind_prompts needs a model with a tokenizer, got one without")

    def ids_of(word: str) -> list[int]:
        return model.tokenizer(word, add_special_tokens=False)["input_ids"]

    ids = [[ids_of(f" {word}") for word in words.split()] for words in WORDS]
    width = Counter(len(i) for words in ids for i in words).most_common(1)[0][0]
    pools = [torch.tensor([i for i in words if len(i) == width]) for words in ids]
    if min(map(len, pools)) <= n_lines // 2:
        raise ValueError(f"n_lines={n_lines} needs more words than this tokenizer has in one size")
    newline, colon, *labels = (ids_of(text)[-1] for text in ("\n", ":", " A", " B", " C", " D"))
    generator, rows, kinds = generator_of(seed), [], []
    for _ in range(n_prompts):
        kind = torch.randperm(n_lines, generator=generator) % 4
        kind = torch.cat([kind, torch.randint(4, (1,), generator=generator)])
        drawn = [iter(pool[torch.randperm(len(pool), generator=generator)]) for pool in pools]
        row = []
        for k in kind.tolist():
            first, second = next(drawn[k // 2]), next(drawn[2 + k % 2])
            row += [newline, *first.tolist(), *second.tolist(), colon, labels[k]]
        rows.append(row[:-1])
        kinds.append(kind)
    tokens, kind, labels = torch.tensor(rows), torch.stack(kinds), torch.tensor(labels)
    check_length(model, tokens.shape[1] + 1, "prompts")
    places = [(line + 1) * (2 * width + 3) for line in range(n_lines)]
    same = kind[:, :-1] == kind[:, -1:]
    return KindPrompts(_with_start(model, tokens), same, places, labels[kind[:, -1]], labels)


def _manual_topics() -> dict[str, Callable[[], str]]:
    from pydoc_data.topics import topics

    return {name: partial(str, text) for name, text in topics.items()}


def _module_docs() -> dict[str, Callable[[], str]]:
    """The docstrings of each module of the standard library, read from its source."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return {path.stem: partial(_docstrings, path) for path in folder.glob("*.py")}


def _docstrings(path: Path) -> str:
    nodes = ast.walk(ast.parse(path.read_bytes()))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return "\n\n".join(ast.get_docstring(n) or "" for n in nodes if isinstance(n, kinds))


def _prose(text: str) -> list[str]:
    """Its paragraphs of prose, each once."""
    paragraphs = [" ".join(block.split()) for block in text.split("\n\n")]
    return list(filter(_is_prose, dict.fromkeys(paragraphs)))


def _is_prose(paragraph: str) -> bool:
    """Sentences, not code, tables, grammar or headings: long, ends one, nearly all letters."""
    plain = sum(ch.isalpha() or ch in " ,.'’" for ch in paragraph)
    return len(paragraph) > 120 and paragraph[-1] in ".:" and plain > 0.94 * len(paragraph)


def _with_start(model: TransformerBridge, tokens: Tensor) -> Int[Tensor, "prompt pos"]:
    padded = torch.nn.functional.pad(tokens, (1, 0), value=start_token(model))
    return padded.to(model.cfg.device)
