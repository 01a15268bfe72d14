"""The exercises of the IOI notebook: right answers, test cases, typical mistakes."""

from collections.abc import Callable, Iterable
from functools import partial, reduce
from operator import index

import ioi_experiments as ways
import torch
from ioi_exercises_patching import (
    ALL,
    EXERCISES,
    attribution_patching,
    corrupt_s2,
    head_attribution,
    logit_difference,
    logit_lens,
    patch_head,
    sweep_heads,
)
from ioi_slips import misplaced, misread, misrun, with_mlps_frozen, without_mlps
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from utils import circuit, metrics
from utils.edits import heads_from
from utils.exercises.diagnosis import a_kind
from utils.exercises.exercise import hook_point, run_hook, set_at
from utils.heads import Head, check_heads
from utils.ioi import ioi_prompts

__all__ = [  # of parts 1 to 3
    "attribution_patching",
    "corrupt_s2",
    "head_attribution",
    "logit_difference",
    "logit_lens",
    "patch_head",
    "sweep_heads",
]
predict, progress = EXERCISES.predict, EXERCISES.progress


# Exercises 8 to 10: path patching


def _path_cases() -> dict[str, tuple]:
    z, original, new = torch.randn(3, 3, 2, 4, 3, 5, generator=ways.generator(6)).unbind(0)
    return {
        f"layer {layer}, sender {sender}": (z[layer], hook_point(layer), original, new, sender)
        for sender in (Head(1, 2), Head(0, 1))
        for layer in range(3)
    }


def _send(z: Tensor, hook: HookPoint, new: Tensor, sender: Head, start: Tensor) -> Tensor:
    """A layer that starts from `start`, with the sender in it if it is the sender's."""
    at_sender = hook.layer() == sender.layer
    sent = (ALL, ALL, sender.head)
    return set_at(start, sent, new[hook.layer()][sent]) if at_sender else start


# hooks that are wrong in one way: the sweeps that are asked for next can be wrong by them


def _unfrozen(z: Tensor, hook: HookPoint, original: Tensor, new: Tensor, sender: Head) -> Tensor:
    return _send(z, hook, new, sender, start=z)


def _no_sender(z: Tensor, hook: HookPoint, original: Tensor, new: Tensor, sender: Head) -> Tensor:
    return original[hook.layer()].clone()


def _in_every_layer(
    z: Tensor, hook: HookPoint, original: Tensor, new: Tensor, sender: Head
) -> Tensor:
    return _send(z, hook, new, Head(hook.layer(), sender.head), original[hook.layer()])


def _whole_layer(z: Tensor, hook: HookPoint, original: Tensor, new: Tensor, sender: Head) -> Tensor:
    run = new if hook.layer() == sender.layer else original
    return run[hook.layer()].clone()


def _sent_where(fits: Callable[[int, int], bool]) -> Callable:
    """Frozen, with the sender's head new in the layers that fit its own."""
    return lambda z, hook, original, new, sender: (
        _send(z, hook, new, Head(hook.layer(), sender.head), original[hook.layer()])
        if fits(hook.layer(), sender.layer)
        else original[hook.layer()].clone()
    )


def _frozen_where(fits: Callable[[int, int], bool]) -> Callable:
    """The sender sent, with the heads frozen in the layers that fit its own."""
    return lambda z, hook, original, new, sender: _send(
        z, hook, new, sender, original[hook.layer()] if fits(hook.layer(), sender.layer) else z
    )


def _sent_as(change: Callable) -> Callable:
    """Frozen, with something else than the new output sent."""
    return lambda z, hook, original, new, sender: _send(
        z, hook, change(new, original), sender, original[hook.layer()]
    )


MISSENT = {
    "send it one layer too high": _sent_where(lambda layer, own: layer == own + 1),
    "send that head number in the sender's and all later layers": _sent_where(int.__ge__),
    "send that head number in the sender's and all earlier layers": _sent_where(int.__le__),
    "freeze the later layers only": _frozen_where(int.__gt__),
    "freeze the sender's and the later layers only": _frozen_where(int.__ge__),
    "freeze the earlier layers only": _frozen_where(int.__lt__),
    "send the head before": lambda z, hook, original, new, sender: _send(
        z, hook, new, Head(sender.layer, sender.head - 1), original[hook.layer()]
    ),
    "send zeros": _sent_as(lambda new, original: 0 * new),
    "send the sum of both runs": _sent_as(lambda new, original: new + original),
    "send the difference of the runs": _sent_as(lambda new, original: new - original),
    "send the mean of both runs": _sent_as(lambda new, original: (new + original) / 2),
    "send the mean over the positions": _sent_as(
        lambda new, original: new.mean(2, keepdim=True).expand_as(new)
    ),
    "send what another layer gives": _sent_as(lambda new, original: new.roll(1, 0)),
    "freeze at zero": lambda z, hook, original, new, sender: _send(z, hook, new, sender, 0 * z),
}

