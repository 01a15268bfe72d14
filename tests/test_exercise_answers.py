"""The exercises, answered as learners would: right in many styles, wrong in ways nobody listed."""

import pytest
import torch
from einops import einsum, reduce
from numpy import s_
from torch.linalg import eigvals, norm
from torch.nn import functional

import induction_exercises as induction
import ioi_exercises as ioi
from utils.exercises import set_at

# Right answers of more than one line, or that are used twice; the others stand in RIGHT


def loss_by_loop(logits, tokens):
    losses = torch.zeros(len(tokens), tokens.shape[1] - 1)
    for prompt, pos in ((i, j) for i in range(len(tokens)) for j in range(tokens.shape[1] - 1)):
        row = logits[prompt, pos].double()
        losses[prompt, pos] = row.logsumexp(0) - row[tokens[prompt, pos + 1]]
    return losses


def loss_by_one_hot(logits, tokens):
    picked = functional.one_hot(tokens[:, 1:], logits.shape[-1])
    return einsum(-logits[:, :-1].log_softmax(-1), picked.float(), "b p v, b p v -> b p")


def stripe_by_loop(pattern, seq_len):
    later = range(1 + seq_len, pattern.shape[-1])
    return sum(pattern[:, :, dest, dest - seq_len + 1] for dest in later) / len(later)


def drop_by_loop(steps, loss, window):
    best, where = None, None
    for i in range(len(steps) - window):
        slope = (loss[i + window] - loss[i]) / (steps[i + window] - steps[i])
        if best is None or slope < best:
            best, where = slope, i
    return float(steps[where] + steps[where + window]) / 2


def drop_by_argmax(steps, loss, window):
    i = ((loss[:-window] - loss[window:]) / (steps[window:] - steps[:-window])).argmax()
    return (steps[i] + steps[i + window]).float() / 2


def drop_by_minimum(steps, loss, window):
    ends = zip(steps, loss, steps[window:], loss[window:], strict=False)
    return min(((b - a) / (t - s), (s + t) / 2) for s, a, t, b in ends)[1].item()


def put(x, where, values):
    """An edit in place, by a hook that returns nothing."""
    x[where] = values


def difference_by_rows(logits, answers):
    rows = torch.arange(len(logits))
    return logits[rows, -1, answers[:, 0]] - logits[rows, -1, answers[:, 1]]


def corrupt_by_loop(tokens, positions):
    tokens = tokens.clone()
    for row, s2, io in zip(tokens, positions["S2"], positions["IO"], strict=True):
        row[s2] = row[io]
    return tokens


def corrupt_by_where(tokens, positions):
    at_s2 = torch.arange(tokens.shape[1]) == positions["S2"][:, None]
    return torch.where(at_s2, tokens.gather(1, positions["IO"][:, None]), tokens)


def patch_position_by_loop(resid, hook, clean_resid, positions):
    for row, clean_row, position in zip(resid, clean_resid, positions, strict=True):
        row[position] = clean_row[position]
    return resid


def path_in_place(z, hook, original, new, sender):
    z[:] = original[hook.layer()]
    if hook.layer() == sender.layer:
        z[:, :, sender.head] = new[sender.layer, :, :, sender.head]


def path_by_where(z, hook, original, new, sender):
    layer = int(hook.name.split(".")[1])
    return torch.where(chosen(z, sender[1]) & (layer == sender[0]), new[layer], original[layer])


def copying_by_rank(resid, w_v, w_o, w_u, names, k):
    logits = resid @ (w_v @ w_o) @ w_u
    return ((logits > logits.gather(1, names[:, None])).sum(-1) < k).float().mean()


def copying_by_loop(resid, w_v, w_o, w_u, names, k):
    top = [(row @ w_v @ w_o @ w_u).topk(k).indices.tolist() for row in resid]
    return sum(name.item() in row for row, name in zip(top, names, strict=True)) / len(names)


def chosen(z, head):
    """True at one head of [prompt pos head d_head]."""
    return (torch.arange(z.shape[2]) == head)[:, None]


def share(values):
    """How much of the eigenvalues' size is their sum."""
    return (values.sum() / values.abs().sum()).real


