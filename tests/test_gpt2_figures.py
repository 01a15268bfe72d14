"""Published figures of GPT-2 small, to check ours by where the hub answers; the rest is a stand-in.

Sources: TransformerLens, Main and Exploratory Analysis demos (eight prompts, start token).
"""

import pytest
import torch

from utils import attribution, heads, ioi, metrics, patching
from utils.models import load_model
from utils.models.hub import hub_trouble
from utils.prompts import repeated_tokens

pytestmark = pytest.mark.usefixtures("no_grad")

# figure: published, tolerance
PUBLISHED = {
    "logit difference, eight prompts": (3.552, 0.01),
    "the same without a start token": (2.814, 0.01),
    "S2 stream patched before layer 0": (1.000, 0.01),
    "before layer 7": (0.923, 0.01),
    "before layer 8": (0.657, 0.01),
    "9.9 direct": (2.985, 0.02),
    "9.6 direct": (1.384, 0.02),
    "10.0 direct": (0.561, 0.02),
    "10.7 direct": (-1.899, 0.02),
    "11.10 direct": (-0.970, 0.02),
    # other random tokens, and a start token: a wider margin
    "5.1 induction": (0.93, 0.07),
    "5.5 induction": (0.93, 0.07),
    "6.9 induction": (0.93, 0.07),
    "7.2 induction": (0.86, 0.07),
    "7.10 induction": (0.92, 0.07),
    "4.11 previous token": (0.99, 0.02),
}
INDUCTION = {(5, 1), (5, 5), (6, 9), (7, 2), (7, 10)}


def figures(model):
    """The same figures of any model of twelve layers of twelve heads; and its top heads."""
    eight = ioi.eight_prompts(model)
    tokens, answers = eight.tokens, eight.answers
    clean = metrics.logit_diff(model(tokens), answers)
    bare = metrics.logit_diff(model(tokens[:, 1:], prepend_bos=False), answers)
    other = tokens.view(4, 2, -1).flip(1).flatten(0, 1)  # each pair exchanged
    corrupted = metrics.logit_diff(model(other), answers)
    (s2,) = eight.positions["S2"].unique().tolist()
    patched = patching.patch_stream(
        model, tokens, other, metrics.LogitDiff(answers), positions=[s2], layers=[0, 7, 8]
    )
    restored = metrics.normalised_effect(patched[..., 0], clean, corrupted).mean(0).tolist()
    written = attribution.head_projections(model, tokens, heads.all_heads(model), answers).mean(0)
    direct = (written[0] - written[1]).unflatten(0, (model.cfg.n_layers, model.cfg.n_heads))
    repeats = repeated_tokens(model, n_prompts=4, seq_len=50, seed=0)
    patterns = heads.attention_patterns(model, repeats)
    induction = heads.induction_score(patterns, seq_len=50).mean(0)
    previous = heads.previous_token_score(patterns).mean(0)
    found = [clean.mean(), bare.mean(), *restored]
    found += [direct[head] for head in ((9, 9), (9, 6), (10, 0), (10, 7), (11, 10))]
    found += [*(induction[head] for head in sorted(INDUCTION)), previous[4, 11]]
    measured = {name: float(value) for name, value in zip(PUBLISHED, found, strict=True)}
    return measured, set(heads.top_heads(induction, k=5))


def far_off(measured):
    """What differs by more than its tolerance."""
    return {
        name: measured[name]
        for name, (published, tolerance) in PUBLISHED.items()
        if not abs(measured[name] - published) <= tolerance
    }


def test_gpt2_small_from_the_hub_gives_the_published_figures():
    if hub_trouble():
        pytest.skip("the Hugging Face hub does not answer")
    measured, top = figures(load_model("gpt2-small", device="cpu"))
    assert far_off(measured) == {}
    assert top == INDUCTION


@pytest.mark.nightly
def test_random_weights_in_its_shape_do_not_give_them(gpt2_full_shape):
    measured, top = figures(load_model(str(gpt2_full_shape), device="cpu"))
    assert len(far_off(measured)) > 10
    assert top != INDUCTION


def test_a_figure_is_far_off_outside_its_tolerance_or_when_there_is_none():
    exact = {name: published for name, (published, _) in PUBLISHED.items()}
    assert far_off(exact) == {}
    for name, (published, tolerance) in PUBLISHED.items():
        for wrong in (published + 1.1 * tolerance, float("nan")):
            assert list(far_off(exact | {name: wrong})) == [name]


def test_gpt2s_own_tokenizer_keeps_every_name_and_place_whole(gpt2_stand_in):
    model = load_model(str(gpt2_stand_in), device="cpu")
    assert model.cfg.d_vocab == 50257 and ioi.start_token(model) == 50256
    assert ioi.single_token_names(model) == list(ioi.NAMES)
    prompts = ioi.ioi_prompts(model, 16)
    assert prompts.template.unique().tolist() == list(range(len(ioi.FRAMES)))
    # a published prompt, token by token
    eight = ioi.eight_prompts(model)
    assert eight.tokens.shape == (8, 15) and eight.positions["S2"].tolist() == [10] * 8
    assert eight.answers[0].tolist() == [5335, 1757]  # Mary, John
    assert torch.equal(eight.answers[1], eight.answers[0].flip(0))