path_patch_hook = EXERCISES.add(
    number=8,
    name="path_patch_hook",
    title="path patch to the logits",
    part="4",
    reference=ways.path_patch_hook,
    cases=_path_cases,
    run=run_hook,
    mistakes={
        "The activations come out as they went in: return the frozen layer, with the sender "
        "in it.": lambda z, hook, original, new, sender: z,
        "That is activation patching: the other heads react to the sender. Freeze them at "
        "their `original` output.": _unfrozen,
        "Every head is frozen, the sender too, so nothing changes: in its layer, take the "
        "sender's output from `new`.": _no_sender,
        "You patched that head number in every layer; the sender is in one layer only, so "
        "compare `hook.layer()` with `sender.layer`.": _in_every_layer,
        "You took the sender's whole layer from `new`; only `sender.head` should be.": (
            _whole_layer
        ),
        "In the sender's own layer the other heads are not frozen: start from `original` "
        "there too.": lambda z, hook, original, new, sender: _send(
            z, hook, new, sender, z if hook.layer() == sender.layer else original[hook.layer()]
        ),
        "You froze the sender's layer only; the heads of every other layer are frozen too.": (
            lambda z, hook, original, new, sender: _send(
                z, hook, new, sender, original[hook.layer()] if hook.layer() == sender.layer else z
            )
        ),
        "You froze every layer at the sender's layer; each layer has its own output, "
        "`original[hook.layer()]`.": lambda z, hook, original, new, sender: _send(
            z, hook, new, sender, original[sender.layer]
        ),
        "You put the new run in everywhere; all heads but the sender are frozen at `original`.": (
            lambda z, hook, original, new, sender: new[hook.layer()].clone()
        ),
        "You took the sender at the last position only; take its output at every position.": (
            lambda z, hook, original, new, sender: set_at(
                original[hook.layer()],
                (ALL, -1),
                ways.path_patch_hook(z, hook, original, new, sender)[:, -1],
            )
        ),
        **{
            f"You {what}; every layer is `original`, but for the sender, which is `new`.": hook
            for what, hook in MISSENT.items()
        },
        "`original` and `new` are swapped: all heads as in the original run, the sender as "
        "in the new one.": (
            lambda z, hook, original, new, sender: ways.path_patch_hook(
                z, hook, new, original, sender
            )
        ),
    },
)


def _path_sweep_cases() -> dict[str, tuple]:
    senders = {31: [Head(2, 1), Head(1, 2), Head(0, 0)], 33: [Head(0, 0), Head(3, 1)]}
    return {f"{len(heads)} senders": (*ways.random_pair(i), heads) for i, heads in senders.items()}


_to_logits, _every, _run = ways.path_patch_to_logits, ways.every, ways.run_under


def _accumulated(
    model: TransformerBridge, old: Tensor, new: Tensor, answers: Tensor, senders: list[Head]
) -> Tensor:
    """The sweep in which every sender is written into the same activations."""
    original, source, found = ways.record_z(model, old), ways.record_z(model, new), []
    for layer, head in senders:
        original[layer, :, :, head] = source[layer, :, :, head]
        hooks = _every(model, lambda z, hook: original[hook.layer()].clone())
        found.append(_run(model, old, answers, hooks))
    return torch.stack(found, dim=1)


path_patch_to_logits = EXERCISES.add(
    number=9,
    name="path_patch_to_logits",
    title="the sweep over senders",
    part="4",
    reference=_to_logits,
    cases=_path_sweep_cases,
    mistakes={
        "That is activation patching: the other heads react to the sender. Put your hook into "
        "every layer, so that they stay frozen.": partial(_to_logits, hook=_unfrozen),
        "All your runs give the original figure: take the sender's output from the new run, at "
        "every position, and hook its own layer too.": partial(_to_logits, hook=_no_sender),
        "You patch that head number in every layer; the sender is one head of one layer.": (
            partial(_to_logits, hook=_in_every_layer)
        ),
        "You send the whole layer of the sender; one head at a time.": (
            partial(_to_logits, hook=_whole_layer)
        ),
        **misread(_to_logits),
        **misplaced(_to_logits),
        **{
            f"You {what}; every layer is the original one's, but for the sender, which is new.": (
                partial(_to_logits, hook=MISSENT[what])
            )
            for what in MISSENT
            if "freeze the" not in what
        },
        "You freeze the MLPs too; only heads are frozen, so the path may go through MLPs.": (
            ways.otherwise("run_under", with_mlps_frozen, _to_logits)
        ),
        "The last layer is not frozen: hook every layer, `range(n_layers)`.": ways.otherwise(
            "every",
            lambda model, hook: _every(model, hook, range(model.cfg.n_layers - 1)),
            _to_logits,
        ),
        "You take the head of the layer below each sender; layers count from 0.": lambda *args: (
            _to_logits(*args[:4], [Head((layer - 1) % 4, head) for layer, head in args[4]])
        ),
        "You take the head of the layer above each sender; layers count from 0.": lambda *args: (
            _to_logits(*args[:4], [Head((layer + 1) % 4, head) for layer, head in args[4]])
        ),
        "Earlier senders stay in: put each into a fresh copy of the original output.": (
            lambda *args: _accumulated(*args)
        ),
        "You subtract from the original figure; return the logit difference as it is.": (
            lambda model, old, new, answers, senders: (
                ways.run_under(model, old, answers)[:, None]
                - _to_logits(model, old, new, answers, senders)
            )
        ),
        "You run the new prompts; the run is the original one, and the sender's output alone is "
        "new.": lambda model, old, new, *rest: _to_logits(model, old, new, *rest, base=new),
        "Original and new are swapped: the run and all frozen heads are the original ones.": (
            lambda model, old, new, *rest: _to_logits(model, new, old, *rest)
        ),
        "The frozen heads are those of the new run and the sender that of the original; it is the "
        "other way round.": (
            lambda model, old, new, *rest: _to_logits(model, new, old, *rest, base=old)
        ),
        "You divide by the original figure; return the logit difference as it is.": (
            lambda model, old, new, answers, senders: (
                _to_logits(model, old, new, answers, senders)
                / ways.run_under(model, old, answers)[:, None]
            )
        ),
        "You subtract the original figure; return the logit difference as it is.": (
            lambda model, old, new, answers, senders: (
                _to_logits(model, old, new, answers, senders)
                - ways.run_under(model, old, answers)[:, None]
            )
        ),
    },
)


def _query_cases() -> dict[str, tuple]:
    two_layers = [Head(3, 1), Head(2, 0), Head(3, 2)]
    receivers = {"one receiver": [Head(2, 1)], "three receivers": two_layers}
    senders, end = [Head(0, 2), Head(1, 1), Head(0, 1)], torch.tensor([5, 6, 6, 4, 6, 5])
    return {
        label: (*ways.random_pair(41), senders, heads, end) for label, heads in receivers.items()
    }


_to_queries = ways.path_patch_to_queries

