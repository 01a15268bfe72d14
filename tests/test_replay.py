"""The engine under a sweep: its check on first use, its packs, what it leaves out."""

import warnings

import pytest
import torch
from test_circuit import random_prompts

from utils import circuit as c
from utils import selection as s
from utils.ablation import losses, pattern_preserving
from utils.edits import STREAM_SITES, heads_from, hook_name, record, sweep
from utils.engine import direct, memory, packs
from utils.engine.packs import in_packs, rows_that_fit
from utils.engine.replay import Replay
from utils.engine.shortcuts import given_attention
from utils.heads import HEAD_SITES
from utils.metrics import LogitDiff, TokenLoss
from utils.patching import patch_heads, patch_stream
from utils.paths import path_patch

pytestmark = pytest.mark.usefixtures("no_grad")
EXACT = {"atol": 1e-4, "rtol": 1e-4}
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError(),
]


def one_logit(logits):
    return logits[:, -1, 7]


def zero_each(model, layers=(0, 1)):
    return [heads_from(model, [(la, h)], 0.0) for la in layers for h in range(model.cfg.n_heads)]


def test_what_does_not_fit_says_what_it_would_take_and_how_much_would(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**9)
    cpu = torch.device("cpu")
    memory.check_fits("It", 8e8, 4, cpu)  # the 80 % that may be taken
    said = r"It would take 2\.0 GB for 4 prompts, .* 0\.8 GB may be taken: .* \(about 1 fit\)"
    with pytest.raises(MemoryError, match=said):
        memory.check_fits("It", 2e9, 4, cpu)
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**6)
    with pytest.raises(MemoryError, match=r"take 2\.0 MB .* 0\.8 MB may"):
        memory.check_fits("It", 2e6, 4, cpu)


# A model that cannot be replayed


def case(model):
    """Clean and corrupted prompts, and the corrupted as IOI prompts."""
    prompts = random_prompts(high=min(1000, model.cfg.d_vocab))
    return prompts.corrupted["abc"], prompts.tokens, prompts


def every_sweep(model):
    """The result of every public sweep, by name."""
    clean, corrupted, prompts = case(model)
    pair, metric = (clean, corrupted), LogitDiff(prompts.answers)
    top = model.cfg.n_layers - 1
    some = [(0, 1), (1, 0), (0, 0), (top, 1)]
    found = {site: patch_heads(model, *pair, metric, site, some) for site in HEAD_SITES}
    for site in STREAM_SITES:
        if hook_name(0, site) in model.hook_dict:
            found[site] = patch_stream(model, *pair, metric, site, [2, 6])
    runs = {
        "none": [],
        "zero": heads_from(model, [(0, 1)], 0.0),
        "kept": pattern_preserving(model, [(1, 1)], record(model, corrupted, ["pattern"])),
    }
    found["losses"] = losses(model, corrupted, runs, columns=[1, 5])
    found["to logits"] = path_patch(model, *pair, one_logit)
    for site in "qkv":
        for at in (None, prompts.positions["S2"]):
            receivers = [(top, 0), (1, 1)]
            found[site, at] = path_patch(model, *pair, metric, some, receivers, site, at)
    circuit = {"s_inhibition": [(0, 1), (0, 2)], "name_mover": [(1, 2), (top, 0)]}
    means = c.means_run(prompts, c.abc_means(model, prompts))
    found["circuit"] = c.run_circuit(model, prompts, means, c.nodes(circuit))
    removed = c.knock_out(model, prompts, means, c.nodes(circuit))
    found["knock-out"] = c.logit_diffs(model, prompts, [removed])[0]
    found["completeness"] = c.completeness(model, prompts, means, circuit)
    found |= {"minimality": c.minimality(model, prompts, means, circuit)}
    on, nodes = (model, prompts, means), sorted(c.nodes(circuit))
    found["each added"] = s.each_added(*on, set(nodes[:1]), nodes[1:])
    found["each removed"] = s.each_removed(*on, set(nodes), nodes[1:], set(nodes[:1]))
    found["of the model"] = s.each_removed(*on, None, nodes[1:], set(nodes[:1]))
    found["forward"] = s.forward_search(*on, nodes, n_steps=2)
    found["backward"] = s.backward_search(*on, nodes, n_left=2)
    return found | {"worst set": s.worst_set(*on, set(nodes), n_steps=2)}


def assert_same(got, want):
    assert [str(key) for key in got] == [str(key) for key in want]
    for one, other in zip(got.values(), want.values(), strict=True):
        if isinstance(one, list):  # of a search
            assert [step.node for step in one] == [step.node for step in other]
            one, other = ([step.figure for step in steps] for steps in (one, other))
        torch.testing.assert_close(one, other, equal_nan=True, **EXACT)


def test_a_refused_model_runs_every_sweep(small_model, monkeypatch):
    replayed = every_sweep(small_model)
    monkeypatch.setattr("utils.engine.packs.can_replay", lambda *_: False)
    monkeypatch.setattr("utils.paths.can_replay", lambda *_: False)
    monkeypatch.setattr(packs, "Replay", None)  # nothing is replayed
    monkeypatch.setattr("utils.paths.along_direct_paths", None)
    assert_same(every_sweep(small_model), replayed)


