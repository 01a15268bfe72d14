"""The exercises of the induction-heads notebook: right answers, test cases, typical mistakes.

A right answer takes, after what the learner's function gets, what mistakes do otherwise: they are
`partial`s of it. What `utils.exercises.diagnosis` tells (axes, signs, sums, shifts) is not.
The tables are laid out by hand: what a learner is told, and under it what errs so.
"""

import math
from collections.abc import Callable
from functools import cache, partial, reduce
from warnings import catch_warnings, simplefilter

import torch
from induction_exercises_causal import (
    ALL,
    EXERCISES,
    Heads,
    Prompts,
    Tokens,
    ablate_head,
    ablation_experiment,
    cut_inputs,
    grouped_model,
    normalised_effect,
    patch_every_head,
    patch_head_input,
    patch_inputs,
    randn,
    repeats,
    tiny_model,
)
from induction_exercises_census import fit_exponent
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformer_lens.model_bridge import TransformerBridge as Model

from utils import heads, metrics, prompts, toy, weights
from utils.edits import record
from utils.exercises.learner import Watched

__all__ = [  # those that edit runs, and the census's
    "ablate_head",
    "ablation_experiment",
    "cut_inputs",
    "fit_exponent",
    "normalised_effect",
    "patch_every_head",
    "patch_head_input",
    "patch_inputs",
]
predict, progress = EXERCISES.predict, EXERCISES.progress

MAIN = dict(dim1=-2, dim2=-1)
In, Out = Float[Tensor, "d_model d_head"], Float[Tensor, "d_head d_model"]
EPSILONS = (1e-12, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5)


