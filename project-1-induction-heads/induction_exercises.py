"""The exercises of the induction-heads notebook: right answers, test cases, typical mistakes.

A right answer takes, after what the learner's function gets, what mistakes do otherwise: they are
`partial`s of it. What `utils.diagnosis` tells by itself (axes, signs, sums, shifts) is not listed.
The tables are laid out by hand: what a learner is told, and under it what errs so.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge as Model

from utils import ablation, heads, metrics, prompts, toy, weights
from utils.edits import Run, heads_from, hooks, record
from utils.exercises import Exercises, hook_point, run_hook, set_at
from utils.learner import Watched

EXERCISES = Exercises()
predict, progress = EXERCISES.predict, EXERCISES.progress

ALL, MAIN = slice(None), dict(dim1=-2, dim2=-1)
Tokens, Heads = Int[Tensor, "prompt pos"], Sequence[tuple[int, int]]
Prompts, Z = Float[Tensor, "prompt"], Float[Tensor, "prompt pos head d_head"]
In, Out = Float[Tensor, "d_model d_head"], Float[Tensor, "d_head d_model"]
SWAPPED = "Clean and corrupted are swapped: run the corrupted prompts, and put clean values in."
UNEDITED = "The activation comes out as it went in: assign to a part of it, or return your copy."
PILED_UP = "Your hooks pile up: those of one run must be gone before the next."
EPSILONS = (1e-12, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5)
tiny_model = cache(toy.tiny_model)  # what an answer changes in it is put back
grouped_model = cache(partial(toy.tiny_model, n_layers=3, seed=2, grouped=True))


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _randint(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def _repeats(n_prompts: int, seq_len: int, n_repeats: int = 2, seed: int = 0) -> Tensor:
    return prompts.repeated_tokens(tiny_model(), n_prompts, seq_len, n_repeats, seed)


def _pattern(n_prompts: int, n_heads: int, length: int) -> Tensor:
    """Random causal attention patterns [prompt head dest src]; rows sum to one."""
    scores = 3 * _randn(n_prompts, n_heads, length, length)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


def _averaged(run: Run, *axes: int) -> Run:
    return Run({name: x.mean(axes, keepdim=True) for name, x in run.activations.items()})


def _norms(
    model: Model, tokens: Tokens, site="resid_pre", of=lambda x: x.norm(dim=-1).mean()
) -> Float[Tensor, "layer"]:
    cache = model.run_with_cache(tokens)[1]
    return torch.stack([of(cache[f"blocks.{i}.hook_{site}"]) for i in range(model.cfg.n_layers)])


stream_norms = EXERCISES.add(
    number=1, name="stream_norms", part="primer", title="the length of the residual stream",
    reference=_norms, cases=lambda: {"a small random model": (tiny_model(), _repeats(3, 5)),
                                     "one of three layers": (grouped_model(), _repeats(2, 4))},
    mistakes={
        "You take the norm of a mean vector; take the norm of each vector, then their mean.":
            [partial(_norms, of=lambda x, at=at: x.mean(at).norm(dim=-1).mean())
             for at in ((0, 1), 0, 1)],
        "You take one norm of the whole activation, or of each prompt; take one of each vector "
        "(`dim=-1`).": [partial(_norms, of=lambda x: x.norm()),
                        partial(_norms, of=lambda x: x.norm(dim=(1, 2)).mean())],
        "Your norm runs over prompts or positions; a vector lies along the last axis (`dim=-1`).":
            [partial(_norms, of=lambda x, at=at: x.norm(dim=at).mean()) for at in (0, 1)],
        "You add up absolute values: the norm is the root of the sum of squares.":
            partial(_norms, of=lambda x: x.norm(p=1, dim=-1).mean()),
        "You take the root last: take the root for each vector, then the mean.":
            partial(_norms, of=lambda x: x.square().sum(-1).mean().sqrt()),
        "You leave out the root: a norm is the root of the sum of squares.":
            partial(_norms, of=lambda x: x.square().sum(-1).mean()),
        "You measure the stream after each layer; wanted is before it, at `hook_resid_pre`.":
            partial(_norms, site="resid_post"),
        "You measure in the middle of the layer, or what is added to the stream; wanted is the "
        "stream before the layer, at `hook_resid_pre`.": [
            partial(_norms, site=site) for site in ("resid_mid", "attn_out", "mlp_out")],
        "You keep one position only; take the mean over all positions.":
            [partial(_norms, of=lambda x, i=i: x[:, i].norm(dim=-1).mean()) for i in (-1, 0)],
        "You leave the start token out; take the mean over all positions.":
            partial(_norms, of=lambda x: x[:, 1:].norm(dim=-1).mean()),
        "You keep one prompt only; take the mean over all prompts.":
            [partial(_norms, of=lambda x, i=i: x[i].norm(dim=-1).mean()) for i in (0, -1)],
        "You take the largest norm or the one in the middle; take the mean of all.":
            [partial(_norms, of=lambda x: x.norm(dim=-1).max()),
             partial(_norms, of=lambda x: x.norm(dim=-1).median())],
})  # fmt: skip


def _loss(
    logits: Float[Tensor, "prompt pos vocab"], tokens: Tokens,
    log_p=lambda x: x.log_softmax(-1), predicting=slice(0, -1), predicted=slice(1, None),
) -> Float[Tensor, "prompt pos-1"]:  # fmt: skip
    return -log_p(logits)[:, predicting].gather(-1, tokens[:, predicted, None])[..., 0]


per_token_loss = EXERCISES.add(
    number=2, name="per_token_loss", part="A1", title="per-token loss", reference=_loss,
    cases=lambda: {"3 prompts of 6 tokens": (2 * _randn(3, 6, 7), _randint(7, 3, 6)),
                   "large logits": (40 * _randn(3, 6, 7), _randint(7, 3, 6, seed=1))},
    mistakes={
        "You compare each prediction with the token at its own position; the logits at position i "
        "predict the token at i + 1.": [
            partial(_loss, predicting=slice(1, None)), partial(_loss, predicted=slice(0, -1))],
        "You return a loss for every position; nothing predicts the first token, and the logits at "
        "i predict the token at i + 1.": partial(_loss, predicting=ALL, predicted=ALL),
        "You shift the wrong way: the logits at position i predict the token at i + 1, not i - 1.":
            partial(_loss, predicting=slice(1, None), predicted=slice(0, -1)),
        "You take the logits themselves; turn them into log-probabilities first (log_softmax over "
        "the vocabulary).": partial(_loss, log_p=lambda x: x),
        "You take the softmax without its logarithm: the loss is -log p, not -p.":
            [partial(_loss, log_p=lambda x, a=a, b=b: a + b * x.softmax(-1))
             for a, b in ((0, 1), (0, -1), (-1, 1))],
        "You add a small number before the logarithm, or cut small probabilities off, which "
        "changes large losses; log_softmax needs none.": [
            *(partial(_loss, log_p=lambda x, e=e: (x.softmax(-1) + e).log()) for e in EPSILONS),
            *(partial(_loss, log_p=lambda x, e=e: x.softmax(-1).clamp(e).log()) for e in EPSILONS)],
        "Your softmax runs over positions or prompts; probabilities must sum to one over the "
        "vocabulary.": [partial(_loss, log_p=lambda x, at=at: x.log_softmax(at)) for at in (0, 1)],
        "You take a softmax twice: log_softmax takes the logits themselves.":
            partial(_loss, log_p=lambda x: x.softmax(-1).log_softmax(-1)),
        "You subtract the largest or the mean logit; subtract the `logsumexp` of all of them.":
            [partial(_loss, log_p=lambda x: x - x.amax(-1, keepdim=True)),
             partial(_loss, log_p=lambda x: x - x.mean(-1, keepdim=True))],
        "You look at the likeliest token; wanted is the loss of the token that came.":
            lambda logits, tokens: _loss(logits, pad(logits.argmax(-1)[:, :-1], (1, 0))),
        "You average over the vocabulary; wanted is the loss of the token that came.":
            lambda x, tokens: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1)[:, :-1],
})  # fmt: skip


def _repeated(
    pool: Int[Tensor, "token"], start: int, n_prompts: int, seq_len: int, seed: int,
    of=lambda copy: copy.repeat(1, 2), taken=lambda order, n: order[:, :n],
) -> Tokens:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(len(pool), generator=generator) for _ in range(n_prompts)]
    return pad(of(pool[taken(torch.stack(order), seq_len)]), (1, 0), value=start)


def _drawn_anew(pool: Tensor, start: int, n: int, seq_len: int, seed: int) -> Tensor:
    copies = _repeated(pool, start, 2 * n, seq_len, seed, of=lambda copy: copy)
    return torch.cat([copies[::2], copies[1::2, 1:]], dim=1)


build_repeats = EXERCISES.add(
    number=3, name="build_repeats", part="A1", title="build the repeats", reference=_repeated,
    cases=lambda: {"seed 0": (torch.arange(20, 80, 3), 7, 3, 5, 0),
                   "seed 5": (torch.arange(31, 10, -1), 2, 4, 3, 5)},
    mistakes={
        "The start token is missing in front.": lambda *args: _repeated(*args)[:, 1:],
        "There is one copy only; the tokens come twice.": partial(_repeated, of=lambda copy: copy),
        "You double each token where it stands (A A B B); repeat the row as a whole (A B A B).":
            partial(_repeated, of=lambda copy: copy.repeat_interleave(2, dim=1)),
        "You draw the second copy anew; it is the same as the first.": _drawn_anew,
        "All your prompts are the same: make the generator once, before the loop over prompts.":
            lambda pool, start, n, *args: _repeated(pool, start, 1, *args).repeat(n, 1),
        "You return places in the pool; look the tokens up, `pool[places]`.":
            lambda pool, *args: (_repeated(torch.arange(len(pool)), *args)),
        "You ignore `seed`: hand it to the generator.": [
            partial(lambda seed, *args: _repeated(*args[:4], seed), seed)
            for seed in (0, 1, 42, torch.Generator().initial_seed())],
        "You take the last tokens of each shuffle; take the first `seq_len`.":
            partial(_repeated, taken=lambda order, n: order[:, -n:]),
        "You sort the tokens; take them in the order of the shuffle.":
            partial(_repeated, taken=lambda order, n: order[:, :n].sort().values),
        "You make a generator for each prompt; make one, before the loop over prompts.":
            lambda pool, start, n, seq_len, seed: torch.cat(
                [_repeated(pool, start, 1, seq_len, seed + i) for i in range(n)]),
        "You shuffle once and cut it up; shuffle the whole pool again for each prompt.":
            lambda pool, start, n, seq_len, seed: _repeated(
                pool, start, 1, n * seq_len, seed, of=lambda x: x.view(n, -1).repeat(1, 2)),
        "You shuffle the first tokens of the pool; shuffle the whole pool, then take the first.":
            lambda pool, start, n, seq_len, seed: _repeated(
                pool[:seq_len], start, n, seq_len, seed),
        "Your second copy runs backwards; it is the same as the first.":
            partial(_repeated, of=lambda copy: torch.cat([copy, copy.flip(1)], 1)),
        "There are too many copies; the tokens come twice.":
            partial(_repeated, of=lambda copy: copy.repeat(1, 3)),
        "A start token stands before each copy; there is one, before the first.":
            lambda *args: _repeated(*args, of=lambda copy: copy).repeat(1, 2),
        "You take one token more or less than `seq_len`.": [
            partial(_repeated, taken=lambda order, n, by=by: order[:, : n + by]) for by in (1, -1)],
})  # fmt: skip


def _stripes(
    pattern: Float[Tensor, "prompt head dest src"], seq_len: int,
    previous=(1, 1), same=(0, 0), after=(-1, 0),
) -> Float[Tensor, "prompt head role"]:  # fmt: skip
    """Each role: how far back, and the first destination (of the last two: beyond a copy)."""
    places = [previous, *((seq_len + b, seq_len + 1 + first) for b, first in (same, after))]
    stripes = [pattern.diagonal(-b, **MAIN)[..., first - b :] for b, first in places]
    return torch.stack([stripe.mean(-1) for stripe in stripes], dim=-1)


stripe_scores = EXERCISES.add(
    number=4, name="stripe_scores", part="A1", title="three stripes", reference=_stripes,
    cases=lambda: {"1 + 2 x 5 tokens": (_pattern(2, 4, 11), 5),
                   "1 + 3 x 4 tokens": (_pattern(2, 4, 13), 4)},
    mistakes={
        "For induction you look at the copy itself, `seq_len` back; the token after it is one "
        "position less far back.": partial(_stripes, after=(0, 0)),
        "You average over whole diagonals; only destinations from `1 + seq_len` on have a copy.":
            partial(_stripes, same=(0, -1), after=(-1, -2)),
        "Your induction average takes the whole diagonal, which begins before the second copy "
        "does; take destinations from `1 + seq_len` on.": partial(_stripes, after=(-1, -2)),
        "Your averages start one position early: with the start token in front, the second copy "
        "begins at position `1 + seq_len`.": partial(_stripes, same=(0, -1), after=(-1, -1)),
        "For the previous token you read the main diagonal: each token's attention to itself.":
            partial(_stripes, previous=(0, 0)),
        "For the previous token you look two back; it stands one back.":
            partial(_stripes, previous=(2, 2)),
        "For the previous token you leave positions out: only the first has none.":
            [partial(lambda at, p, n: _stripes(p, n, previous=(1, at(n))), at)
             for at in (lambda n: n + 1, lambda n: 2)],
        "For induction you look one further back than the copy; the token after it is one "
        "position less far back.": partial(_stripes, after=(1, 0)),
        "Your averages start one position late: the second copy begins at `1 + seq_len`.":
            partial(_stripes, same=(0, 1), after=(-1, 1)),
        "You average over one copy alone; take all copies but the first.":
            [lambda p, n: torch.cat([_stripes(p, n)[..., :1], _stripes(
                p[..., : 1 + 2 * n, : 1 + 2 * n], n)[..., 1:]], -1),
             lambda p, n: _stripes(p[..., : 1 + 2 * n, : 1 + 2 * n], n),
             lambda p, n: torch.cat([_stripes(p, n)[..., :1], _stripes(
                 p[..., -1 - 2 * n :, -1 - 2 * n :], n)[..., 1:]], -1)],
        "Your axes `dest` and `src` are the wrong way round: looking back means a diagonal below "
        "the main one.": lambda pattern, seq_len: _stripes(pattern.mT, seq_len),
})  # fmt: skip


score_every_head = EXERCISES.add(
    number=5, name="score_every_head", part="A1", title="score every head",
    reference=heads.score_heads, cases=lambda: {
        "one score": (tiny_model(), _repeats(2, 6), partial(heads.induction_score, seq_len=6)),
        "a model of three layers": (
            grouped_model(), _repeats(3, 6), partial(heads.induction_score, seq_len=6)),
        "three scores": (tiny_model(), _repeats(5, 4, 3), partial(_stripes, seq_len=4))},
    mistakes={
        "Every layer gets the scores of the last: write each to its own place, `hook.layer()`.":
            lambda *args: (s := heads.score_heads(*args))[:, -1:].expand_as(s),
        "Every layer gets the scores of the first: hook the patterns of all layers.":
            lambda *args: (s := heads.score_heads(*args))[:, :1].expand_as(s),
        "You score the first prompt alone; the hook gets all of them at once.":
            lambda *args: (s := heads.score_heads(*args))[:1].expand_as(s),
        "You turn the pattern round before you score it; hand it on as it is.":
            lambda model, tokens, score: heads.score_heads(model, tokens, lambda p: score(p.mT)),
})  # fmt: skip


def _after(copies: Tensor) -> Tensor:
    return pad(copies[:, :, :-1], (1, 0))


def _prefix(
    pattern: Float[Tensor, "prompt head dest src"], tokens: Tokens,
    mask=_after, count=lambda copies: _after(copies).any(-1).sum(-1),
) -> Float[Tensor, "prompt head"]:  # fmt: skip
    copies = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)  # [prompt dest src]
    return (pattern * mask(copies)[:, None]).sum((-2, -1)) / count(copies).reshape(-1, 1)


def _last_of(mask: Tensor) -> Tensor:
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)


prefix_matching = EXERCISES.add(
    number=6, name="prefix_matching", part="A1", title="prefix matching", reference=_prefix,
    cases=lambda: {
        "4 copies of 3 tokens": (_pattern(2, 3, 13), _repeats(2, 3, 4)),
        "tokens that come again here and there": (_pattern(2, 3, 13), _randint(7, 2, 13, seed=3))},
    mistakes={
        "You take the last earlier copy alone; sum over all earlier copies.":
            partial(_prefix, mask=lambda copies: _last_of(_after(copies))),
        "You look at the earlier copies themselves; look at the tokens after them, one to the "
        "right.": partial(_prefix, mask=lambda copies: copies),
        "You divide by the number of all positions; divide by the number of those that have an "
        "earlier copy.": partial(_prefix, count=lambda c: torch.full((len(c),), c.shape[1])),
        "You divide by the number of copies; divide by the number of positions that have one.":
            partial(_prefix, count=lambda copies: copies.sum((1, 2))),
        "You sum over positions; divide by the number of those that have an earlier copy.":
            partial(_prefix, count=lambda copies: torch.ones(len(copies))),
        "Your axes `dest` and `src` are the wrong way round: rows (dest) attend to columns (src).":
            lambda pattern, tokens: _prefix(pattern.mT, tokens),
})  # fmt: skip


def _dropped(
    steps: Int[Tensor, "snapshot"], loss: Float[Tensor, "snapshot"], window: int,
    slope=lambda s, x, w: (x[:-w] - x[w:]) / (s[w:] - s[:-w]),
    place=lambda s, i, w: (s[i] + s[i + w]) / 2,
) -> float:  # fmt: skip
    return float(place(steps, int(slope(steps, loss, window).argmax()), window))


def _drop_cases() -> dict[str, tuple]:
    # uneven snapshots; rises as steep as falls; falls from high and from low values
    cases = {}
    for seed, window in ((8, 2), (5, 3), (1, 4)):
        steps, loss = (2 + _randint(40, 14, seed=seed)).cumsum(0), _randn(14, seed=seed).cumsum(0)
        cases[f"curve {seed}, window {window}"] = (steps, (4 + loss / 2).abs() + 0.2, window)
    late = torch.tensor([4.0, 4.1, 4.0, 3.9, 4.0, 3.8, 2.0, 0.5])
    return cases | {"a fall at the very end": (torch.arange(8) ** 2, late, 2)}


sharpest_drop = EXERCISES.add(
    number=7, name="sharpest_drop", part="A2", title="step of the sharpest drop",
    reference=_dropped, cases=_drop_cases,
    mistakes={
        "You return where the steepest window begins; return its middle, half-way between its "
        "first and its last step.": partial(_dropped, place=lambda steps, i, w: steps[i]),
        "You return where the steepest window ends; return its middle, half-way between its first "
        "and its last step.": partial(_dropped, place=lambda steps, i, w: steps[i + w]),
        "You return the middle snapshot, but they are not evenly spaced; take half-way between "
        "first and last step.": partial(_dropped, place=lambda steps, i, w: steps[i + w // 2]),
        "You average all steps of the window; take half-way between its first and its last.":
            partial(_dropped, place=lambda steps, i, w: steps[i : i + w + 1].float().mean()),
        "You found the steepest rise: mind the sign, a fall is earlier loss minus later loss.":
            lambda steps, loss, window: _dropped(steps, -loss, window),
        "You take absolute values, so that a steep rise counts as a fall; keep the sign.":
            partial(_dropped, slope=lambda s, x, w: ((x[w:] - x[:-w]) / (s[w:] - s[:-w])).abs()),
        "You compare falls per window, but the snapshots are not evenly spaced; divide each fall "
        "by its steps.": partial(_dropped, slope=lambda s, x, w: x[:-w] - x[w:]),
        "You compare relative falls; do not divide by the loss itself.":
            partial(_dropped, slope=lambda s, x, w: (1 - x[w:] / x[:-w]) / (s[w:] - s[:-w])),
        "You average the intervals' slopes; divide the whole fall by the whole number of steps.":
            partial(_dropped, slope=lambda s, x, w: (x.diff() / -s.diff()).unfold(0, w, 1).mean(1)),
        "You compare neighbouring snapshots, so a noisy one wins; take the fall over `window` "
        "intervals.": lambda steps, loss, window: _dropped(steps, loss, 1),
})  # fmt: skip


def _cut(
    model: Model, tokens: Tokens, senders: Heads, receivers: Heads, measure: Callable,
    usual=ablation.mean_run, sites="qkv", who=lambda model, group: group, n_senders=None,
) -> Float[Tensor, "input measure"]:  # fmt: skip
    gone = heads_from(model, senders[:n_senders], usual(model, tokens))
    without, cut = record(model, tokens, ["q", "k", "v"], gone), who(model, receivers)
    edits = [[e for s in group for e in heads_from(model, cut, without, s)] for group in sites]
    return torch.stack([measure(hooks(edit)) for edit in edits])


def _all_of_layers(model: Model, group: Heads) -> list[heads.Head]:
    return [h for h in heads.all_heads(model) if h.layer in {layer for layer, _ in group}]


def _cut_cases() -> dict[str, tuple]:
    model, tokens, receivers = tiny_model(), _repeats(3, 6), [(1, 0), (2, 2)]

    def measure(fwd_hooks: list) -> Tensor:
        with model.hooks(fwd_hooks=fwd_hooks):
            scores = heads.score_heads(model, tokens, heads.prefix_matching_score).mean(0)
            loss = metrics.per_token_loss(model, tokens).mean()
        return torch.stack([loss, *(scores[head] for head in receivers)])

    return {"a small random model": (model, tokens, [(0, 0), (0, 2)], receivers, measure)}


cut_inputs = EXERCISES.add(
    number=8, name="cut_inputs", part="A4", title="cut one input",
    reference=_cut, cases=_cut_cases,
    mistakes={
        "You set the senders' output to zero; put its mean over the prompts there.":
            partial(_cut, usual=lambda model, tokens: 0.0),
        "You average the senders' output over positions too; keep one mean per position.":
            partial(_cut, usual=lambda model, x: _averaged(record(model, x, ["z"]), 0, 1)),
        "You take out the first sender alone; take all of them out at once.":
            partial(_cut, n_senders=1),
        "You change the input of every head in the receivers' layers; only the receivers' should "
        "change.": partial(_cut, who=_all_of_layers),
        PILED_UP: partial(_cut, sites=["q", "qk", "qkv"]),
        "You take the senders out of the measured run; put only the receivers' q, k or v into it.":
            lambda m, t, senders, _, measure: measure(
                hooks(heads_from(m, senders, ablation.mean_run(m, t)))).repeat(3, 1),
        "Nothing is cut: hand your hooks to `measure`.": lambda *args: args[-1]([]).repeat(3, 1),
})  # fmt: skip


def _composition(w_ov: Tensor, read: Tensor, norm: Callable = torch.linalg.norm) -> Tensor:
    return norm(w_ov @ read) / (norm(w_ov) * norm(read))


def _k_composition(w_v: In, w_o: Out, w_q: In, w_k: In) -> Float[Tensor, ""]:
    return _composition(w_v @ w_o, w_k @ w_q.T)


composition_score = EXERCISES.add(
    number=9, name="composition_score", part="A4", title="K-composition score",
    reference=_k_composition, cases=lambda: {
        f"heads of size {n} in {d} dimensions": (
            _randn(d, n), _randn(n, d, seed=1), _randn(d, n, seed=2), _randn(d, n, seed=3))
        for d, n in ((12, 4), (9, 2), (6, 5))},
    mistakes={
        "This is Q-composition: the writer's output must meet W_K, so W_QK stands transposed.":
            lambda w_v, w_o, w_q, w_k: _composition(w_v @ w_o, w_q @ w_k.T),
        "Your product has the reader before the writer; W_OV comes first, then the reader's W_K.":
            lambda w_v, w_o, w_q, w_k: _composition(w_q @ w_k.T, w_v @ w_o),
        "You return the norm of the product alone; divide it by the norms of W_OV and W_QK.":
            lambda w_v, w_o, w_q, w_k: (w_v @ w_o @ w_k @ w_q.T).norm(),
        "You divide by one norm and multiply by the other: put brackets round the product below "
        "the line.": lambda v, o, q, k: _k_composition(v, o, q, k) * (q @ k.T).norm() ** 2,
        "You use the spectral norm; the Frobenius norm is the root of the sum of squares.":
            lambda v, o, q, k: _composition(v @ o, k @ q.T, lambda m: torch.linalg.norm(m, 2)),
        "You stop at W_K; the score uses the whole QK circuit, W_K followed by W_Q transposed.":
            lambda w_v, w_o, w_q, w_k: _composition(w_v @ w_o, w_k),
})  # fmt: skip


def _copying(
    w_e: Float[Tensor, "vocab d_model"], w_v: In, w_o: Out, w_u: Float[Tensor, "d_model vocab"],
    share=lambda values: values.sum().real / values.abs().sum(),
    circuit=lambda w_e, w_v, w_o, w_u: w_e @ w_v @ w_o @ w_u,
) -> Float[Tensor, ""]:  # fmt: skip
    return share(torch.linalg.eigvals(circuit(w_e, w_v, w_o, w_u).double())).float()


def _ov_cases() -> dict[str, tuple]:
    shapes = [(10, 6), (6, 4), (4, 6), (6, 10)]
    w_e, w_v, w_o, w_u = (_randn(*shape, seed=i) for i, shape in enumerate(shapes, start=1))
    return {"a random head": (w_e, w_v, w_o, w_u),
            "a head that half copies": (w_e, w_v, w_o + w_v.T, w_u + w_e.T),
            "a head that suppresses": (w_e, w_v, w_o - 2 * w_v.T, w_u + w_e.T)}  # fmt: skip


eigenvalue_copying = EXERCISES.add(
    number=10, name="eigenvalue_copying", part="A5", title="eigenvalue copying score",
    reference=_copying, cases=_ov_cases,
    mistakes={
        "You take the size of the sum; take its real part: a head that suppresses is below zero.":
            partial(_copying, share=lambda x: x.sum().abs() / x.abs().sum()),
        "You take sizes above the line too, so that every head scores 1.":
            partial(_copying, share=lambda x: x.abs().sum() / x.abs().sum()),
        "You take the sizes of the real parts; divide by the sum of the sizes of the complex "
        "eigenvalues.": partial(_copying, share=lambda x: x.real.sum() / x.real.abs().sum()),
        "You return the sum of the eigenvalues (the trace); divide by the sum of their sizes.":
            partial(_copying, share=lambda x: x.sum().real),
        "You divide by the singular values; use the eigenvalues (torch.linalg.eigvals).":
            lambda e, v, o, u: (x := e @ v @ o @ u).trace() / torch.linalg.svdvals(x).sum(),
        "You look at W_V W_O alone; the OV circuit of tokens is W_E W_V W_O W_U.":
            partial(_copying, circuit=lambda w_e, w_v, w_o, w_u: w_v @ w_o),
        "You unembed with W_E transposed; the unembedding is W_U.":
            partial(_copying, circuit=lambda w_e, w_v, w_o, w_u: w_e @ w_v @ w_o @ w_e.T),
})  # fmt: skip


def _match(
    model: Model, writers: Heads, reader: tuple[int, int],
    read=lambda e, left, w_q, w_k: (e @ w_q) @ (left @ w_k).T,
    leave=lambda e, w_ov: e @ w_ov.sum(0),
) -> Float[Tensor, "query token"]:  # fmt: skip
    (w_q,), (w_k,) = weights.qk_weights(model, [reader])
    w_v, w_o = weights.ov_weights(model, writers)
    return read(model.W_E, leave(model.W_E, w_v @ w_o), w_q, w_k)


previous_token_match = EXERCISES.add(
    number=11, name="previous_token_match", part="A5",
    title="the QK circuit through the previous-token heads", reference=_match,
    cases=lambda: {
        "two writers": (tiny_model(), [heads.Head(0, 0), heads.Head(0, 2)], heads.Head(1, 1)),
        "one writer": (tiny_model(), [heads.Head(1, 2)], heads.Head(3, 0))},
    mistakes={
        "You exchanged W_Q and W_K: what the writers left behind is read by W_K.":
            partial(_match, read=lambda e, left, w_q, w_k: (e @ w_k) @ (left @ w_q).T),
        "The writers are missing: this is the path from the embedding straight to the key.":
            partial(_match, leave=lambda e, w_ov: e),
        "The writers' output meets both sides; the query comes from the embedding.":
            partial(_match, read=lambda e, left, w_q, w_k: (left @ w_q) @ (left @ w_k).T),
        "You take the first writer alone; sum over all of them.":
            partial(_match, leave=lambda e, w_ov: e @ w_ov[0]),
        "You turned W_OV round: a token's row of W_E stands on its left.":
            partial(_match, leave=lambda e, w_ov: e @ w_ov.sum(0).T),
})  # fmt: skip


DESTROYED, RESCUED, _handed_over = 1.0, 0.2, []  # nats on the second copy; the trained toy


def use_toy(run: toy.ToyRun) -> None:
    """Hand over the trained toy on which `change_weights` is judged."""
    _handed_over[:] = [run]


def _after_change(answer: Callable, rescue: bool) -> tuple[float, Tensor, int]:
    """Second copy's loss, the matrices [layer head weight], how many weights are other ones."""
    model, tokens, *_ = _handed_over[0]
    watched = Watched([model])
    try:
        with torch.no_grad():
            answer(model, rescue)
        loss = metrics.per_token_loss(model, tokens)
        by_head = [w.detach().flatten(2) for w in (model.W_Q, model.W_K, model.W_V, model.W_O)]
        pairs = zip(model.parameters(), watched.weights[0], strict=True)
        second = metrics.half_losses(loss, toy.LONGEST).second.mean().item()
        return second, torch.cat(by_head, dim=-1), sum(int((a != b).sum()) for a, b in pairs)
    finally:
        watched.undo()