def test_a_model_whose_blocks_drift_is_refused_and_runs_every_sweep(neox, new_neox):
    """Its top block gives another result unless the whole model runs."""
    whole = []

    def drift(block, args, out):
        hidden, *rest = out if isinstance(out, tuple) else (out,)
        hidden = hidden + 0.1 * (not whole) * torch.arange(hidden.shape[-1])
        whole.clear()
        return (hidden, *rest) if isinstance(out, tuple) else hidden

    new_neox.blocks[-1].register_forward_hook(drift)
    new_neox.embed.register_forward_hook(lambda *_: whole.append(True))
    with pytest.warns(UserWarning, match="plain path"):
        sweep(new_neox, torch.arange(10, 22)[None], one_logit, [[]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, not again
        got = every_sweep(new_neox)
    assert_same(got, every_sweep(neox))


def test_the_check_sees_a_patch_that_is_lost(new_neox, monkeypatch):
    """A run that ignores hooks is right as long as nothing is patched."""
    run = Replay.run
    monkeypatch.setattr(
        Replay, "run", lambda self, layers, hooks, *rest: run(self, layers, [], *rest)
    )
    with pytest.warns(UserWarning, match="plain path"):
        sweep(new_neox, torch.arange(10, 22)[None], one_logit, [[]])


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_running_out_of_memory_in_the_check_is_no_refusal(new_neox, monkeypatch, error):
    tokens, run, calls = torch.arange(10, 22)[None], Replay.run, []

    def fail(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Replay, "run", fail)
        with pytest.raises(type(error)):
            sweep(new_neox, tokens, one_logit, [[]])
    monkeypatch.setattr(Replay, "run", lambda *given: calls.append(1) or run(*given))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep(new_neox, tokens, one_logit, [[]])
    assert len(calls) == 2  # the check, and the sweep itself


# Packs


@pytest.mark.parametrize("name", ["random_gpt2", "llama"])  # learned positions, and rotary
def test_neither_packs_nor_parts_of_the_prompts_change_a_result(request, name, monkeypatch):
    """Four prompts one by one, in parts of three and one, and in packs of three copies."""
    model = request.getfixturevalue(name)
    at_once = every_sweep(model)
    for rows in (1, 3, 12):
        monkeypatch.setattr(packs, "rows_that_fit", lambda *_, rows=rows: rows)
        monkeypatch.setattr(direct, "rows_that_fit", lambda *_, rows=rows: rows)
        assert_same(every_sweep(model), at_once)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_pack(random_gpt2, monkeypatch, error):
    tokens, run, sizes = torch.arange(10, 22)[None], Replay.run, []

    def at_most_three(self, layers, *rest):
        sizes.append(len(layers))
        if len(layers) > 3:
            raise error
        return run(self, layers, *rest)

    want = sweep(random_gpt2, tokens, one_logit, zero_each(random_gpt2, range(3)))
    monkeypatch.setattr(Replay, "run", at_most_three)
    got = sweep(random_gpt2, tokens, one_logit, zero_each(random_gpt2, range(3)))
    torch.testing.assert_close(got, want)
    assert sizes == [12, 6, 3, 3, 3, 3]


def test_other_errors_and_packs_of_one_are_not_tried_again():
    def fail(pack):
        raise RuntimeError("can't allocate memory" if pack == [0] else "something else")

    for items, message in (([0], "allocate"), ([1, 2], "else")):
        with pytest.raises(RuntimeError, match=message):
            in_packs(items, 2, fail, None)


def test_packs_are_sized_to_memory(random_gpt2):
    assert rows_that_fit(random_gpt2, 16, 12) > rows_that_fit(random_gpt2, 16) >= 1
    assert rows_that_fit(random_gpt2, 10**6) == 1


# What is left out


@pytest.mark.parametrize("read", [None, [2, 5]])
def test_known_metrics_need_no_unembedding(small_model, draw, read):
    tokens, n_logits = draw(small_model), []
    metric = TokenLoss(tokens[:, read]) if read else LogitDiff(torch.tensor([[7, 11], [5, 3]]))
    sweep(small_model, tokens, metric, [[]], read=read)  # the check on first use
    handle = small_model.unembed.register_forward_hook(lambda *given: n_logits.append(1))
    try:
        sweep(small_model, tokens, metric, zero_each(small_model), read=read)
        assert len(n_logits) == 1  # of the recorded run
        sweep(small_model, tokens, one_logit, zero_each(small_model))
        assert len(n_logits) > 2
    finally:
        handle.remove()


def test_given_attention_is_not_computed_and_is_restored(small_model, draw):
    model, tokens = small_model, draw(small_model)
    layer = model.cfg.n_layers // 2
    whole, cache = model.run_with_cache(tokens)
    given = cache[hook_name(layer, "out")] * 0
    hook = (hook_name(layer, "z"), lambda z, hook: pytest.fail("computed"))
    with given_attention(model, layer, given), model.hooks(fwd_hooks=[hook]):
        got = model(tokens)
    without = [(hook_name(layer, "out"), lambda out, hook: out * 0)]
    torch.testing.assert_close(got, model.run_with_hooks(tokens, fwd_hooks=without), **EXACT)
    with pytest.raises(KeyboardInterrupt), given_attention(model, layer, given):
        raise KeyboardInterrupt
    assert torch.equal(model(tokens), whole)


def test_left_padded_prompts_are_refused(smollm2):
    pad = smollm2.tokenizer.pad_token_id
    prompts = torch.tensor([[10, 11, 12, 13], [pad, pad, 11, 12]])
    with pytest.raises(ValueError, match="prompt 1 begins with padding"):
        sweep(smollm2, prompts, one_logit, [[]])
