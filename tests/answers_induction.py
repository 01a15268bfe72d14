"""The induction notebook's exercises, answered as learners would: right in many styles, and wrong.

`RIGHT`: exercise -> right answers. `WRONG`: exercise, an answer wrong in no way that the exercise
lists, and a part of what it is told.
"""

import math
import random
from functools import partial

import numpy as np
import torch
from einops import einsum, rearrange, reduce
from numpy import s_
from torch.linalg import eigvals, norm
from torch.nn import functional

from utils import ablation, heads, metrics, patching, power_law, weights
from utils.edits import Edit, Run, heads_from, hooks, record
from utils.exercises.exercise import set_at

# The length of the residual stream


def norms_by_hook(model, tokens):
    found = torch.zeros(model.cfg.n_layers)

    def measure(stream, hook):
        assert hook.name == f"blocks.{hook.layer()}.hook_in"
        found[hook.layer()] = stream.norm(dim=-1).mean()

    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.cfg.n_layers)]
    model.run_with_hooks(tokens, fwd_hooks=[(name, measure) for name in names])
    return found


def norms_under_hooks(model, tokens):
    found = []
    keep = lambda x, hook: found.append(x.double().pow(2).sum(-1).sqrt().mean().item())  # noqa: E731
    with model.hooks(fwd_hooks=[(lambda name: name.endswith("hook_resid_pre"), keep)]):
        model(tokens)
    return torch.tensor(found)


def norms_by_cache(model, tokens):
    cache = model.run_with_cache(tokens)[1]
    streams = torch.stack([cache["resid_pre", la] for la in range(model.cfg.n_layers)])
    return reduce(streams.norm(dim=-1), "layer prompt pos -> layer", "mean")


def norms_by_loop(model, tokens):
    found = []
    for layer in range(model.cfg.n_layers):
        name = f"blocks.{layer}.hook_resid_pre"
        cache = model.run_with_cache(tokens, names_filter=[name])[1]
        found.append(np.mean([[v.norm().item() for v in row] for row in cache[name]]))
    return torch.tensor(found)


def norms_before_and_after(model, tokens):
    """After the layer below is before this one."""
    kept = {}
    first = [("blocks.0.hook_resid_pre", lambda x, hook: kept.update(start=x))]
    rest = [
        (f"blocks.{la}.hook_resid_post", lambda x, hook: kept.update({hook.layer(): x}))
        for la in range(model.cfg.n_layers - 1)
    ]
    model.run_with_hooks(tokens, fwd_hooks=first + rest)
    return torch.stack([x.norm(dim=2).flatten().mean() for x in kept.values()])


# The loss of each token


def loss_by_loop(logits, tokens):
    losses = torch.zeros(len(tokens), tokens.shape[1] - 1)
    for prompt, pos in ((i, j) for i in range(len(tokens)) for j in range(tokens.shape[1] - 1)):
        row = logits[prompt, pos].double()
        losses[prompt, pos] = row.logsumexp(0) - row[tokens[prompt, pos + 1]]
    return losses


def loss_by_one_hot(logits, tokens):
    picked = functional.one_hot(tokens[:, 1:], logits.shape[-1])
    return einsum(-logits[:, :-1].log_softmax(-1), picked.float(), "b p v, b p v -> b p")


def loss_by_index(logits, tokens):
    rows, columns = torch.arange(len(tokens))[:, None], torch.arange(tokens.shape[1] - 1)
    logits = logits - logits.logsumexp(-1, keepdim=True)
    return -logits[rows, columns, tokens[:, 1:]]


# The repeats


def repeats_by_list(pool, start, n_prompts, seq_len, seed):
    generator, rows = torch.Generator().manual_seed(seed), []
    for _ in range(n_prompts):
        copy = pool[torch.randperm(len(pool), generator=generator)][:seq_len].tolist()
        rows.append([start, *copy, *copy])
    return torch.tensor(rows)


def repeats_in_place(pool, start, n_prompts, seq_len, seed):
    generator = torch.Generator()
    generator.manual_seed(seed)
    tokens = torch.full((n_prompts, 1 + 2 * seq_len), start, dtype=torch.int64)
    for row in tokens:
        row[1:] = pool[torch.randperm(len(pool), generator=generator)[:seq_len]].repeat(2)
    return tokens


def repeats_by_pad(pool, start, n, seq_len, seed):
    g = torch.Generator().manual_seed(seed)
    first = torch.stack([torch.randperm(len(pool), generator=g)[:seq_len] for _ in range(n)])
    return functional.pad(pool[first].tile(2), (1, 0), value=start)


def repeats_by_seeding(pool, start, n, seq_len, seed):
    torch.manual_seed(seed)  # the global generator gives the same numbers
    copies = [pool[torch.randperm(len(pool))[:seq_len]] for _ in range(n)]
    return torch.stack([torch.cat([torch.tensor([start]), c, c]) for c in copies])


def repeats_by_gather(pool, start, n, seq_len, seed):
    g = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(len(pool), generator=g) for _ in range(n)])
    copy = pool.expand(n, -1).gather(1, order[:, :seq_len])
    return torch.cat([copy.new_full((n, 1), start), copy, copy], -1)


# The stripes


def stripes_by_loop(pattern, seq_len):
    result = torch.zeros(*pattern.shape[:2], 3)
    n = pattern.shape[-1]
    for dest in range(1, n):
        result[..., 0] += pattern[:, :, dest, dest - 1] / (n - 1)
    for dest in range(1 + seq_len, n):
        result[..., 1] += pattern[:, :, dest, dest - seq_len] / (n - 1 - seq_len)
        result[..., 2] += pattern[:, :, dest, dest - seq_len + 1] / (n - 1 - seq_len)
    return result