def _judge(answer: Callable) -> str | None:
    if not _handed_over:
        return "Run the cell with `checks.use_toy` first."
    _, trained, _ = _after_change(lambda *_: None, rescue=False)
    broken_loss, broken, n_changed = _after_change(answer, rescue=False)
    rescued_loss, rescued, n_rescued = _after_change(answer, rescue=True)
    damaged = (broken != trained).any(-1)
    if damaged.sum() != 1 or n_changed != int((broken != trained).sum()):
        found = f"You change {int(damaged.sum())} heads and {n_changed} weights in all"
        return f"{found}; without rescue, change W_Q, W_K, W_V or W_O of one head, in place."
    if not broken_loss > DESTROYED:
        return f"Not destroyed: the loss on the second copy is {broken_loss:.2f} nats."
    if n_rescued != int((rescued != trained).sum()):
        return "With `rescue` too, change W_Q, W_K, W_V and W_O of heads alone."
    if not torch.equal(rescued[damaged], broken[damaged]):
        return "With `rescue` the damaged head must stay as damaged as without."
    if not rescued_loss < RESCUED:
        return f"Destroyed ({broken_loss:.2f} nats), not rescued: still {rescued_loss:.2f} nats."
    return None


change_weights = EXERCISES.stretch(
    number=12, name="change_weights", title="destroy and rescue", part="A5", judge=_judge
)