path_patch_to_queries = EXERCISES.add(
    number=10,
    name="path_patch_to_queries",
    title="path patching to a receiver",
    part="4",
    reference=_to_queries,
    cases=_query_cases,
    mistakes={
        "You change the queries at the last position; `positions` says where, prompt by prompt.": (
            lambda *args: _to_queries(*args[:6], torch.full_like(args[6], 6))
        ),
        "You use the first prompt's position for all prompts; each has its own.": (
            lambda *args: _to_queries(*args[:6], args[6][:1].expand(len(args[6])))
        ),
        "In your first pass the other heads are not frozen, so the sender reaches the queries "
        "through them too.": partial(_to_queries, first=_unfrozen),
        "The sender is patched in your second pass too; only what arrives at the queries may be "
        "new there.": partial(_to_queries, second=_unfrozen),
        "All your runs give the original figure: take the sender from the new run in the first "
        "pass, record `hook_q`, and let the heads run freely, not frozen, in the second.": (
            partial(_to_queries, first=_no_sender)
        ),
        "Your queries come straight from the new run; record them in the first pass, with all "
        "frozen but the sender.": partial(_to_queries, from_new=True),
        "You put the queries in at every position; only at each prompt's own `positions`.": (
            partial(_to_queries, everywhere=True)
        ),
        "You put the queries of all heads of the receivers' layer in; only those of the "
        "receivers.": partial(_to_queries, whole_layer=True),
        "You record and put in the keys; the receivers' queries are `hook_q`.": (
            partial(_to_queries, site="k")
        ),
        "You record and put in the values; the receivers' queries are `hook_q`.": (
            partial(_to_queries, site="v")
        ),
        **misread(_to_queries),
        "You put every receiver's head number in at every receiver's layer; compare "
        "`hook.layer()` with `receiver.layer`.": partial(_to_queries, any_layer=True),
        "Your receivers are one layer too low: layers count from 0.": lambda *args: _to_queries(
            *args[:5], [Head(layer - 1, head) for layer, head in args[5]], args[6]
        ),
        "Your receivers are one layer too high: layers count from 0.": lambda *args: _to_queries(
            *args[:5], [Head(min(layer + 1, 3), head) for layer, head in args[5]], args[6]
        ),
        "Your receivers are the heads after those asked for: heads count from 0.": lambda *args: (
            _to_queries(
                *args[:5], [Head(layer, (head + 1) % 3) for layer, head in args[5]], args[6]
            )
        ),
        **{
            f"You change the queries one position too {what}; `positions` says where.": (
                lambda *args, by=by: _to_queries(*args[:6], (args[6] + by).clamp(max=6))
            )
            for what, by in {"early": -1, "late": 1}.items()
        },
        "You send the sender's whole layer in the first pass; one head at a time.": (
            partial(_to_queries, first=_whole_layer)
        ),
        "You send that head number in every layer in the first pass; the sender is in one.": (
            partial(_to_queries, first=_in_every_layer)
        ),
        "You freeze the MLPs too in the second pass; nothing is frozen there.": (
            ways.otherwise("run_under", with_mlps_frozen, _to_queries)
        ),
        "Your second pass runs the new prompts; both passes run the original ones.": (
            lambda model, old, new, *rest: ways.otherwise(
                "run_under", lambda m, tokens, *more: _run(m, new, *more), _to_queries
            )(model, old, new, *rest)
        ),
        "You subtract the original figure; return the logit difference as it is.": (
            lambda model, old, new, answers, *rest: (
                _to_queries(model, old, new, answers, *rest) - _run(model, old, answers)[:, None]
            )
        ),
        "Senders and receivers are swapped.": lambda *args: _to_queries(
            *args[:4], args[5], args[4], args[6]
        ),
        "Only the last receiver gets its new queries; all of them do, in the same run.": (
            lambda *args: _to_queries(*args[:5], args[5][-1:], args[6])
        ),
        "That is the path to the logits; the path wanted ends at the receivers' queries, and a "
        "second pass goes on from there.": lambda *args: _to_logits(*args[:5]),
        "Only the first receiver gets its new queries; all of them do, in the same run.": (
            lambda *args: _to_queries(*args[:5], args[5][:1], args[6])
        ),
        "Of several receivers in one layer only the last gets its new queries; all of them do.": (
            lambda *args: _to_queries(
                *args[:5], list({h.layer: h for h in args[5]}.values()), args[6]
            )
        ),
        "Original and new are swapped: the run and all frozen heads are the original ones.": (
            lambda model, old, new, *rest: _to_queries(model, new, old, *rest)
        ),
    },
)


# Exercise 11: the copying score


def copying_score_answer(
    resid: Float[Tensor, "name d_model"],
    w_v: Float[Tensor, "d_model d_head"],
    w_o: Float[Tensor, "d_head d_model"],
    w_u: Float[Tensor, "d_model vocab"],
    names: Int[Tensor, "name"],
    k: int,
) -> float:
    """Share of names whose own logit is among the k largest that the head gives."""
    return _hits(_ov(resid, w_v, w_o, w_u), names, k).any(-1).float().mean().item()


def _copying_cases() -> dict[str, tuple]:
    cases = {}
    for seed, k in ((7, 3), (8, 5), (9, 4)):
        generator = ways.generator(seed)
        names = torch.randperm(30, generator=generator)[:12]
        w_u = torch.randn(8, 30, generator=generator)
        resid = w_u[:, names].T + 0.5 * torch.randn(12, 8, generator=generator)
        w_v = torch.randn(8, 4, generator=generator)
        # half of a copying circuit, half noise: some names are copied and some are not
        w_o = w_v.T + torch.randn(4, 8, generator=generator)
        cases[f"12 names, k = {k}"] = (resid, w_v, w_o, w_u, names, k)
    return cases


def _hits(logits: Tensor, names: Tensor, k: int) -> Tensor:
    """Which of the k largest logits are the name's own, [name k]."""
    return (logits.topk(k).indices == names[:, None]).float()


def _own(resid: Tensor, w_v: Tensor, w_o: Tensor, w_u: Tensor, names: Tensor) -> Tensor:
    return _ov(resid, w_v, w_o, w_u).gather(1, names[:, None])