def stripes_by_mask(pattern, seq_len):
    dest, src = torch.meshgrid(*[torch.arange(pattern.shape[-1])] * 2, indexing="ij")
    masks = [
        dest - src == 1,
        (dest - src == seq_len) & (dest > seq_len),
        (dest - src == seq_len - 1) & (dest > seq_len),
    ]
    return torch.stack([(pattern * m).sum((-2, -1)) / m.sum() for m in masks], -1)


def stripes_by_rows(pattern, seq_len):
    later = pattern.double()[:, :, 1 + seq_len :]
    main = dict(dim1=-2, dim2=-1)
    previous = pattern[..., 1:, :].diagonal(**main).mean(-1)
    same, after = (later[..., first:].diagonal(**main).mean(-1) for first in (1, 2))
    return torch.stack([previous.double(), same, after], dim=2)


def stripes_by_gather(pattern, seq_len):
    dest = torch.arange(1 + seq_len, pattern.shape[-1])
    every = torch.arange(1, pattern.shape[-1])
    picked = [pattern[..., every, every - 1], pattern[..., dest, dest - seq_len]]
    picked.append(pattern[..., dest, dest - seq_len + 1])
    return torch.cat([x.mean(-1, keepdim=True) for x in picked], -1)


def stripes_by_library(pattern, seq_len):
    later = (heads.duplicate_token_score, heads.induction_score)
    first = heads.previous_token_score(pattern)
    return torch.stack([first, *(score(pattern, seq_len=seq_len) for score in later)], dim=-1)


# Every head


def every_head_by_hook(model, tokens, score):
    by_layer = {}

    def keep(pattern, hook):
        assert hook.name.endswith("hook_pattern")
        by_layer[hook.layer()] = score(pattern)

    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    model.run_with_hooks(tokens, fwd_hooks=[(name, keep) for name in names])
    return torch.stack([by_layer[layer] for layer in range(model.cfg.n_layers)], dim=1)


def every_head_by_cache(model, tokens, score):
    cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("pattern"))[1]
    return torch.stack([score(cache["pattern", la]) for la in range(model.cfg.n_layers)], 1)


def every_head_by_writing(model, tokens, score):
    result = None

    def write(pattern, hook):
        nonlocal result
        print(hook.name)
        values = score(pattern.clone())
        if result is None:
            shape = (model.cfg.n_layers, *values.shape)
            result = torch.zeros(shape, dtype=torch.float64)
        result[hook.layer()] = values
        return pattern

    with model.hooks(fwd_hooks=[(lambda n: n.endswith("attn.hook_pattern"), write)]):
        model(tokens)
    return result.transpose(0, 1)


def every_head_by_prompt(model, tokens, score):
    rows = [every_head_by_cache(model, row[None], score) for row in tokens]
    return torch.cat(rows)


def every_head_in_order(model, tokens, score):
    found = []
    add = lambda p, hook: found.append(score(p))  # noqa: E731
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(model.cfg.n_layers)]
    model.run_with_hooks(tokens, fwd_hooks=[(n, add) for n in names])
    return rearrange(found, "layer prompt ... -> prompt layer ...")


# Prefix matching


def prefix_by_loop(pattern, tokens):
    result = torch.zeros(pattern.shape[:2])
    for prompt, row in enumerate(tokens.tolist()):
        n = 0
        for dest, token in enumerate(row):
            places = [src for src in range(1, dest + 1) if row[src - 1] == token]
            n += bool(places)
            for src in places:
                result[prompt] += pattern[prompt, :, dest, src]
        result[prompt] /= n
    return result


def prefix_by_roll(pattern, tokens):
    copies = (tokens[..., None] == tokens[:, None]).tril(-1)
    after = copies.roll(1, dims=-1)
    after[..., 0] = False
    return einsum(pattern, after.float(), "b h d s, b d s -> b h") / after.any(2).sum(1)[:, None]


def prefix_by_columns(pattern, tokens):
    same = tokens[:, None, :-1] == tokens[:, :, None]  # [prompt dest, token before src]
    n = tokens.shape[1]
    same &= torch.arange(n - 1) < torch.arange(n)[:, None]
    total = torch.einsum("bhds,bds->bh", pattern[..., 1:].double(), same.double())
    return total / same.any(-1).sum(-1, keepdim=True)


def prefix_by_row(pattern, tokens):
    means = []
    for p, t in zip(pattern, tokens, strict=True):
        after = functional.pad((t[:, None] == t).tril(-1)[:, :-1], (1, 0))
        by_dest = (p * after).sum(-1)  # [head dest]
        means.append(by_dest[:, after.any(-1)].mean(-1))
    return torch.stack(means)


def prefix_by_places(pattern, tokens):
    copies = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
    prompt, dest, copy = copies.nonzero(as_tuple=True)
    total = torch.zeros(pattern.shape[:2])
    total.index_add_(0, prompt, pattern[prompt, :, dest, copy + 1])
    return (
        total
        / torch.tensor([len(set(dest[prompt == i].tolist())) for i in range(len(tokens))])[:, None]
    )


def prefix_by_sources(pattern, tokens):
    """As many places stand after a copy that comes again as destinations have one."""
    after = (tokens[:, :, None] == tokens[:, None]).tril(-1).roll(1, -1)
    return (pattern * after[:, None]).sum((2, 3)) / after.any(1).sum(-1, keepdim=True)


