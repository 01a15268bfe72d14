"""Exercises of the induction-heads notebook that edit runs: cut an input, ablate, patch.

`induction_exercises` has the others, and says how the tables are laid out.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge as Model

from utils import ablation, heads, metrics, prompts, toy
from utils.edits import Run, heads_from, hooks, record
from utils.exercises.exercise import Exercises, NotRight, hook_point, run_hook, set_at

EXERCISES = Exercises()

ALL = slice(None)
Tokens, Heads = Int[Tensor, "prompt pos"], Sequence[tuple[int, int]]
Prompts, Z = Float[Tensor, "prompt"], Float[Tensor, "prompt pos head d_head"]
SWAPPED = "Clean and corrupted are swapped: run the corrupted prompts, and put clean values in."
UNEDITED = "The activation comes out as it went in: assign to a part of it, or return your copy."
PILED_UP = "Your hooks pile up: those of one run must be gone before the next."
tiny_model = cache(toy.tiny_model)  # what an answer changes in it is put back
grouped_model = cache(partial(toy.tiny_model, n_layers=3, seed=2, grouped=True))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_group(*pairs: tuple[int, int]) -> list[heads.Head]:
    return [heads.Head(*pair) for pair in pairs]


def repeats(n_prompts: int, seq_len: int, n_repeats: int = 2, seed: int = 0) -> Tensor:
    return prompts.repeated_tokens(tiny_model(), n_prompts, seq_len, n_repeats, seed)


def _averaged(run: Run, *axes: int) -> Run:
    return Run({name: x.mean(axes, keepdim=True) for name, x in run.activations.items()})


def _cut(
    model: Model, tokens: Tokens, senders: Heads, receivers: Heads, measure: Callable,
    usual=ablation.mean_run, sites="qkv", who=lambda model, group: group, which=ALL,
    put=lambda run: run,
) -> Float[Tensor, "input measure"]:  # fmt: skip
    gone = heads_from(model, senders[which], usual(model, tokens))
    cut, without = who(model, receivers), put(record(model, tokens, ["q", "k", "v", "z"], gone))
    edits = [[e for s in group for e in heads_from(model, cut, without, s)] for group in sites]
    return torch.stack([measure(hooks(edit)) for edit in edits])


def _all_of_layers(model: Model, group: Heads) -> list[heads.Head]:
    return [h for h in heads.all_heads(model) if h.layer in {layer for layer, _ in group}]


def _last_everywhere(model: Model, group: Heads) -> list[heads.Head]:
    return [heads.Head(layer, group[-1][1]) for layer, _ in group]


def _over_heads(model: Model, tokens: Tokens) -> Run:
    z = record(model, tokens, ["z"]).activations
    return Run({k: x.mean((0, 2), keepdim=True).repeat(1, 1, x.shape[2], 1) for k, x in z.items()})


def _cut_cases() -> dict[str, tuple]:
    model, tokens, receivers = tiny_model(), repeats(3, 6), a_group((1, 0), (2, 2))

    def measure(fwd_hooks: list) -> Tensor:
        with model.hooks(fwd_hooks=fwd_hooks):
            scores = heads.score_heads(model, tokens, heads.prefix_matching_score).mean(0)
            loss = metrics.per_token_loss(model, tokens).mean()
        return torch.stack([loss, *(scores[head] for head in receivers)])

    return {"a small random model": (model, tokens, a_group((0, 0), (0, 2)), receivers, measure)}


cut_inputs = EXERCISES.add(
    number=8, name="cut_inputs", part="A4", title="cut one input",
    reference=_cut, cases=_cut_cases,
    mistakes={
        "You set the senders' output to zero; put its mean over the prompts there.":
            partial(_cut, usual=lambda model, tokens: 0.0),
        "You average the senders' output over positions too; keep one mean per position.":
            partial(_cut, usual=lambda model, x: _averaged(record(model, x, ["z"]), 0, 1)),
        "You average the senders' output over positions or heads; average over prompts alone.":
            [partial(_cut, usual=lambda model, x: _averaged(record(model, x, ["z"]), 1)),
             partial(_cut, usual=_over_heads)],
        "You take the senders' output in the first prompt; take its mean over the prompts.":
            partial(_cut, usual=lambda model, x: record(model, x[:1], ["z"])),
        "You take out one sender alone; take all of them out at once.":
            [partial(_cut, which=slice(0, 1)), partial(_cut, which=slice(-1, None))],
        "You take the senders out one at a time and average; take them out at once.":
            lambda m, t, group, *rest: sum(_cut(m, t, [x], *rest) / len(group) for x in group),
        "You change the input of one receiver alone; change that of all of them at once.":
            [partial(_cut, who=lambda model, group: group[:1]),
             partial(_cut, who=lambda model, group: group[-1:])],
        "A hook of yours changes the wrong head: made in a loop, it uses the loop's last `head`.":
            [partial(_cut, who=_last_everywhere), lambda m, t, senders, *rest: _cut(
                m, t, _last_everywhere(m, senders), *rest, who=_last_everywhere)],
        "You change all three inputs each time, or the output z; change one input.":
            [partial(_cut, sites=["qkv"] * 3), partial(_cut, sites="zzz")],
        "You put zeros or the receivers' own mean into them; take q, k and v of the run without "
        "the senders.": [partial(_cut, put=lambda run: 0.0), lambda m, t, _, r, measure: _cut(
            m, t, r, r, measure, put=lambda _: _averaged(record(m, t, ["q", "k", "v"]), 0))],
        "You change the input of every head in the receivers' layers; only the receivers' should "
        "change.": partial(_cut, who=_all_of_layers),
        PILED_UP: partial(_cut, sites=["q", "qk", "qkv"]),
        "You take the senders out of the measured run; put only the receivers' q, k or v into it.":
            lambda m, t, senders, _, measure: measure(
                hooks(heads_from(m, senders, ablation.mean_run(m, t)))).repeat(3, 1),
        "Nothing is cut: hand your hooks to `measure`, and take what you put into the receivers "
        "from a run without the senders.": lambda *args: args[-1]([]).repeat(3, 1),
})  # fmt: skip


def _ablated(
    z: Z, hook: HookPoint, head: int, value: Float[Tensor, "*value"] | float,
    where=lambda head: (ALL, ALL, head),
) -> Z:  # fmt: skip
    return set_at(z, where(head), value)


ablate_head = EXERCISES.add(
    number=15, name="ablate_head", part="B4", title="ablate a head",
    reference=_ablated, run=run_hook,
    # as many positions as heads and dimensions: the value then fits along a wrong axis too
    cases=lambda: {"head 1 of 3, zero": (randn(2, 4, 3, 5), hook_point(0), 1, 0.0),
                   "head 2 of 3, a mean": (randn(2, 3, 3, 3), hook_point(4), 2, randn(3, 3))},
    mistakes={
        UNEDITED: lambda z, hook, head, value: z,
        "You change a position instead of a head: heads are the third axis, `z[:, :, head]`.":
            partial(_ablated, where=lambda head: (ALL, head)),
        "You change one dimension of every head: heads are the third axis, `z[:, :, head]`.":
            partial(_ablated, where=lambda head: (..., head)),
        "You change every head of the layer; only `head` should change.":
            partial(_ablated, where=lambda head: ALL),
        "You put zero there whatever `value` is.": lambda *args: _ablated(*args[:3], 0.0),
        "You add the value to the head's output; it takes the output's place.":
            lambda z, hook, head, value: _ablated(z, hook, head, z[:, :, head] + value),
})  # fmt: skip


def _experiment(
    model: Model, tokens: Tokens, others: Int[Tensor, "reference pos"], chosen: Heads, seed: int,
    usual=lambda model, tokens, others: ablation.mean_run(model, others),
    control=lambda *args: ablation.random_control(*args)[0], group=list, left_out=1, end=None,
) -> tuple[Float[Tensor, "run prompt"], list[tuple[int, int]]]:  # fmt: skip
    drawn, source = control(model, chosen, 1, seed), usual(model, tokens, others)
    edits = [[], *(heads_from(model, group(out), source) for out in (chosen, drawn))]
    losses = [metrics.per_token_loss(model, tokens, hooks(edit)) for edit in edits]
    n = losses[0].shape[1] // 2
    return torch.stack([x[:, max(n + left_out, 0) : end].mean(1) for x in losses]), drawn


PAIR = "Return two things: the losses, and then the control's heads as pairs (layer, head)."
CONTROL = (
    "Your control must have as many heads as are chosen, one from the layer of each.",
    "Your control holds chosen heads, or a head twice; draw others, each once.",
    "Your control changes from call to call: draw it with a generator that has `seed`.",
    "Your control is the same for every seed; hand `seed` to the generator.",
)


def _run_experiment(
    answer: Callable, model: Model, tokens: Tokens, others: Tokens, chosen: Heads, seed: int
) -> Float[Tensor, "run prompt"]:
    """What the answer measured. The control is judged first: any random numbers will do.

    Its loss is given as if it were the library's control. Raises NotRight for another pair.
    """
    expected = _experiment(model, tokens, others, chosen, seed)[0]
    seeds = (*[seed] * 4, 7, 8)  # without one, four draws are hardly the same
    results = [answer(model, tokens, others, chosen, s) for s in seeds]
    try:
        losses = torch.stack([*results[0][0]])
        draws = [[(int(layer), int(head)) for layer, head in out] for _, out in results]
    except (TypeError, ValueError, RuntimeError, IndexError):
        raise NotRight(PAIR) from None
    layers = [sorted(la for la, _ in out) == sorted(la for la, _ in chosen) for out in draws]
    fresh = [len({*out} - {tuple(head) for head in chosen}) == len(out) for out in draws]
    seeded = all(out == draws[0] for out in draws[:4]), any(out != draws[0] for out in draws)
    for holds, sentence in zip((all(layers), all(fresh), *seeded), CONTROL, strict=True):
        if not holds:
            raise NotRight(sentence)
    if losses.shape == expected.shape:
        right = _experiment(model, tokens, others, chosen, seed, control=lambda *_: draws[0])[0]
        losses = torch.cat([losses[:2], losses[2:] * expected[2] / right[2]])
    return losses


ablation_experiment = EXERCISES.add(
    number=16, name="ablation_experiment", part="B4", title="the ablation experiment",
    reference=_experiment, run=_run_experiment,
    cases=lambda: {name: (model, repeats(3, 6), repeats(4, 6, seed=1), chosen, len(chosen))
                   for name, model, chosen in (
                       ("two layers", tiny_model(), a_group((0, 1), (2, 0))),
                       ("one layer", tiny_model(2, grouped=True),
                        a_group((1, 0), (0, 3), (1, 2))))},
    mistakes={
        "That is zero ablation; put the mean over the other prompts there.":
            partial(_experiment, usual=lambda *_: 0.0),
        "You average over the prompts being run; the mean is over the other prompts.":
            partial(_experiment, usual=lambda model, run, _: ablation.mean_run(model, run)),
        "You average over positions too; keep one mean per position.":
            partial(_experiment, usual=lambda m, _, x: _averaged(record(m, x, ["z"]), 0, 1)),
        "You average over positions or heads; average over the other prompts alone.": [
            partial(_experiment, usual=lambda m, _, x: _averaged(record(m, x[:3], ["z"]), 1)),
            partial(_experiment, usual=lambda m, _, x: _over_heads(m, x))],
        "You take one of the other prompts; take the mean over all of them.":
            partial(_experiment, usual=lambda m, _, x: record(m, x[:1], ["z"])),
        "You take out one head of each group alone; take all of them out at once.":
            [partial(_experiment, group=lambda out: out[-1:]),
             partial(_experiment, group=lambda out: out[:1])],
        "A hook of yours changes the wrong head: made in a loop, it uses the loop's last `head`.":
            partial(_experiment, group=lambda out: [heads.Head(la, out[-1][1]) for la, _ in out]),
        "The first token of the second copy cannot be predicted; leave it out.":
            partial(_experiment, left_out=0),
        "Your losses count the first copy; take the second copy, without its first token.": [
            partial(_experiment, left_out=-99), partial(_experiment, left_out=-99, end=6),
            partial(_experiment, left_out=-1)],
        "A token of the second copy is missing: only its first is left out.":
            [partial(_experiment, left_out=2), partial(_experiment, end=-1)],
})  # fmt: skip


def _effect(
    patched: Float[Tensor, "prompt *rest"], clean: Prompts, corrupted: Prompts,
    scale=lambda p, clean, bad: (p - bad) / (clean - bad).mean(),
) -> Float[Tensor, "prompt *rest"]:  # fmt: skip
    return scale(patched.movedim(0, -1), clean, corrupted).movedim(-1, 0)  # prompts last


normalised_effect = EXERCISES.add(
    number=17, name="normalised_effect", part="B5", title="normalised effect", reference=_effect,
    # as many entries in the last axis as prompts: broadcasting along the wrong one then runs
    cases=lambda: {
        "one value a prompt": (3 * randn(4), randn(4, seed=1) + 3, randn(4, seed=2) - 1),
        "clean below corrupted": (3 * randn(4, 2, 4), randn(4, seed=3) - 2, randn(4) + 1)},
    mistakes={
        "Clean and corrupted are swapped: a run as good as the clean one must give 1.":
            partial(_effect, scale=lambda p, clean, bad: (p - clean) / (bad - clean).mean()),
        "Your zero is right, but the clean run does not give 1: divide by the gap between clean "
        "and corrupted.": partial(_effect, scale=lambda p, clean, bad: p - bad),
        "Divide by the gap between clean and corrupted, not by the clean figure.":
            partial(_effect, scale=lambda p, clean, bad: (p - bad) / clean.mean()),
        "You divide each prompt by its own gap, which can be near zero; divide by the mean gap.":
            [partial(_effect, scale=lambda p, clean, bad, e=e: (p - bad) / (clean - bad + e))
             for e in (0, 1e-6, 1e-3)],
        "You subtract one number from all prompts; each has its own corrupted value.": [
            partial(_effect, scale=lambda p, c, bad, of=of: (p - of(bad)) / (c - bad).mean())
            for of in (lambda bad: bad.mean(), lambda bad: bad[0])],
        "The zero is the corrupted run: subtract its value, in brackets, before you divide.": [
            partial(_effect, scale=lambda p, clean, bad: (p - clean) / (clean - bad).mean()),
            partial(_effect, scale=lambda p, clean, bad: p / (clean - bad).mean()),
            partial(_effect, scale=lambda p, clean, bad: p / clean.mean()),
            partial(_effect, scale=lambda p, clean, bad: (p + bad) / (clean - bad).mean()),
            partial(_effect, scale=lambda p, clean, bad: p - bad / (clean - bad).mean())],
        "Divide by the mean gap; and prompts lie along the first axis, not along the last.":
            lambda p, clean, bad: (p - bad) / (clean - bad),
        "You lose the sign of the gap; where clean is below corrupted, it is negative.":
            partial(_effect, scale=lambda p, clean, bad: (p - bad) / (clean - bad).mean().abs()),
        "You subtract along the last axis; prompts lie along the first, so give `corrupted` as "
        "many axes as `patched`.": lambda p, clean, bad: (p - bad) / (clean - bad).mean(),
})  # fmt: skip


def _sweep(
    model: Model, clean: Tokens, corrupted: Tokens, metric: Callable, layers: Sequence[int],
    with_it=lambda head, n_heads: [head], source=lambda run: run, site="z", at=None,
) -> Float[Tensor, "prompt layer head"]:  # fmt: skip
    source, n, values = source(record(model, clean, [site])), model.cfg.n_heads, []
    columns = torch.arange(clean.shape[1])
    places = None if at is None else (columns == at % len(columns)).expand_as(clean)
    for layer, head in product(layers, range(n)):
        group = [(layer, h * heads.n_site_heads(model, site) // n) for h in with_it(head, n)]
        patch = heads_from(model, group, source, site, places)
        values.append(metric(model.run_with_hooks(corrupted, fwd_hooks=hooks(patch))))
    return torch.stack(values, dim=1).unflatten(1, (-1, n))


def _sweep_piled_up(model: Model, clean: Tokens, corrupted: Tokens, metric, layers) -> Tensor:
    run, patch, values, n = record(model, clean, ["z"]), [], [], model.cfg.n_heads
    for head in product(layers, range(n)):
        patch += heads_from(model, [head], run)
        values.append(metric(model.run_with_hooks(corrupted, fwd_hooks=hooks(patch))))
    return torch.stack(values, dim=1).unflatten(1, (-1, n))


def _pair(corruption: str, more: Sequence, model: Model | None = None) -> tuple:
    model = model or tiny_model()
    clean, corrupted, answers, _ = prompts.induction_prompts(model, 3, 8)
    return model, clean, corrupted[corruption], metrics.LogitDiff(answers), more


patch_every_head = EXERCISES.add(
    number=18, name="patch_every_head", part="B5", title="the sweep over heads",
    reference=_sweep,
    cases=lambda: {"keys differ": _pair("key", [3, 1]), "values differ": _pair("value", [0, 3]),
                   "another model": _pair("value", [0, 2], grouped_model())},
    mistakes={
        SWAPPED: lambda model, clean, bad, *rest: _sweep(model, bad, clean, *rest),
        "You patch the whole layer; patch one head at a time.":
            partial(_sweep, with_it=lambda head, n_heads: range(n_heads)),
        PILED_UP: [partial(_sweep, with_it=lambda head, n: range(head + 1)), _sweep_piled_up],
        "You set the head to zero or to a mean; it gets its output in the clean run.":
            [partial(_sweep, source=lambda run: 0.0),
             partial(_sweep, source=lambda run: _averaged(run, 0)),
             partial(_sweep, source=lambda run: _averaged(run, 0, 1))],
        "You patch one position alone; patch the head at every position.":
            [partial(_sweep, at=at) for at in (-1, -2)],
        "You patch what the head reads; its output is at `hook_z`.":
            [partial(_sweep, site=site) for site in "qkv"],
        "You put clean values into the clean run; run the corrupted prompts.":
            lambda model, clean, bad, metric, layers: metric(model(clean))[:, None, None].repeat(
                1, len(layers), model.cfg.n_heads),
        "You patch all heads but one; patch one head at a time.":
            partial(_sweep, with_it=lambda head, n: [h for h in range(n) if h != head]),
        "You patch the layer before; counted from 0, layer 1 is `blocks.1`.":
            lambda *args: _sweep(*args[:-1], [max(layer - 1, 0) for layer in args[-1]]),
        "Nothing is patched: hand your hook to `run_with_hooks`, return in it what it changed, and "
        "take the values from a run of the clean prompts.":
            lambda model, clean, bad, *rest: _sweep(model, bad, bad, *rest),
        "You patch the first layers of the model; patch those in `layers`.":
            lambda *args: _sweep(*args[:-1], range(2)),
        "You return shares of the gap; return the metric itself.":
            lambda model, clean, bad, metric, layers: _effect(
                _sweep(model, clean, bad, metric, layers),
                *(metric(model(tokens)) for tokens in (clean, bad))),
})  # fmt: skip


def _input_patched(
    activation: Z, hook: HookPoint, clean: Z, head: int, n_heads: int,
    index=lambda head, n, n_heads: head // (n_heads // n), positions=ALL,
) -> Z:  # fmt: skip
    where = (ALL, positions, index(head, activation.shape[2], n_heads))
    return set_at(activation, where, clean[where])


patch_head_input = EXERCISES.add(
    number=19, name="patch_head_input", part="B5", title="patch what a head reads",
    reference=_input_patched, run=run_hook, cases=lambda: {f"head {h} of {n_heads} on {n}": (
        randn(2, 4, n, 5), hook_point(1, "attn.hook_k"), randn(2, 4, n, 5, seed=1), h, n_heads)
        for n, n_heads, h in ((6, 6, 4), (6, 12, 3), *((3, 6, h) for h in range(3)),
                              *((4, 12, h) for h in range(4)))},
    mistakes={
        UNEDITED: lambda activation, *_: activation,
        "You patch every head of the layer; only the one that `head` uses should change.":
            lambda activation, hook, clean, head, n_heads: clean,
        "You divide by the number of key/value heads; divide by how many query heads share one, "
        "`n_heads // n`.": partial(_input_patched, index=lambda head, n, n_heads: head // n),
        "You divide by two; how many query heads share one is `n_heads // n`.":
            partial(_input_patched, index=lambda head, n, n_heads: head // (1 + (n < n_heads))),
        "You round; neighbouring heads share one, so cut off: `head // (n_heads // n)`.":
            partial(_input_patched, index=lambda head, n, n_heads: round(head * n / n_heads)),
        "You use `head` itself, or its remainder; neighbouring heads share one, so divide (`//`).":
            partial(_input_patched, index=lambda head, n, n_heads: head % n),
        "You patch the last position only; patch the head at every position.":
            partial(_input_patched, positions=slice(-1, None)),
        "Clean and corrupted are swapped: return the corrupted activation with one clean head.":
            lambda x, hook, clean, *rest: _input_patched(clean, hook, x, *rest),
})  # fmt: skip


def _inputs(
    model: Model, clean: Tokens, corrupted: Tokens, metric: Callable, group: Heads,
    sites="qkv", who=lambda model, group: group, source=lambda run: run, places=None,
    which=lambda model, head: heads.key_value_head(model, head).head,
) -> Float[Tensor, "input prompt"]:  # fmt: skip
    run, group = source(record(model, clean, ["q", "k", "v"])), who(model, group)
    shared = [heads.Head(head[0], which(model, head)) for head in group]
    values, at = [], dict(q=group, k=shared, v=shared)
    for site in sites:
        patch = [edit for s in site for edit in heads_from(model, at[s], run, s, places)]
        values.append(metric(model.run_with_hooks(corrupted, fwd_hooks=hooks(patch))))
    return torch.stack(values)


patch_inputs = EXERCISES.add(
    number=20, name="patch_inputs", part="B5", title="three inputs",
    reference=_inputs, cases=lambda: {
        "keys differ": _pair("key", a_group((1, 0), (2, 1))),
        "values differ": _pair("value", a_group((1, 2), (1, 1), (3, 0))),
        "keys that two heads share": _pair("key", a_group((1, 1), (2, 2)), grouped_model())},
    mistakes={
        SWAPPED: lambda model, clean, bad, *rest: _inputs(model, bad, clean, *rest),
        "You patch all three inputs each time; patch one.": partial(_inputs, sites=["qkv"] * 3),
        PILED_UP: partial(_inputs, sites=["q", "qk", "qkv"]),
        "You patch one head alone; patch all heads of the group at once.":
            [partial(_inputs, who=lambda model, group: group[:1]),
             partial(_inputs, who=lambda model, group: group[-1:])],
        "You patch the heads one by one and average; patch them all in one run.":
            lambda *args: sum(_inputs(*args[:-1], [head]) / len(args[-1]) for head in args[-1]),
        "Nothing is patched: hand your hooks to `run_with_hooks`, with values of the clean run.":
            lambda model, clean, bad, metric, group: metric(model(bad)).repeat(3, 1),
        "You put clean values into the clean run; run the corrupted prompts.":
            lambda model, clean, bad, metric, group: metric(model(clean)).repeat(3, 1),
        "A hook of yours changes the wrong head: made in a loop, it uses the loop's last `head`.":
            partial(_inputs, who=_last_everywhere),
        "You put in zeros or a mean; the values are those of the clean run.": [
            partial(_inputs, source=lambda run: 0.0),
            partial(_inputs, source=lambda run: _averaged(run, 0))],
        "You patch one position alone; patch every position.": [
            lambda model, clean, *rest, at=at: _inputs(model, clean, *rest, places=torch.arange(
                clean.shape[1]).eq(at % clean.shape[1]).expand_as(clean)) for at in (-1, -2)],
        "You patch the layer before; the heads' own layer is `blocks.{layer}`.":
            partial(_inputs, who=lambda m, group: [heads.Head(la - 1, h) for la, h in group]),
        "You patch every head of these layers; only the group's should change.":
            partial(_inputs, who=_all_of_layers),
        "Neighbouring heads share keys and values here: patch those of `head // (n_heads // n)`, "
        "as in exercise 19.": [
            partial(_inputs, which=lambda m, head: head[1] % heads.n_site_heads(m, "k")),
            partial(_inputs, which=lambda m, head: min(head[1], heads.n_site_heads(m, "k") - 1))],
})  # fmt: skip