SIZES = (norm, lambda m: (m @ m.T).trace().sqrt(), lambda m: m.square().sum().sqrt().item())
RIGHT = {
    induction.per_token_loss: [
        lambda x, t: functional.cross_entropy(x[:, :-1].mT, t[:, 1:], reduction="none"),
        loss_by_loop,
        loss_by_one_hot,
    ],
    induction.induction_score: [
        lambda p, n: p.double().diagonal(1 - n, -2, -1)[..., 2:].mean(-1),
        stripe_by_loop,
        lambda p, n: p[..., 1 + n :, 2:].diagonal(dim1=-2, dim2=-1).mean(-1),
    ],
    induction.previous_token_score: [
        lambda p: torch.stack([p[:, :, i, i - 1] for i in range(1, p.shape[-1])]).mean(0),
        lambda p: p[..., 1:, :].diagonal(dim1=-2, dim2=-1).mean(-1),
        lambda p: torch.tensor([[head[1:].diagonal().mean() for head in row] for row in p]),
    ],
    induction.sharpest_drop: [drop_by_loop, drop_by_argmax, drop_by_minimum],
    induction.composition_score: [
        lambda v, o, q, k, size=size: size(v @ o @ k @ q.T) / size(v @ o) / size(q @ k.T)
        for size in SIZES
    ],
    induction.eigenvalue_copying: [
        lambda e, v, o, u: share(eigvals(o @ u @ e @ v)),
        lambda e, v, o, u: share(eigvals((e @ (v @ o) @ u).double())).item(),
        lambda e, v, o, u: (x := (e @ v @ o @ u).double()).trace() / eigvals(x).abs().sum(),
    ],
    induction.icl_score: [
        lambda loss, early, late: loss[:, late - 1] - loss[:, early - 1],
        lambda loss, early, late: loss.T[late - 1].double() - loss.T[early - 1].double(),
        lambda loss, e, late: torch.tensor([x[late - 1] - x[e - 1] for x in loss.tolist()]),
    ],
    induction.zero_ablation: [
        lambda z, hook, head: z * ~chosen(z, head),
        lambda z, hook, head: put(z, s_[..., head, :], 0),
        lambda z, hook, head: z.index_fill(2, torch.tensor(head), 0.0),
    ],
    induction.mean_ablation: [
        lambda z, hook, head, r: torch.where(chosen(z, head), r.double().mean(0), z),
        lambda z, hook, h, r: set_at(z, s_[:, :, h], torch.einsum("nphd->hpd", r)[h] / len(r)),
        lambda z, hook, h, r: put(z, s_[:, :, h], reduce(r, "n p h d -> p h d", "mean")[:, h]),
    ],
    induction.normalised_effect: [
        lambda patched, clean, corrupted: (patched - corrupted) / (clean - corrupted),
        lambda patched, clean, corrupted: 1 - (clean - patched) / (clean - corrupted),
        lambda patched, top, low: torch.tensor([(x - low) / (top - low) for x in patched.tolist()]),
    ],
    induction.patch_head_input: [
        lambda x, hook, c, h, n: torch.where(chosen(x, h // (n // x.shape[2])), c, x),
        lambda x, hook, c, h, n: put(x, s_[:, :, (i := h * x.shape[2] // n)], c[:, :, i]),
        lambda x, hook, c, h, n: set_at(x, s_[..., (i := h // (n // x.shape[2])), :], c[..., i, :]),
    ],
    ioi.logit_difference: [
        lambda x, a: torch.stack([r[-1, i] - r[-1, j] for r, (i, j) in zip(x, a, strict=True)]),
        lambda x, a: -x[:, -1].log_softmax(-1).gather(1, a).diff(dim=1)[:, 0],
        difference_by_rows,
    ],
    ioi.direct_attribution: [
        lambda z, w_o, scale, direction: ((z @ w_o) * direction).sum(-1) / scale,
        lambda z, w_o, scale, d: torch.einsum("ph,hd,pd->p", z, w_o, d / scale[:, None]),
        lambda z, w_o, scale, d: (z @ w_o @ d.T).diagonal() / scale,
    ],
    ioi.corrupt_s2: [
        lambda t, at: t.scatter(1, at["S2"][:, None], t.gather(1, at["IO"][:, None])),
        corrupt_by_loop,
        corrupt_by_where,
    ],
    ioi.patch_head: [
        lambda z, hook, x, h: torch.cat([z[:, :, :h], x[:, :, [h]], z[:, :, h + 1 :]], dim=2),
        lambda z, hook, x, h: torch.where(chosen(z, h), x, z),
        lambda z, hook, x, h: put(z, s_[:, :, h], x[:, :, h]),
    ],
    ioi.patch_position: [
        patch_position_by_loop,
        lambda x, hook, c, at: put(x, (rows := torch.arange(len(x)), at), c[rows, at]),
        lambda x, _, c, at: torch.where((torch.arange(x.shape[1]) == at[:, None])[..., None], c, x),
    ],
    ioi.path_patch_hook: [
        path_in_place,
        lambda z, hook, o, n, s: set_at(o, (i := s_[s[0], :, :, s[1]]), n[i])[hook.layer()],
        path_by_where,
    ],
    ioi.copying_score: [
        copying_by_rank,
        copying_by_loop,
        lambda r, v, o, u, n, k: (n == (r @ v @ o @ u).topk(k).indices.T).any(0).double().mean(),
    ],
    ioi.mean_ablation: [
        lambda z, hook, m, keep: z * keep[..., None] + m * ~keep[..., None],
        lambda z, hook, m, keep: put(z, ~keep, m[~keep]),
        lambda z, hook, m, keep: torch.where(keep[..., None], z, m.double()),
    ],
    ioi.faithfulness: [
        lambda circuit, model: circuit.mean() / model.mean(),
        lambda circuit, model: float(circuit.sum() / model.sum()),
        lambda circuit, model: sum(circuit.tolist()) / sum(model.tolist()),
    ],
}


def corrupt_in_place(tokens, positions):
    s2, io = positions["S2"][:, None], positions["IO"][:, None]
    return tokens.scatter_(1, s2, tokens.gather(1, io))


def path_into_the_cache(z, hook, original, new, sender):
    original[sender.layer, :, :, sender.head] = new[sender.layer, :, :, sender.head]
    return original[hook.layer()]


# wrong in no way that the exercise lists: told where the output differs
WRONG = [
    (induction.per_token_loss, lambda x, t: loss_by_loop(x, t) / 0.6931, "off by up to"),
    (induction.induction_score, lambda p, n: stripe_by_loop(p, n).amax(0), "got shape [3]"),
    (induction.previous_token_score, lambda p: p[..., 1, 0], "off by up to"),
    (induction.sharpest_drop, lambda s, x, w: drop_by_loop(s, x, w) / 2, "off by up to"),
    (induction.composition_score, lambda v, o, q, k: v @ o, "got shape [12, 12], want []"),
    (induction.eigenvalue_copying, lambda e, v, o, u: torch.tensor(0j), "numbers of type"),
    (induction.icl_score, lambda x, e, late: x[:, late - 1] / x[:, e - 1], "off by up to"),
    (
        induction.zero_ablation,
        lambda z, _, h: put(z + 0, s_[..., h, :], 0),
        "the edited copy",
    ),
    (induction.mean_ablation, lambda z, hook, h, r: r.mean(0), "got shape [4, 3, 5]"),
    (induction.normalised_effect, lambda p, clean, bad: (p - bad) / (clean + 1), "off by up to"),
    (induction.patch_head_input, lambda x, hook, c, h, n: x[:, :, h], "got shape [2, 4, 5]"),
    (ioi.logit_difference, lambda x, a: difference_by_rows(x, a).abs(), "off by up to"),
    (ioi.direct_attribution, lambda z, w, s, d: z @ w / s, "raised RuntimeError"),
    (ioi.corrupt_s2, corrupt_in_place, "work on a copy"),
    (ioi.patch_head, lambda z, hook, clean, head: clean[:, :, head], "got shape"),
    (ioi.patch_position, lambda x, hook, clean, at: (x + clean) / 2, "off by up to"),
    (ioi.path_patch_hook, path_into_the_cache, "work on a copy"),
    (ioi.copying_score, lambda r, v, o, u, names, k: k / len(names), "off by up to"),
    (ioi.mean_ablation, lambda z, hook, m, keep: z / 0 * keep[..., None], "values are NaN"),
    (ioi.faithfulness, lambda c, m: (c.median() / m.median()).item(), "off by up to"),
]


def name(part):
    return getattr(part, "__name__", str(part))


@pytest.mark.parametrize(
    ("check", "answer"), [(c, a) for c, answers in RIGHT.items() for a in answers], ids=name
)
def test_right_answers_are_right(check, answer, capsys):
    check(answer)
    assert capsys.readouterr().out == f"{check}: right.\n"


@pytest.mark.parametrize(("check", "answer", "text"), WRONG, ids=name)
def test_other_wrong_answers_are_told_what_is_wrong(check, answer, text, capsys):
    check(answer)
    said = capsys.readouterr().out
    assert said.startswith(f"{check}: not right yet. ")
    assert text in said


@pytest.mark.parametrize("check", RIGHT, ids=str)
def test_a_forgotten_return_is_told(check, capsys):
    check(lambda *args: None)
    assert "return" in capsys.readouterr().out


def test_every_exercise_is_answered():
    exercises = {*induction.EXERCISES.all.values(), *ioi.EXERCISES.all.values()}
    assert exercises == set(RIGHT) == {check for check, *_ in WRONG}
    assert min(map(len, RIGHT.values())) >= 3
