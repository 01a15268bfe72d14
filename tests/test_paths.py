"""Path patching against the paper's recipe, in whole runs with plain hooks."""

import pytest
import torch

from utils import paths
from utils.heads import Head, all_heads, key_value_head
from utils.patching import patch_heads
from utils.paths import path_patch

pytestmark = pytest.mark.usefixtures("no_grad")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(params=["random_gpt2", "llama", "neox", "toy2"])
def small(request):
    return request.getfixturevalue(request.param)


def prompts(model, first=4, n=2, length=9):
    """Two sets of random prompts, that differ from position `first` on."""
    generator = torch.Generator().manual_seed(3)
    draws = torch.randint(3, model.cfg.d_vocab, (2, n, length), generator=generator)
    draws[1, :, :first] = draws[0, :, :first]
    return draws[0], draws[1]


def metric(logits):
    return logits[:, -1, 7] - logits[:, -1, 11]


def recipe(model, original, new, sender, receivers=(), site=None, positions=None, metric=metric):
    """Appendix B of Wang et al.: run both, freeze all but the sender, then put what arrives."""
    n_layers = range(model.cfg.n_layers)
    z_names = [f"blocks.{layer}.attn.hook_z" for layer in n_layers]
    from_original = model.run_with_cache(original)[1]
    from_new = model.run_with_cache(new)[1]
    frozen = {name: from_original[name].clone() for name in z_names}
    layer, head = sender
    frozen[z_names[layer]][:, :, head] = from_new[z_names[layer]][:, :, head]
    with model.hooks(fwd_hooks=[(n, lambda z, hook, n=n: frozen[n]) for n in z_names]):
        logits, arrived = model.run_with_cache(original)
    if not receivers:
        return metric(logits)

    def put(name, head):
        def hook_fn(activation, hook):
            activation = activation.clone()
            for row in range(len(original)):
                where = slice(None) if positions is None else int(positions[row])
                activation[row, where, head] = arrived[name][row, where, head]
            return activation

        return name, hook_fn

    hooks = []
    for receiver in receivers:
        layer, head = receiver if site == "q" else key_value_head(model, receiver)
        hooks.append(put(f"blocks.{layer}.attn.hook_{site}", head))
    return metric(model.run_with_hooks(original, fwd_hooks=hooks))


def test_every_head_to_the_logits(small):
    original, new = prompts(small)
    got = path_patch(small, original, new, metric)
    want = [recipe(small, original, new, head) for head in all_heads(small)]
    torch.testing.assert_close(got.flatten(1), torch.stack(want, dim=1), **CLOSE)
    assert (got - metric(small(original))[:, None, None]).abs().amax() > 1e-3


@pytest.mark.parametrize("positions", [None, torch.tensor([8, 6])])
@pytest.mark.parametrize("site", ["q", "k", "v"])
def test_every_head_to_receivers(small, site, positions):
    original, new = prompts(small)
    top = small.cfg.n_layers - 1
    receivers = [Head(top - 1, 1), Head(top, 0), Head(top, 3)]
    got = path_patch(small, original, new, metric, None, receivers, site, positions)
    want = [
        recipe(small, original, new, head, receivers, site, positions) for head in all_heads(small)
    ]
    torch.testing.assert_close(got.flatten(1), torch.stack(want, dim=1), **CLOSE)
    assert (got - metric(small(original))[:, None, None]).abs().amax() > 1e-4


@pytest.mark.parametrize(
    ("receivers", "site", "position"),
    [((), None, None), ([(18, 1), (20, 4)], "q", 8), ([(9, 8), (11, 0)], "k", 5)],
)
def test_paths_in_smollm2(smollm2, receivers, site, position):
    original, new = prompts(smollm2)
    positions = None if position is None else torch.tensor([position, position - 1])
    senders = [(0, 0), (8, 7)]

    def words(logits):
        return logits[:, -1, 1000] - logits[:, -1, 2000]

    got = path_patch(smollm2, original, new, words, senders, receivers or None, site, positions)
    want = [recipe(smollm2, original, new, s, receivers, site, positions, words) for s in senders]
    torch.testing.assert_close(got, torch.stack(want, dim=1), **CLOSE)
    assert (got - words(smollm2(original))[:, None]).abs().amax() > 1e-3


def test_small_packs_give_the_same(random_gpt2, monkeypatch):
    """Receivers in two layers, and packs of senders that lie between them."""
    pair = prompts(random_gpt2)
    receivers = [(1, 1), (2, 0)]
    whole = path_patch(random_gpt2, *pair, metric, None, receivers, "v")
    monkeypatch.setattr(paths, "pack_size", lambda *_, **__: 3)
    torch.testing.assert_close(path_patch(random_gpt2, *pair, metric, None, receivers, "v"), whole)