def _icl(
    loss: Float[Tensor, "prompt column"], early: int, late: int, window: int,
    of=lambda token, w: slice(token - 1 - w, token + w),
) -> Prompts:  # fmt: skip
    return loss[:, of(late, window)].mean(1) - loss[:, of(early, window)].mean(1)


icl_score = EXERCISES.add(
    number=13, name="icl_score", part="B1", title="in-context-learning score", reference=_icl,
    cases=lambda: {"window 0": (_randn(3, 40, seed=7).exp(), 5, 33, 0),
                   "window 3": (_randn(4, 40, seed=8).exp(), 6, 30, 3)},
    mistakes={
        "You are one token late: column 0 is about token 1, so token `late` is in column `late - "
        "1`.": partial(_icl, of=lambda token, w: slice(token - w, token + w + 1)),
        "You leave out the neighbours; average over `window` columns on either side as well.":
            partial(_icl, of=lambda token, w: slice(token - 1, token)),
        "You average from the token on; its neighbours stand on either side.":
            partial(_icl, of=lambda token, w: slice(token - 1, token + w)),
        "The last neighbour is missing: the end of a slice is not part of it.":
            partial(_icl, of=lambda token, w: slice(token - 1 - w, token - 1 + w)),
})  # fmt: skip


def _copies(
    model: Model, tokens: Tokens, layer: int, head: int,
    start=1, positive=torch.relu, weigh=lambda attention: attention.sum(1),
) -> Prompts:  # fmt: skip
    run, reads = record(model, tokens, ["pattern", "v"]), heads.key_value_head(model, (layer, head))
    pattern, v = (run.activations[f"blocks.{layer}.attn.hook_{s}"] for s in ("pattern", "v"))
    seen = weigh(pattern[:, head])[:, start:]  # [prompt src]
    written = v[:, start:, reads.head] @ model.blocks[layer].attn.W_O[head]
    raises = model.W_U.T[tokens[:, start:]] - model.W_U.mean(1)
    raised = positive(written @ raises.mT)  # [prompt src token]
    return 2 * (seen * raised.diagonal(**MAIN)).sum(1) / (seen * raised.sum(2)).sum(1) - 1


