"""The toys against a forward pass in plain PyTorch, and their measures against loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from census.training import sharpest_drop
from induction_claims import CLAIMS
from utils import toy
from utils.ablation import mean_run
from utils.edits import heads_from, hooks, record
from utils.heads import Head

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def parameters(model):
    named = model.original_model.named_parameters()
    return {name.replace("._original_component", ""): p for name, p in named}


def randomise(model, seed=0):
    """Random weights everywhere: fresh biases and LayerNorms would hide mistakes with either."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters(model).items():
        centre = 1.0 if "ln" in name and name.endswith("weight") else 0.0
        parameter.data = centre + 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def project(w, name, x):
    """Linear map, then split into heads: [prompt head pos d_head]."""
    out = x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    return out.reshape(*x.shape[:2], 4, -1).transpose(1, 2)


def write(w, layer, z):
    """Output of attention from z [prompt head pos d_head]."""
    joined = z.transpose(1, 2).flatten(2)
    return joined @ w[f"layers.{layer}.attn.o.weight"].T + w[f"layers.{layer}.attn.o.bias"]


def pattern_of(q, k):
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


def forward(model, tokens, n_layers, edit=lambda layer, name, x, resid, zs: x):
    """Logits and the patterns of each layer; `edit` may change q, k and v on the way."""
    w = parameters(model)
    x = w["tok_embed.weight"][tokens] + w["pos.weight"][: tokens.shape[1]]
    patterns, zs = [], []
    for layer in range(n_layers):
        h = norm(w, f"layers.{layer}.ln1", x)
        q, k, v = (
            edit(layer, name, project(w, f"layers.{layer}.attn.{name}", h), x, zs) for name in "qkv"
        )
        patterns.append(pattern_of(q, k))
        zs.append(patterns[-1] @ v)
        x = x + write(w, layer, zs[-1])
    return norm(w, "ln_out", x) @ w["head.weight"].T, patterns


def some_batch(seed, n_sequences=300):
    return toy.toy_batch(torch.Generator().manual_seed(seed), n_sequences)


@pytest.fixture(scope="module")
def batch():
    return some_batch(3, n_sequences=5)


@pytest.fixture(scope="module")
def short_run():
    return toy.train_toy(1, smeared=True, seed=1, n_steps=25)


def smallest_period(body):
    periods = range(1, len(body) + 1)
    return next(p for p in periods if all(body[i] == body[i - p] for i in range(p, len(body))))


def test_batch_repeats_a_random_segment():
    rows, again, other = (some_batch(seed).tolist() for seed in (0, 0, 1))
    assert rows == again and rows != other
    periods = [smallest_period(row[1:]) for row in rows]
    assert {len(row) for row in rows} == {toy.CONTEXT}
    assert set(periods) == set(range(toy.SHORTEST, toy.LONGEST + 1))
    for row, period in zip(rows, periods, strict=True):
        assert row[0] == 0
        assert len(set(row[1 : 1 + period])) == period
    assert {t for row in rows for t in row[1:]} == set(range(1, toy.VOCAB))
    assert len({tuple(row) for row in rows}) == 300


@pytest.mark.parametrize("n_layers", [1, 2])
@torch.no_grad()
def test_plain_toy_is_a_plain_transformer(n_layers, batch):
    model = randomise(toy.build_toy(n_layers))
    assert_close(model(batch), forward(model, batch, n_layers)[0], **CLOSE)


@torch.no_grad()
def test_smeared_keys_equal_plain_pytorch(batch):
    model = randomise(toy.build_toy(2, smeared=True))
    alpha = torch.tensor([-2.0, 0.0, 0.7, 3.0])
    model.original_model.smear_alpha.copy_(alpha)

    def smear(layer, name, x, resid, zs):
        mixed = x.clone()
        for head in range(4 if (layer, name) == (0, "k") else 0):
            s = 1 / (1 + math.exp(-alpha[head]))
            for pos in range(1, x.shape[2]):
                mixed[:, head, pos] = s * x[:, head, pos] + (1 - s) * x[:, head, pos - 1]
        return mixed

    logits, patterns = forward(model, batch, 2, smear)
    assert_close(model(batch), logits, **CLOSE)
    # analysis sees the smeared model, also after hooks were reset and in compatibility mode
    model.reset_hooks()
    model.enable_compatibility_mode()
    _, cache = model.run_with_cache(batch)
    for layer in range(2):
        assert_close(cache["pattern", layer], patterns[layer], rtol=1e-4, atol=1e-5)
    assert_close(model(batch).log_softmax(-1), logits.log_softmax(-1), **CLOSE)


def test_only_the_mix_is_new_in_a_smeared_toy():
    plain, smeared = parameters(toy.build_toy(2)), parameters(toy.build_toy(2, smeared=True))
    assert set(smeared) - set(plain) == {"smear_alpha"}
    assert all(torch.equal(plain[name], smeared[name]) for name in plain)