def _ranks(*args: Tensor) -> Tensor:
    return (_ov(*args[:4]) > _own(*args)).sum(-1)


def _ov(resid: Tensor, w_v: Tensor, w_o: Tensor, w_u: Tensor) -> Tensor:
    return resid @ w_v @ w_o @ w_u


OTHER_LOGITS = {
    "absolute values": lambda r, v, o, u, *_: _ov(r, v, o, u).abs(),
    "what the head gives together with the residual stream": lambda r, v, o, u, *_: (
        (r + r @ v @ o) @ u
    ),
    "what the transposed matrices give": lambda r, v, o, u, *_: r @ o.T @ v.T @ u,
    "what the values alone give": lambda r, v, o, u, *_: r @ v @ v.T @ u,
    "what the head gives for `w_u`": lambda r, v, o, u, names, k: _ov(u[:, names].T, v, o, u),
    "logits less their mean over the names": lambda r, v, o, u, *_: (
        (x := _ov(r, v, o, u)) - x.mean(0)
    ),
}
OTHER_SHARES = {
    "the mean rank": lambda *args: _ranks(*args[:5]).float().mean(),
    "the mean logit of the name": lambda *args: _own(*args[:5]).mean(),
    "how many names have a positive logit": lambda *args: (_own(*args[:5]) > 0).float().mean(),
    "how many of the k largest are names": lambda *args: (
        torch.isin(_ov(*args[:4]).topk(args[5]).indices, args[4]).float().mean()
    ),
    "how many names are among the k largest of any row": lambda *args: (
        torch.isin(args[4], _ov(*args[:4]).topk(args[5]).indices).float().mean()
    ),
    "how many names are among the k largest of the first row": lambda *args: (
        torch.isin(args[4], _ov(*args[:4])[0].topk(args[5]).indices).float().mean()
    ),
    "a share over the k ranks, `any` along the names": lambda *args: (
        _hits(_ov(*args[:4]), *args[4:]).amax(0).mean()
    ),
    "what `argsort` has at the name, which is no rank": lambda *args: (
        (_ov(*args[:4]).argsort(-1, descending=True).gather(1, args[4][:, None]) < args[5])
        .float()
        .mean()
    ),
    "the share among the `2 * k` largest": lambda *args: (
        _hits(_ov(*args[:4]), args[4], 2 * args[5]).sum(-1).mean()
    ),
}

copying_score = EXERCISES.add(
    number=11,
    name="copying_score",
    title="copying score",
    part="5",
    reference=copying_score_answer,
    cases=_copying_cases,
    mistakes={
        "You ask for the largest logit; the name may be anywhere among the `k` largest.": (
            lambda *args: _hits(_ov(*args[:4]), args[4], 1).mean()
        ),
        "You let one rank too many pass: of ranks counted from 0, those below `k` count.": (
            lambda *args: _hits(_ov(*args[:4]), args[4], args[5] + 1).sum(-1).mean()
        ),
        "You let one rank too few pass: of ranks counted from 0, all below `k` count, and the k-th "
        "largest logit does too.": (
            lambda *args: _hits(_ov(*args[:4]), args[4], args[5] - 1).sum(-1).mean()
        ),
        **{
            f"You rank {what}; rank the logits that the head gives, `resid @ w_v @ w_o @ w_u`.": (
                lambda *args, logits=logits: _hits(logits(*args), *args[4:]).sum(-1).mean()
            )
            for what, logits in OTHER_LOGITS.items()
        },
        **{
            f"You return {what}; return the share of names whose own logit is among the `k` "
            "largest of their row.": share
            for what, share in OTHER_SHARES.items()
        },
        "You look among the k smallest logits; that is the score of a negative name mover.": (
            lambda *args: _hits(-_ov(*args[:4]), *args[4:]).sum(-1).mean()
        ),
        "You unembed the residual stream itself; it must go through the head first, `w_v` and "
        "then `w_o`.": lambda resid, w_v, w_o, w_u, names, k: (
            _hits(resid @ w_u, names, k).sum(-1).mean()
        ),
        "You count a row when *any* name is among its k largest logits; it must be the name "
        "of that row.": lambda *args: (
            torch.isin(_ov(*args[:4]).topk(args[5]).indices, args[4]).any(-1).float().mean()
        ),
        "You rank the name among the other names; it must be among the `k` largest of the whole "
        "vocabulary.": lambda *args: (
            _hits(_ov(*args[:4])[:, args[4]], torch.arange(len(args[4])), args[5]).sum(-1).mean()
        ),
        "You divided by k as well: at most one of the k can be the name, so ask whether any "
        "of them is, then average over the names.": (
            lambda *args: _hits(_ov(*args[:4]), *args[4:]).mean()
        ),
        "That is the mean probability of the name; ask whether it is among the `k` largest.": (
            lambda *args: _ov(*args[:4]).softmax(-1)[torch.arange(len(args[4])), args[4]].mean()
        ),
        "That is how many names are copied; return their share, between 0 and 1.": (
            lambda *args: _hits(_ov(*args[:4]), *args[4:]).sum()
        ),
        "You return one entry per name; average them into one number.": (
            lambda *args: _hits(_ov(*args[:4]), *args[4:]).sum(-1)
        ),
    },
)


# Exercise 12: position or token

CODES = torch.tensor([[p, t] for p in (1, -1) for t in (1, 0, -1)])


def fit_signal_answer(
    values: Float[Tensor, "variant prompt"], codes: Int[Tensor, "variant 2"]
) -> Float[Tensor, "code prompt"]:
    """Each prompt's coefficients in values = position * codes[:, 0] + token * codes[:, 1]."""
    return torch.linalg.lstsq(codes.to(values), values).solution


def _signal_cases() -> dict[str, tuple]:
    cases = {}
    for seed, order in ((1, range(6)), (2, [4, 0, 5, 3, 1, 2])):
        known = torch.randn(2, 5, generator=ways.generator(seed)) * torch.tensor([[3.0], [1.0]])
        noise = 0.3 * torch.randn(6, 5, generator=ways.generator(seed + 2))
        values = CODES.float() @ known + noise
        cases[f"variants in order {list(order)}"] = (values[list(order)], CODES[list(order)])
    return cases


