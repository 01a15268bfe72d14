"""Attribution against hooks on the untouched Hugging Face model, and against TransformerLens."""

import pytest
import torch
from transformer_lens.tools import analysis

from utils import attribution
from utils.attribution import (
    attention_at,
    attribution_patching,
    direct_logit_attribution,
    head_attribution,
    head_projections,
    logit_lens,
)
from utils.heads import attention_patterns
from utils.metrics import logit_diff
from utils.toy import build_toy

CLOSE = {"atol": 1e-3, "rtol": 1e-3}
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def toy():
    model = build_toy(2)
    model.enable_compatibility_mode()
    return model


# LayerNorm and biases; attention and MLP in parallel; grouped keys and values; attention only
ARCHITECTURES = ["random_gpt2", "neox", "llama", "toy"]


@pytest.fixture
def model(request):
    return request.getfixturevalue(request.param)


def make_task(model):
    """Three prompts, the same with two of the tokens changed, and two answers each."""
    tokens = torch.randint(
        20, model.cfg.d_vocab, (3, 12), generator=torch.Generator().manual_seed(0)
    )
    corrupted = tokens.clone()
    corrupted[:, [3, 7]] = tokens[:, [7, 3]]
    return tokens, corrupted, tokens[:, [4, 8]]


class HuggingFace:
    """A run of the untouched model: what the modules gave at the end, read as logit difference."""

    def __init__(self, hf, tokens, answers):
        gpt2 = hasattr(hf, "transformer")
        body = hf.transformer if gpt2 else hf.model
        blocks, self.norm = (body.h, body.ln_f) if gpt2 else (body.layers, body.norm)
        self.embeddings = [body.wte, body.wpe] if gpt2 else [body.embed_tokens]
        self.attns = [block.attn if gpt2 else block.self_attn for block in blocks]
        self.outs = [attn.c_proj if gpt2 else attn.o_proj for attn in self.attns]
        self.gpt2, self.hf, self.blocks, self.got, self.given = gpt2, hf, blocks, {}, {}
        mlps = [block.mlp for block in blocks]
        modules = [*self.embeddings, *self.attns, *self.outs, *mlps, *blocks, self.norm]
        handles = [module.register_forward_hook(self.keep) for module in modules]
        self.logits = hf(tokens).logits
        for handle in handles:
            handle.remove()
        self.directions = hf.lm_head.weight[answers[:, 0]] - hf.lm_head.weight[answers[:, 1]]
        self.bias = (self.norm.bias * self.directions).sum(-1) if gpt2 else torch.zeros(3)

    def keep(self, module, args, out):
        out = out[0] if isinstance(out, tuple) else out
        self.given[module] = out[:, -1].expand(3, -1)  # positions are embedded once for all
        if args and args[0].ndim == 3:
            self.got[module] = args[0][:, -1]

    def read(self, part):
        """Of a part of the last residual stream, by the norm's own formula."""
        last = self.got[self.norm]
        if not self.gpt2:
            scale = (last.pow(2).mean(-1) + self.norm.variance_epsilon).sqrt()
        else:
            scale = (last.var(-1, unbiased=False) + self.norm.eps).sqrt()
            part = part - part.mean(-1, keepdim=True)
        return (part / scale[:, None] * self.norm.weight * self.directions).sum(-1)

    def read_heads(self, layer):
        """What each head of a layer writes, value biases left out (they belong to b_O)."""
        z, weight = self.got[self.outs[layer]], self.outs[layer].weight
        if self.gpt2:
            values, from_v = self.attns[layer].c_attn, slice(2 * z.shape[1], None)
            into = self.blocks[layer].ln_1.bias
            z, weight = z - into @ values.weight[:, from_v] - values.bias[from_v], weight.T
        columns = torch.arange(z.shape[1]).chunk(self.hf.config.num_attention_heads)
        return torch.stack([self.read(z[:, c] @ weight[:, c].T) for c in columns], dim=1)


@pytest.fixture
def run(model_pair):
    """Prompts and answers, and what the untouched model makes of them."""
    tokens, _, answers = make_task(model_pair[0])
    return tokens, answers, HuggingFace(model_pair[1], tokens, answers)


