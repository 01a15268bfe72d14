"""Prompts for indirect object identification: "When Mary and John ..., John gave a drink to"."""

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from utils.checks import check_count, check_tokens, generator_of, start_token
from utils.typed import checked

# One word is one token, in every frame the slots stand at the same places.
FRAMES = (
    "When {first} and {second} went to the {place}, {third} gave a {object} to",
    "After {first} and {second} arrived at the {place}, {third} handed a {object} to",
    "While {first} and {second} sat in the {place}, {third} gave a {object} to",
    "Once {first} and {second} got to the {place}, {third} offered a {object} to",
    "As {first} and {second} walked to the {place}, {third} handed the {object} to",
    "Because {first} and {second} met at the {place}, {third} gave the {object} to",
    "Because {first} and {second} lived near the {place}, {third} lent a {object} to",
    "Since {first} and {second} worked at the {place}, {third} lent the {object} to",
)
PLACES = (
    "store school park garden station office hospital restaurant house beach museum hotel church "
    "airport library theater"
).split()
OBJECTS = (
    "drink ring book ball gift letter key bag computer box watch camera ticket map phone guitar"
).split()
NAMES = (
    "James John Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew Anthony "
    "Steven Paul Andrew Kenneth Kevin Brian George Edward Ronald Timothy Jason Jeffrey Ryan Jacob "
    "Gary Nicholas Eric Jonathan Stephen Larry Justin Scott Benjamin Samuel Gregory Frank Raymond "
    "Patrick Jack Dennis Jerry Aaron Adam Henry Nathan Peter Douglas Simon Roger Oliver Tom Tim "
    "Dan Mary Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Lisa Nancy "
    "Margaret Sandra Emily Michelle Carol Amanda Melissa Stephanie Rebecca Laura Kathleen Amy "
    "Angela Shirley Anna Emma Nicole Helen Samantha Katherine Christine Rachel Catherine Maria "
    "Heather Ruth Julie Victoria Alice Jane Kate Hannah"
).split()
# Who is named first, second and third: A is the indirect object, B the subject, D to F are others.
# Written for ABBA; in BABA the first two change places.
CORRUPTIONS = {
    "s2_io": "ABA",
    "abc": "DEF",
    "swapped": "BAB",
    "exchanged": "BAA",
    "renamed": "DEE",
    "renamed_swapped": "EDE",
}
# Wang et al. 2022 (section 4.4) add a sentence between the naming and the giving.
ADVERSARIAL_OPENINGS = (
    "Then {first} and {second} went to the {place}.",
    "Later {first} and {second} met at the {place}.",
    "Then {first} and {second} sat in the {place}.",
)
ADVERSARIAL_EXTRAS = ("{extra} was quite tired.", "{extra} felt very happy.")
ADVERSARIAL_GIVING = "{third} gave a {object} to"
# Whom the extra sentence is about: A is IO, B is S, E a third name, N nobody by name.
ADVERSARIAL_ABOUT = {"plain": "", "io": "A", "s": "B", "third": "E", "nobody": "N"}
NOBODY = "Everyone"
# Pairs of prompts of the TransformerLens demos, with the giver of the first and of the second.
EIGHT = (
    ("When John and Mary went to the shops, {} gave the bag to", ("John", "Mary")),
    ("When Tom and James went to the park, {} gave the ball to", ("James", "Tom")),
    ("When Dan and Sid went to the shops, {} gave an apple to", ("Sid", "Dan")),
    ("After Martin and Amy went to the park, {} gave a drink to", ("Amy", "Martin")),
)


class IOIPrompts(NamedTuple):
    """Prompts of one length with their answers, positions and corruptions; see `ioi_prompts`."""

    tokens: Int[Tensor, "prompt pos"]
    answers: Int[Tensor, "prompt 2"]
    positions: dict[str, Int[Tensor, "prompt"]]
    template: Int[Tensor, "prompt"]
    is_abba: Bool[Tensor, "prompt"]
    corrupted: dict[str, Int[Tensor, "prompt pos"]]