def test_the_last_layer_reaches_the_logits_directly_alone(small):
    """No attention above it can be frozen: path patching is activation patching there."""
    original, new = prompts(small)
    top = [head for head in all_heads(small) if head.layer == small.cfg.n_layers - 1]
    got = path_patch(small, original, new, metric, top)
    torch.testing.assert_close(got, patch_heads(small, new, original, metric, "z", top), **CLOSE)


def test_every_path_open_is_activation_patching(random_gpt2):
    """Layer 1 acts on the logits directly and through layer 2: one or the other patched adds up.

    With the last layer's attention output replaced by what all its inputs give, the direct path
    is the only one left, so path patching from there equals patching the head's output.
    """
    original, new = prompts(random_gpt2)
    sender, name = Head(1, 2), "blocks.1.attn.hook_z"
    cache = random_gpt2.run_with_cache(new)[1]

    def patch(z, hook):
        z = z.clone()
        z[:, :, sender.head] = cache[name][:, :, sender.head]
        return z

    frozen = random_gpt2.run_with_cache(original)[1]["attn_out", 2]
    hooks = [(name, patch), ("blocks.2.hook_attn_out", lambda out, hook: frozen)]
    want = metric(random_gpt2.run_with_hooks(original, fwd_hooks=hooks))
    got = path_patch(random_gpt2, original, new, metric, [sender])[:, 0]
    torch.testing.assert_close(got, want, **CLOSE)


def test_a_shared_value_reaches_every_query_head_that_reads_it(llama):
    pair = prompts(llama)
    one, sharing, other = (
        path_patch(llama, *pair, metric, [(0, 0)], [(2, head)], "v") for head in (0, 3, 4)
    )
    torch.testing.assert_close(one, sharing)
    assert (one - other).abs().max() > 1e-5


def test_senders_without_a_path_change_nothing(random_gpt2):
    original, new = prompts(random_gpt2)
    got = path_patch(random_gpt2, original, new, metric, [(1, 0), (2, 1)], [(1, 1)], "q")
    unpatched = metric(random_gpt2(original))
    torch.testing.assert_close(got, unpatched[:, None].expand(-1, 2), **CLOSE)


def test_the_same_prompts_change_nothing(small):
    original = prompts(small)[0]
    got = path_patch(small, original, original, metric)
    want = metric(small(original))[:, None, None].expand_as(got)
    torch.testing.assert_close(got, want, **CLOSE)


def test_attention_that_cannot_be_left_out_takes_the_plain_path(random_gpt2, monkeypatch):
    monkeypatch.setattr(paths, "_checked", type(paths._checked)())
    monkeypatch.setattr(paths, "_refused", type(paths._refused)())
    pair = prompts(random_gpt2)
    arguments = [
        (random_gpt2, *pair, metric, [(0, 1), (1, 2)], *rest) for rest in ((), ([(2, 0)], "k"))
    ]
    fast = [path_patch(*call) for call in arguments]
    broken = lambda *_: {layer: torch.zeros(1, 2, 1, 64) for layer in range(4)}  # noqa: E731
    monkeypatch.setattr(paths, "_checked", type(paths._checked)())
    with monkeypatch.context() as patched:
        patched.setattr(paths, "_through_mlps", broken)
        with pytest.warns(UserWarning, match="plain path"):
            slow = [path_patch(*call) for call in arguments]
    torch.testing.assert_close(slow, fast, **CLOSE)


def test_nothing_is_left_behind(random_gpt2):
    pair = prompts(random_gpt2)

    def interrupt(logits):
        raise KeyboardInterrupt

    before = random_gpt2(pair[0])
    with pytest.raises(KeyboardInterrupt):
        path_patch(random_gpt2, *pair, interrupt)
    assert not any(point.fwd_hooks for point in random_gpt2.hook_dict.values())
    assert torch.equal(random_gpt2(pair[0]), before)


ORIGINAL, NEW = torch.arange(10, 16)[None], torch.arange(20, 26)[None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"new": NEW[:, 1:]}, "must have one shape"),
        ({"senders": []}, "heads is empty"),
        ({"senders": [(3, 0)]}, "no head L3H0"),
        ({"receivers": [(2, 0)]}, "site must be one of .* got None"),
        ({"receivers": [(2, 0)], "site": "z"}, "site must be one of .* got 'z'"),
        ({"receivers": [(2, 9)], "site": "q"}, "no head L2H9"),
        ({"site": "q"}, "needs receivers"),
        ({"positions": torch.tensor([1])}, "give receivers too"),
        ({"receivers": [(2, 0)], "site": "q", "positions": torch.tensor([6])}, "in 0..5"),
        ({"receivers": [(2, 0)], "site": "q", "positions": torch.tensor([1, 2])}, "one integer"),
        ({"metric": lambda logits: logits.mean()}, r"metric must give \[prompt\]"),
    ],
)
def test_bad_input_is_named(random_gpt2, arguments, message):
    given = {"original": ORIGINAL, "new": NEW, "metric": metric} | arguments
    with pytest.raises(ValueError, match=message):
        path_patch(random_gpt2, **given)