# The sharpest drop


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


def drop_by_numpy(steps, loss, window):
    s, x = steps.numpy(), loss.numpy().astype(np.float64)
    i = np.argmin((x[window:] - x[:-window]) / (s[window:] - s[:-window]))
    return s[[i, i + window]].mean()


def drop_by_windows(steps, loss, window):
    s, x = steps.unfold(0, window + 1, 1), loss.unfold(0, window + 1, 1)
    i = ((x[:, -1] - x[:, 0]) / (s[:, -1] - s[:, 0])).argmin()
    return s[i, [0, -1]].double().mean()


# Cut one input


def cut_by_library(model, tokens, senders, receivers, measure):
    gone = heads_from(model, senders, ablation.mean_run(model, tokens))
    without = record(model, tokens, ["q", "k", "v"], gone)
    return torch.stack([measure(hooks(heads_from(model, receivers, without, s))) for s in "qkv"])


def cut_by_hand(model, tokens, senders, receivers, measure):
    cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("hook_z"))[1]

    def take_out(z, hook, head):
        z[:, :, head] = cache["z", hook.layer()][:, :, head].mean(0)
        return z

    out = [(f"blocks.{la}.attn.hook_z", partial(take_out, head=h)) for la, h in senders]
    with model.hooks(fwd_hooks=out):
        without = model.run_with_cache(tokens)[1]

    def put(x, hook, head, site):
        x[:, :, head] = without[site, hook.layer()][:, :, head]

    results = []
    for site in ("q", "k", "v"):
        hook = [
            (f"blocks.{la}.attn.hook_{site}", partial(put, head=h, site=site))
            for la, h in receivers
        ]
        results.append(measure(hook))
    return torch.stack(results)


def cut_by_edits(model, tokens, senders, receivers, measure):
    z = record(model, tokens, ["z"]).activations
    usual = Run({name: x.double().mean(0, keepdim=True).float() for name, x in z.items()})
    without = record(model, tokens, ("v", "k", "q"), heads_from(model, senders, usual))
    rows = {s: measure(hooks(heads_from(model, receivers, without, s))) for s in ("v", "q", "k")}
    return torch.stack([rows["q"], rows["k"], rows["v"]])


def cut_by_where(model, tokens, senders, receivers, measure):
    usual = ablation.mean_run(model, tokens)
    without = record(model, tokens, ["q", "k", "v"], heads_from(model, senders, usual)).activations
    rows = []
    for site in "qkv":
        edits = []
        for layer, head in receivers:
            name = f"blocks.{layer}.attn.hook_{site}"
            where = (torch.arange(model.cfg.n_heads) == head)[None, None, :, None]
            edits.append(Edit(name, where, Run(without)))
        rows.append(measure(hooks(edits)).tolist())
    return torch.tensor(rows)


def cut_one_by_one(model, tokens, senders, receivers, measure):
    """A run without the senders for each input, and the receivers by layer."""
    edits = heads_from(model, senders, ablation.mean_run(model, tokens))
    result = torch.zeros(3, len(measure([])), dtype=torch.float64)
    for i, site in enumerate(["q", "k", "v"]):
        without = record(model, tokens, [site], edits)
        by_head = [e for r in receivers for e in heads_from(model, [r], without, site)]
        result[i] = measure(hooks(by_head))
    return result


# The QK circuit through the previous-token heads


def match_by_matrices(model, writers, reader):
    w_ov = sum(model.W_V[h.layer, h.head] @ model.W_O[h.layer, h.head] for h in writers)
    queries = model.W_E @ model.W_Q[reader.layer, reader.head]
    return queries @ (model.W_E @ w_ov @ model.W_K[reader.layer, reader.head]).T


def match_by_einsum(model, writers, reader):
    layers, numbers = map(list, zip(*writers, strict=True))
    left = einsum(
        model.W_E, model.W_V[layers, numbers], model.W_O[layers, numbers],
        "token d, n d h, n h e -> token e",
    )  # fmt: skip
    w_qk = model.W_Q[reader] @ model.W_K[reader].T
    return einsum(model.W_E, w_qk, left, "query d, d e, token e -> query token")


def match_in_double(model, writers, reader):
    e = model.W_E.double()
    result = torch.zeros(len(e), len(e), dtype=torch.float64)
    for layer, head in writers:
        left = e @ model.W_V[layer, head].double() @ model.W_O[layer, head].double()
        keys = left @ model.W_K[reader[0], reader[1]].double()
        result = result + e @ model.W_Q[reader[0], reader[1]].double() @ keys.T
    return result


def match_by_weights(model, writers, reader):
    (w_q,), (w_k,) = weights.qk_weights(model, [reader])
    w_v, w_o = weights.ov_weights(model, writers)
    return (model.W_E @ w_q) @ (model.W_E @ (w_v @ w_o).sum(0) @ w_k).mT


def match_by_rows(model, writers, reader):
    w_qk = model.blocks[reader.layer].attn.W_Q[reader.head] @ (
        model.blocks[reader.layer].attn.W_K[reader.head].T
    )
    left = sum(
        model.W_E @ model.blocks[la].attn.W_V[h] @ model.blocks[la].attn.W_O[h] for la, h in writers
    )
    return torch.stack([left @ (row @ w_qk) for row in model.W_E])


# The in-context-learning score


