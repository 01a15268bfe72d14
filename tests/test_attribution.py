"""Attribution against hooks on the untouched Hugging Face model, and against TransformerLens."""

import pytest
import references
import torch
from einops import einsum
from torch.testing import assert_close
from transformer_lens.tools import analysis

from utils import attribution
from utils.attribution import (
    attention_at,
    attribution_patching,
    direct_logit_attribution,
    head_projections,
)
from utils.heads import all_heads
from utils.metrics import logit_diff
from utils.toy import build_toy

CLOSE = {"atol": 1e-3, "rtol": 1e-3}
pytestmark = pytest.mark.usefixtures("no_grad")


def head_attribution(model, tokens, answers):
    """[prompt layer head]: right minus wrong answer."""
    to_right, to_wrong = head_projections(model, tokens, all_heads(model), answers).unbind(1)
    return (to_right - to_wrong).unflatten(1, (model.cfg.n_layers, model.cfg.n_heads))


@pytest.fixture(scope="module")
def toy():
    model = build_toy(2)
    model.enable_compatibility_mode()
    return model


# LayerNorm and biases; attention and MLP in parallel; grouped keys and values; attention only
MODELS = ("random_gpt2", "neox", "llama", "toy")


def make_task(model):
    """Three prompts, the same with two of the tokens changed, and two answers each."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, model.cfg.d_vocab, (3, 12), generator=generator)
    corrupted = tokens.clone()
    corrupted[:, [3, 7]] = tokens[:, [7, 3]]
    return tokens, corrupted, tokens[:, [4, 8]]


class HuggingFace:
    """The last position of the untouched model's run, read as logit difference."""

    def __init__(self, hf, tokens, answers):
        self.hf, self.tokens, self.gpt2 = hf, tokens, hasattr(hf, "transformer")
        self.norm = references.final_norm(hf)
        self.unembed = hf.lm_head.weight - hf.lm_head.weight.mean(0)
        self.directions = self.unembed[answers[:, 0]] - self.unembed[answers[:, 1]]
        self.bias = (self.norm.bias * self.directions).sum(-1) if self.gpt2 else torch.zeros(3)

    def at(self, site):
        """[prompt layer d_model], or [prompt layer head d_head] for z."""
        return references.recorded(self.hf, self.tokens, site)[:, :, -1]

    def read(self, parts, directions=None):
        """Of parts of the last residual stream [prompt ... d_model], by the norm's own formula."""
        last = self.at("resid_post")[:, -1]
        if not self.gpt2:
            scale = (last.pow(2).mean(-1, keepdim=True) + self.norm.variance_epsilon).sqrt()
        else:
            scale = (last.var(-1, unbiased=False, keepdim=True) + self.norm.eps).sqrt()
            parts = parts - parts.mean(-1, keepdim=True)
        directions = self.directions if directions is None else directions
        reader = self.norm.weight * directions / scale
        return einsum(parts, reader, "prompt ... d_model, prompt d_model -> prompt ...")


@pytest.fixture
def run(model_pair):
    """A model, prompts and answers, and what the untouched model makes of them."""
    tokens, _, answers = make_task(model_pair[0])
    return model_pair[0], tokens, answers, HuggingFace(model_pair[1], tokens, answers)


def test_components_equal_hugging_face_hooks(run):
    model, tokens, answers, hf = run
    parts = [hf.hf.get_input_embeddings()(tokens[:, -1])]
    parts += [hf.hf.transformer.wpe.weight[11].expand(3, -1)] if hf.gpt2 else []
    labels = ["embed", "pos_embed"][: len(parts)]
    attn, mlp = hf.at("attn_out"), hf.at("mlp_out")
    for layer in range(attn.shape[1]):
        parts += [attn[:, layer], mlp[:, layer]]
        labels += [f"{layer}_attn_out", f"{layer}_mlp_out"]
    want = torch.cat([hf.read(torch.stack(parts, dim=1)), hf.bias[:, None]], dim=1)
    result = direct_logit_attribution(model, tokens, answers)
    assert result.labels == [*labels, "b_U"]
    assert_close(result.values, want, **CLOSE)
    logits = hf.hf(tokens).logits
    assert_close(result.values.sum(1), logit_diff(logits, answers), **CLOSE)


