"""Path patching against the paper's recipe, in whole runs with plain hooks."""

from functools import lru_cache

import pytest
import torch

from utils.edits import heads_from, hooks, record, sweep
from utils.heads import Head, all_heads, key_value_head
from utils.patching import patch_heads
from utils.paths import path_patch

pytestmark = pytest.mark.usefixtures("no_grad")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def prompts(model, first=4, n=2, length=9):
    """Two sets of random prompts, that differ from position `first` on."""
    generator = torch.Generator().manual_seed(3)
    draws = torch.randint(3, model.cfg.d_vocab, (2, n, length), generator=generator)
    draws[1, :, :first] = draws[0, :, :first]
    return draws[0], draws[1]


def metric(logits):
    return logits[:, -1, 7] - logits[:, -1, 11]


@lru_cache(maxsize=2)  # of one test's prompts, which are the same tensors for every sender
def activations(model, tokens):
    return model.run_with_cache(tokens)[1]


def recipe(model, original, new, sender, receivers=(), site=None, positions=None, metric=metric):
    """Appendix B of Wang et al.: run both, freeze all but the sender, then put what arrives."""
    n_layers = range(model.cfg.n_layers)
    z_names = [f"blocks.{layer}.attn.hook_z" for layer in n_layers]
    from_original, from_new = activations(model, original), activations(model, new)
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


@pytest.mark.parametrize("to", [{}, {"receivers": [(1, 1)], "site": "q"}])
def test_in_a_model_with_hooks_paths_are_those_of_that_model(small_model, to):
    original, new = prompts(small_model)
    with small_model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: 0.5 * x)]):
        got = path_patch(small_model, original, new, metric, [(0, 2)], **to)
        want = recipe(small_model, original, new, (0, 2), **to)
    torch.testing.assert_close(got[:, 0], want, **CLOSE)


def test_every_head_to_the_logits(small_model):
    original, new = prompts(small_model)
    got = path_patch(small_model, original, new, metric)
    want = [recipe(small_model, original, new, head) for head in all_heads(small_model)]
    torch.testing.assert_close(got.flatten(1), torch.stack(want, dim=1), **CLOSE)
    assert (got - metric(small_model(original))[:, None, None]).abs().amax() > 1e-3


@pytest.mark.parametrize("positions", [None, torch.tensor([8, 6])])
@pytest.mark.parametrize("site", ["q", "k", "v"])
def test_every_head_to_receivers(small_model, site, positions):
    original, new = prompts(small_model)
    top = small_model.cfg.n_layers - 1
    receivers = [Head(top - 1, 1), Head(top, 0), Head(top, 3)]
    got = path_patch(small_model, original, new, metric, None, receivers, site, positions)
    want = [
        recipe(small_model, original, new, head, receivers, site, positions)
        for head in all_heads(small_model)
    ]
    torch.testing.assert_close(got.flatten(1), torch.stack(want, dim=1), **CLOSE)
    assert (got - metric(small_model(original))[:, None, None]).abs().amax() > 1e-4


def test_paths_in_smollm2(smollm2):
    original, new = prompts(smollm2)
    senders, receivers, positions = [(0, 0), (8, 7)], [(9, 8), (11, 0)], torch.tensor([5, 4])

    def words(logits):
        return logits[:, -1, 1000] - logits[:, -1, 2000]

    got = path_patch(smollm2, original, new, words, senders, receivers, "k", positions)
    want = [recipe(smollm2, original, new, s, receivers, "k", positions, words) for s in senders]
    torch.testing.assert_close(got, torch.stack(want, dim=1), **CLOSE)
    assert (got - words(smollm2(original))[:, None]).abs().amax() > 1e-3


def test_freezing_all_but_the_sender_is_path_patching(small_model):
    """The recipe in edits: to the logits it is one sweep, to receivers one run more for each."""
    model, (original, new) = small_model, prompts(small_model)
    frozen = heads_from(model, all_heads(model), record(model, original, ["z"]))
    senders, top = [(0, 1), (0, 3)], model.cfg.n_layers - 1
    alone = [heads_from(model, [head], record(model, new, ["z"])) for head in senders]
    got = sweep(model, original, metric, alone, base=frozen)
    torch.testing.assert_close(got.T, path_patch(model, original, new, metric, senders), **CLOSE)
    arrived = [record(model, original, ["q"], [*frozen, *sender]) for sender in alone]
    put = [heads_from(model, [(top, 0), (top, 2)], run, "q") for run in arrived]
    want = path_patch(model, original, new, metric, senders, [(top, 0), (top, 2)], "q")
    torch.testing.assert_close(sweep(model, original, metric, put).T, want, **CLOSE)


def test_the_last_layer_reaches_the_logits_directly_alone(small_model):
    """No attention above it can be frozen: path patching is activation patching there."""
    original, new = prompts(small_model)
    top = [head for head in all_heads(small_model) if head.layer == small_model.cfg.n_layers - 1]
    got = path_patch(small_model, original, new, metric, top)
    torch.testing.assert_close(
        got, patch_heads(small_model, new, original, metric, "z", top), **CLOSE
    )


def test_with_the_layer_above_frozen_activation_patching_is_path_patching(random_gpt2):
    original, new = prompts(random_gpt2)
    sender, frozen = [(1, 2)], record(random_gpt2, original, ["attn_out"]).activations
    patch = hooks(heads_from(random_gpt2, sender, record(random_gpt2, new, ["z"])))
    above = [("blocks.2.hook_attn_out", lambda out, hook: frozen[hook.name])]
    want = metric(random_gpt2.run_with_hooks(original, fwd_hooks=[*patch, *above]))
    got = path_patch(random_gpt2, original, new, metric, sender)[:, 0]
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


def test_the_same_prompts_change_nothing(small_model):
    original = prompts(small_model)[0]
    got = path_patch(small_model, original, original, metric)
    want = metric(small_model(original))[:, None, None].expand_as(got)
    torch.testing.assert_close(got, want, **CLOSE)


ORIGINAL, NEW = torch.arange(10, 16)[None], torch.arange(20, 26)[None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"new": NEW[:, 1:]}, "new must be .* pos=6"),
        ({"receivers": [(2, 0)]}, "site must be one of .* got None"),
        ({"receivers": [(2, 0)], "site": "z"}, "site must be one of .* got 'z'"),
        ({"site": "q"}, "needs receivers"),
        ({"positions": torch.tensor([1])}, "give receivers too"),
        (
            {"receivers": [(2, 0)], "site": "q", "positions": torch.tensor([1, 2])},
            "positions must be .*prompt=1",
        ),
    ],
)
@pytest.mark.usefixtures("no_forward")
def test_bad_input_is_named(random_gpt2, arguments, message):
    given = {"original": ORIGINAL, "new": NEW, "metric": metric} | arguments
    with pytest.raises(ValueError, match=message):
        path_patch(random_gpt2, **given)


@pytest.mark.parametrize("receivers", [{}, {"receivers": [(2, 0)], "site": "k"}])
def test_a_metric_that_is_not_one_per_prompt_is_named(random_gpt2, receivers):
    with pytest.raises(ValueError, match=r"metric must give \[prompt\]"):
        path_patch(random_gpt2, ORIGINAL, NEW, lambda logits: logits.mean(), **receivers)
