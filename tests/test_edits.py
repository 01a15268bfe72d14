"""Edits as hooks equal hooks written out; a sweep of edits equals one whole run for each."""

import pytest
import torch

from utils.ablation import losses, mean_run, pattern_preserving
from utils.edits import (
    STREAM_SITES,
    Edit,
    Run,
    heads_from,
    hook_name,
    hooks,
    nodes_from,
    only_at,
    record,
    stream_from,
    sweep,
)
from utils.heads import HEAD_SITES, all_heads, n_site_heads
from utils.metrics import LogitDiff, TokenLoss, logit_diff
from utils.patching import patch_heads, patch_stream
from utils.paths import path_patch

pytestmark = pytest.mark.usefixtures("no_grad")
EXACT = {"atol": 1e-4, "rtol": 1e-4}
POSITIONS = torch.tensor([6, 3])  # one for each of two prompts


def one_logit(logits):
    return logits[:, -1, 7]


def written_out(places, source):
    """A plain hook that sets some places of an activation, one after the other."""

    def hook_fn(x, hook):
        x = x.clone()
        for place in places:
            x[place] = source[place] if isinstance(source, torch.Tensor) else source
        return x

    return hook_fn


def whole_runs(model, tokens, interventions, base=(), metric=one_logit):
    """What `sweep` promises, one whole run for each intervention."""
    runs = [model.run_with_hooks(tokens, fwd_hooks=hooks([*base, *each])) for each in interventions]
    return torch.stack([metric(logits) for logits in runs])


# Builders


@pytest.mark.parametrize("kind", ["zero", "mean", "mean over positions", "other run"])
@pytest.mark.parametrize("at", [None, POSITIONS])
def test_heads_from_equals_hooks_written_out(small_model, draw, kind, at):
    model, tokens, others = small_model, draw(small_model), draw(small_model, seed=1)
    top = model.cfg.n_layers - 1
    for site in HEAD_SITES if kind in ("zero", "other run") else ["z"]:
        heads = [(0, 0), (top, 1), (0, n_site_heads(model, site) - 1)]
        source, values = 0.0, dict.fromkeys((0, top), 0.0)
        if kind == "other run":
            source = record(model, others, [site])
        elif kind != "zero":
            source = mean_run(model, others, per_position=kind == "mean")
        if kind != "zero":
            shape = record(model, tokens, [site]).activations[hook_name(0, site)].shape
            activations = source.activations
            values = {la: activations[hook_name(la, site)].expand(shape) for la in (0, top)}
        plain = []
        for layer, head in heads:
            rows = [(i, slice(None) if at is None else int(at[i])) for i in range(2)]
            cells = [(i, head, p) if site == "pattern" else (i, p, head) for i, p in rows]
            plain.append((hook_name(layer, site), written_out(cells, values[layer])))
        edits = heads_from(model, heads, source, site, at if at is None else only_at(tokens, at))
        got = model.run_with_hooks(tokens, fwd_hooks=hooks(edits))
        assert torch.equal(got, model.run_with_hooks(tokens, fwd_hooks=plain))
        assert len(edits) == 2  # one a layer
        assert (got - model(tokens)).abs().max() > 1e-4


@pytest.mark.parametrize("site", STREAM_SITES)
def test_stream_from_equals_hooks_written_out(small_model, draw, site):
    model, tokens, others = small_model, draw(small_model), draw(small_model, seed=1)
    if hook_name(0, site) not in model.hook_dict:
        with pytest.raises(ValueError, match=r"site must be one of .* that the model has"):
            stream_from(model, 1, 0.0, site)
        return
    run = record(model, others, [site])
    for source, values in ((0.0, 0.0), (run, run.activations[hook_name(1, site)])):
        for at in (None, POSITIONS):
            cells = [(i, slice(None) if at is None else int(at[i])) for i in range(2)]
            plain = [(hook_name(1, site), written_out(cells, values))]
            where = at if at is None else only_at(tokens, at)
            edits = stream_from(model, 1, source, site, where)
            got = model.run_with_hooks(tokens, fwd_hooks=hooks(edits))
            assert torch.equal(got, model.run_with_hooks(tokens, fwd_hooks=plain))
            assert (got - model(tokens)).abs().max() > 1e-4