def icl_by_loop(loss, early, late, window):
    result = torch.zeros(len(loss))
    for d in range(-window, window + 1):
        result += (loss[:, late - 1 + d] - loss[:, early - 1 + d]) / (2 * window + 1)
    return result


def icl_by_index(loss, early, late, window):
    near = torch.arange(-window, window + 1) - 1
    return (loss[:, late + near] - loss[:, early + near]).double().mean(-1)


def icl_by_unfold(loss, early, late, window):
    smooth = loss.unfold(1, 2 * window + 1, 1).mean(-1)  # entry i is about token i + 1 + window
    return smooth[:, late - 1 - window] - smooth[:, early - 1 - window]


# The copying score of one head


def copying_by_matrices(model, tokens, layer, head):
    names = [f"blocks.{layer}.attn.hook_{site}" for site in ("pattern", "v")]
    kept = model.run_with_cache(tokens, names_filter=names)[1]
    attention = kept[names[0]][:, head, :, 1:].sum(1)
    v = kept[names[1]][:, 1:]
    v = v[:, :, head // (model.cfg.n_heads // v.shape[2])]
    written = v @ model.blocks[layer].attn.W_O[head]
    raises = (model.W_U - model.W_U.mean(1, keepdim=True)).T[tokens[:, 1:]]
    raised = (written @ raises.mT).relu()
    own = (attention * raised.diagonal(dim1=1, dim2=2)).sum(1)
    return 2 * own / (attention * raised.sum(2)).sum(1) - 1


def copying_by_loop(model, tokens, layer, head):
    cache, scores = model.run_with_cache(tokens)[1], []
    v = cache["v", layer][:, :, head * cache["v", layer].shape[2] // model.cfg.n_heads]
    for i, row in enumerate(tokens):
        right = total = 0.0
        for src in range(1, len(row)):
            weight = cache["pattern", layer][i, head, :, src].sum().item()
            logits = v[i, src] @ model.W_O[layer, head] @ model.W_U
            raised = (logits - logits.mean()).clamp(min=0)[row[1:]]
            right += weight * raised[src - 1].item()
            total += weight * raised.sum().item()
        scores.append(2 * right / total - 1)
    return torch.tensor(scores)


def copying_by_logits(model, tokens, layer, head):
    run = record(model, tokens, ["pattern", "v"]).activations
    v = run[f"blocks.{layer}.attn.hook_v"]
    v = v[:, 1:, head * v.shape[2] // model.cfg.n_heads].double()
    logits = v @ model.W_O[layer, head].double() @ model.W_U.double()
    logits = logits - logits.mean(-1, keepdim=True)
    index = tokens[:, None, 1:].expand(-1, v.shape[1], -1)
    raised = logits.gather(2, index).clamp_min(0)  # [prompt src token]
    attention = run[f"blocks.{layer}.attn.hook_pattern"][:, head, :, 1:].double()
    weighted = einsum(attention, raised, "p dest src, p src token -> p src token")
    share = weighted.diagonal(dim1=1, dim2=2).sum(-1) / weighted.sum((1, 2))
    return 2 * share - 1


def copying_by_hooks(model, tokens, layer, head):
    kept = {}
    names = [f"blocks.{layer}.attn.hook_{site}" for site in ("pattern", "v")]

    def keep(x, hook):
        print(hook.name)
        kept[hook.name.split("_")[-1]] = x

    model.run_with_hooks(tokens, fwd_hooks=[(names[0], keep), (names[1], keep)])
    v = next(x for name, x in kept.items() if name != "pattern")
    raises = model.W_U.mT[tokens[:, 1:]] - model.W_U.mean(-1)
    w_o = model.W_O[layer, head]
    v = v.repeat_interleave(model.cfg.n_heads // v.shape[2], dim=2)
    raised = torch.einsum("psd,dm,ptm->pst", v[:, 1:, head], w_o, raises).relu()
    attention = kept["pattern"][:, head, :, 1:].sum(1)
    own = torch.einsum("ps,pss->p", attention, raised)
    return 2 * own / torch.einsum("ps,pst->p", attention, raised) - 1


def copying_by_library(model, tokens, layer, head):
    return weights.copying_score(model, tokens)[:, layer, head]


# The ablation experiment


def experiment(model, tokens, others, chosen, seed):
    generator, control = torch.Generator().manual_seed(seed), []
    for layer, _ in chosen:
        same_layer = [(layer, head) for head in range(model.cfg.n_heads)]
        free = [h for h in same_layer if h not in chosen and h not in control]
        control.append(free[int(torch.randint(len(free), (1,), generator=generator))])
    kept = model.run_with_cache(others, names_filter=lambda name: name.endswith("hook_z"))[1]
    losses = []
    for group in ([], chosen, control):
        fwd_hooks = []
        for layer, head in group:
            usual = kept["z", layer][:, :, head].mean(0)
            hook = lambda z, hook, head=head, usual=usual: put(z, s_[:, :, head], usual)  # noqa: E731
            fwd_hooks.append((f"blocks.{layer}.attn.hook_z", hook))
        by_token = loss_by_index(model.run_with_hooks(tokens, fwd_hooks=fwd_hooks), tokens)
        losses.append(by_token[:, by_token.shape[1] // 2 + 1 :].mean(1))
    return torch.stack(losses), control


def drawn_with_random(model, chosen, seed):
    """Layer by layer, with Python's own random numbers."""
    numbers, drawn = random.Random(seed), []
    for layer in sorted({layer for layer, _ in chosen}):
        taken = [head for la, head in chosen if la == layer]
        free = [head for head in range(model.cfg.n_heads) if head not in taken]
        drawn += [(layer, head) for head in numbers.sample(free, len(taken))]
    return drawn


def experiment_by_edits(model, tokens, others, chosen, seed, control=drawn_with_random):
    usual, drawn = ablation.mean_run(model, others), control(model, chosen, seed)
    edits = {"none": [], "them": heads_from(model, chosen, usual)}
    edits["control"] = heads_from(model, drawn, usual)
    seq_len = (tokens.shape[1] - 1) // 2
    losses = [metrics.per_token_loss(model, tokens, hooks(e)) for e in edits.values()]
    return torch.stack([metrics.half_losses(x, seq_len).second for x in losses]), drawn


def experiment_by_library(model, tokens, others, chosen, seed):
    draw = lambda model, out, seed: ablation.random_control(model, out, 1, seed)[0]  # noqa: E731
    return experiment_by_edits(model, tokens, others, chosen, seed, draw)


def drawn_with_numpy(model, chosen, seed):
    rng, chosen = np.random.default_rng(seed), [tuple(head) for head in chosen]
    drawn = []
    for layer, _ in chosen:
        order = [(layer, int(h)) for h in rng.permutation(model.cfg.n_heads)]
        drawn.append(next(h for h in order if h not in chosen + drawn))
    return drawn


def experiment_in_double(model, tokens, others, chosen, seed):
    losses, drawn = experiment_by_edits(model, tokens, others, chosen, seed, drawn_with_numpy)
    return losses.double(), [list(head) for head in drawn]


def experiment_under_hooks(model, tokens, others, chosen, seed):
    with model.hooks(fwd_hooks=[]):
        z = model.run_with_cache(others)[1]
    control = [heads.Head(*head) for head in drawn_with_random(model, chosen, seed)]

    def ablated(group):
        def edit(x, hook):
            for _, head in (h for h in group if h[0] == hook.layer()):
                x = set_at(x, s_[:, :, head], z["z", hook.layer()].mean(0)[:, head])
            return x

        with model.hooks(fwd_hooks=[(lambda name: name.endswith("hook_z"), edit)]):
            return loss_by_one_hot(model(tokens), tokens)

    second = slice((tokens.shape[1] - 1) // 2 + 1, None)
    return [ablated(group)[:, second].mean(1) for group in ([], chosen, control)], control


# The normalised effect


def effect_by_reshape(patched, clean, corrupted):
    start = corrupted.reshape(-1, *[1] * (patched.ndim - 1))
    return (patched - start) / (clean - corrupted).mean()


def effect_by_loop(patched, clean, corrupted):
    gap = sum((c - k).item() for c, k in zip(clean, corrupted, strict=True)) / len(clean)
    return torch.stack([(p - k) / gap for p, k in zip(patched, corrupted, strict=True)])


def effect_from_the_top(patched, clean, corrupted):
    gap = clean.mean() - corrupted.mean()
    return ((patched.mT if patched.ndim == 2 else patched.movedim(0, -1)) - corrupted).movedim(
        -1, 0
    ).double() / gap


# The sweep over heads


def sweep_by_loop(model, clean, corrupted, metric, layers):
    names = [f"blocks.{layer}.attn.hook_z" for layer in layers]
    kept, values = model.run_with_cache(clean, names_filter=names)[1], []
    for name in names:
        for head in range(model.cfg.n_heads):
            patch = lambda z, hook, head=head: put(z, s_[:, :, head], kept[hook.name][:, :, head])  # noqa: E731
            values.append(metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, patch)])))
    return torch.stack(values, dim=1).unflatten(1, (len(layers), model.cfg.n_heads))


def sweep_by_writing(model, clean, corrupted, metric, layers):
    cache = model.run_with_cache(clean)[1]
    result = torch.zeros(len(clean), len(layers), model.cfg.n_heads, dtype=torch.float64)
    for i, layer in enumerate(layers):
        for head in range(model.cfg.n_heads):

            def patch(z, hook, head=head):
                assert hook.name == f"blocks.{hook.layer()}.attn.hook_z"
                z = z.clone()
                z[..., head, :] = cache["z", hook.layer()][..., head, :]
                return z

            with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", patch)]):
                result[:, i, head] = metric(model(corrupted))
    return result


def sweep_by_edits(model, clean, corrupted, metric, layers):
    run = record(model, clean, ["z"])

    def patched(layer, head):
        edits = heads_from(model, [(layer, head)], run)
        return metric(model.run_with_hooks(corrupted, fwd_hooks=hooks(edits)))

    rows = [torch.stack([patched(la, h) for h in range(model.cfg.n_heads)], 1) for la in layers]
    return torch.stack(rows, dim=1)


def sweep_by_library(model, clean, corrupted, metric, layers):
    return patching.patch_heads(model, clean, corrupted, metric)[:, layers]


def sweep_prompt_by_prompt(model, clean, corrupted, metric, layers):
    """All heads of a layer in one batch of copies of the prompts."""
    n, columns = model.cfg.n_heads, []
    for layer in layers:
        name = f"blocks.{layer}.attn.hook_z"
        kept = model.run_with_cache(clean, names_filter=[name])[1][name]
        for head in range(n):
            chosen_head = (torch.arange(n) == head)[:, None]
            patch = lambda z, hook, c=chosen_head, kept=kept: torch.where(c, kept, z)  # noqa: E731
            columns.append(metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, patch)])))
    return rearrange(columns, "(layer head) prompt -> prompt layer head", head=n)