def _weighted(values: Tensor, codes: Tensor, sizes: tuple[float, float]) -> Tensor:
    """Sums of the values with the codes as weights, each divided by a number."""
    return codes.to(values).T @ values / torch.tensor(sizes)[:, None]


def _when(values: Tensor, codes: Tensor, position: int, token: int) -> Tensor:
    return values[(codes == torch.tensor([position, token])).all(1)][0]


OTHER_FITS = {
    "use the first three variants": lambda values, codes: fit_signal_answer(values[:3], codes[:3]),
    "leave out the variants with another name": lambda values, codes: fit_signal_answer(
        values[codes[:, 1] != 0], codes[codes[:, 1] != 0]
    ),
    "return means of the kept position and of the same name": lambda values, codes: torch.stack(
        [values[codes[:, i] == 1].mean(0) for i in (0, 1)]
    ),
    "standardise the values": lambda values, codes: fit_signal_answer(
        (values - values.mean(0)) / values.std(0), codes
    ),
    "shrink the coefficients (a ridge)": lambda values, codes: torch.linalg.solve(
        codes.T.float() @ codes.float() + torch.eye(2), codes.T.float() @ values
    ),
    "return shares or correlations": lambda values, codes: (
        torch.nn.functional.normalize(codes.float(), dim=0).T
        @ torch.nn.functional.normalize(values, dim=0)
    ),
    "return a constant first": lambda values, codes: torch.stack(
        [values.mean(0), fit_signal_answer(values, codes)[0]]
    ),
    "get the token from one position alone": lambda values, codes: torch.stack(
        [
            fit_signal_answer(values, codes)[0],
            (_when(values, codes, 1, 1) - _when(values, codes, 1, -1)) / 2,
        ]
    ),
    "get the position from one name alone": lambda values, codes: torch.stack(
        [
            (_when(values, codes, 1, 1) - _when(values, codes, -1, 1)) / 2,
            fit_signal_answer(values, codes)[1],
        ]
    ),
}

fit_signal = EXERCISES.add(
    number=12,
    name="fit_signal",
    title="position or token",
    part="5",
    reference=fit_signal_answer,
    cases=_signal_cases,
    mistakes={
        "The two coefficients have changed places: position is the first code, token the second.": (
            lambda values, codes: fit_signal_answer(values, codes).flip(0)
        ),
        "Your token coefficient is divided by all six variants; two of them say nothing of it, so "
        "divide by four.": lambda values, codes: _weighted(values, codes, (6, 6)),
        "You return sums; divide by how often each code counts: the sum of its squares.": (
            lambda values, codes: _weighted(values, codes, (1, 1))
        ),
        "You take the whole difference between kept and turned round; the codes are two apart, so "
        "halve it.": lambda values, codes: _weighted(values, codes, (3, 2)),
        "You use the variants that keep the position alone; fit all of them at once.": (
            lambda values, codes: fit_signal_answer(
                values[codes[:, 0] == 1], codes[codes[:, 0] == 1]
            )
        ),
        "You use the variants with the same name alone; fit all of them at once.": (
            lambda values, codes: fit_signal_answer(
                values[codes[:, 1] == 1], codes[codes[:, 1] == 1]
            )
        ),
        **{
            f"You {what}; fit all six variants at once, with no constant, each by its own codes.": (
                lambda values, codes, fit=fit: fit(values, codes)
            )
            for what, fit in OTHER_FITS.items()
        },
        "You fit the mean over the prompts; fit each prompt by itself.": (
            lambda values, codes: fit_signal_answer(values.mean(1, keepdim=True), codes)
        ),
        "The variants do not stand in one order: read what each is from its row of `codes`.": (
            lambda values, codes: fit_signal_answer(values, CODES)
        ),
    },
)


# Exercise 13: means by template


def template_means_answer(
    z: Float[Tensor, "abc layer pos head d_head"],
    template: Int[Tensor, "abc"],
    wanted: Int[Tensor, "prompt"],
) -> Float[Tensor, "prompt layer pos head d_head"]:
    """For each template in `wanted`, the mean of z over the ABC prompts of that template."""
    return torch.stack([z[template == t].mean(0) for t in wanted])


def _means_cases() -> dict[str, tuple]:
    z = torch.randn(9, 2, 4, 3, 5, generator=ways.generator(13))
    template = torch.tensor([5, 0, 2, 0, 5, 0, 2, 0, 5])
    return {"9 ABC prompts, 6 prompts": (z, template, torch.tensor([2, 0, 5, 0, 0, 2]))}


