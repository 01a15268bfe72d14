"""IOI prompts, read back as text: slots, corruptions, balance, seeds, and tokenizers that split."""

import re
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from utils import ioi
from utils.ioi import adversarial_prompts, eight_prompts, ioi_prompts, single_token_names
from utils.metrics import accuracy, logit_diff
from utils.models import load_model
from utils.toy import build_toy

SENTENCE = re.compile(
    r"(?P<opening>\w+) (?P<first>\w+) and (?P<second>\w+) (?P<going>\w+ \w+ the) (?P<place>\w+)[,.]"
    r"( (?P<extra>\w+) \w+ \w+ \w+\.)?"
    r" (?P<third>\w+) (?P<giving>\w+ (a|the)) (?P<object>\w+) to"
)
FEW_NAMES = ["Mary", "John", "Tom", "Anna", "Paul", "Kate"]
# Who is named first, second and third, in ABBA and in BABA; A is the indirect object.
ORDERS = {
    "s2_io": ("ABA", "BAA"),
    "swapped": ("BAB", "ABB"),
    "exchanged": ("BAA", "ABA"),
    "renamed": ("DEE", "EDE"),
    "renamed_swapped": ("EDE", "DEE"),
    "abc": ("DEF", "EDF"),
}


def word_tokenizer(names, without=()):
    """A byte-level BPE in which the frames' words and `names` are one token, other words not."""
    frames = [re.sub(r"{\w+}", "", frame) for frame in ioi.FRAMES]
    known = " ".join([*names, *ioi.PLACES, *ioi.OBJECTS]).split()
    corpus = [word for word in known if word not in without]
    corpus += [w for frame in frames for w in re.findall(r"\w+", frame) if w not in without]
    tokenizer, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    settings = {"vocab_size": 5000, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(special_tokens=["<s>"], **settings)
    # a frame's first word has no space before it
    tokenizer.train_from_iterator(corpus + [" " + word for word in corpus], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def stand_in(tokenizer):
    """As much of a model as making prompts takes; a loaded one wants a tokenizer off a disk."""
    model = build_toy(1)
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def few_names(tmp_path_factory):
    """A random model whose tokenizer splits all names but six, and the word "Once"."""
    folder = tmp_path_factory.mktemp("few") / "few-names"
    tokenizer = word_tokenizer(FEW_NAMES, without=["Once"])
    size = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 32}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, **size)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(str(folder), device="cpu")


@pytest.fixture(params=["smollm2", "few_names"])
def model(request):
    return request.getfixturevalue(request.param)


def read(model, tokens):
    """Each prompt's words by slot, read off the decoded text; it must encode to the same tokens."""
    rows = []
    for row in tokens:
        assert row[0] == model.tokenizer.bos_token_id
        text = model.tokenizer.decode(row[1:])
        assert model.tokenizer(text, add_special_tokens=False).input_ids == row[1:].tolist()
        rows.append(SENTENCE.fullmatch(text).groupdict())
    return rows


def named(words):
    """The indirect objects and the subjects, as tokens are spelled."""
    io = [w["first"] if w["third"] == w["second"] else w["second"] for w in words]
    return [" " + name for name in io], [" " + w["third"] for w in words]


def word_at(model, tokens, positions):
    return [model.tokenizer.decode(row[p]) for row, p in zip(tokens, positions, strict=True)]


def test_slots_positions_and_answers(model):
    prompts = ioi_prompts(model, 34)
    assert prompts.tokens.shape == (34, 15)
    words = read(model, prompts.tokens)
    assert [w["third"] == w["second"] for w in words] == prompts.is_abba.tolist()
    io, s = named(words)
    assert all(a != b for a, b in zip(io, s, strict=True))
    answers = [[model.tokenizer.decode(t) for t in column] for column in prompts.answers.T]
    at = {name: word_at(model, prompts.tokens, p) for name, p in prompts.positions.items()}
    assert answers == [io, s] == [at["IO"], at["S1"]] and at["S2"] == s
    assert set(at["END"]) == {" to"}
    assert (prompts.positions["S1+1"] == prompts.positions["S1"] + 1).all()
    places = {"IO": {2, 4}, "S1": {2, 4}, "S2": {10}, "END": {14}}
    for name, want in places.items():
        assert set(prompts.positions[name].tolist()) == want
    for w, template in zip(words, prompts.template.tolist(), strict=True):
        assert ioi.FRAMES[template].startswith(w["opening"] + " ")
        assert w["going"] in ioi.FRAMES[template] and w["giving"] in ioi.FRAMES[template]