def test_nodes_from_equals_hooks_written_out(small_model, draw):
    model, tokens = small_model, draw(small_model)
    mean = mean_run(model, draw(model, seed=1))
    mask = torch.zeros(2, model.cfg.n_layers, 9, model.cfg.n_heads, dtype=torch.bool)
    nodes = [(0, 0, 3, 1), (1, 0, 5, 2), (1, 1, 8, 0)]  # prompt, layer, position, head
    plain = []
    for prompt, layer, position, head in nodes:
        mask[prompt, layer, position, head] = True
        name = hook_name(layer, "z")
        z = mean.activations[name].expand(2, -1, -1, -1)
        plain.append((name, written_out([(prompt, position, head)], z)))
    edits = nodes_from(mask, mean)
    assert [edit.name for edit in edits] == [hook_name(0, "z"), hook_name(1, "z")]
    got = model.run_with_hooks(tokens, fwd_hooks=hooks(edits))
    assert torch.equal(got, model.run_with_hooks(tokens, fwd_hooks=plain))


def test_only_at_is_one_place_of_each_prompt():
    tokens = torch.ones(2, 4).long()
    assert only_at(tokens, 2).nonzero().tolist() == [[0, 2], [1, 2]]
    assert only_at(tokens, torch.tensor([3, 0])).nonzero().tolist() == [[0, 3], [1, 0]]


def test_record_keeps_what_a_run_under_edits_has(small_model, draw):
    tokens, edits = draw(small_model), heads_from(small_model, [(0, 1)], 0.0)
    run = record(small_model, tokens, ["z", "q", "pattern", "resid_post"], edits)
    with small_model.hooks(fwd_hooks=hooks(edits)):
        want = small_model.run_with_cache(tokens)[1]
    assert len(run.activations) == 4 * small_model.cfg.n_layers
    assert all(torch.equal(values, want[name]) for name, values in run.activations.items())
    assert run.activations[hook_name(0, "z")][:, :, 1].abs().max() == 0


# Sweeps


def mixed(model, tokens):
    """Interventions out of order: several layers, several edits at a hook point, one, none."""
    top, other = model.cfg.n_layers - 1, tokens.clone()
    other[:, 5:] = tokens[:, 5:].flip(1)
    run = record(model, other, ["z", "q", "pattern", "resid_pre"])
    mean = mean_run(model, other, per_position=False)
    here = only_at(tokens, 6)
    return [
        heads_from(model, [(top, 1)], 0.0),
        [*heads_from(model, [(0, 1)], mean), *heads_from(model, [(top, 0)], run)],
        [],
        stream_from(model, top, run, "resid_pre", here),
        [
            *heads_from(model, [(0, 0)], 0.0),
            *heads_from(model, [(0, 1)], run),
            *heads_from(model, [(0, 0)], run, at=only_at(tokens, POSITIONS)),
        ],
        [*heads_from(model, [(1, 0)], run, "pattern"), *heads_from(model, [(1, 1)], run, "q")],
        # below its first change: the very values of the run
        [
            *heads_from(model, [(0, 1)], record(model, tokens, ["z"])),
            *heads_from(model, [(top, 1)], 0.0),
        ],
    ]


@pytest.mark.parametrize(("read", "under_base"), [(None, False), (None, True), ([1, 4], True)])
def test_a_sweep_is_one_whole_run_for_each(small_model, draw, read, under_base):
    model, tokens = small_model, draw(small_model)
    top = model.cfg.n_layers - 1
    base = heads_from(model, [(0, 2), (top, 2)], mean_run(model, tokens)) if under_base else []
    answers = torch.tensor([[7, 11], [5, 3]])
    metrics = [one_logit, LogitDiff(answers), lambda logits: logit_diff(logits, answers)]
    if read:
        metrics = [
            lambda logits: logits[:, :, 7],
            TokenLoss(draw(model, length=len(read))),
            *metrics,
        ]
    interventions = mixed(model, tokens)
    logits = whole_runs(model, tokens, interventions, base, lambda logits: logits[:, read or [-1]])
    for metric in metrics[:3]:
        got = sweep(model, tokens, metric, interventions, base, read)
        torch.testing.assert_close(got, torch.stack([metric(each) for each in logits]), **EXACT)
        if read is None:
            assert (got - got[2]).abs().amax(1)[[0, 1, 3, 4, 5, 6]].min() > 1e-5


