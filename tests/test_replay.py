"""A replayed part of a forward pass equals the whole pass under the same hooks."""

import warnings

import pytest
import torch

from utils.engine import replay
from utils.engine.packs import in_packs, pack_size
from utils.engine.replay import Replay
from utils.engine.shortcuts import given_attention
from utils.metrics import logit_diff
from utils.patching import LogitDiff

FIRST = 6  # first position the interventions below change


@pytest.fixture(params=["smollm2", "random_gpt2", "llama", "neox", "toy2"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def tokens(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, model.cfg.d_vocab, (2, 11), generator=generator)


def _set_from(position, value):
    """A hook that overwrites head 0 from an absolute position on, for a run that starts later."""

    def at(start):
        def hook_fn(activation, hook):
            activation[:, position - start :, 0] = value
            return activation

        return hook_fn

    return at


@pytest.mark.parametrize("site", ["hook_q", "hook_k", "hook_v", "hook_z"])
def test_equals_a_whole_pass(model, tokens, site):
    layer = model.cfg.n_layers // 2
    name, edit = f"blocks.{layer}.attn.{site}", _set_from(FIRST, 0.7)
    changed = torch.zeros_like(tokens, dtype=torch.bool)
    changed[:, FIRST:] = True
    with torch.no_grad():
        recorded = Replay(model, tokens)
        start = recorded.first_position(changed)
        ours = recorded.run([(name, edit(start))], start)
        whole = model.run_with_hooks(tokens, fwd_hooks=[(name, edit(0))])
        plain = model(tokens)
    assert (whole - plain).abs().max() > 1e-3, "the intervention must change something"
    assert model not in replay._refused
    torch.testing.assert_close(ours, whole[:, start:], atol=1e-4, rtol=0)


def test_shares_the_prefix_where_keys_and_values_are_kept(smollm2, toy2):
    tokens = torch.arange(10, 22)[None]
    changed = torch.zeros_like(tokens, dtype=torch.bool)
    changed[:, FIRST] = True
    with torch.no_grad():
        assert Replay(smollm2, tokens).first_position(changed) == FIRST
        assert Replay(toy2, tokens).first_position(changed) == 0
        assert Replay(smollm2, tokens).first_position(torch.zeros_like(changed)) == 0


def test_reads_only_the_positions_asked_for(smollm2):
    tokens = torch.arange(10, 22)[None]
    with torch.no_grad():
        recorded = Replay(smollm2, tokens)
        last = recorded.run([], start=FIRST, read=slice(-1, None))
        some = recorded.run([], read=[2, 5])
        whole = smollm2(tokens)
    torch.testing.assert_close(last, whole[:, -1:], atol=1e-4, rtol=0)
    torch.testing.assert_close(some, whole[:, [2, 5]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("n_prompts", [1, 3])
def test_copies_are_independent(model, n_prompts):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, model.cfg.d_vocab, (n_prompts, 9), generator=generator)
    changed = torch.zeros_like(tokens, dtype=torch.bool)
    changed[:, FIRST:] = True
    name = f"blocks.{model.cfg.n_layers // 2}.attn.hook_z"

    def zero_one_head_per_copy(z, hook):
        z = z.clone()
        for head, copy in enumerate(z.split(n_prompts)):
            copy[:, FIRST - start :, head] = 0
        return z

    with torch.no_grad():
        recorded = Replay(model, tokens)
        start = recorded.first_position(changed)
        ours = recorded.run([(name, zero_one_head_per_copy)], start, read=slice(-1, None), copies=3)
        for head, copy in enumerate(ours.split(n_prompts)):

            def zero_head(z, hook, head=head):
                z = z.clone()
                z[:, FIRST:, head] = 0
                return z

            whole = model.run_with_hooks(tokens, fwd_hooks=[(name, zero_head)])
            torch.testing.assert_close(copy, whole[:, -1:], atol=1e-4, rtol=0)


def test_runs_only_the_blocks_at_and_above_the_hook(smollm2):
    tokens = torch.arange(10, 22)[None]
    seen = []
    with torch.no_grad():
        recorded = Replay(smollm2, tokens)
        handles = [
            block.register_forward_pre_hook(lambda *_, layer=layer: seen.append(layer))
            for layer, block in enumerate(smollm2.blocks)
        ]
        try:
            recorded.run([("blocks.20.attn.hook_z", lambda z, hook: z)])
        finally:
            for handle in handles:
                handle.remove()
    assert seen == list(range(20, smollm2.cfg.n_layers))


def test_a_model_that_cannot_be_replayed_takes_the_plain_path(random_gpt2, monkeypatch):
    """A block that counts its calls gives another result when it is run on its own."""
    monkeypatch.setattr(replay, "_checked", type(replay._checked)())
    monkeypatch.setattr(replay, "_refused", type(replay._refused)())
    tokens = torch.arange(10, 22)[None]
    calls = []

    def drift(_, args, output):
        calls.append(1)
        hidden = output[0] if isinstance(output, tuple) else output
        hidden += 0.1 * (len(calls) > 1) * torch.arange(hidden.shape[-1])

    handle = random_gpt2.blocks[-1].register_forward_hook(drift)
    try:
        with torch.no_grad(), pytest.warns(UserWarning, match="plain path"):
            Replay(random_gpt2, tokens)
        assert random_gpt2 in replay._refused
    finally:
        handle.remove()
    hooks = [("blocks.1.attn.hook_z", lambda z, hook: z * 0)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, not again
        ours = Replay(random_gpt2, tokens).run(hooks, read=slice(-1, None))
        whole = random_gpt2.run_with_hooks(tokens, fwd_hooks=hooks)
    torch.testing.assert_close(ours, whole[:, -1:])


def test_the_check_sees_a_patch_that_is_lost(random_gpt2, monkeypatch):
    """A run that ignores hooks is right as long as nothing is patched."""
    monkeypatch.setattr(replay, "_checked", type(replay._checked)())
    monkeypatch.setattr(replay, "_refused", type(replay._refused)())
    run_from = Replay._run_from
    monkeypatch.setattr(
        Replay, "_run_from", lambda self, layers, hooks, *rest: run_from(self, layers, [], *rest)
    )
    with torch.no_grad(), pytest.warns(UserWarning, match="plain path"):
        Replay(random_gpt2, torch.arange(10, 22)[None])


def test_no_hooks_are_left_behind(random_gpt2):
    tokens = torch.arange(10, 22)[None]

    def fail(z, hook):
        raise RuntimeError("stopped in the middle")

    with torch.no_grad():
        before = random_gpt2(tokens)
        with pytest.raises(RuntimeError, match="stopped"):
            Replay(random_gpt2, tokens).run([("blocks.1.attn.hook_z", fail)])
        assert torch.equal(random_gpt2(tokens), before)


def test_bad_input(random_gpt2, toy2):
    with pytest.raises(TypeError, match="tokens"):
        Replay(random_gpt2, torch.tensor([1, 2, 3]))
    recorded = Replay(random_gpt2, torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match="ln_final"):
        recorded.run([("ln_final.hook_scale", lambda x, hook: x)])
    with pytest.raises(ValueError, match="start"):
        Replay(toy2, torch.tensor([[1, 2, 3]])).run([], start=1)


def _zero_head(layer, head):
    def hook_fn(z, hook):
        z = z.clone()
        z[:, :, head] = 0
        return z

    return (f"blocks.{layer}.attn.hook_z", hook_fn)


def _last(logits):
    return logits[:, -1, 7]


def test_a_sweep_is_one_run_for_each_intervention(model, tokens):
    """Out of order, in several layers, some with hooks in two layers or none."""
    top = model.cfg.n_layers - 1
    sweep = [
        [_zero_head(top, 1)],
        [_zero_head(0, 1), _zero_head(top, 0)],
        [],
        [_zero_head(0, 0)],
        [_zero_head(top, 1), _zero_head(0, 1)],
    ]
    with torch.no_grad():
        got = Replay(model, tokens).sweep(_last, sweep)
        want = [_last(model.run_with_hooks(tokens, fwd_hooks=hooks)) for hooks in sweep]
    torch.testing.assert_close(got, torch.stack(want), atol=1e-4, rtol=1e-4)
    assert (got[0] - got[2]).abs().max() > 1e-4


def test_a_run_on_top_of_hooks(model, tokens):
    """Recorded under base hooks; handed again where they lie in the part that is run again."""
    top = model.cfg.n_layers - 1
    low, high, extra = _zero_head(0, 1), _zero_head(top, 1), _zero_head(top, 0)
    with torch.no_grad():
        recorded = Replay(model, tokens, hooks=[low, high], keep=[f"blocks.{top}.hook_resid_pre"])
        got = recorded.run([high, extra])
        want = model.run_with_hooks(tokens, fwd_hooks=[low, high, extra])
        with model.hooks(fwd_hooks=[low]):
            resid = model.run_with_cache(tokens)[1]["resid_pre", top]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(recorded.activations[f"blocks.{top}.hook_resid_pre"], resid)


def test_logit_diff_needs_no_unembedding(model, tokens, monkeypatch):
    answers = torch.tensor([[7, 11], [5, 3]])
    sweep = [[_zero_head(0, 1)], []]
    with torch.no_grad():
        want = [logit_diff(model.run_with_hooks(tokens, fwd_hooks=h), answers) for h in sweep]
        recorded = Replay(model, tokens)
        monkeypatch.setattr(Replay, "_unembed", None)
        got = recorded.sweep(LogitDiff(answers), sweep)
    torch.testing.assert_close(got, torch.stack(want), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="answers"):
        LogitDiff(torch.tensor([7, 11]))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_pack(random_gpt2, monkeypatch, error):
    tokens = torch.arange(10, 22)[None]
    sweep = [[_zero_head(layer, head)] for layer in range(3) for head in range(4)]
    sizes, whole = [], Replay._run_from

    def at_most_three(self, layers, *rest):
        sizes.append(len(layers))
        if len(layers) > 3:
            raise error
        return whole(self, layers, *rest)

    with torch.no_grad():
        recorded = Replay(random_gpt2, tokens)
        want = recorded.sweep(_last, sweep)
        monkeypatch.setattr(Replay, "_run_from", at_most_three)
        got = recorded.sweep(_last, sweep)
    torch.testing.assert_close(got, want)
    assert sizes == [12, 6, 3, 3, 3, 3]


def test_other_errors_and_packs_of_one_are_not_tried_again():
    def fail(pack):
        raise RuntimeError("can't allocate memory" if pack == [0] else "something else")

    for items, message in (([0], "allocate"), ([1, 2], "else")):
        with pytest.raises(RuntimeError, match=message):
            in_packs(items, 2, fail)


def test_packs_are_sized_to_memory(random_gpt2):
    assert pack_size(random_gpt2, 4, 16, 12) > pack_size(random_gpt2, 4, 16) >= 1
    assert pack_size(random_gpt2, 2, 16) == pytest.approx(2 * pack_size(random_gpt2, 4, 16), 0.1)
    assert pack_size(random_gpt2, 10**6, 200) == 1


def test_an_interrupted_sweep_leaves_no_hooks(random_gpt2):
    tokens = torch.arange(10, 22)[None]

    def interrupt(z, hook):
        raise KeyboardInterrupt

    with torch.no_grad():
        before = random_gpt2(tokens)
        with pytest.raises(KeyboardInterrupt):
            Replay(random_gpt2, tokens).sweep(_last, [[("blocks.1.attn.hook_z", interrupt)]])
        assert not any(point.fwd_hooks for point in random_gpt2.hook_dict.values())
        assert torch.equal(random_gpt2(tokens), before)


def test_given_attention_is_not_computed_and_is_restored(model, tokens):
    layer = model.cfg.n_layers // 2
    with torch.no_grad():
        whole, cache = model.run_with_cache(tokens)
        given = cache[f"blocks.{layer}.attn.hook_out"] * 0
        hook = (f"blocks.{layer}.attn.hook_z", lambda z, hook: pytest.fail("computed"))
        with given_attention(model, {layer: given}), model.hooks(fwd_hooks=[hook]):
            got = model(tokens)
        without = [(f"blocks.{layer}.attn.hook_out", lambda out, hook: out * 0)]
        want = model.run_with_hooks(tokens, fwd_hooks=without)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        with pytest.raises(KeyboardInterrupt), given_attention(model, {layer: given}):
            raise KeyboardInterrupt
        assert torch.equal(model(tokens), whole)


def test_left_padded_prompts_are_refused(smollm2):
    pad = smollm2.tokenizer.pad_token_id
    prompts = torch.tensor([[10, 11, 12, 13], [pad, pad, 11, 12]])
    with pytest.raises(ValueError, match="prompt 1 begins with padding"):
        Replay(smollm2, prompts)


@pytest.fixture
def mlp_widths(model):
    """How many positions the top block's MLP computes, run by run."""
    widths = []
    handle = model.blocks[-1].mlp.register_forward_pre_hook(
        lambda _, args: widths.append(args[0].shape[1])
    )
    inner = model.blocks[-1].mlp.hook_in.register_forward_hook(
        lambda _, args, out: widths.append(out.shape[1])
    )
    yield widths
    handle.remove()
    inner.remove()


@pytest.mark.parametrize("model", ["smollm2", "random_gpt2", "llama", "neox"], indirect=True)
def test_the_top_mlp_runs_where_it_is_read(model, tokens, mlp_widths):
    """Unless a hook of the top block may look at its MLP, which is then whole."""
    top = model.cfg.n_layers - 1
    length = tokens.shape[1]
    with torch.no_grad():
        recorded = Replay(model, tokens)
        for read, n_read in ((replay.LAST, 1), ([2, 5], 2), (slice(None), length)):
            mlp_widths.clear()
            got = recorded.run([_zero_head(0, 1), _zero_head(top, 0)], read=read)
            assert mlp_widths == [length, n_read]  # what the MLP is given, and what it computes
            hooks = [_zero_head(0, 1), _zero_head(top, 0)]
            want = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, read]
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
        mlp_widths.clear()
        silent = [(f"blocks.{top}.hook_mlp_out", lambda out, hook: out * 0)]
        got = recorded.run(silent, read=replay.LAST)
        assert mlp_widths == [length, length]
        want = model.run_with_hooks(tokens, fwd_hooks=silent)[:, -1:]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
        with pytest.raises(KeyboardInterrupt):
            recorded.run([(f"blocks.{top}.attn.hook_z", _interrupt)], read=replay.LAST)
        mlp_widths.clear()
        model(tokens)
        assert mlp_widths == [length, length]


def _interrupt(activation, hook):
    raise KeyboardInterrupt


@pytest.mark.parametrize("first", [0, FIRST])
def test_activations_of_prompts_that_share_the_beginning(model, tokens, first):
    others = tokens.clone()
    others[:, first:] = tokens[:, first:].flip(1)
    names = [f"blocks.{la}.attn.hook_{s}" for la in (0, model.cfg.n_layers - 1) for s in "zqkv"]
    patterns = [f"blocks.{model.cfg.n_layers - 1}.attn.hook_pattern"]
    with torch.no_grad():
        recorded = Replay(model, tokens)
        start = recorded.first_position(others != tokens)
        got = recorded.activations_of(others, names + patterns, start)
        want = model.run_with_cache(others)[1]
        assert torch.equal(Replay(model, tokens).hidden[0], recorded.hidden[0])
    assert got.keys() == {*names, *patterns}
    for name in names:
        torch.testing.assert_close(got[name], want[name][:, start:], atol=1e-4, rtol=1e-4)
    for name in patterns:
        torch.testing.assert_close(got[name], want[name][:, :, start:], atol=1e-4, rtol=0)


def test_a_metric_gives_one_value_for_each_prompt_or_position_read(random_gpt2):
    tokens = torch.arange(10, 22).view(2, 6)
    with torch.no_grad():
        recorded = Replay(random_gpt2, tokens)
        hooks = [_zero_head(1, 1)]
        got = recorded.sweep(lambda logits: logits[..., 7], [hooks, []], read=[1, 4])
        want = [random_gpt2.run_with_hooks(tokens, fwd_hooks=h)[:, [1, 4], 7] for h in (hooks, [])]
        torch.testing.assert_close(got, torch.stack(want), atol=1e-4, rtol=0)
        one = recorded.measure(lambda logits: logits[:, 1, 7], hooks, read=[1, 4])
        torch.testing.assert_close(one, got[:1, :, 1], atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match=r"\[prompt read\] values, got shape \(2, 2, 49"):
            recorded.sweep(lambda logits: logits, [hooks], read=[1, 4])
        with pytest.raises(ValueError, match=r"give \[prompt\] values, got shape \(2, 1\)"):
            recorded.sweep(lambda logits: logits[..., 7], [hooks])