def test_training_lowers_the_loss_and_follows_from_the_seed(short_run):
    assert short_run.steps.tolist() == [0, 10, 20, 25]
    assert short_run.second_loss[-1] < short_run.second_loss[0] - 0.2
    assert short_run.model.original_model.smear_alpha.abs().min() > 0
    again, other = (toy.train_toy(1, smeared=True, seed=s, n_steps=25) for s in (1, 2))
    assert torch.equal(short_run.second_loss, again.second_loss)
    assert torch.equal(short_run.prefix_matching, again.prefix_matching)
    assert not torch.equal(short_run.second_loss, other.second_loss)
    assert torch.equal(short_run.tokens, other.tokens)  # held-out prompts are everyone's


@torch.no_grad()
def test_snapshots_equal_loops_over_prompts(short_run):
    tokens, n = short_run.tokens, toy.LONGEST
    logits, cache = short_run.model.run_with_cache(tokens)
    loss = F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")
    # column i is about token i + 1; the second copy starts at token n + 1
    second = sum(loss[:, i] for i in range(n + 1, 2 * n)) / (n - 1)
    middle = [sum(loss[:, i - 1] for i in range(c - 5, c + 6)) / 11 for c in (12, 12 + n)]
    assert short_run.first_loss[-1] == pytest.approx(loss[:, :n].mean().item(), abs=1e-4)
    assert short_run.second_loss[-1] == pytest.approx(second.mean().item(), abs=1e-4)
    assert short_run.icl_score[-1] == pytest.approx((middle[1] - middle[0]).mean().item(), abs=1e-4)
    assert_close(short_run.losses[-1], loss, **CLOSE)
    pattern = cache["pattern", 0].mean(0)  # all prompts repeat at the same positions
    for head in range(4):
        induction = sum(pattern[head, dest, dest - n + 1] for dest in range(n + 1, 2 * n + 1)) / n
        previous = sum(pattern[head, dest, dest - 1] for dest in range(1, n + 1)) / n
        assert short_run.prefix_matching[-1, 0, head] == pytest.approx(float(induction), abs=1e-5)
        assert short_run.previous_token[-1, 0, head] == pytest.approx(float(previous), abs=1e-5)


def test_sharpest_drop_is_the_steepest_stretch():
    generator = torch.Generator().manual_seed(0)
    for window in (1, 2, 5):
        steps = torch.randint(1, 30, (20,), generator=generator).cumsum(0)
        loss = torch.rand(20, generator=generator)
        pairs = [(i, i + window) for i in range(20 - window)]
        falls = [((loss[i] - loss[j]) / (steps[j] - steps[i]), i, j) for i, j in pairs]
        _, i, j = max(falls)
        assert sharpest_drop(steps, loss, window) == (steps[i] + steps[j]).item() / 2


def test_share_formed_of_known_curves():
    steps = torch.arange(0, 101, 10)
    ramp = 3.0 - 0.02 * steps
    step_at_50 = (steps >= 50).float()
    assert toy.share_formed(steps, ramp, centre=50, width=25) == pytest.approx(0.25)
    assert toy.share_formed(steps, ramp, centre=95, width=20) == pytest.approx(0.15)
    assert toy.share_formed(steps, step_at_50, centre=45, width=10) == pytest.approx(1.0)
    assert toy.share_formed(steps, step_at_50, centre=80, width=20) == pytest.approx(0.0)


def test_plateaus_of_known_curves():
    steps = torch.arange(0, 101, 5)
    ramp, step_at_50 = 3.0 - 0.02 * steps, (steps >= 50).float()
    assert toy.plateaus(steps, ramp, 50, 20) == pytest.approx((1, 1))
    assert toy.plateaus(steps, step_at_50, 50, 20) == pytest.approx((0, 0))
    two_slopes = torch.where(steps < 50, 0.01 * steps, 0.5 + 0.02 * (steps - 50))
    assert toy.plateaus(steps, two_slopes, 50, 20) == pytest.approx((2 / 3, 4 / 3))
    before, after = toy.plateaus(steps, ramp, 12, 20)  # two steps before the window are too few
    assert math.isnan(before) and after == pytest.approx(1)
    assert math.isnan(toy.plateaus(steps, ramp, 95, 20)[1])