def positions_run(model, call):
    """How many positions each block is given within a call, as (layer, positions)."""
    seen = []
    handles = [
        block.register_forward_pre_hook(lambda _, args, la=la: seen.append((la, args[0].shape[1])))
        for la, block in enumerate(model.blocks)
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize(
    ("at", "source_differs_from", "read", "n_positions"),
    [(None, 6, None, 3), (4, 0, None, 5), (4, 9, None, 1), (None, 6, [2, 8], 7), (8, 0, [0], 9)],
)
def test_a_sweep_runs_only_what_an_intervention_can_change(
    random_gpt2, draw, at, source_differs_from, read, n_positions
):
    """From the first position that differs, and is set, or is read; blocks from there on."""
    model, tokens = random_gpt2, draw(random_gpt2)
    sweep(model, tokens, one_logit, [[]])  # the check on first use
    other = tokens.clone()
    other[:, source_differs_from:] = draw(model, seed=1)[:, source_differs_from:]
    where = None if at is None else only_at(tokens, at)
    edits = heads_from(model, [(1, 0)], record(model, other, ["z"]), at=where)
    seen = positions_run(model, lambda: sweep(model, tokens, one_logit, [edits], read=read))
    # an edit that changes nothing only needs the top block
    again = [(2, 1)] if source_differs_from == 9 else [(1, n_positions), (2, n_positions)]
    assert seen == [(0, 9), (1, 9), (2, 9), *again]


def test_a_source_under_other_edits_differs_from_its_first_position_on(small_model, draw):
    """Its tokens differ at the end alone, but its edits changed every position."""
    model, tokens = small_model, draw(small_model)
    clean = tokens.clone()
    clean[:, -1] = draw(model, length=1, seed=1)[:, 0]
    low = heads_from(model, [(0, 0)], 0.0)
    run = record(model, clean, ["v"], low)
    edits = heads_from(model, [(1, 0), (1, 1)], run, "v")
    narrowed = heads_from(model, [(1, 0), (1, 1)], run, "v", only_at(tokens, 8))
    got = sweep(model, tokens, one_logit, [edits, narrowed])
    want = whole_runs(model, tokens, [edits, narrowed])
    torch.testing.assert_close(got, want, **EXACT)
    assert (want[0] - want[1]).abs().max() > 1e-3
    # under the same edits as the base the two agree, and the narrow run is enough
    under = [sweep(model, tokens, one_logit, [each], base=low) for each in (edits, narrowed)]
    torch.testing.assert_close(under[0], under[1], **EXACT)
    torch.testing.assert_close(under[0], whole_runs(model, tokens, [edits], low), **EXACT)


def sweeps(model, metric, edits=None):
    """Every public sweep, on prompts of its own."""
    pair = torch.arange(20, 32).reshape(2, 2, 3).unbind(0)
    edits = edits or heads_from(model, [(1, 1)], 0.0)
    return {
        "sweep": lambda: sweep(model, pair[0], metric, [edits]),
        "losses": lambda: losses(model, pair[0], {"one": edits}),
        "heads": lambda: patch_heads(model, *pair, metric, "z", [(0, 0)]),
        "stream": lambda: patch_stream(model, *pair, metric, "resid_pre", [0], [0]),
        "paths": lambda: path_patch(model, *pair, metric),
        "paths to receivers": lambda: path_patch(model, *pair, metric, None, [(1, 1)], "q"),
    }


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["random_gpt2", "toy2"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
def test_nothing_is_left_behind(request, name, error):
    """After a sweep that ends well, in its metric, or within the run of a block."""
    model = request.getfixturevalue(name)
    tokens = torch.arange(20, 26).view(2, 3)
    before = model(tokens)

    class Bad(Edit):
        def __call__(self, x, rows=slice(None), start=0):
            if x.device.type != "meta":
                raise error
            return x

    def fail(*_):
        raise error

    bad = [Bad(*edit) for edit in heads_from(model, [(1, 1)], 0.0)]
    for what in sweeps(model, one_logit):
        sweeps(model, one_logit)[what]()
        assert torch.equal(model(tokens), before)
        broken = [sweeps(model, one_logit, bad)] if what in ("sweep", "losses") else []
        for calls in [*broken, *([] if what == "losses" else [sweeps(model, fail)])]:
            with pytest.raises(error):
                calls[what]()
            assert not any(point.fwd_hooks for point in model.hook_dict.values())
            assert torch.equal(model(tokens), before)


# Bad input

ONES = torch.ones(2, 4).long()


Z = "blocks.0.attn.hook_z"


def z_run(*shape):
    return Run({Z: torch.zeros(shape)})


def given(model, name, shape, source=0.0):
    """A sweep of one edit whose `where` is of this shape."""
    return sweep(model, ONES, one_logit, [[Edit(name, torch.ones(shape) > 0, source)]])


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: heads_from(m, [(0, 4)], 0.0), "no head L0H4 at 'z': 3 layers of 4 heads"),
        (lambda m: heads_from(m, [0, 1], 0.0), "heads must be Iterable"),
        (lambda m: heads_from(m, [(0, 0)], z_run(1), "q"), "source lacks .*hook_q, it has"),
        (lambda m: stream_from(m, 3, 0.0), r"layer must lie in 0\.\.2, got 3"),
        (lambda m: stream_from(m, -1, 0.0), r"layer must lie in 0\.\.2, got -1"),
        (lambda m: stream_from(m, 0, 0.0, "z"), "site must be one of .* got 'z'"),
        (lambda m: stream_from(m, 0, z_run(1)), "source lacks blocks.0.hook_resid_pre"),
        (lambda m: only_at(ONES, 4), r"position must lie in 0\.\.3, got 4"),
        (lambda m: only_at(ONES, torch.tensor([-1, 0])), r"position must lie in 0\.\.3"),
        (lambda m: only_at(ONES, torch.tensor([1, 2, 3])), r"position must be .* prompt=2"),
        (lambda m: record(m, ONES, ["z", "w"]), "sites: this model has no blocks.0.*w"),
        (lambda m: pattern_preserving(m, [(0, 0)], z_run(1)), "source lacks .*hook_pattern"),
        (
            lambda m: sweep(m, ONES, one_logit, [[]], heads_from(m, [(0, 0)], z_run(3, 4, 4, 16))),
            r"source of the edit at .* is for \[3, 4, 4, 16\]",
        ),
        *(
            (
                lambda m, shape=shape: given(m, Z, (1, 1, 1, 1), z_run(*shape)),
                rf"source of the edit at .*hook_z is for \[{shape[0]}, .* this run has \[2, 4, 4",
            )
            for shape in ((3, 4, 4, 16), (2, 5, 4, 16), (1, 1, 5, 16), (1, 1, 4, 8), (4, 16, 1))
        ),
        *(
            (lambda m, shape=shape: given(m, Z, shape), r"where of the edit at .*hook_z is for")
            for shape in ((3, 4, 4, 1), (2, 5, 1, 1), (1, 1, 3, 1), (1, 1, 1, 1, 1), (2,), ())
        ),
        *(
            (lambda m, name=name: given(m, name, (1, 1, 1)), name)
            for name in ("ln_final.hook_scale", "hook_embed", "blocks.0.hook_nothing", "z")
        ),
    ],
)
def test_bad_input_is_one_sentence_before_any_forward_pass(random_gpt2, call, message):
    with pytest.raises(ValueError, match=message):
        call(random_gpt2)


