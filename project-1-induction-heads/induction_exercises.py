"""The exercises of the induction-heads notebook: right answers, test cases, typical mistakes.

A right answer takes, after what the learner's function gets, what mistakes do otherwise: they are
`partial`s of it. What `utils.diagnosis` tells by itself (axes, signs, sums, shifts) is not listed.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge as Model
from transformer_lens.utilities import lm_cross_entropy_loss

from utils import ablation, heads, metrics, prompts, toy, weights
from utils.edits import Run, heads_from, hooks, record
from utils.exercises import Exercises, hook_point, run_hook, set_at
from utils.learner import Watched

EXERCISES = Exercises()
predict, progress = EXERCISES.predict, EXERCISES.progress

ALL, MAIN = slice(None), dict(dim1=-2, dim2=-1)
Tokens, Heads = Int[Tensor, "prompt pos"], Sequence[tuple[int, int]]
Pattern, PerHead = Float[Tensor, "prompt head dest src"], Float[Tensor, "prompt head"]
MAKE_OTHER_RUNS = (
    "Clean and corrupted are swapped: run the corrupted prompts, and put clean values in."
)
UNEDITED = "The activation comes out as it went in: assign to a part of it, or return your copy."
PILED_UP = "Your hooks pile up: those of one run must be gone before the next."
tiny_model = cache(toy.tiny_model)  # what an answer changes in it is put back


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


# Primer: the length of the residual stream


def _norms(
    model: Model,
    tokens: Tokens,
    site: str = "resid_pre",
    of: Callable[[Tensor], Tensor] = lambda x: x.norm(dim=-1).mean(),
) -> Float[Tensor, "layer"]:
    return torch.stack([of(x) for x in record(model, tokens, [site]).activations.values()])


stream_norms = EXERCISES.add(
    number=1,
    name="stream_norms",
    title="the length of the residual stream",
    part="primer",
    reference=_norms,
    cases=lambda: {"a small random model": (tiny_model(), _repeats(3, 5))},
    mistakes={
        "You take the norm of the mean vector; take the norm of each vector, then their "
        "mean.": partial(_norms, of=lambda x: x.mean((0, 1)).norm()),
        "You take one norm of the whole activation; take one of each vector (`dim=-1`).": partial(
            _norms, of=lambda x: x.norm()
        ),
        "Your norm runs over positions; a vector lies along the last axis (`dim=-1`).": partial(
            _norms, of=lambda x: x.norm(dim=1).mean()
        ),
        "You leave out the root: a norm is the root of the sum of squares.": partial(
            _norms, of=lambda x: x.square().sum(-1).mean()
        ),
        "You take the mean of the entries; take the norm of each vector.": partial(
            _norms, of=lambda x: x.mean()
        ),
        "You measure the stream after each layer; wanted is before it, at "
        "`hook_resid_pre`.": partial(_norms, site="resid_post"),
        "You measure what attention adds; the stream itself is at `hook_resid_pre`.": partial(
            _norms, site="attn_out"
        ),
        "You keep the last position only; take the mean over all positions.": partial(
            _norms, of=lambda x: x[:, -1].norm(dim=-1).mean()
        ),
    },
)


# A1: the loss of each token


def _loss(
    logits: Float[Tensor, "prompt pos vocab"], tokens: Tokens
) -> Float[Tensor, "prompt pos-1"]:
    return lm_cross_entropy_loss(logits, tokens, per_token=True)


def _loss_of(
    logits: Tensor,
    tokens: Tensor,
    predicting: slice = slice(0, -1),
    predicted: slice = slice(1, None),
    log_p: Callable[[Tensor], Tensor] = lambda x: x.log_softmax(-1),
) -> Tensor:
    answers = tokens[:, predicted, None]
    return -log_p(logits)[:, predicting].gather(-1, answers)[..., 0]


per_token_loss = EXERCISES.add(
    number=2,
    name="per_token_loss",
    title="per-token loss",
    part="A1",
    reference=_loss,
    cases=lambda: {
        "3 prompts of 6 tokens": (2 * _randn(3, 6, 7), _randint(7, 3, 6)),
        "large logits": (40 * _randn(3, 6, 7), _randint(7, 3, 6, seed=1)),
    },
    mistakes={
        "You compare each prediction with the token at its own position; the logits at position i "
        "predict the token at i + 1.": partial(_loss_of, predicting=slice(1, None)),
        "You return a loss for every position; nothing predicts the first token, and the logits "
        "at i predict the token at i + 1.": partial(_loss_of, predicting=ALL, predicted=ALL),
        "You shift the wrong way: the logits at position i predict the token at i + 1, not i - "
        "1.": partial(_loss_of, predicting=slice(1, None), predicted=slice(0, -1)),
        "You take the logits themselves; turn them into log-probabilities first "
        "(log_softmax over the vocabulary).": partial(_loss_of, log_p=lambda x: x),
        "You take the softmax without its logarithm: the loss is -log p, not -p.": partial(
            _loss_of, log_p=lambda x: x.softmax(-1)
        ),
        "You add a small number before the logarithm, which changes large losses; log_softmax "
        "needs none.": partial(_loss_of, log_p=lambda x: (x.softmax(-1) + 1e-8).log()),
        "Your softmax runs over positions; probabilities must sum to one over the "
        "vocabulary.": partial(_loss_of, log_p=lambda x: x.log_softmax(1)),
        "You average over everything; return one loss per prompt and predicted "
        "token.": lm_cross_entropy_loss,
    },
)


# A1: build the repeats


def _repeated(
    pool: Int[Tensor, "token"],
    start: int,
    n_prompts: int,
    seq_len: int,
    seed: int,
    of: Callable[[Tensor], Tensor] = lambda copy: copy.repeat(1, 2),
) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(len(pool), generator=generator) for _ in range(n_prompts)]
    return pad(of(pool[torch.stack(order)[:, :seq_len]]), (1, 0), value=start)


def _drawn_anew(pool: Tensor, start: int, n: int, seq_len: int, seed: int) -> Tensor:
    copies = _repeated(pool, start, 2 * n, seq_len, seed, of=lambda copy: copy)
    return torch.cat([copies[::2], copies[1::2, 1:]], dim=1)


build_repeats = EXERCISES.add(
    number=3,
    name="build_repeats",
    title="build the repeats",
    part="A1",
    reference=_repeated,
    cases=lambda: {
        "seed 0": (torch.arange(20, 80, 3), 7, 3, 5, 0),
        "seed 5": (torch.arange(31, 10, -1), 2, 4, 3, 5),
    },
    mistakes={
        "The start token is missing in front.": lambda *args: _repeated(*args)[:, 1:],
        "You put the start token in front of the second copy too; it comes once.": lambda *args: (
            torch.cat([_repeated(*args, of=lambda copy: copy)] * 2, dim=1)
        ),
        "There is one copy only; the tokens come twice.": partial(_repeated, of=lambda copy: copy),
        "You double each token where it stands (A A B B); repeat the row as a whole (A B A "
        "B).": partial(_repeated, of=lambda copy: copy.repeat_interleave(2, dim=1)),
        "Your second copy is back to front; it is the same as the first.": partial(
            _repeated, of=lambda copy: torch.cat([copy, copy.flip(1)], dim=1)
        ),
        "You draw the second copy anew; it is the same as the first.": _drawn_anew,
        "All your prompts are the same: make the generator once, before the loop over "
        "prompts.": lambda pool, start, n, *args: _repeated(pool, start, 1, *args).repeat(n, 1),
        "You return places in the pool; look the tokens up, `pool[places]`.": lambda pool, *args: (
            _repeated(torch.arange(len(pool)), *args)
        ),
        "You ignore `seed`: hand it to the generator.": lambda *args: _repeated(*args[:4], 0),
    },
)


# A1: three stripes of an attention pattern


def _stripes(
    pattern: Pattern,
    seq_len: int,
    previous: tuple[int, int] = (1, 1),
    same: tuple[int, int] = (0, 0),
    after: tuple[int, int] = (-1, 0),
) -> Float[Tensor, "prompt head role"]:
    """Each role: how far back, and the first destination (of the last two: beyond a copy)."""
    places = [previous, *((seq_len + b, seq_len + 1 + first) for b, first in (same, after))]
    stripes = [pattern.diagonal(-b, **MAIN)[..., first - b :] for b, first in places]
    return torch.stack([stripe.mean(-1) for stripe in stripes], dim=-1)


def _previous_in_later_copies(pattern: Tensor, seq_len: int) -> Tensor:
    return _stripes(pattern, seq_len, previous=(1, seq_len + 1))


stripe_scores = EXERCISES.add(
    number=4,
    name="stripe_scores",
    title="three stripes",
    part="A1",
    reference=_stripes,
    cases=lambda: {
        "1 + 2 x 5 tokens": (_pattern(2, 4, 11), 5),
        "1 + 3 x 4 tokens": (_pattern(2, 4, 13), 4),
    },
    mistakes={
        "For induction you look at the copy itself, `seq_len` back; the token after it is one "
        "position less far back.": partial(_stripes, after=(0, 0)),
        "For induction you look at the token before the copy; the one after it is `seq_len - 1` "
        "back.": partial(_stripes, after=(1, 0)),
        "You average over whole diagonals, which begin before the second copy does; only positions "
        "from `1 + seq_len` on have an earlier copy.": partial(
            _stripes, same=(0, -1), after=(-1, -2)
        ),
        "Your induction average takes the whole diagonal, which begins before the second copy "
        "does; take destinations from `1 + seq_len` on.": partial(_stripes, after=(-1, -2)),
        "Your averages start one position early: with the start token in front, the second copy "
        "begins at position `1 + seq_len`.": partial(_stripes, same=(0, -1), after=(-1, -1)),
        "For the previous token you read the main diagonal: each token's attention to "
        "itself.": partial(_stripes, previous=(0, 0)),
        "For the previous token you leave positions out: only the first has "
        "none.": _previous_in_later_copies,
        "Your axes `dest` and `src` are the wrong way round: looking back means a diagonal below "
        "the main one.": lambda pattern, seq_len: _stripes(pattern.mT, seq_len),
        "Duplicate token and induction are exchanged: the duplicate is `seq_len` "
        "back.": lambda *args: _stripes(*args)[..., [0, 2, 1]],
    },
)


# A1: score every head


def _every_head(
    model: Model, tokens: Tokens, score: Callable
) -> Float[Tensor, "prompt layer head *rest"]:
    return heads.score_heads(model, tokens, score)


score_every_head = EXERCISES.add(
    number=5,
    name="score_every_head",
    title="score every head",
    part="A1",
    reference=_every_head,
    cases=lambda: {
        "one score": (tiny_model(), _repeats(2, 6), partial(heads.induction_score, seq_len=6)),
        "three scores": (tiny_model(), _repeats(5, 4, 3), partial(_stripes, seq_len=4)),
    },
    mistakes={
        "Your layers stand in the first axis; prompts come first "
        "(`torch.stack(..., dim=1)`).": lambda *args: _every_head(*args).movedim(1, 0),
        "Your heads stand before the layers: the order is prompt, layer, head.": lambda *args: (
            _every_head(*args).movedim(2, 1)
        ),
        "Every layer gets the scores of the last: write each to its own place, "
        "`hook.layer()`.": lambda *args: (s := _every_head(*args))[:, -1:].expand_as(s),
        "Every layer gets the scores of the first: hook the patterns of all "
        "layers.": lambda *args: (s := _every_head(*args))[:, :1].expand_as(s),
        "You score the first prompt alone; the hook gets all of them at once.": lambda *args: (
            s := _every_head(*args)
        )[:1].expand_as(s),
        "You turn the pattern round before you score it; hand it on as it "
        "is.": lambda model, tokens, score: _every_head(model, tokens, lambda p: score(p.mT)),
    },
)


# A1: prefix matching


def _after(copies: Tensor) -> Tensor:
    return pad(copies[:, :, :-1], (1, 0))


def _prefix(
    pattern: Pattern,
    tokens: Tokens,
    mask: Callable[[Tensor], Tensor] = _after,
    count: Callable[[Tensor], Tensor] = lambda copies: _after(copies).any(-1).sum(-1),
) -> PerHead:
    copies = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)  # [prompt dest src]
    return (pattern * mask(copies)[:, None]).sum((-2, -1)) / count(copies).reshape(-1, 1)


def _last_of(mask: Tensor) -> Tensor:
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)


prefix_matching = EXERCISES.add(
    number=6,
    name="prefix_matching",
    title="prefix matching",
    part="A1",
    reference=_prefix,
    cases=lambda: {
        "4 copies of 3 tokens": (_pattern(2, 3, 13), _repeats(2, 3, 4)),
        "tokens that come again here and there": (_pattern(2, 3, 13), _randint(7, 2, 13, seed=3)),
    },
    mistakes={
        "You take the last earlier copy alone; sum over all earlier copies.": partial(
            _prefix, mask=lambda copies: _last_of(_after(copies))
        ),
        "You take the first copy alone; sum over all earlier copies.": partial(
            _prefix, mask=lambda copies: _after(copies) & (_after(copies).cumsum(-1) == 1)
        ),
        "You look at the earlier copies themselves; look at the tokens after them, one to the "
        "right.": partial(_prefix, mask=lambda copies: copies),
        "You look at the tokens before the earlier copies; look at those after them.": partial(
            _prefix, mask=lambda copies: pad(copies[:, :, 1:], (0, 1))
        ),
        "You divide by the number of all positions; divide by the number of those that have an "
        "earlier copy.": partial(_prefix, count=lambda c: torch.full((len(c),), c.shape[1])),
        "You divide by the number of copies; divide by the number of positions that have "
        "one.": partial(_prefix, count=lambda copies: copies.sum((1, 2))),
        "You sum over positions; divide by the number of those that have an earlier copy.": partial(
            _prefix, count=lambda copies: torch.ones(len(copies))
        ),
        "You divide all prompts by one count; each has its own number of positions.": partial(
            _prefix, count=lambda c: c.any(-1).sum(-1).double().mean().repeat(len(c))
        ),
        "Your axes `dest` and `src` are the wrong way round: rows (dest) attend to columns "
        "(src).": lambda pattern, tokens: _prefix(pattern.mT, tokens),
    },
)


# A2: the sharpest drop of a loss curve


def _dropped(
    steps: Int[Tensor, "snapshot"],
    loss: Float[Tensor, "snapshot"],
    window: int,
    slope: Callable[..., Tensor] = lambda s, x, w: (x[:-w] - x[w:]) / (s[w:] - s[:-w]),
    place: Callable[..., Tensor] = lambda s, i, w: (s[i] + s[i + w]) / 2,
) -> float:
    return float(place(steps, int(slope(steps, loss, window).argmax()), window))


def _drop_cases() -> Mapping[str, tuple]:
    # uneven snapshots; rises as steep as falls; falls from high and from low values
    cases = {}
    for seed, window in ((8, 2), (30, 3), (136, 3)):
        steps, loss = (2 + _randint(40, 14, seed=seed)).cumsum(0), _randn(14, seed=seed).cumsum(0)
        cases[f"curve {seed}, window {window}"] = (steps, (4 + loss / 2).abs() + 0.2, window)
    return cases


sharpest_drop = EXERCISES.add(
    number=7,
    name="sharpest_drop",
    title="step of the sharpest drop",
    part="A2",
    reference=_dropped,
    cases=_drop_cases,
    mistakes={
        "You return the index of a snapshot; look it up in `steps`, and return the middle of the "
        "window.": partial(_dropped, place=lambda steps, i, w: i),
        "You return where the steepest window begins; return its middle, half-way between its "
        "first and its last step.": partial(_dropped, place=lambda steps, i, w: steps[i]),
        "You return where the steepest window ends; return its middle, half-way between its first "
        "and its last step.": partial(_dropped, place=lambda steps, i, w: steps[i + w]),
        "You return the middle snapshot, but they are not evenly spaced; take half-way between "
        "first and last step.": partial(_dropped, place=lambda steps, i, w: steps[i + w // 2]),
        "You average all steps of the window; take half-way between its first and its last.": (
            partial(_dropped, place=lambda steps, i, w: steps[i : i + w + 1].float().mean())
        ),
        "You found the steepest rise: mind the sign, a fall is earlier loss minus later "
        "loss.": lambda steps, loss, window: _dropped(steps, -loss, window),
        "You take absolute values, so that a steep rise counts as a fall; keep the sign.": (
            partial(_dropped, slope=lambda s, x, w: ((x[w:] - x[:-w]) / (s[w:] - s[:-w])).abs())
        ),
        "You compare falls per window, but the snapshots are not evenly spaced; divide each fall "
        "by its steps.": partial(_dropped, slope=lambda s, x, w: x[:-w] - x[w:]),
        "You compare relative falls; do not divide by the loss itself.": partial(
            _dropped, slope=lambda s, x, w: (1 - x[w:] / x[:-w]) / (s[w:] - s[:-w])
        ),
        "You average the slopes of the intervals; divide the whole fall by the whole number of "
        "steps.": partial(
            _dropped, slope=lambda s, x, w: (-x.diff() / s.diff()).unfold(0, w, 1).mean(-1)
        ),
        "You compare neighbouring snapshots, so a noisy one wins; take the fall over `window` "
        "intervals.": lambda steps, loss, window: _dropped(steps, loss, 1),
        "You return the step of the lowest loss; wanted is where it falls "
        "fastest.": lambda steps, loss, window: float(steps[loss.argmin()]),
    },
)


# A4: cut one input


def _cut(
    model: Model,
    tokens: Tokens,
    senders: Heads,
    receivers: Heads,
    measure: Callable,
    usual: Callable = ablation.mean_run,
    sites: Sequence[str] = "qkv",
    who: Callable = lambda model, group: group,
    first_sender: bool = False,
) -> Float[Tensor, "input measure"]:
    gone = heads_from(model, senders[:1] if first_sender else senders, usual(model, tokens))
    without, cut = record(model, tokens, ["q", "k", "v"], gone), who(model, receivers)
    edits = [[e for s in group for e in heads_from(model, cut, without, s)] for group in sites]
    return torch.stack([measure(hooks(edit)) for edit in edits])


def _all_of_layers(model: Model, group: Heads) -> list[heads.Head]:
    return [h for h in heads.all_heads(model) if h.layer in {layer for layer, _ in group}]


def _cut_cases() -> Mapping[str, tuple]:
    model, tokens, receivers = tiny_model(), _repeats(3, 6), [(1, 0), (2, 2)]

    def measure(fwd_hooks: list) -> Tensor:
        with model.hooks(fwd_hooks=fwd_hooks):
            scores = heads.score_heads(model, tokens, heads.prefix_matching_score).mean(0)
            loss = metrics.per_token_loss(model, tokens).mean()
        return torch.stack([loss, *(scores[head] for head in receivers)])

    return {"a small random model": (model, tokens, [(0, 0), (0, 2)], receivers, measure)}


cut_inputs = EXERCISES.add(
    number=8,
    name="cut_inputs",
    title="cut one input",
    part="A4",
    reference=_cut,
    cases=_cut_cases,
    mistakes={
        "You set the senders' output to zero; put its mean over the prompts there.": partial(
            _cut, usual=lambda model, tokens: 0.0
        ),
        "You average the senders' output over positions too; keep one mean per position.": partial(
            _cut, usual=lambda model, tokens: _averaged(record(model, tokens, ["z"]), 0, 1)
        ),
        "You take out the first sender alone; take all of them out at once.": partial(
            _cut, first_sender=True
        ),
        "You change the first receiver alone; change all of them at once.": partial(
            _cut, who=lambda model, group: group[:1]
        ),
        "You change the input of every head in the receivers' layers; only the receivers' should "
        "change.": partial(_cut, who=_all_of_layers),
        "You cut all three inputs each time; cut one, and leave the others alone.": partial(
            _cut, sites=["qkv"] * 3
        ),
        PILED_UP: partial(_cut, sites=["q", "qk", "qkv"]),
        "You measure with the senders taken out, which reaches every head above; put only q, k or "
        "v of the receivers into an untouched run.": lambda model, tokens, senders, _, measure: (
            measure(hooks(heads_from(model, senders, ablation.mean_run(model, tokens)))).repeat(
                3, 1
            )
        ),
        "Nothing is cut: hand your hooks to `measure`.": lambda *args: args[-1]([]).repeat(3, 1),
    },
)


# A4: K-composition of two heads


def _composition(w_ov: Tensor, read: Tensor, norm: Callable = torch.linalg.norm) -> Tensor:
    return norm(w_ov @ read) / (norm(w_ov) * norm(read))


def _k_composition(
    w_v: Float[Tensor, "d_model d_head"],
    w_o: Float[Tensor, "d_head d_model"],
    w_q: Float[Tensor, "d_model d_head"],
    w_k: Float[Tensor, "d_model d_head"],
) -> Float[Tensor, ""]:
    return _composition(w_v @ w_o, w_k @ w_q.T)


def _head_weights(d: int, d_head: int, seed: int) -> tuple[Tensor, ...]:
    shapes = [(d, d_head), (d_head, d), (d, d_head), (d, d_head)]
    return tuple(_randn(*shape, seed=seed + i) for i, shape in enumerate(shapes))


composition_score = EXERCISES.add(
    number=9,
    name="composition_score",
    title="K-composition score",
    part="A4",
    reference=_k_composition,
    cases=lambda: {
        "heads of size 4 in 12 dimensions": _head_weights(12, 4, 0),
        "heads of size 2 in 9 dimensions": _head_weights(9, 2, 10),
        "heads of size 5 in 6 dimensions": _head_weights(6, 5, 20),
    },
    mistakes={
        "This is Q-composition: you let the writer's output meet W_Q. For K-composition it must "
        "meet W_K, the key side of W_QK (transpose it).": lambda w_v, w_o, w_q, w_k: _composition(
            w_v @ w_o, w_q @ w_k.T
        ),
        "Your product has the reader before the writer; the residual stream passes W_OV of the "
        "writer first, then the reader's W_K.": lambda w_v, w_o, w_q, w_k: _composition(
            w_q @ w_k.T, w_v @ w_o
        ),
        "You return the norm of the product alone; divide it by the norms of W_OV and W_QK, or "
        "large weights count as composition.": lambda w_v, w_o, w_q, w_k: (
            w_v @ w_o @ w_k @ w_q.T
        ).norm(),
        "You divide by one norm and multiply by the other: put brackets round the product below "
        "the line.": lambda v, o, q, k: _k_composition(v, o, q, k) * (q @ k.T).norm() ** 2,
        "You divide by the norms of the four matrices; divide by those of the products, W_OV and "
        "W_QK.": lambda v, o, q, k: (
            (v @ o @ k @ q.T).norm() / (v.norm() * o.norm() * q.norm() * k.norm())
        ),
        "You use the spectral norm (largest singular value); the score uses the Frobenius norm, "
        "the root of the sum of squares.": lambda v, o, q, k: _composition(
            v @ o, k @ q.T, partial(torch.linalg.matrix_norm, ord=2)
        ),
        "You stop at W_K; the score uses the whole QK circuit, W_K followed by W_Q "
        "transposed.": lambda w_v, w_o, w_q, w_k: _composition(w_v @ w_o, w_k),
    },
)


# A5: does an OV circuit copy?


def _copying(
    w_e: Float[Tensor, "vocab d_model"],
    w_v: Float[Tensor, "d_model d_head"],
    w_o: Float[Tensor, "d_head d_model"],
    w_u: Float[Tensor, "d_model vocab"],
    share: Callable[[Tensor], Tensor] = lambda values: values.sum().real / values.abs().sum(),
    circuit: Callable[..., Tensor] = lambda w_e, w_v, w_o, w_u: w_e @ w_v @ w_o @ w_u,
) -> Float[Tensor, ""]:
    return share(torch.linalg.eigvals(circuit(w_e, w_v, w_o, w_u).double())).float()


def _trace_over(sizes: Callable[[Tensor], Tensor]) -> Callable:
    return lambda e, v, o, u: (x := e @ v @ o @ u).trace() / sizes(x).sum()


def _ov_cases() -> Mapping[str, tuple]:
    w_e, w_v, w_o = _randn(10, 6, seed=1), _randn(6, 4, seed=2), _randn(4, 6, seed=3)
    w_u = _randn(6, 10, seed=4)
    return {
        "a random head": (w_e, w_v, w_o, w_u),
        "a head that half copies": (w_e, w_v, w_o + w_v.T, w_u + w_e.T),
        "a head that suppresses": (w_e, w_v, w_o - 2 * w_v.T, w_u + w_e.T),
    }


eigenvalue_copying = EXERCISES.add(
    number=10,
    name="eigenvalue_copying",
    title="eigenvalue copying score",
    part="A5",
    reference=_copying,
    cases=_ov_cases,
    mistakes={
        "You take the size of the sum, so it cannot be negative; take its real part: a head that "
        "suppresses scores below zero.": partial(
            _copying, share=lambda x: x.sum().abs() / x.abs().sum()
        ),
        "You take sizes above the line too, so that every head scores 1.": partial(
            _copying, share=lambda x: x.abs().sum() / x.abs().sum()
        ),
        "You take the sizes of the real parts; divide by the sum of the sizes of the complex "
        "eigenvalues.": partial(_copying, share=lambda x: x.real.sum() / x.real.abs().sum()),
        "You return the sum of the eigenvalues (the trace); divide by the sum of their "
        "sizes.": partial(_copying, share=lambda x: x.sum().real),
        "You divide by the singular values; use the eigenvalues "
        "(torch.linalg.eigvals).": _trace_over(torch.linalg.svdvals),
        "You divide by the sizes on the diagonal; the eigenvalues are other numbers.": _trace_over(
            lambda x: x.diagonal().abs()
        ),
        "You look at W_V W_O alone; the OV circuit of tokens is W_E W_V W_O W_U.": partial(
            _copying, circuit=lambda w_e, w_v, w_o, w_u: w_v @ w_o
        ),
        "You unembed with W_E transposed; the unembedding is W_U.": partial(
            _copying, circuit=lambda w_e, w_v, w_o, w_u: w_e @ w_v @ w_o @ w_e.T
        ),
    },
)


# A5: the QK circuit through the previous-token heads


def _match(
    model: Model,
    writers: Heads,
    reader: tuple[int, int],
    read: Callable[..., Tensor] = lambda e, left, w_q, w_k: (e @ w_q) @ (left @ w_k).T,
    leave: Callable[..., Tensor] = lambda e, w_ov: e @ w_ov.sum(0),
) -> Float[Tensor, "query token"]:
    (w_q,), (w_k,) = weights.qk_weights(model, [reader])
    w_v, w_o = weights.ov_weights(model, writers)
    return read(model.W_E, leave(model.W_E, w_v @ w_o), w_q, w_k)


previous_token_match = EXERCISES.add(
    number=11,
    name="previous_token_match",
    title="the QK circuit through the previous-token heads",
    part="A5",
    reference=_match,
    cases=lambda: {
        "two writers": (tiny_model(), [heads.Head(0, 0), heads.Head(0, 2)], heads.Head(1, 1)),
        "one writer": (tiny_model(), [heads.Head(1, 2)], heads.Head(3, 0)),
    },
    mistakes={
        "You exchanged W_Q and W_K: what the writers left behind is read by W_K.": partial(
            _match, read=lambda e, left, w_q, w_k: (e @ w_k) @ (left @ w_q).T
        ),
        "The writers are missing: this is the path from the embedding straight to the "
        "key.": partial(_match, leave=lambda e, w_ov: e),
        "The writers' output meets both sides; the query comes from the embedding.": partial(
            _match, read=lambda e, left, w_q, w_k: (left @ w_q) @ (left @ w_k).T
        ),
        "You take the first writer alone; sum over all of them.": partial(
            _match, leave=lambda e, w_ov: e @ w_ov[0]
        ),
        "You average over the writers; their outputs add up, so sum.": partial(
            _match, leave=lambda e, w_ov: e @ w_ov.mean(0)
        ),
        "You turned W_OV round: a token's row of W_E stands on its left.": partial(
            _match, leave=lambda e, w_ov: e @ w_ov.sum(0).T
        ),
    },
)


# A5, stretch: destroy induction in the toy, and rescue it

DESTROYED, RESCUED = 1.0, 0.2  # nats on the second copy
_handed_over: list[toy.ToyRun] = []


def use_toy(run: toy.ToyRun) -> None:
    """Hand over the trained toy on which `change_weights` is judged."""
    _handed_over[:] = [run]


def _after_change(answer: Callable, rescue: bool) -> tuple[float, Tensor, int]:
    """The loss on the second copy, the heads' matrices [layer head weight], and how many weights
    were changed; all is put back."""
    model, tokens = _handed_over[0].model, _handed_over[0].tokens
    watched = Watched([model])
    try:
        with torch.no_grad():
            answer(model, rescue)
        loss = metrics.half_losses(metrics.per_token_loss(model, tokens), toy.LONGEST).second
        matrices = torch.cat(
            [w.detach().flatten(2) for w in (model.W_Q, model.W_K, model.W_V, model.W_O)], dim=-1
        )
        pairs = zip(model.parameters(), watched.weights[0], strict=True)
        return loss.mean().item(), matrices, sum(int((now != old).sum()) for now, old in pairs)
    finally:
        watched.undo()


def _judge(answer: Callable) -> str | None:
    if not _handed_over:
        return "Run the cell with `checks.use_toy` first."
    _, trained, _ = _after_change(lambda model, rescue: None, rescue=False)
    broken_loss, broken, n_changed = _after_change(answer, rescue=False)
    rescued_loss, rescued, _ = _after_change(answer, rescue=True)
    damaged = (broken != trained).any(-1)
    if damaged.sum() != 1 or n_changed != int((broken != trained).sum()):
        found = f"You change {int(damaged.sum())} heads and {n_changed} weights in all"
        return f"{found}; without rescue, change W_Q, W_K, W_V or W_O of one head, in place."
    if not broken_loss > DESTROYED:
        return f"Not destroyed: the loss on the second copy is {broken_loss:.2f} nats."
    if not torch.equal(rescued[damaged], broken[damaged]):
        return "With `rescue` the damaged head must stay as damaged as without."
    if not rescued_loss < RESCUED:
        return f"Destroyed ({broken_loss:.2f} nats), not rescued: still {rescued_loss:.2f} nats."
    return None


change_weights = EXERCISES.stretch(
    number=12, name="change_weights", title="destroy and rescue", part="A5", judge=_judge
)


# B1: the in-context-learning score


def _icl(
    loss: Float[Tensor, "prompt column"],
    early: int,
    late: int,
    window: int,
    of: Callable[[int, int], slice] = lambda token, w: slice(token - 1 - w, token + w),
) -> Float[Tensor, "prompt"]:
    return loss[:, of(late, window)].mean(1) - loss[:, of(early, window)].mean(1)


icl_score = EXERCISES.add(
    number=13,
    name="icl_score",
    title="in-context-learning score",
    part="B1",
    reference=_icl,
    cases=lambda: {
        "window 0": (_randn(3, 40, seed=7).exp(), 5, 33, 0),
        "window 3": (_randn(4, 40, seed=8).exp(), 6, 30, 3),
    },
    mistakes={
        "You are one token late: column 0 is about token 1, so token `late` is in column `late - "
        "1`.": partial(_icl, of=lambda token, w: slice(token - w, token + w + 1)),
        "You leave out the neighbours; average over `window` columns on either side as "
        "well.": partial(_icl, of=lambda token, w: slice(token - 1, token)),
        "You average from the token on; its neighbours stand on either side.": partial(
            _icl, of=lambda token, w: slice(token - 1, token + w)
        ),
        "The last neighbour is missing: the end of a slice is not part of it.": partial(
            _icl, of=lambda token, w: slice(token - 1 - w, token - 1 + max(w, 1))
        ),
        "The sign is turned round: late minus early, below zero where context "
        "helps.": lambda *args: -_icl(*args),
    },
)


# B2: Olsson's copying score of one head


def _copies(
    model: Model,
    tokens: Tokens,
    layer: int,
    head: int,
    start: int = 1,
    positive: Callable[[Tensor], Tensor] = torch.relu,
    weigh: Callable[[Tensor], Tensor] = lambda attention: attention.sum(1),
) -> Float[Tensor, "prompt"]:
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
            fit = torch.linalg.lstsq(v[:, head], raises).solution
            model.blocks[1].attn.W_O[head] = sign * fit
    return model, tokens


copying_of_head = EXERCISES.add(
    number=14,
    name="copying_of_head",
    title="the copying score of one head",
    part="B2",
    reference=_copies,
    cases=lambda: {
        f"a head that {what}": (*_planted(), 1, head)
        for head, what in enumerate(("copies", "does not copy", "suppresses"))
    },
    mistakes={
        "The start token is part of your sample; leave it out, as source and as token "
        "raised.": partial(_copies, start=0),
        "You count what the head lowers too; set raises below zero to zero.": partial(
            _copies, positive=lambda raised: raised
        ),
        "You take the sizes of the raises; set those below zero to zero.": partial(
            _copies, positive=torch.abs
        ),
        "You leave the attention out; each source counts as much as the head attends to "
        "it.": partial(_copies, weigh=lambda attention: torch.ones_like(attention[:, 0])),
        "You take the attention of the last position; sum over all destinations.": partial(
            _copies, weigh=lambda attention: attention[:, -1]
        ),
        "You sum the attention over sources; sum over destinations, one number per "
        "source.": partial(_copies, weigh=lambda attention: attention[..., 1:].sum(2)),
        "You return the share, from 0 to 1; the score is twice the share minus "
        "one.": lambda *args: (_copies(*args) + 1) / 2,
    },
)


# B4: ablate a head


def _ablated(
    z: Float[Tensor, "prompt pos head d_head"],
    hook: HookPoint,
    head: int,
    value: Float[Tensor, "*value"] | float,
    where: Callable[[int], tuple] = lambda head: (ALL, ALL, head),
) -> Float[Tensor, "prompt pos head d_head"]:
    return set_at(z, where(head), value)


ablate_head = EXERCISES.add(
    number=15,
    name="ablate_head",
    title="ablate a head",
    part="B4",
    reference=_ablated,
    # as many positions as heads and dimensions: the value then fits along a wrong axis too
    cases=lambda: {
        "head 1 of 3, zero": (_randn(2, 4, 3, 5), hook_point(0), 1, 0.0),
        "head 2 of 3, a mean": (_randn(2, 3, 3, 3), hook_point(4), 2, _randn(3, 3, seed=1)),
    },
    run=run_hook,
    mistakes={
        UNEDITED: lambda z, hook, head, value: z,
        "You change a position instead of a head: heads are the third axis, `z[:, :, "
        "head]`.": partial(_ablated, where=lambda head: (ALL, head)),
        "You change one dimension of every head: heads are the third axis, `z[:, :, "
        "head]`.": partial(_ablated, where=lambda head: (..., head)),
        "You change every head of the layer; only `head` should change.": partial(
            _ablated, where=lambda head: ALL
        ),
        "You put zero there whatever `value` is.": lambda *args: _ablated(*args[:3], 0.0),
        "You add the value to the head's output; it takes the output's place.": (
            lambda z, hook, head, value: _ablated(z, hook, head, z[:, :, head] + value)
        ),
    },
)


# B4: the ablation experiment


def _experiment(
    model: Model,
    tokens: Tokens,
    others: Int[Tensor, "reference pos"],
    chosen: Heads,
    seed: int,
    usual: Callable = lambda model, tokens, others: ablation.mean_run(model, others),
    control: Callable = lambda *args: ablation.random_control(*args)[0],
    group: Callable = list,
    skip: int = 1,
) -> tuple[Float[Tensor, "run prompt"], list[tuple[int, int]]]:
    """`skip`: tokens of the second copy left out in front."""
    drawn, source = control(model, chosen, 1, seed), usual(model, tokens, others)
    edits = [[], *(heads_from(model, group(out), source) for out in (chosen, drawn))]
    losses = [metrics.per_token_loss(model, tokens, hooks(edit)) for edit in edits]
    return torch.stack([x[:, x.shape[1] // 2 + skip :].mean(1) for x in losses]), drawn


def _run_experiment(answer: Callable, model: Model, tokens, others, chosen, seed) -> Mapping:
    """What the answer measured, and whether its control is one; any random numbers will do."""
    losses, drawn = answer(model, tokens, others, chosen, seed)
    drawn, *again = (
        [(int(layer), int(head)) for layer, head in out]
        for out in (drawn, *(answer(model, tokens, others, chosen, s)[1] for s in (seed, 7, 8, 9)))
    )
    right = _experiment(model, tokens, others, chosen, seed, control=lambda *_: drawn)[0]
    fresh = set(drawn) - {tuple(head) for head in chosen}
    layers = [sorted(layer for layer, _ in out) for out in (drawn, chosen)]
    return {
        "loss with nothing out": losses[0],
        "loss with the heads out": losses[1],
        "loss with your control out, less what it should be": losses[2] - right[2],
        "is the control as large in each layer (1: yes)": float(layers[0] == layers[1]),
        "are its heads others, each once (1: yes)": float(len(fresh) == len(drawn)),
        "does a seed give the same draw (1: yes)": float(again[0] == drawn),
        "do other seeds give others (1: yes)": float(any(out != drawn for out in again)),
    }


def _any_layer(model: Model, chosen: Heads, n: int, seed: int) -> list[heads.Head]:
    left = [head for head in heads.all_heads(model) if head not in chosen]
    return [left[(5 * seed + i) % len(left)] for i in range(len(chosen))]


def _among_them(model: Model, chosen: Heads, n: int, seed: int) -> list[heads.Head]:
    return [heads.Head(layer, (head + i + seed) % 2) for i, (layer, head) in enumerate(chosen)]


ablation_experiment = EXERCISES.add(
    number=16,
    name="ablation_experiment",
    title="the ablation experiment",
    part="B4",
    reference=_experiment,
    cases=lambda: {
        "heads of two layers": (
            *(tiny_model(), _repeats(3, 6), _repeats(4, 6, seed=1)),
            *([(0, 1), (2, 0)], 0),
        ),
        "two heads of one layer": (
            *(toy.build_toy(2), _repeats(2, 6), _repeats(3, 6, seed=1)),
            *([(1, 0), (0, 3), (1, 2)], 1),
        ),
    },
    run=_run_experiment,
    mistakes={
        "That is zero ablation; put the mean over the other prompts there.": partial(
            _experiment, usual=lambda *_: 0.0
        ),
        "You average over the prompts being run; the mean is over the other prompts.": partial(
            _experiment, usual=lambda model, run, _: ablation.mean_run(model, run)
        ),
        "You average over positions too; keep one mean per position.": partial(
            _experiment, usual=lambda model, _, x: _averaged(record(model, x, ["z"]), 0, 1)
        ),
        "You take a single one of the other prompts; average over all of them.": partial(
            _experiment, usual=lambda model, _, x: ablation.mean_run(model, x[:1])
        ),
        "You take out the last head of each group alone; take all of them out at once.": partial(
            _experiment, group=lambda out: out[-1:]
        ),
        "The first token of the second copy cannot be predicted; leave it out.": partial(
            _experiment, skip=0
        ),
        "Your control comes from other layers; draw it from the layers of the chosen "
        "heads.": partial(_experiment, control=_any_layer),
        "Your control holds chosen heads, or a head twice; draw others, each once.": partial(
            _experiment, control=_among_them
        ),
        "Your control is the same for every seed; hand `seed` to the generator.": partial(
            _experiment,
            control=lambda model, out, n, seed: ablation.random_control(model, out, 1)[0],
        ),
    },
)


# B5: the normalised effect


def _effect(
    patched: Float[Tensor, "prompt *rest"],
    clean: Float[Tensor, "prompt"],
    corrupted: Float[Tensor, "prompt"],
    scale: Callable[..., Tensor] = lambda p, clean, bad: (p - bad) / (clean - bad).mean(),
) -> Float[Tensor, "prompt *rest"]:
    return scale(patched.movedim(0, -1), clean, corrupted).movedim(-1, 0)  # prompts last


normalised_effect = EXERCISES.add(
    number=17,
    name="normalised_effect",
    title="normalised effect",
    part="B5",
    reference=_effect,
    # as many entries in the last axis as prompts: broadcasting along the wrong one then runs
    cases=lambda: {
        "one value a prompt": (3 * _randn(4), _randn(4, seed=1) + 3, _randn(4, seed=2) - 1),
        "clean below corrupted": (
            3 * _randn(4, 2, 4),
            _randn(4, seed=3) - 2,
            _randn(4, seed=4) + 1,
        ),
    },
    mistakes={
        "Clean and corrupted are swapped: a run as good as the clean one must give 1.": partial(
            _effect, scale=lambda p, clean, bad: (p - clean) / (bad - clean).mean()
        ),
        "Your zero is right, but the clean run does not give 1: divide by the gap between clean "
        "and corrupted.": partial(_effect, scale=lambda p, clean, bad: p - bad),
        "Divide by the gap between clean and corrupted, not by the clean figure.": partial(
            _effect, scale=lambda p, clean, bad: (p - bad) / clean.mean()
        ),
        "You divide each prompt by its own gap, which can be near zero; divide by the mean "
        "gap.": partial(_effect, scale=lambda p, clean, bad: (p - bad) / (clean - bad)),
        "You subtract the mean of the corrupted runs; each prompt has its own.": partial(
            _effect, scale=lambda p, clean, bad: (p - bad.mean()) / (clean - bad).mean()
        ),
        "You lose the sign of the gap; where clean is below corrupted, it is negative.": partial(
            _effect, scale=lambda p, clean, bad: (p - bad) / (clean - bad).mean().abs()
        ),
        "You subtract along the last axis; prompts lie along the first, so give `corrupted` as "
        "many axes as `patched`.": lambda p, clean, bad: (p - bad) / (clean - bad).mean(),
    },
)


# B5: the sweep over heads


def _sweep(
    model: Model,
    clean: Tokens,
    corrupted: Tokens,
    metric: Callable,
    layers: Sequence[int],
    with_it: Callable[[int, int], Sequence[int]] = lambda head, n_heads: [head],
    source: Callable[[Run], Run | float] = lambda run: run,
    first: int | None = None,
) -> Float[Tensor, "prompt layer head"]:
    source, n = source(record(model, clean, ["z"])), model.cfg.n_heads
    values = []
    for layer, head in (
        (la, h) for la in (layers if first is None else range(first)) for h in range(n)
    ):
        patch = heads_from(model, [(layer, h) for h in with_it(head, n)], source)
        values.append(metric(model.run_with_hooks(corrupted, fwd_hooks=hooks(patch))))
    return torch.stack(values, dim=1).unflatten(1, (-1, n))


def _pairs(arguments: Mapping[str, object]) -> Callable:
    """Cases of patching: each corruption with one more argument."""

    def cases() -> Mapping[str, tuple]:
        pairs = prompts.induction_prompts(tiny_model(), 3, 8)
        metric = metrics.LogitDiff(pairs.answers)
        return {
            f"{name} corruption": (tiny_model(), pairs.clean, pairs.corrupted[name], metric, more)
            for name, more in arguments.items()
        }

    return cases


patch_every_head = EXERCISES.add(
    number=18,
    name="patch_every_head",
    title="the sweep over heads",
    part="B5",
    reference=_sweep,
    cases=_pairs({"key": [1, 3], "value": [0, 3]}),
    mistakes={
        MAKE_OTHER_RUNS: lambda model, clean, bad, *rest: _sweep(model, bad, clean, *rest),
        "You patch the whole layer; patch one head at a time.": partial(
            _sweep, with_it=lambda head, n_heads: range(n_heads)
        ),
        PILED_UP: partial(_sweep, with_it=lambda head, n_heads: range(head + 1)),
        "You set the head to zero; it gets its output in the clean run.": partial(
            _sweep, source=lambda run: 0.0
        ),
        "You put the mean over the clean prompts there; each prompt gets its own.": partial(
            _sweep, source=lambda run: _averaged(run, 0)
        ),
        "Nothing is patched: hand your hook to "
        "`run_with_hooks`.": lambda model, clean, bad, *rest: _sweep(model, bad, bad, *rest),
        "You patch the first layers of the model; patch those in `layers`.": partial(
            _sweep, first=2
        ),
    },
)


# B5: patch what a head reads


def _input_patched(
    activation: Float[Tensor, "prompt pos n d_head"],
    hook: HookPoint,
    clean: Float[Tensor, "prompt pos n d_head"],
    head: int,
    n_heads: int,
    index: Callable[[int, int, int], int] = lambda head, n, n_heads: head // (n_heads // n),
    positions: slice = ALL,
) -> Float[Tensor, "prompt pos n d_head"]:
    n = activation.shape[2]
    where = (ALL, positions, min(index(head, n, n_heads), n - 1))
    return set_at(activation, where, clean[where])


def _patch_cases() -> Mapping[str, tuple]:
    cases = {}
    for n, head in ((n, head) for n in (6, 2, 3) for head in range(6)):
        corrupted, clean = _randn(2, 2, 4, n, 5, seed=n + head).unbind(0)
        point = hook_point(1, "attn.hook_k")
        cases[f"head {head} of 6, {n} key heads"] = (corrupted, point, clean, head, 6)
    return cases


patch_head_input = EXERCISES.add(
    number=19,
    name="patch_head_input",
    title="patch what a head reads",
    part="B5",
    reference=_input_patched,
    cases=_patch_cases,
    run=run_hook,
    mistakes={
        UNEDITED: lambda activation, *_: activation,
        "You patch every head of the layer; only the one that `head` uses should "
        "change.": lambda activation, hook, clean, head, n_heads: clean,
        "You divide by the number of key/value heads; divide by how many query heads share one, "
        "`n_heads // n`.": partial(_input_patched, index=lambda head, n, n_heads: head // n),
        "You round; neighbouring heads share one, so cut off: `head // (n_heads // n)`.": partial(
            _input_patched, index=lambda head, n, n_heads: round(head * n / n_heads)
        ),
        "You count the shared heads in turn (`%`); neighbours share one, so divide "
        "(`//`).": partial(_input_patched, index=lambda head, n, n_heads: head % n),
        "You patch the last position only; patch the head at every position.": partial(
            _input_patched, positions=slice(-1, None)
        ),
        "Clean and corrupted are swapped: return the corrupted activation with one clean "
        "head.": lambda x, hook, clean, *rest: _input_patched(clean, hook, x, *rest),
    },
)


# B5: three inputs


def _inputs(
    model: Model,
    clean: Tokens,
    corrupted: Tokens,
    metric: Callable,
    group: Heads,
    sites: Sequence[str] = "qkv",
    who: Callable[[Model, Heads], Heads] = lambda model, group: group,
    source: Callable[[Run], Run] = lambda run: run,
) -> Float[Tensor, "input prompt"]:
    run, group = source(record(model, clean, ["q", "k", "v"])), who(model, group)
    shared = [heads.key_value_head(model, head) for head in group]
    values = []
    for site in sites:
        who_has = [(s, group if s == "q" else shared) for s in site]
        patch = [edit for s, out in who_has for edit in heads_from(model, out, run, s)]
        values.append(metric(model.run_with_hooks(corrupted, fwd_hooks=hooks(patch))))
    return torch.stack(values)


patch_inputs = EXERCISES.add(
    number=20,
    name="patch_inputs",
    title="three inputs",
    part="B5",
    reference=_inputs,
    cases=_pairs({"key": [(1, 0), (2, 1)], "value": [(1, 2), (1, 1), (3, 0)]}),
    mistakes={
        MAKE_OTHER_RUNS: lambda model, clean, bad, *rest: _inputs(model, bad, clean, *rest),
        "You patch all three inputs each time; patch one.": partial(_inputs, sites=["qkv"] * 3),
        PILED_UP: partial(_inputs, sites=["q", "qk", "qkv"]),
        "You patch the first head alone; patch all heads of the group at once.": partial(
            _inputs, who=lambda model, group: group[:1]
        ),
        "You patch the last head alone; patch all heads of the group at once.": partial(
            _inputs, who=lambda model, group: group[-1:]
        ),
        "You patch every head of these layers; only the group's should change.": partial(
            _inputs, who=_all_of_layers
        ),
        "You put the mean over the clean prompts there; each prompt gets its own.": partial(
            _inputs, source=lambda run: _averaged(run, 0)
        ),
    },
)