@pytest.mark.parametrize("tau", [5, 20, 50, 100, 300])
@pytest.mark.parametrize("noise", [0, 0.003])
def test_a_smooth_exponential_is_no_phase_change(tau, noise):
    """Nor one with some noise: whatever its rate, there is no plateau before the steepest part."""
    steps, generator = torch.arange(0, 501, 10), torch.Generator().manual_seed(0)
    smooth = 1 - torch.exp(-steps / tau) + noise * torch.randn(51, generator=generator)
    centre, width = sharpest_drop(steps, -smooth, window=3), 125
    share = toy.share_formed(steps, smooth, centre, width)
    rates = toy.plateaus(steps, -smooth, centre, width)
    rule = CLAIMS["toy.phase_change"].holds
    assert not rule(share, share, *rates)
    assert tau != 20 or share > 0.75  # the share alone would have passed
    late = torch.sigmoid((steps - 250) / 12)  # what a phase change looks like
    assert rule(0.9, 0.9, *toy.plateaus(steps, late, 250, width))


@pytest.mark.parametrize("tau", [25, 30, 35])
def test_a_smooth_s_fails_by_its_plateaus_alone(tau):
    """Five slow steps that wait for each other: here both rates are numbers, and one too large."""
    steps = torch.arange(0, 501, 10)
    late = steps / tau
    smooth = 1 - torch.exp(-late) * sum(late**i / math.factorial(i) for i in range(5))
    centre, width = sharpest_drop(steps, -smooth, window=3), 125
    rates = toy.plateaus(steps, -smooth, centre, width)
    assert not any(map(math.isnan, rates)) and max(rates) > 1 / 3
    assert not CLAIMS["toy.phase_change"].holds(0.9, 0.9, *rates)


def test_the_path_of_a_turn_and_of_a_straight_line():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.linalg.qr(torch.randn(12, 2, generator=generator)).Q.T
    way = torch.arange(11.0)[:, None]
    turn = way.clamp(max=4) * first + (way - 4).clamp(min=0) * second  # at snapshot 4
    path = toy.path_of(turn.unflatten(1, (3, 4)))
    assert path.points.shape == (11, 2) and path.corner == 4
    assert path.explained.sum() == pytest.approx(1, abs=1e-5)
    # distance of the right angle's corner from the hypotenuse, over the hypotenuse
    assert path.bend == pytest.approx(4 * 6 / (4**2 + 6**2), abs=1e-4)
    assert toy.path_of(way * first).bend == pytest.approx(0, abs=1e-4)
    assert (path.points[-1] > path.points[0]).all()


@pytest.mark.parametrize("site", ["q", "k", "v"])
@torch.no_grad()
def test_cut_path_equals_plain_pytorch(site, batch):
    model = randomise(toy.build_toy(2))
    writers, reader = [(0, 0), (0, 2)], Head(1, 3)
    w = parameters(model)

    def cut(layer, name, x, resid, zs):
        if layer == 0 or name != site:
            return x
        z = zs[0].clone()
        for _, head in writers:
            z[:, head] = z[:, head].mean(0, keepdim=True)
        less = resid - write(w, 0, zs[0]) + write(w, 0, z)
        edited = project(w, f"layers.1.attn.{name}", norm(w, "layers.1.ln1", less))
        return torch.where(torch.arange(4)[:, None, None] == reader.head, edited, x)

    (wanted, patterns), (clean, _) = forward(model, batch, 2, cut), forward(model, batch, 2)
    model.enable_compatibility_mode()
    without = record(model, batch, [site], heads_from(model, writers, mean_run(model, batch)))
    with model.hooks(fwd_hooks=hooks(heads_from(model, [reader], without, site))):
        logits, cache = model.run_with_cache(batch)
    got, wanted, clean = (x.log_softmax(-1) for x in (logits, wanted, clean))
    assert_close(got, wanted, **CLOSE)
    assert_close(cache["pattern", 1], patterns[1], rtol=1e-4, atol=1e-5)
    assert (got - clean).abs().max() > 0.01


STEPS, LOSS = torch.tensor([0, 10, 20]), torch.tensor([3.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sharpest_drop(STEPS, LOSS[:2], 1), "loss must be Float.* snapshot=3"),
        (lambda: sharpest_drop(STEPS, LOSS, 3), "window must be between 1 and 2"),
        (lambda: sharpest_drop(STEPS, LOSS, 0), "window must be between 1 and 2"),
        (lambda: sharpest_drop(STEPS.flip(0), LOSS, 1), "steps must rise"),
        (lambda: toy.share_formed(STEPS, LOSS[:2], 10, 5), "values must be Float.* snapshot=3"),
        (lambda: toy.share_formed(STEPS, LOSS, 10, 0), "width must be positive"),
        (lambda: toy.share_formed(STEPS, torch.ones(3), 10, 5), "end where they began"),
        (lambda: toy.plateaus(STEPS, LOSS[:2], 10, 5), "values must be Float.* snapshot=3"),
        (lambda: toy.path_of(torch.ones(2, 3)), r"three snapshots or more, got .2, 3."),
        (lambda: toy.path_of(torch.ones(3, 3)), "end where they began"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