def test_an_edit_that_does_not_fit_a_plain_run_says_so(random_gpt2):
    edits = heads_from(random_gpt2, [(0, 0)], z_run(1, 5, 4, 16))
    with pytest.raises(ValueError, match=r"source .* is for \[1, 5, 4, 16\], this run has"):
        random_gpt2.run_with_hooks(ONES, fwd_hooks=hooks(edits))


def test_a_metric_gives_one_value_for_each_prompt_or_position_read(random_gpt2):
    for metric, read, got in (
        (
            lambda logits: logits,
            [1, 3],
            r"\[prompt\] or \[prompt read\] values, got shape \(2, 2, ",
        ),
        (lambda logits: logits[:, :1, 7], [1, 3], r"values, got shape \(2, 1\)"),
        (lambda logits: logits[..., 7], None, r"give \[prompt\] values, got shape \(2, 1\)"),
        (lambda logits: logits.mean(), None, r"give \[prompt\] values, got shape \(\)"),
        (lambda logits: 1.0, None, r"give \[prompt\] values, got shape float"),
    ):
        with pytest.raises(ValueError, match=got):
            sweep(random_gpt2, ONES, metric, [[]], read=read)


def test_a_list_of_every_head_at_once_is_the_whole_layer(random_gpt2, draw):
    """Freezing all z of a layer at another run's is patching its attention output."""
    clean, corrupted = draw(random_gpt2, seed=1), draw(random_gpt2)
    layer_1 = [head for head in all_heads(random_gpt2) if head.layer == 1]
    pair = [
        heads_from(random_gpt2, layer_1, record(random_gpt2, clean, ["z"])),
        stream_from(random_gpt2, 1, record(random_gpt2, clean, ["attn_out"]), "attn_out"),
    ]
    got = sweep(random_gpt2, corrupted, one_logit, pair)
    torch.testing.assert_close(got[0], got[1], atol=1e-3, rtol=1e-3)