# Three inputs


def inputs_by_loop(model, clean, corrupted, metric, group):
    values = []
    for site in ("q", "k", "v"):
        names = [f"blocks.{layer}.attn.hook_{site}" for layer, _ in group]
        kept, fwd_hooks = model.run_with_cache(clean, names_filter=names)[1], []
        for name, (_, head) in zip(names, group, strict=True):
            index = head // (model.cfg.n_heads // kept[name].shape[2])
            fill = lambda x, hook, i=index, c=kept[name]: put(x, s_[:, :, i], c[:, :, i])  # noqa: E731
            fwd_hooks.append((name, fill))
        values.append(metric(model.run_with_hooks(corrupted, fwd_hooks=fwd_hooks)))
    return torch.stack(values)


def inputs_by_edits(model, clean, corrupted, metric, group):
    run = record(model, clean, ["q", "k", "v"])
    shared = [heads.key_value_head(model, head) for head in group]
    edits = [heads_from(model, group if s == "q" else shared, run, s) for s in "qkv"]
    runs = [model.run_with_hooks(corrupted, fwd_hooks=hooks(edit)) for edit in edits]
    return torch.stack([metric(logits) for logits in runs]).double()


def inputs_under_hooks(model, clean, corrupted, metric, group):
    cache, result = model.run_with_cache(clean)[1], torch.zeros(3, len(clean))
    for i, site in enumerate(["q", "k", "v"]):

        def patch(x, hook, site=site):
            for _, head in (h for h in group if h[0] == hook.layer()):
                n = x.shape[2]
                x[:, :, head * n // model.cfg.n_heads] = cache[site, hook.layer()][
                    :, :, head * n // model.cfg.n_heads
                ]
            return x

        names = {f"blocks.{layer}.attn.hook_{site}" for layer, _ in group}
        with model.hooks(fwd_hooks=[(name, patch) for name in names]):
            result[i] = metric(model(corrupted))
    return result