template_means = EXERCISES.add(
    number=13,
    name="template_means",
    title="means by template",
    part="6",
    reference=template_means_answer,
    cases=_means_cases,
    mistakes={
        "You average over all ABC prompts; each prompt gets the mean of its own template.": (
            lambda z, template, wanted: z.mean(0).expand(len(wanted), *z.shape[1:])
        ),
        "You give one mean for each template; pick for each prompt that of its own, `wanted`.": (
            lambda z, template, wanted: template_means_answer(z, template, wanted.unique())
        ),
        "You pick by the templates of the ABC prompts; the templates asked for are in `wanted`.": (
            lambda z, template, wanted: template_means_answer(z, template, template)
        ),
        "You use `wanted` to pick prompts; it holds templates, and the mean is over all ABC "
        "prompts of that template.": lambda z, template, wanted: z[wanted],
        "You return sums; divide by the number of ABC prompts with that template.": (
            lambda z, template, wanted: torch.stack([z[template == t].sum(0) for t in wanted])
        ),
        "You divide by the number of all ABC prompts; divide by those with that template.": (
            lambda z, template, wanted: torch.stack(
                [z[template == t].sum(0) / len(z) for t in wanted]
            )
        ),
        "You average over the positions too; a head's mean differs from position to position.": (
            lambda z, template, wanted: template_means_answer(
                z.mean(2, keepdim=True).expand_as(z), template, wanted
            )
        ),
        "You take one ABC prompt for each template; average over all that have it.": (
            lambda z, template, wanted: torch.stack([z[template == t][0] for t in wanted])
        ),
        "You take the templates of the first ABC prompts; the templates asked for are in "
        "`wanted`.": lambda z, template, wanted: template_means_answer(
            z, template, template[: len(wanted)]
        ),
        "You use `wanted` to pick templates; it holds the templates themselves.": (
            lambda z, template, wanted: template_means_answer(z, template, template[wanted])
        ),
        "You put the means in the order of the sorted templates; each prompt has its own.": (
            lambda z, template, wanted: template_means_answer(z, template, wanted.sort().values)
        ),
        "You average the templates' means; each prompt gets the mean of its own template.": (
            lambda z, template, wanted: (
                template_means_answer(z, template, template.unique()).mean(0)[None]
                + 0 * z[: len(wanted)]
            )
        ),
        **{
            f"You take the {what}; take the mean of all ABC prompts with that template.": (
                lambda z, template, wanted, of=of: torch.stack(
                    [of(z[template == t]) for t in wanted]
                )
            )
            for what, of in {
                "median": lambda x: x.median(0).values,
                "last ABC prompt": lambda x: x[-1],
                "standard deviation": lambda x: x.std(0),
                "largest values": lambda x: x.amax(0),
                "mean without the first": lambda x: x[1:].mean(0),
                "mean of the last and the mean so far": lambda x: reduce(
                    lambda a, b: (a + b) / 2, x
                ),
            }.items()
        },
        "`sums[template] += z` adds one prompt for each template and forgets the others: use "
        "`index_add_`, or a mask for each template.": lambda z, template, wanted: torch.stack(
            [z[template == t][-1] / (template == t).sum() for t in wanted]
        ),
        "You take the prompts that have *another* template.": (
            lambda z, template, wanted: torch.stack([z[template != t].mean(0) for t in wanted])
        ),
    },
)


# Exercises 14 to 16: the circuit alone, and its parts


def _nodes(seed: int) -> list[Tensor]:
    """A mask for each of seven heads, none in layer 2, at one position of each prompt."""
    heads = [(0, 1), (1, 2), (0, 0), (3, 1), (1, 0), (3, 2), (0, 2)]
    places = torch.randint(3, 7, (7, 6), generator=ways.generator(seed))
    none = torch.zeros(6, 4, 7, 3, dtype=torch.bool)
    return [
        set_at(none, (torch.arange(6), layer, places[i], head), True)
        for i, (layer, head) in enumerate(heads)
    ]


def _circuit_inputs(seed: int) -> tuple:
    """Model, prompts, answers, means, and the mask of a circuit of seven heads."""
    means = torch.randn(6, 4, 7, 3, 8, generator=ways.generator(seed))
    keep = torch.stack(_nodes(seed)).any(0)
    return (*ways.random_task(seed), means, keep)


def _alone_cases() -> dict[str, tuple]:
    whole = torch.tensor([2.0, -1.0, 0.5, 3.0, -0.3, 0.8])
    scales = {"first": -1.0, "second": -3.0, "third": -0.3}  # shares above 1, between, below 0
    return {
        f"the {name} circuit": (*_circuit_inputs(seed), by * whole)
        for seed, (name, by) in enumerate(scales.items(), start=51)
    }


def _alone_where(change: Callable) -> Callable:
    """The circuit alone, once its means and its mask went through `change`."""
    return lambda model, tokens, answers, means, keep, f_model: ways.circuit_alone(
        model, tokens, answers, *change(means, keep), f_model
    )


OTHER_RATIOS = {
    "a ratio of medians": lambda f, whole: f.median() / whole.median(),
    "a correlation": lambda f, whole: torch.corrcoef(torch.stack([f, whole]))[0, 1],
    "a slope": lambda f, whole: (f * whole).sum() / whole.square().sum(),
    "the mean of F(C)": lambda f, whole: f.mean(),
    "cut to a whole number": lambda f, whole: int(f.mean() / whole.mean()),
    "over the standard deviation": lambda f, whole: f.mean() / whole.std(),
    "a distance": lambda f, whole: (f - whole).abs().mean(),
    "a distance over F(M)": lambda f, whole: (f.mean() - whole.mean()).abs() / whole.mean(),
    "over the first prompt's F(M)": lambda f, whole: f.mean() / whole[0],
    "how many prompts are right": lambda f, whole: (f > 0).float().mean(),
}