def test_components_equal_hugging_face_hooks(model_pair, run):
    tokens, answers, hf = run
    modules, labels = [*hf.embeddings], ["embed", "pos_embed"][: len(hf.embeddings)]
    for layer, block in enumerate(hf.blocks):
        modules += [hf.attns[layer], block.mlp]
        labels += [f"{layer}_attn_out", f"{layer}_mlp_out"]
    want = torch.stack([hf.read(hf.given[module]) for module in modules] + [hf.bias], dim=1)
    result = direct_logit_attribution(model_pair[0], tokens, answers)
    assert result.labels == [*labels, "b_U"]
    torch.testing.assert_close(result.values, want, **CLOSE)
    torch.testing.assert_close(result.values.sum(1), logit_diff(hf.logits, answers), **CLOSE)


def test_heads_equal_hugging_face_hooks(model_pair, run):
    tokens, answers, hf = run
    result = head_attribution(model_pair[0], tokens, answers)
    for layer in range(len(hf.blocks)):
        torch.testing.assert_close(result[:, layer], hf.read_heads(layer), **CLOSE)


def test_logit_lens_equals_hugging_face_hidden_states(model_pair, run):
    tokens, answers, hf = run
    labels, values = logit_lens(model_pair[0], tokens, answers)
    for layer in range(1, len(hf.blocks)):
        before = hf.given[hf.blocks[layer - 1]]
        between = before + hf.given[hf.attns[layer]]
        for label, stream in ((f"{layer}_pre", before), (f"{layer}_mid", between)):
            column = values[:, labels.index(label)]
            torch.testing.assert_close(column, hf.read(stream) + hf.bias, **CLOSE)


@pytest.mark.parametrize("model", ARCHITECTURES, indirect=True)
def test_the_parts_add_up(model):
    tokens, _, answers = make_task(model)
    want = logit_diff(model(tokens), answers)
    assert want.abs().max() > 1e-2
    labels, values = direct_logit_attribution(model, tokens, answers)
    torch.testing.assert_close(values.sum(1), want, **CLOSE)
    torch.testing.assert_close(logit_lens(model, tokens, answers).values[:, -1], want, **CLOSE)
    # a layer's heads and its bias are its attention output
    cache = model.run_with_cache(tokens)[1]
    directions = (model.W_U[:, answers[:, 0]] - model.W_U[:, answers[:, 1]]).T
    heads = head_attribution(model, tokens, answers).sum(-1)
    for layer, block in enumerate(model.blocks):
        want = values[:, labels.index(f"{layer}_attn_out")]
        bias = torch.zeros(()) if block.attn.b_O is None else block.attn.b_O
        bias = (bias - bias.mean()) / cache["ln_final.hook_scale"][:, -1]
        torch.testing.assert_close(heads[:, layer] + (bias * directions).sum(-1), want, **CLOSE)


@pytest.mark.parametrize(
    ("model", "halves"),
    [("neox", ["pre"]), ("toy", ["pre"]), ("llama", ["pre", "mid"])],
    indirect=["model"],
)
def test_logit_lens_has_the_half_layers_a_model_has(model, halves):
    tokens, _, answers = make_task(model)
    want = [f"{layer}_{half}" for layer in range(model.cfg.n_layers) for half in halves]
    assert logit_lens(model, tokens, answers).labels == [*want, "final_post"]


def test_projections_equal_a_loop(model_pair):
    model = model_pair[0]
    tokens, _, answers = make_task(model)
    heads, targets = [(2, 1), (0, 3)], torch.cat([answers, tokens[:, 1:2]], dim=1)
    result = head_projections(model, tokens, heads, targets)
    assert result.shape == (3, 3, 2)
    cache = model.run_with_cache(tokens)[1]
    for prompt in range(3):
        for column, (layer, head) in enumerate(heads):
            written = cache["z", layer][prompt, -1, head] @ model.W_O[layer, head]
            scaled = written / cache["ln_final.hook_scale"][prompt, -1]
            want = scaled @ model.W_U[:, targets[prompt]]
            torch.testing.assert_close(result[prompt, :, column], want, **CLOSE)
    difference = head_attribution(model, tokens, answers)[:, [2, 0], [1, 3]]
    torch.testing.assert_close(result[:, 0] - result[:, 1], difference, **CLOSE)