def inputs_by_where(model, clean, corrupted, metric, group):
    cache, values = model.run_with_cache(clean)[1], []
    for site in "qkv":
        by_layer = {}
        for layer, head in group:
            by_layer.setdefault(layer, set()).add(head)
        fwd_hooks = []
        for layer, numbers in by_layer.items():
            kept = cache[site, layer]
            sharing = torch.arange(model.cfg.n_heads).view(kept.shape[2], -1).tolist()
            mask = torch.tensor([not numbers.isdisjoint(heads) for heads in sharing])[:, None]
            swap = lambda x, hook, mask=mask, kept=kept: torch.where(mask, kept, x)  # noqa: E731
            fwd_hooks.append((f"blocks.{layer}.attn.hook_{site}", swap))
        values.append(metric(model.run_with_hooks(corrupted, fwd_hooks=fwd_hooks)).tolist())
    return torch.tensor(values)


def inputs_in_another_order(model, clean, corrupted, metric, group):
    found = {}
    for site in ("v", "k", "q"):
        run = record(model, clean, [site])
        read = group if site == "q" else [heads.key_value_head(model, head) for head in group]
        edits = [e for head in reversed(read) for e in heads_from(model, [head], run, site)]
        found[site] = metric(model.run_with_hooks(corrupted, fwd_hooks=hooks(edits)))
    return torch.stack([found["q"], found["k"], found["v"]])


# Shared


def put(x, where, values):
    """An edit in place, by a hook that returns nothing."""
    x[where] = values


def chosen(z, head):
    """True at one head of [prompt pos head d_head]."""
    return (torch.arange(z.shape[2]) == head)[:, None]


def share(values):
    """How much of the eigenvalues' size is their sum."""
    return (values.sum() / values.abs().sum()).real


def ablate_with_name(z, hook, head, value):
    print(hook.name)
    assert hook.name == f"blocks.{hook.layer()}.attn.hook_z"
    z[:, :, head] = value
    return z


def ablate_by_loop(z, hook, head, value):
    for prompt in z:
        for pos in range(len(prompt)):
            prompt[pos, head] = value[pos] if isinstance(value, torch.Tensor) else value
    return z


def ablate_by_cat(z, hook, head, value):
    new = torch.as_tensor(value).expand_as(z[:, :, head])[:, :, None]
    return torch.cat([z[:, :, :head], new, z[:, :, head + 1 :]], dim=2)


def patch_input_by_list(x, hook, clean, head, n_heads):
    uses = [query // (n_heads // x.shape[2]) for query in range(n_heads)]
    x = x.clone()
    x[:, :, uses[head]] = clean[:, :, uses[head]]
    return x


SIZES = (
    norm,
    lambda m: (m @ m.T).trace().sqrt(),
    lambda m: m.square().sum().sqrt().item(),
    lambda m: math.sqrt(sum(x * x for row in m.tolist() for x in row)),
    lambda m: torch.linalg.svdvals(m.double()).square().sum().sqrt(),
)
# The exponent of a power law


def exponent_by_lstsq(x, y):
    columns = torch.stack([x.log2(), torch.ones_like(x)], dim=1)
    return torch.linalg.lstsq(columns, y.log2()[:, None]).solution[0, 0]


def exponent_by_loop(x, y):
    a, b = [math.log10(v) for v in x], [math.log10(v) for v in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    across = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True))
    return across / sum((p - mean_a) ** 2 for p in a)


def exponent_by_descent(x, y):
    a, b = x.log() - x.log().mean(), y.log() - y.log().mean()
    slope = 0.0
    for _ in range(300):
        slope += 0.5 * (a * (b - slope * a)).mean() / a.square().mean()
    return slope