circuit_alone = EXERCISES.add(
    number=14,
    name="circuit_alone",
    title="the circuit alone",
    part="7",
    reference=ways.circuit_alone,
    cases=_alone_cases,
    mistakes={
        **misrun(ways.circuit_alone),
        **misread(ways.circuit_alone),
        "You replace every head everywhere; what `keep` marks stays.": (
            _alone_where(lambda means, keep: (means, keep & False))
        ),
        "Nothing is replaced: that is the whole model, F(M). Does your hook return what it edits, "
        "or edit in place?": _alone_where(lambda means, keep: (means, keep | True)),
        "Layers that hold no head of the circuit are left as they are; they are replaced whole.": (
            partial(
                ways.circuit_alone,
                layers=lambda keep: keep.any(0).any(-1).any(-1).nonzero()[:, 0].tolist(),
            )
        ),
        **{
            f"F(C) is right, but your share is {what}; take the mean of F(C) over that of F(M).": (
                partial(ways.circuit_alone, share=share)
            )
            for what, share in OTHER_RATIOS.items()
        },
        "You return per cent; the share of a perfect circuit is 1.": (
            lambda *args: (lambda f, share: (f, 100 * share))(*ways.circuit_alone(*args))
        ),
        "You return what is lost, F(M) - F(C); return F(C) itself.": lambda *args: (
            args[5] - (found := ways.circuit_alone(*args))[0],
            found[1],
        ),
        "You return the ratio for every prompt; return F(C) itself.": lambda *args: (
            (found := ways.circuit_alone(*args))[0] / args[5],
            found[1],
        ),
        "You ablate the MLPs too; only heads are replaced.": (
            ways.otherwise("run_under", without_mlps, ways.circuit_alone)
        ),
        "You average F(C) over the prompts; return one value for each, and the share.": (
            lambda *args: (lambda f, share: (f.mean(), share))(*ways.circuit_alone(*args))
        ),
        "F(C) is right, but your share is the mean of the ratios, in which a prompt with a small "
        "difference counts most; take the ratio of the means.": (
            partial(ways.circuit_alone, share=lambda f, whole: (f / whole).mean())
        ),
        "F(C) is right, but your share is upside down: what the circuit gives, over what the model "
        "gives.": partial(ways.circuit_alone, share=lambda f, whole: whole.mean() / f.mean()),
        "F(C) is right, but you return the share that is lost; return the share that is kept.": (
            partial(ways.circuit_alone, share=lambda f, whole: 1 - f.mean() / whole.mean())
        ),
        "F(C) is right, but your share is a difference, in logits; return the ratio F(C) over "
        "F(M).": partial(ways.circuit_alone, share=lambda f, whole: f.mean() - whole.mean()),
        "F(C) is right, but your share lost its sign: a circuit that prefers the wrong name has a "
        "negative one.": (
            partial(ways.circuit_alone, share=lambda f, whole: (f.mean() / whole.mean()).abs())
        ),
        "F(C) is right, but your share is of absolute values; average with the signs, so that "
        "wrong answers count against.": partial(
            ways.circuit_alone, share=lambda f, whole: f.abs().mean() / whole.abs().mean()
        ),
        "F(C) is right, but you cut the share off at 1; a circuit can do more than the model.": (
            partial(
                ways.circuit_alone, share=lambda f, whole: (f.mean() / whole.mean()).clamp(max=1)
            )
        ),
    },
)


def _completeness_cases() -> dict[str, tuple]:
    seeds = {"first": 71, "second": 72}
    return {
        f"the {name} circuit": (*_circuit_inputs(seed), torch.stack(_nodes(seed)[:3]).any(0))
        for name, seed in seeds.items()
    }


_completeness = ways.role_completeness