def test_attention_equals_hugging_face(model_pair):
    model, hf = model_pair
    tokens = make_task(model)[0]
    dest, source, heads = torch.tensor([9, 4, 7]), torch.tensor([1, 4, 2]), [(2, 1), (0, 3)]
    result = attention_at(attention_patterns(model, tokens), heads, dest, source)
    attentions = hf(tokens, output_attentions=True).attentions
    for column, (layer, head) in enumerate(heads):
        want = attentions[layer][torch.arange(3), head, dest, source]
        torch.testing.assert_close(result[:, column], want, **CLOSE)
    assert result.std() > 0.01


def test_small_batches_change_nothing(random_gpt2, monkeypatch):
    tokens, _, answers = make_task(random_gpt2)

    def everything():
        yield direct_logit_attribution(random_gpt2, tokens, answers).values
        yield logit_lens(random_gpt2, tokens, answers).values
        yield head_attribution(random_gpt2, tokens, answers)
        yield head_projections(random_gpt2, tokens, [(1, 1)], answers)

    whole = list(everything())
    monkeypatch.setattr(attribution, "token_batches", lambda model, tokens: tokens.split(2))
    for got, want in zip(everything(), whole, strict=True):
        torch.testing.assert_close(got, want)


def finite_difference(model, clean, corrupted, answers, layer, head, step=0.003):
    """Slope of the metric on the way from the corrupted to the clean activation, by two runs."""
    name = f"blocks.{layer}.attn.hook_z"
    wanted = model.run_with_cache(clean, names_filter=[name])[1][name]

    def moved(share):
        def move(z, hook):
            z = z.clone()
            z[:, :, head] += share * (wanted - z)[:, :, head]
            return z

        return logit_diff(model.run_with_hooks(corrupted, fwd_hooks=[(name, move)]), answers)

    return (moved(step) - moved(-step)) / (2 * step)


@pytest.mark.parametrize("model", [*ARCHITECTURES, "smollm2"], indirect=True)
def test_attribution_patching_equals_a_finite_difference(model):
    clean, corrupted, answers = make_task(model)
    result = attribution_patching(model, clean, corrupted, lambda x: logit_diff(x, answers))
    assert result.shape == (3, model.cfg.n_layers, model.cfg.n_heads)
    for layer, head in ((1, 2), (model.cfg.n_layers - 1, -1)):
        want = finite_difference(model, clean, corrupted, answers, layer, head)
        torch.testing.assert_close(result[:, layer, head], want, atol=5e-3, rtol=2e-2)
    assert result.abs().max() > 0.005
    # prompts do not mix, and one that is as the clean one has no effect
    mixed = torch.stack([clean[0], *corrupted[1:]])
    every = attribution_patching(model, clean, mixed, lambda x: x[:, -1, 7])
    second = attribution_patching(model, clean[1:2], corrupted[1:2], lambda x: x[:, -1, 7])
    torch.testing.assert_close(every[1], second[0], atol=1e-5, rtol=1e-4)
    assert (every[0] == 0).all()


@pytest.mark.parametrize("model", ["smollm2", "random_gpt2"], indirect=True)
def test_attribution_patching_equals_transformer_lens(model):
    clean, corrupted, answers = (part[:1] for part in make_task(model))
    with torch.enable_grad():
        scores = analysis.attribution_patch(
            model, clean, corrupted, lambda logits: logit_diff(logits, answers).sum()
        ).node_scores
    result = attribution_patching(model, clean, corrupted, lambda x: logit_diff(x, answers))[0]
    want = torch.zeros_like(result)
    for node, score in scores.items():
        if node.kind == "attn_head_out":
            want[node.layer, node.head] += score
    torch.testing.assert_close(result, want, atol=1e-4, rtol=1e-3)