RIGHT = {
    "stream_norms": [
        norms_by_hook,
        norms_under_hooks,
        norms_by_cache,
        norms_by_loop,
        norms_before_and_after,
    ],
    "per_token_loss": [
        lambda x, t: functional.cross_entropy(x[:, :-1].mT, t[:, 1:], reduction="none"),
        loss_by_loop,
        loss_by_one_hot,
        loss_by_index,
        lambda x, t: -torch.distributions.Categorical(logits=x[:, :-1]).log_prob(t[:, 1:]),
        lambda x, t: -x.double().log_softmax(-1)[:, :-1].gather(2, t[:, 1:, None]).squeeze(2),
    ],
    "build_repeats": [
        repeats_by_list,
        repeats_in_place,
        repeats_by_pad,
        repeats_by_seeding,
        repeats_by_gather,
    ],
    "stripe_scores": [
        stripes_by_loop,
        stripes_by_mask,
        stripes_by_rows,
        stripes_by_gather,
        stripes_by_library,
    ],
    "score_every_head": [
        every_head_by_hook,
        every_head_by_cache,
        every_head_by_writing,
        every_head_by_prompt,
        every_head_in_order,
    ],
    "prefix_matching": [
        prefix_by_loop,
        prefix_by_roll,
        prefix_by_columns,
        prefix_by_row,
        prefix_by_places,
        prefix_by_sources,
    ],
    "sharpest_drop": [
        drop_by_loop,
        drop_by_argmax,
        drop_by_minimum,
        drop_by_numpy,
        drop_by_windows,
    ],
    "cut_inputs": [cut_by_library, cut_by_hand, cut_by_edits, cut_by_where, cut_one_by_one],
    "composition_score": [
        lambda v, o, q, k, size=size: size(v @ o @ k @ q.T) / size(v @ o) / size(q @ k.T)
        for size in SIZES
    ],
    "eigenvalue_copying": [
        lambda e, v, o, u: share(eigvals(o @ u @ e @ v)),
        lambda e, v, o, u: share(eigvals((e @ (v @ o) @ u).double())).item(),
        lambda e, v, o, u: (x := (e @ v @ o @ u).double()).trace() / eigvals(x).abs().sum(),
        lambda e, v, o, u: share(torch.linalg.eig((u @ e @ v @ o).double())[0]),
        lambda *w: share(torch.as_tensor(np.linalg.eigvals(torch.linalg.multi_dot(w).numpy()))),
    ],
    "previous_token_match": [
        match_by_matrices,
        match_by_einsum,
        match_in_double,
        match_by_weights,
        match_by_rows,
    ],
    "icl_score": [
        lambda x, e, late, w: (
            x[:, late - 1 - w : late + w].mean(1) - x[:, e - 1 - w : e + w].mean(1)
        ),
        icl_by_loop,
        icl_by_index,
        icl_by_unfold,
        lambda loss, early, late, window: metrics.icl_score(loss, early, late, window),
    ],
    "copying_of_head": [
        copying_by_matrices,
        copying_by_loop,
        copying_by_logits,
        copying_by_hooks,
        copying_by_library,
    ],
    "ablate_head": [
        ablate_with_name,
        ablate_by_loop,
        ablate_by_cat,
        lambda z, hook, head, value: put(z, s_[..., head, :], value),
        lambda z, hook, head, value: set_at(z.double(), s_[:, :, head], value),
    ],
    "ablation_experiment": [
        experiment,
        experiment_by_edits,
        experiment_by_library,
        experiment_in_double,
        experiment_under_hooks,
    ],
    "normalised_effect": [
        effect_by_reshape,
        effect_by_loop,
        effect_from_the_top,
        metrics.normalised_effect,
        lambda p, c, k: (
            einsum(p, torch.ones(()), "i ..., -> i ...") / (c - k).mean()
            - torch.einsum("i,i...->i...", k, torch.ones_like(p)) / (c - k).mean()
        ),
    ],
    "patch_every_head": [
        sweep_by_loop,
        sweep_by_writing,
        sweep_by_edits,
        sweep_by_library,
        sweep_prompt_by_prompt,
    ],
    "patch_head_input": [
        lambda x, hook, c, h, n: torch.where(chosen(x, h // (n // x.shape[2])), c, x),
        lambda x, hook, c, h, n: put(x, s_[:, :, (i := h * x.shape[2] // n)], c[:, :, i]),
        lambda x, hook, c, h, n: set_at(x, s_[..., (i := h // (n // x.shape[2])), :], c[..., i, :]),
        patch_input_by_list,
        lambda x, hook, c, h, n: x.index_copy(
            2, (i := torch.tensor([int(h / n * x.shape[2] + 1e-9)])), c.index_select(2, i)
        ),
    ],
    "patch_inputs": [
        inputs_by_loop,
        inputs_by_edits,
        inputs_under_hooks,
        inputs_by_where,
        inputs_in_another_order,
    ],
    "fit_exponent": [
        lambda x, y: np.polyfit(np.log(x.numpy()), np.log(y.numpy()), 1)[0],
        lambda x, y: torch.cov(torch.stack([x.log(), y.log()]))[0, 1] / x.log().var(),
        exponent_by_lstsq,
        exponent_by_loop,
        exponent_by_descent,
        lambda x, y: power_law.fit_power_law({"x": x}, y, torch.arange(len(x)) * 0)[1]["x"].mean,
    ],
}


def norms_of_last_layer(model, tokens):
    return norms_by_hook(model, tokens)[-1:].expand(model.cfg.n_layers)


def every_head_of_scores(model, tokens, score):
    cache = model.run_with_cache(tokens)[1]
    names = [f"blocks.{layer}.attn.hook_attn_scores" for layer in range(model.cfg.n_layers)]
    return torch.stack([score(cache[name]) for name in names], dim=1)


def repeats_with_last_start(*args):
    tokens = repeats_by_list(*args)
    tokens[-1, 0] = 0
    return tokens


def weights_changed(model, tokens, score):
    with torch.no_grad():
        model.W_E.mul_(2)
    return every_head_by_hook(model, tokens, score)


def hooks_left(model, clean, corrupted, metric, group):
    model.add_hook("blocks.1.attn.hook_q", lambda x, hook: x)
    return inputs_by_loop(model, clean, corrupted, metric, group)


def runs_exchanged(losses, control):
    return losses[[1, 0, 2]], control


def any_heads(model, chosen, seed):
    every = [head for head in heads.all_heads(model) if head not in chosen]
    return random.Random(seed).sample(every, len(chosen))


# wrong in no way that the exercise lists: told by kind, or where the output differs
WRONG = [
    ("stream_norms", lambda m, t: norms_by_hook(m, t) / 2, "2 times too small"),
    ("stream_norms", lambda m, t: norms_by_hook(m, t).cumsum(0), "add up along layer"),
    (
        "stream_norms",
        lambda m, t: norms_by_hook(m, t)[1:],
        "The first entry along layer is missing",
    ),
    ("per_token_loss", lambda x, t: loss_by_loop(x, t) / 0.6931, "to base 2"),
    ("per_token_loss", lambda x, t: loss_by_loop(x, t).mean(0), "average over prompt"),
    ("build_repeats", lambda *a: repeats_by_list(*a).float(), "floating-point"),
    ("build_repeats", repeats_with_last_start, "Right but for"),
    ("stripe_scores", lambda p, n: stripes_by_loop(p, n).mean(0), "average over prompt"),
    ("stripe_scores", lambda p, n: stripes_by_loop(p, n).movedim(-1, 0), "another order"),
    ("score_every_head", lambda *a: every_head_by_hook(*a).flip(1), "back to front along layer"),
    ("score_every_head", weights_changed, "changes the model's weights"),
    ("prefix_matching", lambda p, t: 1 - prefix_by_loop(p, t), "one minus the right ones"),
    ("sharpest_drop", lambda s, x, w: drop_by_loop(s, x, w) / 2, "2 times too small"),
    ("cut_inputs", lambda *a: cut_by_library(*a).flip(0), "back to front along input"),
    ("cut_inputs", lambda *a: cut_by_library(*a)[1], "entry 1 of input alone"),
    ("composition_score", lambda v, o, q, k: v @ o, "wanted is one number"),
    ("eigenvalue_copying", lambda e, v, o, u: torch.tensor(0j), "take the real part"),
    ("previous_token_match", lambda *a: match_by_matrices(*a).T, "transposed"),
    ("previous_token_match", lambda *a: match_by_matrices(*a).softmax(-1), "softmax over token"),
    ("icl_score", lambda x, e, late, w: icl_by_loop(x, e, late, w).mean(), "average over prompt"),
    ("copying_of_head", lambda *a: -copying_by_loop(*a), "signs are turned round"),
    ("ablate_head", lambda z, hook, head, value: z[:, :, head], "Your result has shape"),
    ("ablation_experiment", lambda *a: runs_exchanged(*experiment(*a)), "you have 1, 0, 2"),
    ("normalised_effect", lambda p, c, k: effect_by_loop(p, c, k).clamp(0, 1), "between 0 and 1"),
    ("patch_every_head", lambda *a: sweep_by_loop(*a).mT, "wanted is [3, 2, 3]"),
    ("patch_head_input", lambda x, hook, c, h, n: x[:, :, h % x.shape[2]], "Your result has shape"),
    ("patch_inputs", lambda *a: inputs_by_loop(*a)[[1, 0, 2]], "you have 1, 0, 2"),
    ("stream_norms", norms_of_last_layer, "Every layer gets what belongs to the last"),
    ("per_token_loss", lambda x, t: loss_by_loop(x, t).mean(), "average over everything"),
    ("per_token_loss", lambda x, t: loss_by_loop(x, t).flatten(), "strung together"),
    ("score_every_head", every_head_of_scores, "You hook the attention scores"),
    ("stripe_scores", lambda p, n: stripes_by_loop(p, n) * (p.shape[-1] - 1), "10 times too large"),
    ("ablation_experiment", lambda *a: experiment(*a)[0], "Return two things"),
    ("ablation_experiment", lambda *a: (experiment(*a)[0], a[3]), "holds chosen heads"),
    ("ablation_experiment", lambda *a: experiment(*a[:4], 0), "the same for every seed"),
    (
        "ablation_experiment",
        partial(experiment_by_edits, control=lambda m, out, _: drawn_with_random(m, out, None)),
        "changes from call to call",
    ),
    (
        "ablation_experiment",
        partial(experiment_by_edits, control=any_heads),
        "one from the layer of each",
    ),
    ("fit_exponent", lambda x, y: -exponent_by_loop(x, y), "signs are turned round"),
    ("fit_exponent", lambda x, y: 2 * exponent_by_loop(x, y), "Off by up to"),
    ("patch_inputs", hooks_left, "leaves hooks on the model"),
]
