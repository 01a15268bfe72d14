"""Patching gives the numbers of whole runs with plain hooks, for every site, model and metric."""

from itertools import product

import pytest
import torch

from utils.edits import STREAM_SITES
from utils.heads import HEAD_SITES, n_site_heads
from utils.metrics import LogitDiff, answer_probability, logit_diff
from utils.patching import patch_heads, patch_stream

pytestmark = pytest.mark.usefixtures("no_grad")
LENGTH = 9
EXACT = {"atol": 1e-4, "rtol": 0}
# one prompt, two that begin alike, and two that share nothing
PROMPTS = {"one": (1, 6), "shared prefix": (2, 6), "no shared prefix": (2, 0)}


@pytest.fixture(
    params=[*product(("random_gpt2", "llama", "neox", "toy2"), PROMPTS), ("smollm2", "one")],
    ids="-".join,
)
def case(request):
    """A model, with clean and corrupted prompts that differ from some position on."""
    name, kind = request.param
    model, (n_prompts, first) = request.getfixturevalue(name), PROMPTS[kind]
    generator = torch.Generator().manual_seed(6)
    shape = (2, n_prompts, LENGTH)
    clean, corrupted = torch.randint(3, model.cfg.d_vocab, shape, generator=generator)
    corrupted[:, :first] = clean[:, :first]
    return model, (clean, corrupted)


def metrics(model, n_prompts):
    """One that reads two columns of the unembedding, and (of few layers) those that get logits."""
    answers = torch.tensor([[7, 11], [5, 3]])[:n_prompts]
    if model.cfg.n_layers > 20:
        return (LogitDiff(answers),)
    return (
        LogitDiff(answers),
        lambda logits: logit_diff(logits, answers),
        lambda logits: answer_probability(logits, answers).log(),
    )


def run_with_cache(model, tokens, site):
    return model.run_with_cache(tokens, names_filter=lambda name: name.endswith(site))[1]


def whole_run(model, corrupted, name, clean, where):
    """Logits of the corrupted run in which part of an activation is the clean run's."""

    def patch(activation, hook):
        activation[where] = clean[name][where]
        return activation

    return model.run_with_hooks(corrupted, fwd_hooks=[(name, patch)])[:, -1:]


@pytest.mark.parametrize("site", HEAD_SITES)
def test_heads(case, site):
    model, pair = case
    top, n_heads = model.cfg.n_layers - 1, n_site_heads(model, site)
    heads = [(0, n_heads - 1), (top // 2, 0), (top, 1)]
    clean, corrupted = run_with_cache(model, pair[0], site), pair[1]
    unpatched = model(corrupted)[:, -1:]
    runs = []
    for layer, head in heads:
        where = (slice(None), head) if site == "pattern" else (slice(None), slice(None), head)
        runs.append(whole_run(model, corrupted, f"blocks.{layer}.attn.hook_{site}", clean, where))
    for metric in metrics(model, len(corrupted)):
        got = patch_heads(model, *pair, metric, site, heads)
        want = torch.stack([metric(logits) for logits in runs], dim=1)
        torch.testing.assert_close(got, want, **EXACT)
        assert (got - metric(unpatched)[:, None]).abs().max() > 1e-4


@pytest.mark.parametrize("site", STREAM_SITES)
def test_layers_by_position(case, site):
    model, pair = case
    layers, positions = [0, model.cfg.n_layers - 1], [1, LENGTH - 2, LENGTH - 1]
    clean, corrupted = run_with_cache(model, pair[0], site), pair[1]
    unpatched = model(corrupted)[:, -1:]
    if f"blocks.0.hook_{site}" not in clean:
        with pytest.raises(ValueError, match=r"site must be one of .* that the model has"):
            patch_stream(model, *pair, metrics(model, len(corrupted))[0], site)
        return
    cells = [(f"blocks.{la}.hook_{site}", (slice(None), at)) for la in layers for at in positions]
    runs = [whole_run(model, corrupted, name, clean, where) for name, where in cells]
    for metric in metrics(model, len(corrupted)):
        got = patch_stream(model, *pair, metric, site, positions, layers)
        want = torch.stack([metric(logits) for logits in runs], dim=1)
        torch.testing.assert_close(got.flatten(1), want, **EXACT)
        assert (want - metric(unpatched)[:, None]).abs().max() > 1e-4