def _rows(masks: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable:
    """Both rows, with these masks of what is kept."""
    return lambda model, tokens, answers, means, keep, role: torch.stack(
        [ways.run_kept(model, tokens, answers, means, kept) for kept in masks(keep, role)]
    )


role_completeness = EXERCISES.add(
    number=15,
    name="role_completeness",
    title="completeness of one role",
    part="7",
    reference=_completeness,
    cases=_completeness_cases,
    mistakes={
        "The two have changed places: the circuit without the role comes first, the model without "
        "it second.": lambda *args: _completeness(*args).flip(0),
        "You knock the role out of the circuit only; your second row is the whole model, F(M).": (
            lambda *args: torch.stack([_completeness(*args)[0], ways.run_under(*args[:3])])
        ),
        "You knock the role out of the model only; your first row is the whole circuit, F(C).": (
            lambda *args: torch.stack([ways.run_kept(*args[:5]), _completeness(*args)[1]])
        ),
        "You return how much is lost; return the logit difference that is left.": (
            lambda *args: (
                torch.stack([ways.run_kept(*args[:5]), ways.run_under(*args[:3])])
                - _completeness(*args)
            )
        ),
        "Both your rows are of the circuit; in the second nothing but the role is ablated.": (
            partial(_completeness, among=lambda keep: keep)
        ),
        "You keep the role and ablate all else; it is the role that goes.": (
            partial(_completeness, without=lambda keep, role: role)
        ),
        **misrun(_completeness),
        **misread(_completeness),
        "Both your rows are of the model; in the first all but the circuit is ablated.": (
            _rows(lambda keep, role: (~role, ~role))
        ),
        "Your second row keeps the role alone; there nothing but the role is ablated.": (
            _rows(lambda keep, role: (keep & ~role, role))
        ),
        "Your second row is the circuit; it is the model without the role.": (
            _rows(lambda keep, role: (keep & ~role, keep))
        ),
        "Your second row is the model without the circuit; take the role alone out.": (
            _rows(lambda keep, role: (keep & ~role, ~keep))
        ),
        "Your first row keeps the role alone; it is the circuit without the role.": (
            _rows(lambda keep, role: (keep & role, ~role))
        ),
        "You knock out the role's layers whole; only where `role` is True.": (
            partial(_completeness, without=lambda keep, role: keep & ~role.any(3, keepdim=True))
        ),
        "You subtract F(M); return the logit difference that is left.": lambda *args: (
            _completeness(*args) - ways.run_under(*args[:3])
        ),
        "You divide by the figure with the role; return the logit difference that is left.": (
            lambda *args: (
                _completeness(*args)
                / torch.stack([ways.run_kept(*args[:5]), ways.run_under(*args[:3])])
            )
        ),
        "You knock the role's heads out at all positions; only where `role` is True.": (
            partial(_completeness, without=lambda keep, role: keep & ~role.any(2, keepdim=True))
        ),
        "You knock out what any prompt has; `role` has a row for each prompt, because the "
        "positions differ.": partial(_completeness, without=lambda keep, role: keep & ~role.any(0)),
    },
)


def _minimality_cases() -> dict[str, tuple]:
    cases = {}
    # either comparison wins, the signs differ, and the largest is not always so in sizes
    tried = {"A": (75, 3), "B": (114, 2), "C": (86, 3), "D": (60, 3), "E": (89, 3)}
    for name, (seed, others) in tried.items():
        node, *rest = _nodes(seed)
        mask = torch.stack(rest[:others]).any(0)
        cases[f"a role of {others + 1} heads in circuit {name}"] = (
            *_circuit_inputs(seed),
            node,
            mask,
        )
    return cases


_minimality = ways.head_minimality
SECOND = {
    "F(C) - F(C without K and v)": lambda f, keep, node, rest: f(keep) - f(keep & ~(rest | node)),
    "F(C without v) - F(C without K and v)": lambda f, keep, node, rest: (
        f(keep & ~node) - f(keep & ~(rest | node))
    ),
    "F(C without K) - F(C without v)": lambda f, keep, node, rest: (
        f(keep & ~rest) - f(keep & ~node)
    ),
    "F(C) - F(C without K)": lambda f, keep, node, rest: f(keep) - f(keep & ~rest),
}


def _minimality_by(
    after: Callable,
    model: TransformerBridge,
    tokens: Tensor,
    answers: Tensor,
    means: Tensor,
    keep: Tensor,
    node: Tensor,
    rest: Tensor,
) -> Tensor:
    """The head's minimality with another second change."""
    f = partial(ways.run_kept, model, tokens, answers, means)
    return ways.larger_on_average(f(keep) - f(keep & ~node), after(f, keep, node, rest))


head_minimality = EXERCISES.add(
    number=16,
    name="head_minimality",
    title="minimality of one head",
    part="7",
    reference=_minimality,
    cases=_minimality_cases,
    mistakes={
        "Knocking the head out changes nothing: is every layer ablated, the first too, by its own "
        "part of the mask, and the answer read at the last position?": (
            lambda *args: 0 * _minimality(*args)
        ),
        **misrun(_minimality, but=("the first layer", "of the last")),
        **dict(list(misread(_minimality).items())[1:]),
        **{
            f"Your second change is {what}; it is F(C without K) - F(C without K and v).": (
                partial(_minimality_by, after)
            )
            for what, after in SECOND.items()
        },
        "You take the larger one prompt by prompt, without regard to size; one of the two "
        "comparisons is chosen for all prompts, by its mean.": (
            partial(_minimality, choose=torch.maximum)
        ),
        "You add the two comparisons; take the one that is larger on average.": (
            partial(_minimality, choose=torch.add)
        ),
        "You choose by the largest prompt; choose by the size of the mean.": (
            partial(_minimality, choose=lambda a, b: a if a.max() >= b.max() else b)
        ),
        "You choose by the median; choose by the size of the mean.": partial(
            _minimality, choose=lambda a, b: a if a.median().abs() >= b.median().abs() else b
        ),
        "`node` and `rest` are swapped.": lambda *args: _minimality(*args[:5], args[6], args[5]),
        "Your signs are turned round: what the head adds is the figure with it minus that without "
        "it, and the logit difference right minus wrong, as in `answers`.": (
            lambda *args: -_minimality(*args)
        ),
        "You compare only with all others present; do it with `rest`, which does not hold the "
        "head, gone too, and take what is larger on average.": (
            partial(_minimality, choose=lambda alone, after: alone)
        ),
        "You compare only with the rest of the role gone; do it with all others present too, and "
        "take what is larger on average.": (
            partial(_minimality, choose=lambda alone, after: after)
        ),
        "You take the larger one prompt by prompt; one of the two comparisons is chosen for all "
        "prompts, by its mean.": partial(
            _minimality, choose=lambda a, b: torch.where(a.abs() >= b.abs(), a, b)
        ),
        "You take the higher of the two means; the larger in size counts, and a head may work "
        "against the answer.": (
            partial(_minimality, choose=lambda a, b: a if a.mean() >= b.mean() else b)
        ),
        "You take the whole role out at once; compare what differs in this one head.": (
            lambda *args: _minimality(*args[:5], args[5] | args[6], args[6] & False)
        ),
        "You compare means of sizes, in which prompts cannot cancel; compare the sizes of the "
        "means.": partial(
            _minimality, choose=lambda a, b: a if a.abs().mean() >= b.abs().mean() else b
        ),
        "You take the smaller of the two changes; the larger in size counts.": (
            partial(_minimality, choose=lambda a, b: b if ways.larger_on_average(a, b) is a else a)
        ),
        "You average the two comparisons; take the one that is larger on average.": (
            partial(_minimality, choose=lambda a, b: (a + b) / 2)
        ),
        "You knock out of the whole model; here everything but the circuit, `keep`, is ablated "
        "all along.": partial(_minimality, among=torch.ones_like),
        "You compare with the whole model, F(M); compare the circuit with and without the head.": (
            partial(_minimality, whole=True)
        ),
    },
)


# Exercise 17: a head that nobody named

_STAGE: dict[str, object] = {}


def set_stage(model: TransformerBridge, named: Iterable[tuple[int, int]]) -> None:
    """Which model the last exercise is about, and which of its heads have a role already."""
    _STAGE.update(model=model, named={Head(*head) for head in named})


def _judge_head(answer: Callable[[], tuple[int, int]]) -> str | None:
    """Whether knocking the head out passes the notebook's rule, on prompts not used before."""
    if not _STAGE:
        return "Run the cell above first: it says which heads have a role already."
    model, head = _STAGE["model"], answer()
    if not isinstance(head, tuple) or len(head) != 2:
        return f"Return a head, such as `Head(3, 5)`; you return {a_kind(head)}."
    head = check_heads(model, [tuple(map(index, head))])[0]  # numpy's or torch's integers too
    if head in _STAGE["named"]:
        return f"{head} has a role already: find one that is not in the circuit."
    prompts, others = (ioi_prompts(model, n_prompts=48, seed=seed) for seed in (101, 102))
    means = circuit.means_run(prompts, circuit.abc_means(model, others))
    f_model, f = circuit.logit_diffs(model, prompts, [[], heads_from(model, [head], means)])
    change = metrics.estimate((f - f_model) / f_model.mean().abs())
    if abs(change.mean) > max(0.01, 3 * change.stderr):
        return None
    return (
        f"Without {head} the logit difference of new prompts changes by {change}, as a share of "
        "it: by the rule, more than 0.01 and more than three standard errors are wanted."
    )


unnamed_head = EXERCISES.stretch(
    number=17,
    name="unnamed_head",
    title="a head that nobody named",
    part="8",
    judge=_judge_head,
)