def test_heads_equal_hugging_face_hooks(run):
    model, tokens, answers, hf = run
    weights = [references.out_weight(hf.hf, layer) for layer in range(model.cfg.n_layers)]
    written = einsum(hf.at("z"), torch.stack(weights), "p l h d_head, l h d_head d -> p l h d")
    result = head_attribution(model, tokens, answers)
    assert_close(result, hf.read(written), **CLOSE)
    # one by one, of some heads
    targets = torch.cat([answers, tokens[:, 1:2]], dim=1)
    result = head_projections(model, tokens, [(2, 1), (0, 3)], targets)
    some = written[:, [2, 0], [1, 3]]
    want = torch.stack([hf.read(some, hf.unembed[target]) for target in targets.T], dim=1)
    assert_close(result, want, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_add_up(request, name):
    model = request.getfixturevalue(name)
    tokens, _, answers = make_task(model)
    want = logit_diff(model(tokens), answers)
    assert want.abs().max() > 1e-2
    labels, values = direct_logit_attribution(model, tokens, answers)
    assert_close(values.sum(1), want, **CLOSE)
    # a layer's heads and its bias are its attention output
    cache = model.run_with_cache(tokens)[1]
    directions = (model.W_U[:, answers[:, 0]] - model.W_U[:, answers[:, 1]]).T
    heads = head_attribution(model, tokens, answers).sum(-1)
    for layer, block in enumerate(model.blocks):
        want = values[:, labels.index(f"{layer}_attn_out")]
        bias = torch.zeros(()) if block.attn.b_O is None else block.attn.b_O
        bias = (bias - bias.mean()) / cache["ln_final.hook_scale"][:, -1]
        assert_close(heads[:, layer] + (bias * directions).sum(-1), want, **CLOSE)


def test_attention_between_places_equals_a_loop():
    patterns, heads = torch.rand(3, 4, 5, 12, 12), [(2, 1), (0, 3)]
    places = [(9, 1), (4, 4), (7, 2)]
    result = attention_at(patterns, heads, *torch.tensor(places).T)
    want = [[patterns[(i, *head, *at)] for head in heads] for i, at in enumerate(places)]
    assert_close(result, torch.tensor(want))


def test_small_batches_change_nothing(random_gpt2, monkeypatch):
    tokens, _, answers = make_task(random_gpt2)

    def everything():
        values = direct_logit_attribution(random_gpt2, tokens, answers).values
        by_head = head_attribution(random_gpt2, tokens, answers)
        return values, by_head, head_projections(random_gpt2, tokens, [(1, 1)], answers)

    whole = everything()
    monkeypatch.setattr(attribution, "token_batches", lambda model, tokens: tokens.split(2))
    assert_close(everything(), whole)


def finite_difference(model, clean, corrupted, answers, layer, head, step=0.003):
    """Slope of the metric on the way from the corrupted to the clean activation, by two runs."""
    name = f"blocks.{layer}.attn.hook_z"
    wanted = model.run_with_cache(clean, names_filter=[name])[1][name]
    this_head = torch.eye(model.cfg.n_heads)[head][:, None]

    def moved(share):
        hook = (name, lambda z, hook: z + share * (wanted - z) * this_head)
        return logit_diff(model.run_with_hooks(corrupted, fwd_hooks=[hook]), answers)

    return (moved(step) - moved(-step)) / (2 * step)


@pytest.mark.parametrize("name", [*MODELS, "random_smollm2"])
def test_attribution_patching_equals_a_finite_difference(request, name):
    model = request.getfixturevalue(name)
    clean, corrupted, answers = make_task(model)
    result = attribution_patching(model, clean, corrupted, lambda x: logit_diff(x, answers))
    assert result.shape == (3, model.cfg.n_layers, model.cfg.n_heads)
    for layer, head in ((1, 2), (model.cfg.n_layers - 1, -1)):
        want = finite_difference(model, clean, corrupted, answers, layer, head)
        assert_close(result[:, layer, head], want, atol=5e-3, rtol=2e-2)
    assert result.abs().max() > 0.005
    # prompts do not mix, and one that is as the clean one has no effect
    mixed = torch.stack([clean[0], *corrupted[1:]])
    every = attribution_patching(model, clean, mixed, lambda x: x[:, -1, 7])
    second = attribution_patching(model, clean[1:2], corrupted[1:2], lambda x: x[:, -1, 7])
    assert_close(every[1], second[0], atol=1e-5, rtol=1e-4)
    assert (every[0] == 0).all()


def test_attribution_patching_equals_transformer_lens(model_pair):
    model, _ = model_pair
    *pair, answers = (part[:1] for part in make_task(model))
    with torch.enable_grad():
        their = analysis.attribution_patch(model, *pair, lambda x: logit_diff(x, answers).sum())
    result = attribution_patching(model, *pair, lambda x: logit_diff(x, answers))[0]
    want = torch.zeros_like(result)
    for node, score in their.node_scores.items():
        if node.kind == "attn_head_out":
            want[node.layer, node.head] += score
    assert_close(result, want, atol=1e-4, rtol=1e-3)


def test_the_model_is_left_as_it_was(random_gpt2):
    *pair, answers = make_task(random_gpt2)
    expected = attribution_patching(random_gpt2, *pair, lambda x: logit_diff(x, answers))
    random_gpt2.requires_grad_(False)
    try:
        frozen = attribution_patching(random_gpt2, *pair, lambda x: logit_diff(x, answers))
        assert torch.equal(frozen, expected)
        with pytest.raises(ZeroDivisionError):
            attribution_patching(random_gpt2, *pair, lambda x: 1 / 0)
        assert not any(p.requires_grad for p in random_gpt2.parameters())
    finally:
        random_gpt2.requires_grad_(True)
    assert all(p.grad is None for p in random_gpt2.parameters())
    assert not any(point.fwd_hooks for point in random_gpt2.hook_dict.values())
    assert not torch.is_grad_enabled()


TOKENS, ANSWERS = torch.ones(2, 4).long(), torch.tensor([[1, 2], [3, 4]])
PATTERNS, AT = torch.ones(2, 3, 4, 5, 5), torch.tensor([0, 4])


def attend(heads, dest, source, patterns=PATTERNS):
    return lambda m: attention_at(patterns, heads, dest, source)


def patch(corrupted, metric=lambda x: x[:, -1, 0], clean=TOKENS):
    return lambda m: attribution_patching(m, clean, corrupted, metric)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: direct_logit_attribution(m, TOKENS, ANSWERS[:1]), "answers must be .* prompt=2"),
        (
            lambda m: direct_logit_attribution(m, TOKENS, ANSWERS[:, :1]),
            "answers must be Int.*'prompt 2'",
        ),
        (lambda m: head_projections(m, TOKENS, [(0, 0)], ANSWERS[:, :0]), "is empty"),
        (attend([(0, 0)], AT[:1], AT), "dest must be Int.* prompt=2"),
        (patch(TOKENS[:, 1:]), "corrupted must be .*pos=4"),
        (patch(TOKENS, lambda x: x[:, -1, 0].detach()), "metric must give differentiable"),
    ],
)
def test_bad_input_is_named(random_gpt2, call, message):
    with pytest.raises(ValueError, match=message):
        call(random_gpt2)


def test_a_model_that_cannot_be_read_is_refused(random_gpt2, monkeypatch):
    # where a norm stands between heads and residual stream, heads have no output of their own
    monkeypatch.setattr(
        random_gpt2.blocks[0], "ln1_post", torch.nn.Identity().eval(), raising=False
    )
    with pytest.raises(ValueError, match="do not write to the residual stream one by one"):
        head_attribution(random_gpt2, TOKENS, ANSWERS)