class NamePrompts(NamedTuple):
    """Prompts of one length, answers (IO, S), and the positions of IO, S1, S1+1, S2 and END."""

    tokens: Int[Tensor, "prompt pos"]
    answers: Int[Tensor, "prompt 2"]
    positions: dict[str, Int[Tensor, "prompt"]]


@checked
def single_token_names(model: TransformerBridge) -> list[str]:
    """The `NAMES` that are one token, with the space before them, in the model's tokenizer."""
    return _single_tokens(model, NAMES)


@checked
def ioi_prompts(model: TransformerBridge, n_prompts: int, seed: int = 0) -> IOIPrompts:
    """Aligned prompts: the answer is the indirect object IO, not the subject S, who is named twice.

    Start token, then a frame of `FRAMES`; END is the last position. The prompts name IO first
    (ABBA) and S first (BABA) in turn, with each frame equally often in each. `answers` is (IO, S).
    `corrupted` (A = IO, B = S; the original is A B B, and in BABA the first two change places):

    - `s2_io` A B A: S2 is the other name, so the answer flips.
    - `abc` D E F: three new names, all different; no name is the answer.
    - `swapped` B A B: the first two change places, ABBA becomes BABA; same answer.
    - `exchanged` B A A, `renamed` D E E, `renamed_swapped` E D E: with the prompt itself, `s2_io`
      and `swapped`, the six data sets that tell position from token (Wang et al. 2022, appendix A).

    A CPU generator draws prompt by prompt: a seed means the same data on every machine, and fewer
    prompts are the first of more. ValueError: no tokenizer, `n_prompts` below 1, fewer than 5 names
    or no frame, place or object left that the tokenizer does not split.
    """
    draws = _draw(model, n_prompts, seed)
    filled = [_fill(frame, "ABB", True, draws[0]) for frame in FRAMES]
    kept = [i for i, text in enumerate(filled) if _is_whole(model, text)]
    if not kept:
        raise ValueError("no frame is left: the model's tokenizer splits a word in each of FRAMES")
    index = torch.arange(n_prompts)
    is_abba, template = index % 2 == 0, torch.tensor(kept)[index // 2 % len(kept)]
    slots = list(zip(template.tolist(), is_abba.tolist(), draws, strict=True))

    def texts(letters: str) -> list[str]:
        return [_fill(FRAMES[i], letters, abba, drawn) for i, abba, drawn in slots]

    clean = _name_prompts(model, texts("ABB"), draws)
    corrupted = {name: _encode(model, texts(letters)) for name, letters in CORRUPTIONS.items()}
    device = model.cfg.device
    return IOIPrompts(*clean, template.to(device), is_abba.to(device), corrupted)


@checked
def eight_prompts(model: TransformerBridge) -> NamePrompts:
    """The eight prompts of the TransformerLens demos, with their start token.

    Source: TransformerLens, Exploratory Analysis demo. ValueError without a tokenizer, or when it
    splits a name or gives the prompts unequal lengths.
    """
    texts, answers = [], []
    for sentence, names in EIGHT:
        lost = [name for name in names if not _is_whole(model, " " + name)]
        if lost:
            raise ValueError(f"the model's tokenizer splits {', '.join(lost)}: want one token each")
        for subject, indirect in (names, names[::-1]):
            texts.append(sentence.format(subject))
            answers.append({"A": indirect, "B": subject})
    return _name_prompts(model, texts, answers)


@checked
def adversarial_prompts(
    model: TransformerBridge, n_prompts: int, seed: int = 0
) -> dict[str, NamePrompts]:
    """The same prompts "plain", and with an extra sentence about IO ("io") or S ("s").

    The sentence stands between the naming and the giving (Wang et al. 2022, section 4.4); naming IO
    twice makes it look like the subject, naming S once more is the paper's control. Two more, of
    the same length: about a "third" name, and about "nobody" by name. Orders alternate; the prompts
    of a key are aligned, "plain" is shorter. ValueError as `ioi_prompts`.
    """
    draws = _draw(model, n_prompts, seed)
    pairs = [(a, f"{a} {extra}") for extra in ADVERSARIAL_EXTRAS for a in ADVERSARIAL_OPENINGS]
    pairs = [[f"{start} {ADVERSARIAL_GIVING}" for start in pair] for pair in pairs]
    kept = [pair for pair in pairs if _is_whole(model, _fill(pair[1], "ABBA", True, draws[0]))]
    if not kept:
        raise ValueError("no sentence is left: the model's tokenizer splits a word in each of them")
    prompts = {}
    for key, letter in ADVERSARIAL_ABOUT.items():
        texts = [
            _fill(kept[i // 2 % len(kept)][bool(letter)], "ABB" + letter, i % 2 == 0, drawn)
            for i, drawn in enumerate(draws)
        ]
        prompts[key] = _name_prompts(model, texts, draws)
    return prompts


def _draw(model: TransformerBridge, n_prompts: int, seed: int) -> list[dict[str, str]]:
    """For each prompt: five names, a place and an object."""
    check_count("n_prompts", n_prompts)
    names = single_token_names(model)
    if len(names) < 5:
        remain = f"{len(names)} of {len(NAMES)} remain: {', '.join(names) or 'none'}"
        raise ValueError(f"want at least 5 names that the model's tokenizer keeps whole, {remain}")
    pools = {"place": _single_tokens(model, PLACES), "object": _single_tokens(model, OBJECTS)}
    for slot, pool in pools.items():
        if not pool:
            raise ValueError(f"no {slot} is left: the model's tokenizer splits all of them")
    generator = generator_of(seed)
    draws = []
    for _ in range(n_prompts):
        chosen = [names[i] for i in torch.randperm(len(names), generator=generator)[:5]]
        draw = dict(zip("ABDEF", chosen, strict=True)) | {"N": NOBODY}
        for slot, pool in pools.items():
            draw[slot] = pool[int(torch.randint(len(pool), (), generator=generator))]
        draws.append(draw)
    return draws


def _fill(frame: str, letters: str, abba: bool, drawn: dict[str, str]) -> str:
    """The frame with the drawn names in the order of `letters` (a fourth is the extra one)."""
    first, second, third, *extra = (drawn[letter] for letter in letters)
    if not abba:
        first, second = second, first
    return frame.format(first=first, second=second, third=third, extra="".join(extra), **drawn)


def _encode(model: TransformerBridge, texts: list[str]) -> Int[Tensor, "prompt pos"]:
    """Start token and text of each prompt."""
    rows = [_ids(model, text) for text in texts]
    lengths = [len(row) for row in rows]
    if len(set(lengths)) > 1:
        raise ValueError(f"the prompts must be equally long, got {lengths} tokens")
    tokens = torch.tensor([[start_token(model), *row] for row in rows], device=model.cfg.device)
    check_tokens(model, tokens, "prompts")
    return tokens


def _ids(model: TransformerBridge, text: str) -> list[int]:
    if model.tokenizer is None:
        raise ValueError("prompts with names need a model with a tokenizer, got one without")
    return model.tokenizer(text, add_special_tokens=False).input_ids


def _is_whole(model: TransformerBridge, text: str) -> bool:
    """Whether every word and punctuation mark is a token of its own."""
    ids = _ids(model, text)
    # an unknown word is one token too, but does not spell the word
    spelled = model.tokenizer.decode(ids).split() == text.split()
    return spelled and len(ids) == len(re.findall(r"\w+|[,.]", text))


def _single_tokens(model: TransformerBridge, words: Iterable[str]) -> list[str]:
    """Those of the words that are one token, with the space before them."""
    return [word for word in words if _is_whole(model, " " + word)]


def _name_prompts(model: TransformerBridge, texts: list[str], draws: list[dict]) -> NamePrompts:
    """Tokens, with the answers A and B; where these are first named, S last, and the end."""
    tokens = _encode(model, texts)
    answers = [[_ids(model, " " + drawn[letter])[0] for letter in "AB"] for drawn in draws]
    answers = torch.tensor(answers, device=tokens.device)
    is_io, is_s = ((tokens == column[:, None]).int() for column in answers.T)
    io, s1 = is_io.argmax(1), is_s.argmax(1)
    end = torch.full_like(io, tokens.shape[1] - 1)
    positions = {"IO": io, "S1": s1, "S1+1": s1 + 1, "S2": end - is_s.flip(1).argmax(1), "END": end}
    return NamePrompts(tokens, answers, positions)
