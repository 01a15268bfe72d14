"""Copying and composition scores against full matrices, loops and TransformerLens."""

import pytest
import references
import torch
from einops import einsum

from utils import weights
from utils.heads import all_heads, top_heads
from utils.prompts import ordinary_tokens, repeated_tokens
from utils.toy import build_toy
from utils.weights import (
    composition_baseline,
    composition_scores,
    copying_of_output,
    copying_score,
    eigenvalue_copying_score,
    name_copying_in_place,
    name_copying_score,
    on_paper_scale,
    own_logit_largest,
)

pytestmark = pytest.mark.usefixtures("no_grad")


def folded_toy():
    """A two-layer toy in compatibility mode, whose weights a test may set."""
    model = build_toy(2)
    model.enable_compatibility_mode()
    return model


@pytest.fixture(params=["random_smollm2", "random_gpt2", "toy2"])
def model(request):
    return request.getfixturevalue(request.param)


def shared_head(model, head):
    """The key/value head of a query head, found by listing the groups."""
    n_kv = getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads
    return [kv for kv in range(n_kv) for _ in range(model.cfg.n_heads // n_kv)][head]


def ov_matrix(model, layer, head):
    attn = model.blocks[layer].attn
    return attn.W_V[shared_head(model, head)] @ attn.W_O[head]


def qk_matrix(model, layer, head):
    attn = model.blocks[layer].attn
    return attn.W_Q[head] @ attn.W_K[shared_head(model, head)].T


def test_copying_score_equals_a_loop_over_attended_tokens(model):
    tokens = repeated_tokens(model, 2, 6, n_repeats=1)
    scores = copying_score(model, tokens)
    assert scores.shape == (2, model.cfg.n_layers, model.cfg.n_heads)
    _, cache = model.run_with_cache(tokens)
    group = model.cfg.n_heads // cache["v", 0].shape[2]
    for prompt, layer, head in [(0, 0, 0), (1, 1, model.cfg.n_heads - 1), (0, 1, 2)]:
        own = total = 0.0
        for src in range(1, 7):
            value = cache["v", layer][prompt, src, head // group]
            logits = value @ model.W_O[layer, head] @ model.W_U
            raised = (logits - logits.mean()).relu()
            attended = cache["pattern", layer][prompt, head, 1:, src].sum()
            own += attended * raised[tokens[prompt, src]]
            total += attended * raised[tokens[prompt, 1:]].sum()
        want = (2 * own / total - 1).item()
        assert scores[prompt, layer, head].item() == pytest.approx(want, abs=1e-3)


def test_a_head_that_copies_scores_one_and_one_that_suppresses_minus_one():
    toy = folded_toy()
    tokens = repeated_tokens(toy, 1, 8, n_repeats=1)
    # an unembedding that reads tokens off layer 1, head 0's own output for them
    _, cache = toy.run_with_cache(tokens)
    written = cache["v", 1][0, 1:, 0] @ toy.blocks[1].attn.W_O[0]
    toy.unembed.W_U.zero_()
    toy.unembed.W_U[:, tokens[0, 1:]] = torch.linalg.pinv(written)
    assert copying_score(toy, tokens)[0, 1, 0] > 0.95
    toy.unembed.W_U.neg_()
    assert copying_score(toy, tokens)[0, 1, 0] < -0.95


def test_copying_of_output_equals_a_loop_over_positions(model):
    tokens = repeated_tokens(model, 2, 6, n_repeats=1)[:, 1:]
    scores = copying_of_output(model, tokens)
    _, cache = model.run_with_cache(tokens)
    for prompt, layer, head in [(0, 0, 0), (1, 1, model.cfg.n_heads - 1), (0, 1, 2)]:
        own = total = 0.0
        for dest in range(6):
            logits = cache["z", layer][prompt, dest, head] @ model.W_O[layer, head] @ model.W_U
            raised = (logits - logits.mean()).relu()[tokens[prompt]]
            own += (cache["pattern", layer][prompt, head, dest] * raised).sum()
            total += raised.sum()
        want = (4 * own / (own + total) - 1).item()
        assert scores[prompt, layer, head].item() == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize("start", [0, 1])
def test_planted_heads_score_one_chance_and_minus_one_on_the_papers_scale(start):
    """Three heads that attend to their own token: one copies, one raises all alike, one lowers."""
    toy, n = folded_toy(), 8
    tokens = repeated_tokens(toy, 1, n, n_repeats=1)[:, 1 - start :]  # with the start token, or not
    attention = toy.blocks[1].attn
    for head in range(3):  # a query fits the key of its own token best
        attention.W_K[head] *= 40
        attention.W_Q[head] = attention.W_K[head]
    values = toy.run_with_cache(tokens)[1]["z", 1][0, start:]  # [pos head d_head]
    raises = toy.W_U.T[tokens[0, start:]] - toy.W_U.mean(1)
    alone = torch.linalg.pinv(raises).T  # row t raises token t and no other one
    for head, written in enumerate([alone, alone.sum(0).expand(n, -1), -alone]):
        attention.W_O[head] = torch.linalg.pinv(values[:, head]) @ written
    if start:
        scores = on_paper_scale((copying_score(toy, tokens) + 1) / 2)
    else:
        scores = copying_of_output(toy, tokens)
    assert scores[0, 1, :3].tolist() == pytest.approx([1, 4 / (n + 1) - 1, -1], abs=0.05)


def test_eigenvalue_score_equals_the_full_matrix(model):
    heads = [(0, 0), (1, 3), (model.cfg.n_layers - 1, 1)]
    every = eigenvalue_copying_score(model)
    assert every.shape == (model.cfg.n_layers, model.cfg.n_heads)
    for layer, head in heads:
        ov, w_e, w_u = (w.double() for w in (ov_matrix(model, layer, head), model.W_E, model.W_U))
        token_by_token = model.cfg.d_vocab < 1000  # as defined
        full = w_e @ ov @ w_u if token_by_token else ov @ (w_u @ w_e)
        eigenvalues = torch.linalg.eigvals(full)
        want = (eigenvalues.sum() / eigenvalues.abs().sum()).real.item()
        assert every[layer, head].item() == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize("model", ["random_smollm2", "toy2"], indirect=True)
def test_own_logit_largest_equals_a_loop(model):
    heads = top_heads(eigenvalue_copying_score(model), k=3)
    largest = own_logit_largest(model, heads, n_tokens=20, seed=3)
    assert largest.shape == (20, 3)
    pool = ordinary_tokens(model)
    sample = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(3))[:20]]
    for i, (layer, head) in enumerate(heads):
        for t, token in enumerate(sample.tolist()):
            logits = model.W_E[token] @ ov_matrix(model, layer, head) @ model.W_U
            assert largest[t, i].item() == bool((logits <= logits[token]).all())


def hf_copied(hf, layer, resid, own, sign):
    """Which heads of the untouched model, given a residual stream, write `own` in the top: [head].

    (Without value biases: they are the same for every token, and belong to b_O.)
    """
    block, w_o = references.blocks(hf)[layer], references.out_weight(hf, layer)
    attn, norm = references.attention(block), references.final_norm(hf)
    if hasattr(hf, "transformer"):
        w_v = attn.c_attn.weight[:, 2 * hf.config.hidden_size :]
        values = (block.ln_1(resid) - block.ln_1.bias) @ w_v
    else:
        values = attn.v_proj(block.input_layernorm(resid))
    values = values.unflatten(-1, (-1, w_o.shape[1]))  # [kv_head d_head]
    values = values.repeat_interleave(len(w_o) // len(values), dim=0)
    logits = hf.lm_head(norm(sign * einsum(values, w_o, "h d_head, h d_head d -> h d")))
    return (logits.topk(weights.TOP).indices == own).any(-1).float()


# a head that is not made for it writes next to nothing into the top 5: a third of the vocabulary
# lets every head show, and every rank count
TOPS = pytest.mark.parametrize(("sign", "top"), [(1, 5), (-1, 5), (1, 15_000), (-1, 15_000)])


@TOPS
def test_name_copying_equals_topk_on_hugging_face(model_pair, monkeypatch, sign, top):
    model, hf = model_pair
    monkeypatch.setattr(weights, "TOP", top)
    names = ordinary_tokens(model)[::900]
    scores = name_copying_score(model, names, all_heads(model), sign)
    start = torch.full_like(names, model.tokenizer.bos_token_id)
    hidden = hf(torch.stack([start, names], dim=1), output_hidden_states=True).hidden_states[1]
    best = [int(i) // model.cfg.n_heads for i in scores.topk(2).indices]
    for layer in {0, 2, model.cfg.n_layers - 1, *best}:
        copied = [hf_copied(hf, layer, *at, sign) for at in zip(hidden[:, 1], names, strict=True)]
        got = scores.unflatten(0, (-1, model.cfg.n_heads))[layer]
        torch.testing.assert_close(got, torch.stack(copied).mean(0))
    assert 0 < scores.mean() < 1 or top == 5


@TOPS
def test_copying_in_place_equals_topk_on_hugging_face(model_pair, monkeypatch, sign, top):
    model, hf = model_pair
    monkeypatch.setattr(weights, "TOP", top)
    tokens, positions = repeated_tokens(model, 4, 5), torch.tensor([2, 5, 1, 8])
    scores = name_copying_in_place(model, tokens, positions, sign)
    assert scores.shape == (4, model.cfg.n_layers, model.cfg.n_heads)
    hidden = hf(tokens, output_hidden_states=True).hidden_states
    for layer in (0, 1, model.cfg.n_layers - 1):
        for i, pos in enumerate(positions):
            want = hf_copied(hf, layer, hidden[layer][i, pos], tokens[i, pos], sign)
            assert torch.equal(scores[i, layer], want)
    assert 0 < scores.mean() < 1 or top == 5


def test_a_head_that_copies_scores_one_by_name_and_one_that_writes_nothing_zero(monkeypatch):
    monkeypatch.setattr(weights, "TOP", 1)
    toy, prompt = folded_toy(), torch.arange(3)
    tokens, positions = repeated_tokens(toy, 3, 8, n_repeats=1), torch.tensor([2, 5, 8])

    def scores(sign):
        return name_copying_in_place(toy, tokens, positions, sign)[:, 1, 0].tolist()

    # an unembedding that reads each token off what layer 1, head 0 writes for it
    _, cache = toy.run_with_cache(tokens)
    written = cache["v", 1][prompt, positions, 0] @ toy.blocks[1].attn.W_O[0]
    readers = torch.linalg.pinv(written - written.mean(-1, keepdim=True))
    toy.unembed.W_U.zero_().index_add_(1, tokens[prompt, positions], readers)
    assert (scores(1), scores(-1)) == ([1.0] * 3, [0.0] * 3)
    toy.unembed.W_U.neg_()
    assert scores(-1) == [1.0] * 3
    toy.unembed.W_U.zero_()  # every logit ties
    assert scores(1) == [0.0] * 3


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_composition_equals_the_full_matrices(model, kind):
    last = model.cfg.n_layers - 1
    writers, readers = [(0, 1), (last - 1, 0), (0, 3)], [(last, 2), (last, 3)]
    scores = composition_scores(model, kind, writers, readers)
    assert scores.shape == (3, 2)
    for j, reader in enumerate(readers):
        qk = qk_matrix(model, *reader)
        reads = {"Q": qk, "K": qk.T, "V": ov_matrix(model, *reader)}[kind]
        for i, writer in enumerate(writers):
            writes = ov_matrix(model, *writer)
            want = (writes @ reads).norm() / writes.norm() / reads.norm()
            assert scores[i, j].item() == pytest.approx(want.item(), rel=1e-3)


def test_gaussian_heads_compose_by_one_over_the_root_of_the_width(random_gpt2):
    """For Gaussian matrices E||WM||^2 = ||W||^2 ||M||^2 / d_model."""
    baseline = composition_baseline(random_gpt2, n=200)
    assert baseline.shape == (200,)
    assert baseline.mean().item() == pytest.approx(64**-0.5, rel=0.02)
    assert 0 < baseline.std().item() < 0.02
    assert torch.equal(baseline, composition_baseline(random_gpt2, n=200))


ONE = torch.ones(2, 3).long()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: copying_score(m, repeated_tokens(m, 2, 5)), "must not repeat"),
        (lambda m: copying_score(m, torch.tensor([[1, 3]])), "must be at least 3, got 2"),
        (lambda m: copying_of_output(m, repeated_tokens(m, 2, 5)), "must not repeat"),
        (lambda m: copying_of_output(m, torch.tensor([[1]])), "must be at least 2, got 1"),
        (lambda m: name_copying_in_place(m, ONE, ONE[0]), "positions must be Int.* prompt=2"),
        (lambda m: composition_scores(m, "K", [(1, 0)], [(1, 1)]), "in a later layer"),
    ],
)
def test_bad_input_is_named(random_gpt2, call, message):
    with pytest.raises(ValueError, match=message):
        call(random_gpt2)