def test_the_model_is_left_as_it_was(random_gpt2):
    *pair, answers = make_task(random_gpt2)
    expected = attribution_patching(random_gpt2, *pair, lambda x: logit_diff(x, answers))

    def fails(logits):
        raise RuntimeError("stop")

    random_gpt2.requires_grad_(False)
    try:
        frozen = attribution_patching(random_gpt2, *pair, lambda x: logit_diff(x, answers))
        assert torch.equal(frozen, expected)
        with pytest.raises(RuntimeError, match="stop"):
            attribution_patching(random_gpt2, *pair, fails)
        assert not any(p.requires_grad for p in random_gpt2.parameters())
    finally:
        random_gpt2.requires_grad_(True)
    assert all(p.grad is None for p in random_gpt2.parameters())
    assert not any(point.fwd_hooks for point in random_gpt2.hook_dict.values())
    assert not torch.is_grad_enabled()


TOKENS, ANSWERS = torch.ones(2, 4).long(), torch.tensor([[1, 2], [3, 4]])
PATTERNS, AT = torch.ones(2, 3, 4, 5, 5), torch.tensor([0, 4])


def value(logits):
    return logits[:, -1, 0]


def attend(heads, dest, source, patterns=PATTERNS):
    return lambda m: attention_at(patterns, heads, dest, source)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: direct_logit_attribution(m, TOKENS, ANSWERS[:1]), "answers must be .* prompt=2"),
        (lambda m: logit_lens(m, TOKENS, ANSWERS[:, :1]), "answers must be Int.*'prompt 2'"),
        (lambda m: head_attribution(m, TOKENS, ANSWERS.float()), "answers must be Int"),
        (lambda m: head_attribution(m, TOKENS, -ANSWERS), r"answers must lie in 0\.\."),
        (lambda m: logit_lens(m, TOKENS[:, :0], ANSWERS), "tokens is empty"),
        (lambda m: logit_lens(m, TOKENS[:0], ANSWERS[:0]), "answers is empty"),
        (lambda m: head_projections(m, TOKENS, [], ANSWERS), "heads is empty"),
        (lambda m: head_projections(m, TOKENS, [(0, 0)], ANSWERS[:, :0]), "answers is empty"),
        (lambda m: head_projections(m, TOKENS, [(3, 0)], ANSWERS), "no head L3H0"),
        (attend([(0, 0)], AT, 5 - AT), r"source must lie in 0\.\.4, got 1\.\.5"),
        (attend([(0, 0)], -AT, AT), r"dest must lie in 0\.\.4, got -4\.\.0"),
        (attend([(0, 0)], AT[:1], AT), "dest must be Int.* prompt=2"),
        (attend([(0, 0)], AT, AT.float()), "source must be Int"),
        (attend([(0, 9)], AT, AT), r"heads must lie in 0\.\.3"),
        (attend([(3, 0)], AT, AT), r"heads' layers must lie in 0\.\.2"),
        (attend([], AT, AT), "heads.* empty"),
        (attend([(0, 0)], AT, AT, PATTERNS[0]), "patterns must be Float"),
        (
            lambda m: attribution_patching(m, TOKENS, TOKENS[:, 1:], value),
            "corrupted must be .*pos=4",
        ),
        (lambda m: attribution_patching(m, TOKENS[:0], TOKENS[:0], value), "clean is empty"),
        (lambda m: attribution_patching(m, TOKENS, -TOKENS, value), "corrupted must lie in"),
        (lambda m: attribution_patching(m, TOKENS, TOKENS, "z"), "metric must be"),
        (
            lambda m: attribution_patching(m, TOKENS, TOKENS, lambda x: x.mean()),
            r"metric must give differentiable \[prompt\] values, got shape \(\)",
        ),
        (
            lambda m: attribution_patching(m, TOKENS, TOKENS, lambda x: value(x).detach()),
            "metric must give differentiable",
        ),
    ],
)
def test_bad_input_is_named(random_gpt2, call, message):
    with pytest.raises(ValueError, match=message):
        call(random_gpt2)


def test_a_model_that_cannot_be_read_is_refused(toy2, random_gpt2, monkeypatch):
    with pytest.raises(ValueError, match="must be in compatibility mode"):
        head_attribution(toy2, TOKENS, ANSWERS)
    # where a norm stands between heads and residual stream, heads have no output of their own
    monkeypatch.setattr(random_gpt2.blocks[0], "ln1_post", torch.nn.Identity(), raising=False)
    with pytest.raises(ValueError, match="do not write to the residual stream one by one"):
        head_attribution(random_gpt2, TOKENS, ANSWERS)