def _randint(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def _pattern(n_prompts: int, n_heads: int, length: int) -> Tensor:
    """Random causal attention patterns [prompt head dest src]; rows sum to one."""
    scores = 3 * randn(n_prompts, n_heads, length, length)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


def _norms(
    model: Model, tokens: Tokens, site="resid_pre", of=lambda x: x.norm(dim=-1).mean()
) -> Float[Tensor, "layer"]:
    cache = model.run_with_cache(tokens)[1]
    return torch.stack([of(cache[f"blocks.{i}.hook_{site}"]) for i in range(model.cfg.n_layers)])


stream_norms = EXERCISES.add(
    number=1, name="stream_norms", part="primer", title="the length of the residual stream",
    reference=_norms, cases=lambda: {"a small random model": (tiny_model(), repeats(3, 5)),
                                     "one of three layers": (grouped_model(), repeats(2, 4))},
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
    cases=lambda: {"3 prompts of 6 tokens": (2 * randn(3, 6, 7), _randint(7, 3, 6)),
                   "large logits": (40 * randn(3, 6, 7), _randint(7, 3, 6, seed=1))},
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
        "The softmax of an unlikely token is rounded to zero, and its logarithm is infinite; take "
        "log_softmax, which does both at once.":
            partial(_loss, log_p=lambda x: x.softmax(-1).log()),
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


def _with_scores(answer: Callable, model: Model, tokens: Tokens, score: Callable) -> Tensor:
    """On a model whose attention scores are not its patterns, as in pretrained ones."""
    names = [f"blocks.{layer}.attn.hook_attn_scores" for layer in range(model.cfg.n_layers)]
    with catch_warnings():
        simplefilter("ignore")  # a warning that the change has no effect
        with model.hooks(fwd_hooks=[(name, lambda x, hook: x.log()) for name in names]):
            return answer(model, tokens, score)


score_every_head = EXERCISES.add(
    number=5, name="score_every_head", part="A1", title="score every head",
    reference=heads.score_heads, run=_with_scores, cases=lambda: {
        "one score": (tiny_model(), repeats(2, 6), partial(heads.induction_score, seq_len=6)),
        "a model of three layers": (
            grouped_model(), repeats(3, 6), partial(heads.induction_score, seq_len=6)),
        "three scores": (tiny_model(), repeats(5, 4, 3), partial(_stripes, seq_len=4))},
    mistakes={
        "Every layer gets the scores of the last: write each to its own place, `hook.layer()`.":
            lambda *args: (s := heads.score_heads(*args))[:, -1:].expand_as(s),
        "Every layer gets the scores of the first: hook the patterns of all layers.":
            lambda *args: (s := heads.score_heads(*args))[:, :1].expand_as(s),
        "You score the first prompt alone; the hook gets all of them at once.":
            lambda *args: (s := heads.score_heads(*args))[:1].expand_as(s),
        "You turn the pattern round before you score it; hand it on as it is.":
            lambda model, tokens, score: heads.score_heads(model, tokens, lambda p: score(p.mT)),
        "You hook the attention scores, from before the softmax; the pattern is at `hook_pattern`.":
            lambda model, tokens, score: heads.score_heads(model, tokens, lambda p: score(p.log())),
        "You take a softmax of the pattern, whose rows sum to one already.":
            lambda *args: heads.score_heads(*args[:2], lambda p: args[2](p.softmax(-1))),
})  # fmt: skip


def _after(copies: Tensor, by: int = 1) -> Tensor:
    return pad(copies[:, :, :-by], (by, 0))


def _prefix(
    pattern: Float[Tensor, "prompt head dest src"], tokens: Tokens,
    mask=_after, count=lambda copies: _after(copies).any(-1).sum(-1), earlier=-1,
) -> Float[Tensor, "prompt head"]:  # fmt: skip
    copies = (tokens[:, :, None] == tokens[:, None, :]).tril(earlier)  # [prompt dest src]
    return (pattern * mask(copies)[:, None]).sum((-2, -1)) / count(copies).reshape(-1, 1)


_plain = (lambda copies: copies, lambda copies: copies.any(-1).sum(-1))


def _both(mask=_after, earlier=-1) -> list[Callable]:
    """With this mask, divided by the positions that have one, and by those with a copy."""
    counts = (lambda c: mask(c).any(-1).sum(-1), lambda c: c.any(-1).sum(-1))
    return [partial(_prefix, mask=mask, count=count, earlier=earlier) for count in counts]


def _last_of(mask: Tensor) -> Tensor:
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)


prefix_matching = EXERCISES.add(
    number=6, name="prefix_matching", part="A1", title="prefix matching", reference=_prefix,
    cases=lambda: {
        "4 copies of 3 tokens": (_pattern(2, 3, 13), repeats(2, 3, 4)),
        "tokens that come again here and there": (_pattern(2, 3, 13), _randint(7, 2, 13, seed=3))},
    mistakes={
        "You take the last earlier copy alone; sum over all earlier copies.":
            partial(_prefix, mask=lambda copies: _last_of(_after(copies))),
        "You look at the earlier copies themselves; look at the tokens after them, one to the "
        "right.": partial(_prefix, mask=lambda copies: copies),
        "You look at the first earlier copy alone; sum over all earlier copies.":
            partial(_prefix, mask=lambda copies: _after(copies & (copies.cumsum(-1) == 1))),
        "You look at the tokens before the earlier copies; look at those after, one to the right.":
            _both(mask=lambda copies: pad(copies[:, :, 1:], (0, 1))),
        "You look two to the right of the earlier copies; the token after one is one to the right.":
            _both(mask=partial(_after, by=2)),
        "You look at the copies themselves, and count a token as a copy of itself: look one to the "
        "right of earlier copies (`.tril(-1)`).": _both(mask=lambda copies: copies, earlier=0),
        "You move the destinations (rows); move the sources (columns), one to the right.":
            _both(mask=lambda copies: pad(copies[:, :-1], (0, 0, 1, 0))),
        "You compare the tokens before the two positions; compare the token before the source "
        "with the one at the destination.": lambda pattern, tokens: _prefix(
            pattern, pad(tokens[:, :-1], (1, 0), value=-1), *_plain),
        "You average over the copies of each position; add up the attention to all of them.":
            partial(_prefix, mask=lambda c: _after(c) / _after(c).sum(-1, keepdim=True).clamp(1)),
        "You leave out the copy next to a token; every earlier position counts.":
            _both(earlier=-2),
        "You count positions of all prompts together; each prompt has its own number.":
            [partial(_prefix, count=lambda c, by=by: _after(c).any(-1).sum().repeat(len(c)) / by)
             for by in (1, 2)],
        "You divide by the number of all positions; only those with an earlier copy count (a token "
        "is no copy of itself: `.tril(-1)`).": [
            partial(_prefix, count=lambda c, by=by: torch.full((len(c),), c.shape[1] - by))
            for by in (0, 1)],
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
    for seed, window in ((8, 2), (5, 3), (1, 4), (30, 3)):
        steps, loss = (2 + _randint(40, 14, seed=seed)).cumsum(0), randn(14, seed=seed).cumsum(0)
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
        "You average the steps of the window; take half-way between its first and its last.": [
            partial(_dropped, place=lambda steps, i, w, n=n: steps[i : i + w + n].float().mean())
            for n in (1, 0)],
        "Your window ends one snapshot early or late: `window` intervals from `i` end at `i + "
        "window`.": [*(lambda s, x, w, by=by: _dropped(s, x, w + by) for by in (1, -1)),
                     partial(_dropped, place=lambda s, i, w: (s[i] + s[i + w - 1]) / 2),
                     partial(_dropped, place=lambda s, i, w: (s[i] + s[(i + w + 1) % len(s)]) / 2)],
        "You find the right stretch and return the next: it begins at `steps[i]`.":
            partial(_dropped, place=lambda s, i, w: (s[i + 1] + s[(i + w + 1) % len(s)]) / 2),
        "Your loop ends before the last stretch: there are `len(steps) - window` of them.":
            lambda s, x, w: _dropped(s[:-1], x[:-1], w),
        "You cut the half off: divide by 2 (`/`), not by `//`.":
            partial(_dropped, place=lambda s, i, w: (s[i] + s[i + w]) // 2),
        "You return half the window's length; the middle is half the sum of its ends.":
            partial(_dropped, place=lambda s, i, w: (s[i + w] - s[i]) / 2),
        "You return a number of a snapshot, counted from 0; return its step, `steps[i]`.":
            [partial(_dropped, place=lambda s, i, w, of=of: of(i, w))
             for of in (lambda i, w: i, lambda i, w: i + w / 2, lambda i, w: i + w // 2)],
        "You return how steep it is; return at which step.": lambda s, x, w: float(
            ((x[:-w] - x[w:]) / (s[w:] - s[:-w])).max()),
        "You return where the loss is smallest; find where it falls fastest.":
            lambda steps, loss, window: float(steps[loss.argmin()]),
        "You divide the steps by the fall; divide the fall by the steps.":
            partial(_dropped, slope=lambda s, x, w: (s[w:] - s[:-w]) / (x[:-w] - x[w:])),
        "You divide by the logarithm of the steps; divide by the steps themselves.": partial(
            _dropped, slope=lambda s, x, w: (x[:-w] - x[w:]) / (s[w:].log() - s[:-w].log())),
        "You found the steepest rise: mind the sign, a fall is earlier loss minus later loss.":
            lambda steps, loss, window: _dropped(steps, -loss, window),
        "You take absolute values, so that a steep rise counts as a fall; keep the sign.":
            partial(_dropped, slope=lambda s, x, w: ((x[w:] - x[:-w]) / (s[w:] - s[:-w])).abs()),
        "You compare falls per window, but the snapshots are not evenly spaced; divide each fall "
        "by its steps.": partial(_dropped, slope=lambda s, x, w: x[:-w] - x[w:]),
        "You compare relative falls; do not divide by the loss itself, nor take its logarithm.":
            [partial(_dropped, slope=lambda s, x, w: (1 - x[w:] / x[:-w]) / (s[w:] - s[:-w])),
             partial(_dropped, slope=lambda s, x, w: (x[:-w] / x[w:]).log() / (s[w:] - s[:-w]))],
        "You average the intervals' slopes; divide the whole fall by the whole number of steps.":
            partial(_dropped, slope=lambda s, x, w: (x.diff() / -s.diff()).unfold(0, w, 1).mean(1)),
        "You compare neighbouring snapshots, so a noisy one wins; take the fall over `window` "
        "intervals.": lambda steps, loss, window: _dropped(steps, loss, 1),
})  # fmt: skip


def _composition(
    w_ov: Tensor, read: Tensor, norm: Callable = torch.linalg.norm,
    over=lambda ov, read: ov * read, product=torch.matmul,
) -> Tensor:  # fmt: skip
    return norm(product(w_ov, read)) / over(norm(w_ov), norm(read))


def _norm_slips(**how) -> list[Callable]:
    return [lambda w_v, w_o, w_q, w_k: _composition(w_v @ w_o, w_k @ w_q.T, **how)]


def _k_composition(w_v: In, w_o: Out, w_q: In, w_k: In) -> Float[Tensor, ""]:
    return _composition(w_v @ w_o, w_k @ w_q.T)


composition_score = EXERCISES.add(
    number=9, name="composition_score", part="A4", title="K-composition score",
    reference=_k_composition, cases=lambda: {
        f"heads of size {n} in {d} dimensions": (
            randn(d, n), randn(n, d, seed=1), randn(d, n, seed=2), randn(d, n, seed=3))
        for d, n in ((12, 4), (9, 2), (6, 5))},
    mistakes={
        "This is Q-composition: the writer's output must meet W_K, so W_QK stands transposed.":
            lambda w_v, w_o, w_q, w_k: _composition(w_v @ w_o, w_q @ w_k.T),
        "The wrong sides meet: the reader stands before the writer, or W_OV is transposed. W_OV "
        "comes first, and its W_O meets the reader's W_K.":
            [lambda w_v, w_o, w_q, w_k: _composition(w_q @ w_k.T, w_v @ w_o),
             lambda w_v, w_o, w_q, w_k: _composition(w_k @ w_q.T, w_v @ w_o)],
        "You divide by one norm alone; divide by those of both W_OV and W_QK.": [
            *_norm_slips(over=lambda ov, read: ov), *_norm_slips(over=lambda ov, read: read)],
        "You add the norms below the line, or take their root; multiply them.": [
            *_norm_slips(over=torch.add), *_norm_slips(over=lambda ov, read: (ov * read).sqrt())],
        "You multiply entry by entry (`*`); multiply the matrices (`@`).":
            _norm_slips(product=torch.mul),
        "You divide by the norms of the four matrices; divide by those of W_OV and W_QK.":
            lambda w_v, w_o, w_q, w_k: (w_v @ w_o @ w_k @ w_q.T).norm() / (
                w_v.norm() * w_o.norm() * w_q.norm() * w_k.norm()),
        "You add up absolute values, or take their mean or the largest; the Frobenius norm is the "
        "root of the sum of squares.": [
            slip for norm in (lambda m: m.abs().sum(), lambda m: m.abs().mean(),
                              lambda m: m.abs().max(), lambda m: torch.linalg.norm(m, 1))
            for slip in _norm_slips(norm=norm)],
        "You take a norm of each row; the Frobenius norm is one of the whole matrix.":
            lambda v, o, q, k: ((v @ o @ k @ q.T).norm(dim=-1) / (
                (v @ o).norm(dim=-1) * (q @ k.T).norm(dim=-1))).mean(),
        "You return the norm of the product alone; divide it by the norms of W_OV and W_QK.":
            lambda w_v, w_o, w_q, w_k: (w_v @ w_o @ w_k @ w_q.T).norm(),
        "You divide by one norm and multiply by the other: put brackets round the product below "
        "the line.": lambda v, o, q, k: _k_composition(v, o, q, k) * (q @ k.T).norm() ** 2,
        "You use the spectral or the nuclear norm; the Frobenius norm is the root of the sum of "
        "squares.": [*_norm_slips(norm=partial(torch.linalg.norm, ord=2)),
                     *_norm_slips(norm=partial(torch.linalg.norm, ord="nuc"))],
        "You stop at W_K; the score uses the whole of both circuits, W_V W_O and W_K followed by "
        "W_Q transposed.": [lambda w_v, w_o, w_q, w_k: _composition(w_v @ w_o, w_k),
                            lambda w_v, w_o, w_q, w_k: _composition(w_o, w_k)],
})  # fmt: skip


def _ov(w_e: Tensor, w_v: Tensor, w_o: Tensor, w_u: Tensor) -> Tensor:
    return w_e @ w_v @ w_o @ w_u


def _copying(
    w_e: Float[Tensor, "vocab d_model"], w_v: In, w_o: Out, w_u: Float[Tensor, "d_model vocab"],
    share=lambda values: values.sum().real / values.abs().sum(),
    circuit=_ov,
) -> Float[Tensor, ""]:  # fmt: skip
    return share(torch.linalg.eigvals(circuit(w_e, w_v, w_o, w_u).double())).float()


def _ov_cases() -> dict[str, tuple]:
    shapes = [(10, 6), (6, 4), (4, 6), (6, 10)]
    w_e, w_v, w_o, w_u = (randn(*shape, seed=i) for i, shape in enumerate(shapes, start=1))
    return {"a random head": (w_e, w_v, w_o, w_u),
            "a head that half copies": (w_e, w_v, w_o + w_v.T, w_u + w_e.T),
            "a head that suppresses": (w_e, w_v, w_o - 2 * w_v.T, w_u + w_e.T)}  # fmt: skip


eigenvalue_copying = EXERCISES.add(
    number=10, name="eigenvalue_copying", part="A5", title="eigenvalue copying score",
    reference=_copying, cases=_ov_cases,
    mistakes={
        "You take the size of the sum; take its real part: a head that suppresses is below zero.":
            partial(_copying, share=lambda x: x.sum().abs() / x.abs().sum()),
        "Above the line and below it stands the same, so that every head scores 1: sum above, and "
        "sum the sizes below.": partial(_copying, share=lambda x: x.abs().sum() / x.abs().sum()),
        "You take the sizes of the real parts; divide by the sum of the sizes of the complex "
        "eigenvalues.": [partial(_copying, share=lambda x: x.real.sum() / x.real.abs().sum()),
                         partial(_copying, share=lambda x: x.real.abs().sum() / x.abs().sum())],
        "You return the sum of the eigenvalues (the trace) or their mean; divide by the sum of "
        "their sizes.": [partial(_copying, share=lambda x: x.sum().real),
                         partial(_copying, share=lambda x: x.mean().real)],
        "You take the size of the sum below the line; take the sizes first, then their sum.":
            partial(_copying, share=lambda x: x.sum().real / x.sum().abs()),
        "You square the sizes below the line: the size of a complex number is `.abs()`.": [
            partial(_copying, share=lambda x: x.sum().real / x.abs().square().sum()),
            partial(_copying, share=lambda x: x.sum().real / x.abs().square().sum().sqrt())],
        "You keep the largest eigenvalue alone; sum over all of them.": [
            partial(_copying, share=lambda x: x.real.max() / x.abs().sum()),
            partial(_copying, share=lambda x: x[x.abs().argmax()].real / x.abs().max())],
        "You average each eigenvalue's own share; divide the sum by the sum of the sizes.":
            partial(_copying, share=lambda x: (x.real / x.abs()).mean()),
        "You count positive eigenvalues; sum them, as large as they are.": [
            partial(_copying, share=lambda x: (x.real > 1e-4).double().mean()),
            partial(_copying, share=lambda x: x.real.sign().mean())],
        "`eigvalsh` is for symmetric matrices; take `torch.linalg.eigvals`.": [
            lambda *w: (x := torch.linalg.eigvalsh(_ov(*w))).sum() / x.abs().sum(),
            lambda *w: (x := torch.linalg.eigvalsh(_ov(*w) + _ov(*w).T)).sum() / x.abs().sum()],
        "You take the diagonal; sum the eigenvalues, and their sizes.":
            lambda *w: (x := _ov(*w).diagonal()).sum() / x.abs().sum(),
        "You divide by the matrix's norm; divide by the sum of the sizes of the eigenvalues.":
            lambda *w: _ov(*w).trace() / _ov(*w).norm(),
        "You divide by the singular values; use the eigenvalues (torch.linalg.eigvals).":
            lambda e, v, o, u: (x := e @ v @ o @ u).trace() / torch.linalg.svdvals(x).sum(),
        "You look at W_V W_O alone; the OV circuit of tokens is W_E W_V W_O W_U.":
            partial(_copying, circuit=lambda w_e, w_v, w_o, w_u: w_v @ w_o),
        "You unembed with W_E transposed; the unembedding is W_U.":
            partial(_copying, circuit=lambda w_e, w_v, w_o, w_u: w_e @ w_v @ w_o @ w_e.T),
        "You embed with W_U transposed; the embedding is W_E.":
            partial(_copying, circuit=lambda w_e, w_v, w_o, w_u: w_u.T @ w_v @ w_o @ w_u),
        "W_OV stands transposed: it is W_V W_O.": partial(
            _copying, circuit=lambda w_e, w_v, w_o, w_u: w_e @ (w_v @ w_o).T @ w_u),
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
        "The writers' output meets both sides, or the query alone; the query comes from the "
        "embedding, and the key from the writers.": [
            partial(_match, read=lambda e, left, w_q, w_k: (left @ w_q) @ (left @ w_k).T),
            partial(_match, read=lambda e, left, w_q, w_k: (left @ w_q) @ (e @ w_k).T)],
        "You take one writer alone; sum over all of them.": [
            partial(_match, leave=lambda e, w_ov, i=i: e @ w_ov[i]) for i in (0, -1)],
        "You multiply the writers' matrices; their outputs add up, so sum them.":
            partial(_match, leave=lambda e, w_ov: reduce(torch.matmul, [e, *w_ov])),
        "The direct path is in it too; what the writers left behind is `W_E W_OV` alone.":
            partial(_match, leave=lambda e, w_ov: e + e @ w_ov.sum(0)),
        "You use the unembedding; tokens come in by `W_E`.": lambda model, *rest: _match(
            model, *rest, lambda e, left, w_q, w_k: (model.W_U.T @ w_q) @ (left @ w_k).T),
        "You take another head's W_Q and W_K: `reader.layer` and `reader.head` say which.": [
            partial(lambda other, model, writers, reader: _match(
                model, writers, heads.Head(*other(*reader))), other) for other in (
                lambda la, h: (la - 1, h), lambda la, h: (la, 0), lambda la, h: (la, (h + 1) % 3),
                lambda la, h: (0, h), lambda la, h: (h, la % 3))],
        "You take the reader's own W_OV; take that of the writers.":
            lambda model, writers, reader: _match(model, [reader], reader),
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
        by_head = [w.detach().flatten(2) for w in (model.W_Q, model.W_K, model.W_V, model.W_O)]
        pairs = zip(model.parameters(), watched.weights[0], strict=True)
        second = math.nan  # where the weights are none, or give a loss that is none
        if all(weight.isfinite().all() for weight in model.parameters()):
            loss = metrics.per_token_loss(model, tokens)
            if loss.isfinite().all():
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
    if math.isnan(broken_loss) or math.isnan(rescued_loss):
        return "Your weights give a loss that is not a number (NaN): are they themselves?"
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
    of=lambda token, w: slice(token - 1 - w, token + w), mean=lambda x: x.mean(1), apart=torch.sub,
) -> Prompts:  # fmt: skip
    return apart(mean(loss[:, of(late, window)]), mean(loss[:, of(early, window)]))


icl_score = EXERCISES.add(
    number=13, name="icl_score", part="B1", title="in-context-learning score", reference=_icl,
    cases=lambda: {"window 0": (randn(3, 40, seed=7).exp(), 5, 33, 0),
                   "window 3": (randn(4, 40, seed=8).exp(), 6, 30, 3)},
    mistakes={
        "You are one token late: column 0 is about token 1, so token `late` is in column `late - "
        "1`.": partial(_icl, of=lambda token, w: slice(token - w, token + w + 1)),
        "You are one token early: token `late` is in column `late - 1`.":
            partial(_icl, of=lambda token, w: slice(token - 2 - w, token + w - 1)),
        "You leave one of the two means out, or add them; subtract the early from the late.": [
            partial(_icl, apart=lambda late, early: late),
            partial(_icl, apart=lambda late, early: early), partial(_icl, apart=torch.add)],
        "You divide by the early loss; the score is a difference.": [
            partial(_icl, apart=torch.div),
            partial(_icl, apart=lambda late, early: (late - early) / early)],
        "You take logarithms or exponentials of the loss; average the losses themselves.": [
            lambda loss, *rest, of=of: _icl(of(loss), *rest) for of in (torch.log, torch.exp)],
        "You take the median, or the largest, of the neighbours; take the mean.": [
            partial(_icl, mean=of) for of in (lambda x: x.median(1).values, lambda x: x.amax(1))],
        "`window` is on either side, not in all.":
            partial(_icl, of=lambda token, w: slice(token - 1 - w // 2, token + w // 2)),
        "You are one token late, and leave neighbours out; token `late` is in column `late - 1`.":
            [partial(_icl, of=lambda token, w: slice(token, token + 1)),
             partial(_icl, of=lambda token, w: slice(token, token + w + 1))],
        "You average up to the token; its neighbours stand on either side.":
            partial(_icl, of=lambda token, w: slice(token - 1 - w, token)),
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
    own=0, write=0, raised_from=None, reads=lambda head, n_heads, n: head * n // n_heads,
    share=lambda a, r, own: (a * own).sum(1) / (a * r.sum(2)).sum(1),
) -> Prompts:  # fmt: skip
    run = record(model, tokens, ["pattern", "v"])
    pattern, v = (run.activations[f"blocks.{layer}.attn.hook_{s}"] for s in ("pattern", "v"))
    read = reads(head, model.cfg.n_heads, v.shape[2])
    seen = weigh(pattern[:, head])[:, start:]  # [prompt src]
    written = v[:, start:, read] @ model.blocks[layer].attn.W_O[head - write]
    raised_from = start if raised_from is None else raised_from
    raises = model.W_U.T[tokens[:, raised_from:]] - model.W_U.mean(1)
    raised = positive(written @ raises.mT)  # [prompt src token]
    right = pad(raised, (1, 1)).diagonal(1 + own + start - raised_from, **MAIN)
    return 2 * share(seen, raised, right) - 1


@cache
def _planted() -> tuple[Model, Tensor]:
    """A model in which head 0 of layer 1 copies, head 1 does not and head 2 suppresses."""
    model = toy.tiny_model(seed=1)
    tokens = prompts.repeated_tokens(model, 3, 9, n_repeats=1, seed=2)
    with torch.no_grad():  # as where norms subtract no mean
        noise = 0.3 * randn(*model.W_U.shape)
        model.W_U.add_(noise - noise.mean(1, keepdim=True))
        model.blocks[1].attn.W_O[1] += 0.3 * randn(*model.W_O.shape[2:])
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
    } | {f"head {head} of 4, two of which share a value": (
        grouped_model(), repeats(3, 9, 1), 1, head) for head in (1, 2)},
    mistakes={
        "The start token is part of your sample; leave it out, as source and as token raised.":
            [partial(_copies, start=start, raised_from=raised)
             for start, raised in ((0, 0), (0, 1), (1, 0))],
        "You count what the head lowers too, or square; set raises below zero to zero.":
            [partial(_copies, positive=of) for of in (lambda x: x, torch.abs, torch.square)],
        "You leave the attention out; each source counts as much as the head attends to it (the "
        "sum over destinations; over sources it is 1).":
            partial(_copies, weigh=lambda attention: torch.ones_like(attention[:, 0])),
        "You take each token's attention to itself; sum over all destinations.":
            partial(_copies, weigh=lambda attention: attention.diagonal(**MAIN)),
        "You take the largest attention; sum over all destinations.":
            partial(_copies, weigh=lambda attention: attention.amax(1)),
        "You ask for the token after or before the source; a head copies the source itself.":
            [partial(_copies, own=by) for by in (1, -1)],
        "You average each source's own share; divide the sum over sources by the sum.":
            partial(_copies, share=lambda a, r, own: (
                a * own / r.sum(2).clamp(1e-9)).sum(1) / a.sum(1)),
        "You weigh by the attention above or below the line alone; it stands in both sums.": [
            partial(_copies, share=lambda a, r, own: (a * own).sum(1) / r.sum((1, 2))),
            partial(_copies, share=lambda a, r, own: own.sum(1) / (a * r.sum(2)).sum(1))],
        "Sources and tokens are exchanged below the line: weigh sources, sum over tokens raised.":
            partial(_copies, share=lambda a, r, own: (a * own).sum(1) / (a * r.sum(1)).sum(1)),
        "Below the line the source's own token is missing; sum over all tokens of the prompt.":
            partial(_copies, share=lambda a, r, own: (a * own).sum(1) / (
                a * (r.sum(2) - own)).sum(1)),
        "You read another head's values: neighbouring heads share one, "
        "`head // (n_heads // n)` with the n heads of `v`.": [
            partial(_copies, reads=lambda head, n_heads, n: min(head, n - 1)),
            partial(_copies, reads=lambda head, n_heads, n: head % n)],
        "You take another head's W_O: the head's own is `W_O[head]`.":
            partial(_copies, write=1),
        "You take the attention of the last position; sum over all destinations.":
            partial(_copies, weigh=lambda attention: attention[:, -1]),
        "You return the share, from 0 to 1; the score is twice the share minus one.":
            lambda *args: (_copies(*args) + 1) / 2,
})  # fmt: skip