def test_corruptions_move_and_replace_only_names(model):
    prompts = ioi_prompts(model, 12, seed=3)
    assert set(prompts.corrupted) == set(ORDERS)
    clean = read(model, prompts.tokens)
    abc = read(model, prompts.corrupted["abc"])
    for key, orders in ORDERS.items():
        corrupted = read(model, prompts.corrupted[key])
        for is_abba, w, new, got in zip(prompts.is_abba, clean, abc, corrupted, strict=True):
            order, letters = ("ABDEF", orders[0]) if is_abba else ("BAEDF", orders[1])
            names = (w["first"], w["second"], new["first"], new["second"], new["third"])
            assert len(set(names)) == 5
            by_letter = dict(zip(order, names, strict=True))
            slots = zip(("first", "second", "third"), letters, strict=True)
            assert got == w | {slot: by_letter[letter] for slot, letter in slots}, key


def test_no_place_object_or_frame_contains_a_name():
    others = [*ioi.PLACES, *ioi.OBJECTS, *(w for f in ioi.FRAMES for w in f.lower().split())]
    assert not [(name, word) for name in ioi.NAMES for word in others if name.lower() in word]
    for words in (ioi.NAMES, ioi.PLACES, ioi.OBJECTS, ioi.FRAMES):
        assert len(set(words)) == len(words)
    assert len(ioi.NAMES) == 100


def test_orders_and_frames_are_balanced(smollm2):
    n_frames = len(ioi.FRAMES)
    prompts = ioi_prompts(smollm2, 4 * n_frames)
    pairs = zip(prompts.template.tolist(), prompts.is_abba.tolist(), strict=True)
    assert Counter(pairs) == {(f, o): 2 for f in range(n_frames) for o in (True, False)}
    assert abs(ioi_prompts(smollm2, 7).is_abba.float().sum().item() - 3.5) == 0.5


