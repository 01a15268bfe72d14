"""Head scores against loops, Hugging Face attentions and TransformerLens's head detector."""

import pytest
import torch
from torch.testing import assert_close
from transformer_lens.head_detector import detect_head

from utils import metrics
from utils.heads import (
    Head,
    all_heads,
    attention_patterns,
    check_heads,
    duplicate_token_score,
    induction_score,
    key_value_head,
    prefix_matching_score,
    previous_token_score,
    score_heads,
    top_heads,
)
from utils.prompts import repeated_tokens


def random_patterns(n_prompts, n_heads, n_positions):
    weights = torch.rand(n_prompts, n_heads, n_positions, n_positions).tril()
    return weights / weights.sum(-1, keepdim=True)


def pattern_attending(back, n_positions):
    """One head that puts all attention so many positions back, or on itself where that is none."""
    pattern = torch.zeros(1, 1, n_positions, n_positions)
    for dest in range(n_positions):
        pattern[0, 0, dest, dest - back if dest >= back else dest] = 1.0
    return pattern


def test_a_head_is_read_from_its_label_and_from_nothing_else():
    assert Head.from_label("L12H3") == (12, 3)
    for label in ("L5Hx", "LxH5", "5.1", "L5", "L5H1 END", "L-1H0", 5):
        with pytest.raises(ValueError, match=r"label: got .*, want one such as 'L5H1'"):
            Head.from_label(label)


@pytest.mark.parametrize("n_copies", [2, 3])
def test_ideal_heads_score_one_on_their_own_score_and_zero_on_the_others(n_copies):
    tokens = torch.tensor([[0] + list(range(1, 6)) * n_copies])
    for back in (1, 5, 4):
        pattern = pattern_attending(back, 1 + 5 * n_copies)
        assert previous_token_score(pattern).item() == float(back == 1)
        assert duplicate_token_score(pattern, 5).item() == float(back == 5)
        assert induction_score(pattern, 5).item() == float(back == 4)
        assert prefix_matching_score(pattern, tokens).item() == float(back == 4)


@pytest.mark.parametrize("n_copies", [2, 4])
def test_stripes_equal_a_loop(n_copies):
    seq_len, n_positions = 6, 1 + 6 * n_copies
    pattern = random_patterns(2, 3, n_positions)

    def loop(back, first):
        dest = range(first, n_positions)
        return sum(pattern[:, :, i, i - back] for i in dest) / len(dest)

    later = 1 + seq_len
    assert_close(previous_token_score(pattern), loop(1, 1))
    assert_close(duplicate_token_score(pattern, seq_len), loop(seq_len, later))
    assert_close(induction_score(pattern, seq_len), loop(seq_len - 1, later))


def test_prefix_matching_sums_over_all_earlier_copies():
    tokens = torch.tensor([[9, 1, 2, 3, 1, 2, 3, 1, 2, 3], [9, 4, 5, 4, 6, 4, 7, 8, 5, 4]])
    pattern = random_patterns(2, 3, 10)
    want = torch.zeros(2, 3)
    for prompt in range(2):
        row = tokens[prompt].tolist()
        repeats = [dest for dest in range(10) if row[dest] in row[:dest]]
        for dest in repeats:
            after = [src + 1 for src in range(dest) if row[src] == row[dest]]
            want[prompt] += pattern[prompt, :, dest, after].sum(-1) / len(repeats)
    assert_close(prefix_matching_score(pattern, tokens), want)
    # extra axes, as in the patterns of all layers at once
    assert_close(prefix_matching_score(pattern[:, None], tokens), want[:, None])


@torch.no_grad()
def test_scores_agree_with_the_head_detector(smollm2):
    text = "The cat sat on the mat. The cat sat on the mat and the cat slept."
    tokens = smollm2.to_tokens(text)
    patterns = attention_patterns(smollm2, tokens)[0]
    # the detector divides by all positions, the first included
    n = tokens.shape[1]
    want = detect_head(smollm2, text, "previous_token_head") * n / (n - 1)
    assert_close(previous_token_score(patterns), want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_score_heads_equals_hugging_face_attentions(model_pair, monkeypatch):
    model, hf = model_pair
    monkeypatch.setattr(metrics, "MAX_LOGITS", 2 * 11 * model.cfg.d_vocab)  # batches of 2 and 1
    tokens = repeated_tokens(model, 3, 5)
    usual = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    attentions = torch.stack(hf(tokens, output_attentions=True).attentions, dim=1)
    hf.set_attn_implementation(usual)
    close = {"atol": 1e-4, "rtol": 1e-3}
    assert_close(attention_patterns(model, tokens), attentions, **close)
    induction = score_heads(model, tokens, induction_score, seq_len=5)
    assert_close(induction, induction_score(attentions, 5), **close)
    matching = score_heads(model, tokens, prefix_matching_score)
    assert_close(matching, prefix_matching_score(attentions, tokens), **close)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_top_heads_sorts_and_cuts():
    scores = torch.tensor([[0.1, 0.9], [0.5, 0.9], [0.2, 0.3]])
    assert top_heads(scores, k=3) == [(0, 1), (1, 1), (1, 0)]
    assert top_heads(scores, threshold=0.3) == [(0, 1), (1, 1), (1, 0), (2, 1)]
    assert top_heads(scores, k=1, threshold=0.3) == [(0, 1)]
    assert top_heads(scores, threshold=2.0) == []


def test_heads_print_as_layer_and_head():
    assert str(Head(5, 1)) == "L5H1"


def test_key_value_heads_are_those_the_query_heads_read(smollm2, random_gpt2):
    assert [key_value_head(smollm2, (4, h)).head for h in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    every = all_heads(random_gpt2)
    assert [key_value_head(random_gpt2, head) for head in every] == every


PATTERN = torch.ones(1, 1, 4, 4)
POS_MISFIT = r"tokens must be .*where .*pos=4; got int64 of shape \[1, 5\]"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: check_heads(m, [(3, 0)]), "no head L3H0 at 'z': 3 layers of 4 heads"),
        (lambda m: previous_token_score(torch.ones(2, 3, 4)), r"\[... dest src\], got \(2, 3, 4\)"),
        (lambda m: induction_score(torch.ones(9, 9), 5), "9 positions is not a start token"),
        (lambda m: duplicate_token_score(torch.ones(6, 6), 5), "two or more copies"),
        (lambda m: induction_score(torch.ones(9, 9), 1), "at least 2"),
        (lambda m: prefix_matching_score(PATTERN, torch.ones(1, 5).long()), POS_MISFIT),
        (lambda m: prefix_matching_score(PATTERN, torch.arange(4)[None]), "no repeated token"),
        (lambda m: top_heads(torch.ones(2, 2)), "give k, threshold or both"),
        (lambda m: top_heads(torch.ones(2, 2), k=5), "k must be between 1 and 4, got 5"),
    ],
)
def test_bad_input_is_named(random_gpt2, call, message):
    with pytest.raises(ValueError, match=message):
        call(random_gpt2)


@pytest.mark.parametrize(
    ("seq_len", "n_repeats", "message"),
    [(10, 4, "the tokens repeat every 5"), (4, 2, "repeat every 5"), (5, 1, "do not repeat")],
)
def test_a_segment_length_that_is_not_the_tokens_own_is_refused(
    random_gpt2, no_forward, seq_len, n_repeats, message
):
    tokens = repeated_tokens(random_gpt2, 2, 5, n_repeats)
    with pytest.raises(ValueError, match=f"seq_len={seq_len}, but .*{message}"):
        score_heads(random_gpt2, tokens, induction_score, seq_len=seq_len)