@cache
def _planted() -> tuple[Model, Tensor]:
    """A model in which head 0 of layer 1 copies, head 1 does not and head 2 suppresses."""
    model = toy.tiny_model(seed=1)
    tokens = prompts.repeated_tokens(model, 3, 9, n_repeats=1, seed=2)
    raises = (model.W_U.T - model.W_U.mean(1))[tokens[:, 1:]].flatten(0, 1).detach()
    v = record(model, tokens, ["v"]).activations["blocks.1.attn.hook_v"][:, 1:].flatten(0, 1)
    with torch.no_grad():
        for head, sign in ((0, 1), (2, -1)):
            model.blocks[1].attn.W_O[head] = sign * torch.linalg.lstsq(v[:, head], raises).solution
    return model, tokens


copying_of_head = EXERCISES.add(
    number=14, name="copying_of_head", part="B2", title="the copying score of one head",
    reference=_copies, cases=lambda: {
        f"a head that {what}": (*_planted(), 1, head)
        for head, what in enumerate(("copies", "does not copy", "suppresses"))
    } | {"values that two heads share": (grouped_model(), _repeats(3, 9, 1), 1, 2)},
    mistakes={
        "The start token is part of your sample; leave it out, as source and as token raised.":
            partial(_copies, start=0),
        "You count what the head lowers too; set raises below zero to zero.":
            partial(_copies, positive=lambda raised: raised),
        "You leave the attention out; each source counts as much as the head attends to it.":
            partial(_copies, weigh=lambda attention: torch.ones_like(attention[:, 0])),
        "You take the attention of the last position; sum over all destinations.":
            partial(_copies, weigh=lambda attention: attention[:, -1]),
        "You return the share, from 0 to 1; the score is twice the share minus one.":
            lambda *args: (_copies(*args) + 1) / 2,
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
    cases=lambda: {"head 1 of 3, zero": (_randn(2, 4, 3, 5), hook_point(0), 1, 0.0),
                   "head 2 of 3, a mean": (_randn(2, 3, 3, 3), hook_point(4), 2, _randn(3, 3))},
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
    control=lambda *args: ablation.random_control(*args)[0], group=list, left_out=1,
) -> tuple[Float[Tensor, "run prompt"], list[tuple[int, int]]]:  # fmt: skip
    drawn, source = control(model, chosen, 1, seed), usual(model, tokens, others)
    edits = [[], *(heads_from(model, group(out), source) for out in (chosen, drawn))]
    losses = [metrics.per_token_loss(model, tokens, hooks(edit)) for edit in edits]
    return torch.stack([x[:, x.shape[1] // 2 + left_out :].mean(1) for x in losses]), drawn


def _run_experiment(answer: Callable, model: Model, tokens, others, chosen, seed) -> dict:
    """What the answer measured, and whether its control is one; any random numbers will do."""
    losses, drawn = answer(model, tokens, others, chosen, seed)
    draws = [drawn, *(answer(model, tokens, others, chosen, s)[1] for s in (seed, 7, 8))]
    draws = [[(int(layer), int(head)) for layer, head in out] for out in draws]
    right = _experiment(model, tokens, others, chosen, seed, control=lambda *_: draws[0])[0]
    same_layers = [sorted(la for la, _ in out) == sorted(la for la, _ in chosen) for out in draws]
    fresh = [len({*out} - {tuple(head) for head in chosen}) == len(out) for out in draws]
    return {  # of the control's loss what it is too much
        "losses": torch.stack([losses[0], losses[1], losses[2] - right[2]]),
        "the control's layers (1: right)": float(all(same_layers)),
        "the control's heads (1: right)": float(all(fresh)),
        "the seed (1: right)": float(draws[0] == draws[1] and any(d != draws[0] for d in draws)),
    }


def _any_layer(model: Model, chosen: Heads, n: int, seed: int) -> list[heads.Head]:
    left = [head for head in heads.all_heads(model) if head not in chosen]
    return [left[(seed + 1 + i) % len(left)] for i in range(len(chosen))]


def _among_them(model: Model, chosen: Heads, n: int, seed: int) -> list[heads.Head]:
    return [heads.Head(layer, (head + i + seed) % 2) for i, (layer, head) in enumerate(chosen)]


ablation_experiment = EXERCISES.add(
    number=16, name="ablation_experiment", part="B4", title="the ablation experiment",
    reference=_experiment, run=_run_experiment,
    cases=lambda: {name: (model, _repeats(3, 6), _repeats(4, 6, seed=1), chosen, len(chosen))
                   for name, model, chosen in (
                       ("two layers", tiny_model(), [(0, 1), (2, 0)]),
                       ("one layer", toy.build_toy(2), [(1, 0), (0, 3), (1, 2)]))},
    mistakes={
        "That is zero ablation; put the mean over the other prompts there.":
            partial(_experiment, usual=lambda *_: 0.0),
        "You average over the prompts being run; the mean is over the other prompts.":
            partial(_experiment, usual=lambda model, run, _: ablation.mean_run(model, run)),
        "You average over positions too; keep one mean per position.":
            partial(_experiment, usual=lambda m, _, x: _averaged(record(m, x, ["z"]), 0, 1)),
        "You take out the last head of each group alone; take all of them out at once.":
            partial(_experiment, group=lambda out: out[-1:]),
        "The first token of the second copy cannot be predicted; leave it out.":
            partial(_experiment, left_out=0),
        "Your control comes from other layers; draw it from the layers of the chosen heads.":
            partial(_experiment, control=_any_layer),
        "Your control holds chosen heads, or a head twice; draw others, each once.":
            partial(_experiment, control=_among_them),
        "Your control is the same for every seed; hand `seed` to the generator.":
            partial(_experiment, control=lambda *a: ablation.random_control(*a[:3])[0]),
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
        "one value a prompt": (3 * _randn(4), _randn(4, seed=1) + 3, _randn(4, seed=2) - 1),
        "clean below corrupted": (3 * _randn(4, 2, 4), _randn(4, seed=3) - 2, _randn(4) + 1)},
    mistakes={
        "Clean and corrupted are swapped: a run as good as the clean one must give 1.":
            partial(_effect, scale=lambda p, clean, bad: (p - clean) / (bad - clean).mean()),
        "Your zero is right, but the clean run does not give 1: divide by the gap between clean "
        "and corrupted.": partial(_effect, scale=lambda p, clean, bad: p - bad),
        "Divide by the gap between clean and corrupted, not by the clean figure.":
            partial(_effect, scale=lambda p, clean, bad: (p - bad) / clean.mean()),
        "You divide each prompt by its own gap, which can be near zero; divide by the mean gap.":
            partial(_effect, scale=lambda p, clean, bad: (p - bad) / (clean - bad)),
        "Divide by the mean gap; and prompts lie along the first axis, not along the last.":
            lambda p, clean, bad: (p - bad) / (clean - bad),
        "You lose the sign of the gap; where clean is below corrupted, it is negative.":
            partial(_effect, scale=lambda p, clean, bad: (p - bad) / (clean - bad).mean().abs()),
        "You subtract along the last axis; prompts lie along the first, so give `corrupted` as "
        "many axes as `patched`.": lambda p, clean, bad: (p - bad) / (clean - bad).mean(),
})  # fmt: skip


def _sweep(
    model: Model, clean: Tokens, corrupted: Tokens, metric: Callable, layers: Sequence[int],
    with_it=lambda head, n_heads: [head], source=lambda run: run,
) -> Float[Tensor, "prompt layer head"]:  # fmt: skip
    source, n, values = source(record(model, clean, ["z"])), model.cfg.n_heads, []
    for layer, head in product(layers, range(n)):
        patch = heads_from(model, [(layer, h) for h in with_it(head, n)], source)
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
        PILED_UP: partial(_sweep, with_it=lambda head, n_heads: range(head + 1)),
        "You set the head to zero; it gets its output in the clean run.":
            partial(_sweep, source=lambda run: 0.0),
        "Nothing is patched: hand your hook to `run_with_hooks`.":
            lambda model, clean, bad, *rest: _sweep(model, bad, bad, *rest),
        "You patch the first layers of the model; patch those in `layers`.":
            lambda *args: _sweep(*args[:-1], range(2)),
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
        _randn(2, 4, n, 5), hook_point(1, "attn.hook_k"), _randn(2, 4, n, 5, seed=1), h, n_heads)
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
    sites="qkv", who=lambda model, group: group, source=lambda run: run,
) -> Float[Tensor, "input prompt"]:  # fmt: skip
    run, group = source(record(model, clean, ["q", "k", "v"])), who(model, group)
    shared = [heads.key_value_head(model, head) for head in group]
    values, at = [], dict(q=group, k=shared, v=shared)
    for site in sites:
        patch = [edit for s in site for edit in heads_from(model, at[s], run, s)]
        values.append(metric(model.run_with_hooks(corrupted, fwd_hooks=hooks(patch))))
    return torch.stack(values)


patch_inputs = EXERCISES.add(
    number=20, name="patch_inputs", part="B5", title="three inputs",
    reference=_inputs, cases=lambda: {
        "keys differ": _pair("key", [(1, 0), (2, 1)]),
        "values differ": _pair("value", [(1, 2), (1, 1), (3, 0)]),
        "keys that two heads share": _pair("key", [(1, 1), (2, 2)], grouped_model())},
    mistakes={
        SWAPPED: lambda model, clean, bad, *rest: _inputs(model, bad, clean, *rest),
        "You patch all three inputs each time; patch one.": partial(_inputs, sites=["qkv"] * 3),
        PILED_UP: partial(_inputs, sites=["q", "qk", "qkv"]),
        "You patch the first head alone; patch all heads of the group at once.":
            partial(_inputs, who=lambda model, group: group[:1]),
        "You patch every head of these layers; only the group's should change.":
            partial(_inputs, who=_all_of_layers),
})  # fmt: skip
