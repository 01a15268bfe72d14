"""Prompts for indirect object identification: "When Mary and John ..., John gave a drink to"."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from utils.prompts import check_tokens, start_token

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
ORDERS = ("both", "ABBA", "BABA")
# Who is named first, second and third: A is the indirect object, B the subject, C to F are others.
# Written for ABBA; in BABA the first two change places.
CORRUPTIONS = {
    "s2_io": "ABA",
    "s2_third": "ABC",
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
# Opening, two names, giving, and who gives first: pairs of prompts of the TransformerLens demos.
EIGHT = (
    ("When", ("John", "Mary"), "went to the shops", "gave the bag to", "John"),
    ("When", ("Tom", "James"), "went to the park", "gave the ball to", "James"),
    ("When", ("Dan", "Sid"), "went to the shops", "gave an apple to", "Sid"),
    ("After", ("Martin", "Amy"), "went to the park", "gave a drink to", "Amy"),
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


def single_token_names(model: TransformerBridge) -> list[str]:
    """The `NAMES` that are one token, with the space before them, in the model's tokenizer."""
    return _single_tokens(model, NAMES)


def ioi_prompts(
    model: TransformerBridge, n_prompts: int, seed: int = 0, order: str = "both"
) -> IOIPrompts:
    """Aligned prompts: the answer is the indirect object IO, not the subject S, who is named twice.

    Start token, then a frame of `FRAMES`; END is the last position. Order "ABBA" names IO first,
    "BABA" S first; "both" alternates, with each frame equally often in each. `answers` is (IO, S).
    `corrupted` (A = IO, B = S; the original is A B B, and in BABA the first two change places):
    - `s2_io` A B A: S2 is the other name, so the answer flips.
    - `s2_third` A B C: S2 is a third name.
    - `abc` D E F: three new names, all different; no name is the answer.
    - `swapped` B A B: the first two change places, ABBA becomes BABA; same answer.
    - `exchanged` B A A, `renamed` D E E, `renamed_swapped` E D E: with the prompt itself, `s2_io`
      and `swapped`, the six data sets that tell position from token (Wang et al. 2022, appendix A).
    A CPU generator draws prompt by prompt: a seed means the same data on every machine, and fewer
    prompts are the first of more. ValueError: no tokenizer, `order` unknown, `n_prompts` below 1,
    fewer than 5 names or no frame, place or object left that the tokenizer does not split.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    slots = _draw(model, n_prompts, seed)
    kept = [i for i, frame in enumerate(FRAMES) if _is_single(model, frame)]
    if not kept:
        raise ValueError("no frame is left: the model's tokenizer splits a word in each of FRAMES")
    index = torch.arange(n_prompts)
    is_abba = index % 2 == 0 if order == "both" else torch.full((n_prompts,), order == "ABBA")
    template = torch.tensor(kept)[(index // 2 if order == "both" else index) % len(kept)]
    texts = [FRAMES[i] for i in template]

    def tokens(letters: str) -> Int[Tensor, "prompt pos"]:
        return _encode(model, texts, _roles(slots, is_abba, letters))

    clean = tokens("ABB")
    answers = _answers(model, slots)
    corrupted = {name: tokens(letters) for name, letters in CORRUPTIONS.items()}
    device = clean.device
    return IOIPrompts(
        clean,
        answers,
        _positions(clean, answers),
        template.to(device),
        is_abba.to(device),
        corrupted,
    )


def eight_prompts(model: TransformerBridge) -> NamePrompts:
    """The eight prompts of the TransformerLens demos, with their start token.

    Source: TransformerLens, Exploratory Analysis demo. ValueError without a tokenizer, or when it
    splits a name or gives the prompts unequal lengths.
    """
    _check_tokenizer(model)
    rows, answers = [], []
    for opening, names, going, giving, giver in EIGHT:
        lost = [name for name in names if name not in _single_tokens(model, names)]
        if lost:
            raise ValueError(f"the model's tokenizer splits {', '.join(lost)}: want one token each")
        other = names[1 - names.index(giver)]
        for subject, indirect in ((giver, other), (other, giver)):
            text = f"{opening} {names[0]} and {names[1]} {going}, {subject} {giving}"
            ids = model.tokenizer(text, add_special_tokens=False).input_ids
            rows.append([start_token(model), *ids])
            answers.append({"A": indirect, "B": subject})
    lengths = [len(row) for row in rows]
    if len(set(lengths)) > 1:
        raise ValueError(f"the eight prompts must be equally long, got {lengths} tokens")
    tokens = torch.tensor(rows, device=model.cfg.device)
    check_tokens(model, tokens, "prompts")
    return _name_prompts(model, tokens, answers)


def adversarial_prompts(
    model: TransformerBridge, n_prompts: int, seed: int = 0
) -> dict[str, NamePrompts]:
    """The same prompts "plain", and with an extra sentence about IO ("io") or S ("s").

    The sentence stands between the naming and the giving (Wang et al. 2022, section 4.4); naming IO
    twice makes it look like the subject, naming S once more is the control. Orders alternate; the
    prompts of a key are aligned, "plain" is shorter. ValueError as `ioi_prompts`.
    """
    slots = _draw(model, n_prompts, seed)
    variants = [(a, b) for b in ADVERSARIAL_EXTRAS for a in ADVERSARIAL_OPENINGS]
    kept = [v for v in variants if _is_single(model, " ".join([*v, ADVERSARIAL_GIVING]))]
    if not kept:
        raise ValueError("no sentence is left: the model's tokenizer splits a word in each of them")
    is_abba = torch.arange(n_prompts) % 2 == 0
    roles = _roles(slots, is_abba, "ABB")
    prompts = {}
    for key, letter in (("plain", ""), ("io", "A"), ("s", "B")):
        texts = []
        for i, drawn in enumerate(slots):
            opening, extra = kept[i // 2 % len(kept)]
            middle = [extra] if letter else []
            texts.append(" ".join([opening, *middle, ADVERSARIAL_GIVING]))
            roles[i]["extra"] = drawn.get(letter, "")
        prompts[key] = _name_prompts(model, _encode(model, texts, roles), slots)
    return prompts


def _draw(model: TransformerBridge, n_prompts: int, seed: int) -> list[dict[str, str]]:
    """For each prompt: names A to F (C is D: no corruption has both), a place and an object."""
    if n_prompts < 1:
        raise ValueError(f"n_prompts must be at least 1, got {n_prompts}")
    names = single_token_names(model)
    if len(names) < 5:
        raise ValueError(
            f"want at least 5 names that are one token in the model's tokenizer, {len(names)} of "
            f"{len(NAMES)} remain: {', '.join(names) or 'none'}"
        )
    pools = {"place": _single_tokens(model, PLACES), "object": _single_tokens(model, OBJECTS)}
    for slot, pool in pools.items():
        if not pool:
            raise ValueError(f"no {slot} is left: the model's tokenizer splits all of them")
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(n_prompts):
        chosen = [names[i] for i in torch.randperm(len(names), generator=generator)[:5]]
        draw = dict(zip("ABDEF", chosen, strict=True))
        draw["C"] = draw["D"]
        for slot, pool in pools.items():
            draw[slot] = pool[int(torch.randint(len(pool), (), generator=generator))]
        draws.append(draw)
    return draws


def _roles(slots: list[dict], is_abba: Bool[Tensor, "prompt"], letters: str) -> list[dict]:
    """The words of each prompt's slots, when the names stand as in `letters`."""
    roles = []
    for drawn, abba in zip(slots, is_abba.tolist(), strict=True):
        first, second, third = letters if abba else (letters[1], letters[0], letters[2])
        named = {"first": drawn[first], "second": drawn[second], "third": drawn[third]}
        roles.append({**named, "place": drawn["place"], "object": drawn["object"]})
    return roles