def test_a_seed_gives_the_same_data_everywhere(smollm2):
    first, again, other = (ioi_prompts(smollm2, 6, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    more = ioi_prompts(smollm2, 9, seed=0)
    assert torch.equal(more.tokens[:6], first.tokens)
    for key, corrupted in first.corrupted.items():
        assert torch.equal(corrupted, again.corrupted[key])
        assert torch.equal(corrupted, more.corrupted[key][:6])
    # as drawn when this was written: another machine or release must draw the same
    text = smollm2.tokenizer.decode(first.tokens[2, 1:])
    assert text == "After Victoria and Kate arrived at the church, Kate handed a guitar to"
    text = smollm2.tokenizer.decode(first.corrupted["abc"][0, 1:])
    assert text == "When Ruth and Catherine went to the church, Michelle gave a box to"


def test_names_and_frames_that_are_split_are_left_out(model, few_names):
    whole = [n for n in ioi.NAMES if len(model.tokenizer.tokenize("x " + n)) == 2]
    assert single_token_names(model) == whole
    assert sorted(single_token_names(few_names)) == sorted(FEW_NAMES)
    prompts = ioi_prompts(few_names, 40)
    once = next(i for i, frame in enumerate(ioi.FRAMES) if frame.startswith("Once"))
    assert set(prompts.template.tolist()) == set(range(len(ioi.FRAMES))) - {once}
    used = {name for w in read(few_names, prompts.tokens) for name in (w["first"], w["second"])}
    assert used == set(FEW_NAMES)


def test_unknown_words_are_no_names():
    vocab = {"<unk>": 0, "Mary": 1, "John": 2}  # every unknown word is the one token <unk>
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert sorted(single_token_names(stand_in(words))) == ["John", "Mary"]


EIGHT_NAMES = [name for _, pair in ioi.EIGHT for name in pair]


@pytest.mark.parametrize(
    ("make", "names", "without", "message"),
    [
        (ioi_prompts, ["Mary", "John", "Tom"], [], "at least 5 names .* 3 of 100 remain: John, "),
        (ioi_prompts, [], [], "at least 5 names .* 0 of 100 remain: none"),
        (ioi_prompts, FEW_NAMES, ["to"], "no frame is left"),
        (ioi_prompts, FEW_NAMES, ioi.PLACES, "no place is left"),
        (ioi_prompts, FEW_NAMES, ioi.OBJECTS, "no object is left"),
        (adversarial_prompts, FEW_NAMES, [], "no sentence is left"),  # it never saw them
        (lambda m, n: eight_prompts(m), FEW_NAMES, [], "splits James: want one token each"),
        # splits "shops", not "park"
        (lambda m, n: eight_prompts(m), EIGHT_NAMES, [], "must be equally long, got"),
    ],
)
def test_a_tokenizer_that_splits_too_much_is_refused(make, names, without, message):
    with pytest.raises(ValueError, match=message):
        make(stand_in(word_tokenizer(names, without)), 4)


def test_adversarial_prompts_differ_by_one_sentence(smollm2):
    prompts = adversarial_prompts(smollm2, 14, seed=2)
    words = {key: read(smollm2, p.tokens) for key, p in prompts.items()}
    lengths = {key: p.tokens.shape[1] for key, p in prompts.items()}
    assert lengths == {"plain": 15} | dict.fromkeys(("io", "s", "third", "nobody"), 20)
    for plain, *others, io, s in zip(*words.values(), *named(words["plain"]), strict=True):
        assert [with_extra | {"extra": None} for with_extra in others] == [plain] * 4
        about_io, about_s, third, nobody = (with_extra["extra"] for with_extra in others)
        assert (plain["extra"], about_io, about_s, nobody) == (
            None,
            io.strip(),
            s.strip(),
            "Everyone",
        )
        assert third in ioi.NAMES and third not in (about_io, about_s)
    extras = [smollm2.tokenizer.decode(row[1:]).split(". ")[1] for row in prompts["io"].tokens]
    assert len({extra.split(" ", 1)[1] for extra in extras}) == 2
    for key, p in prompts.items():
        io, s = named(words[key])
        at = [word_at(smollm2, p.tokens, p.positions[place]) for place in ("IO", "S1", "S2")]
        assert at == [io, s, s], key
        assert (p.positions["S2"] == p.tokens.shape[1] - 5).all()
        assert torch.equal(p.answers, prompts["plain"].answers)
    assert sum(w["second"] == w["third"] for w in words["plain"]) == 7


def test_eight_prompts_are_those_of_the_demo(smollm2):
    prompts = eight_prompts(smollm2)
    texts = [
        ("When John and Mary went to the shops, John gave the bag to", " Mary", " John"),
        ("When John and Mary went to the shops, Mary gave the bag to", " John", " Mary"),
        ("When Tom and James went to the park, James gave the ball to", " Tom", " James"),
        ("When Tom and James went to the park, Tom gave the ball to", " James", " Tom"),
        ("When Dan and Sid went to the shops, Sid gave an apple to", " Dan", " Sid"),
        ("When Dan and Sid went to the shops, Dan gave an apple to", " Sid", " Dan"),
        ("After Martin and Amy went to the park, Amy gave a drink to", " Martin", " Amy"),
        ("After Martin and Amy went to the park, Martin gave a drink to", " Amy", " Martin"),
    ]
    for i, (text, *answers) in enumerate(texts):
        assert smollm2.tokenizer.decode(prompts.tokens[i]) == smollm2.tokenizer.bos_token + text
        assert [smollm2.tokenizer.decode(t) for t in prompts.answers[i]] == answers
    assert prompts.positions["S2"].tolist() == [10] * 8
    assert prompts.positions["IO"].tolist() == [4, 2, 2, 4, 2, 4, 2, 4]


def test_smollm2_does_the_task_in_every_frame(smollm2, no_grad):
    prompts = ioi_prompts(smollm2, 32)
    logits = smollm2(prompts.tokens)
    diff = logit_diff(logits, prompts.answers)
    assert diff.mean() > 3.5
    assert accuracy(logits, prompts.answers).mean() > 0.95
    for frame in range(len(ioi.FRAMES)):
        assert diff[prompts.template == frame].mean() > 2, ioi.FRAMES[frame]


def test_bad_input_is_named(few_names, smollm2, toy2, monkeypatch):
    for make in (ioi_prompts, adversarial_prompts):
        with pytest.raises(ValueError, match="n_prompts must be at least 1, got 0"):
            make(few_names, 0)
        with pytest.raises(ValueError, match="need a model with a tokenizer, got one without"):
            make(toy2, 4)
    for make in (single_token_names, eight_prompts):
        with pytest.raises(ValueError, match="need a model with a tokenizer"):
            make(toy2)
    monkeypatch.setattr(smollm2.cfg, "n_ctx", 14)
    for make in (lambda m: ioi_prompts(m, 2), eight_prompts):
        with pytest.raises(ValueError, match="prompts of 15 tokens exceed the context of 14"):
            make(smollm2)