def _encode(
    model: TransformerBridge, texts: Sequence[str], roles: list[dict]
) -> Int[Tensor, "prompt pos"]:
    """Start token and the filled-in texts, one token a word."""
    ids: dict[str, int] = {}
    rows = []
    for text, words in zip(texts, roles, strict=True):
        row = [start_token(model)]
        for piece in _pieces(text.format(**words)):
            if piece not in ids:
                ids[piece] = _single_token(model, piece)
            row.append(ids[piece])
        rows.append(row)
    tokens = torch.tensor(rows, device=model.cfg.device)
    check_tokens(model, tokens, "prompts")
    return tokens


def _pieces(text: str) -> list[str]:
    """The text cut into words with the space before them, and punctuation."""
    words = text.replace(",", " ,").replace(".", " .").split()
    return [w if i == 0 or w in ",." else " " + w for i, w in enumerate(words)]


def _single_token(model: TransformerBridge, piece: str) -> int | None:
    """The token that spells `piece`, or None if it takes several or is not in the vocabulary."""
    ids = model.tokenizer(piece, add_special_tokens=False).input_ids
    # an unknown word is one token too, but does not spell the word
    spelled = len(ids) == 1 and model.tokenizer.decode(ids).strip() == piece.strip()
    return ids[0] if spelled else None


def _single_tokens(model: TransformerBridge, words: Sequence[str]) -> list[str]:
    _check_tokenizer(model)
    return [word for word in words if _single_token(model, " " + word) is not None]


def _is_single(model: TransformerBridge, frame: str) -> bool:
    """Whether every word of the frame that is not a slot is one token."""
    return all("{" in p or _single_token(model, p) is not None for p in _pieces(frame))


def _answers(model: TransformerBridge, slots: list[dict]) -> Int[Tensor, "prompt 2"]:
    rows = [[_single_token(model, " " + drawn[letter]) for letter in "AB"] for drawn in slots]
    return torch.tensor(rows, device=model.cfg.device)


def _name_prompts(model: TransformerBridge, tokens: Tensor, slots: list[dict]) -> NamePrompts:
    answers = _answers(model, slots)
    return NamePrompts(tokens, answers, _positions(tokens, answers))


def _positions(
    tokens: Int[Tensor, "prompt pos"], answers: Int[Tensor, "prompt 2"]
) -> dict[str, Int[Tensor, "prompt"]]:
    """Where IO and S are first named, S last, and the end."""
    is_io, is_s = (tokens == column[:, None] for column in answers.unbind(1))
    end = tokens.shape[1] - 1
    io, s1 = is_io.int().argmax(1), is_s.int().argmax(1)
    s2 = end - is_s.flip(1).int().argmax(1)
    return {"IO": io, "S1": s1, "S1+1": s1 + 1, "S2": s2, "END": torch.full_like(io, end)}


def _check_tokenizer(model: TransformerBridge) -> None:
    if model.tokenizer is None:
        raise ValueError("prompts with names need a model with a tokenizer, got one without")
