"""Answers to the exercises of the IOI notebook, as learners write them: right and wrong ones.

`RIGHT` must be accepted; `WRONG` is wrong in no way that the exercises list, with a part of what
the check says about it.
"""

from functools import partial

import numpy as np
import torch
from einops import einsum, rearrange, repeat
from transformer_lens.hook_points import HookPoint

from utils import attribution, circuit, metrics, patching, paths
from utils.edits import heads_from, hooks, record
from utils.exercises.exercise import set_at
from utils.heads import Head, all_heads

ALL = slice(None)

# 1: the logit difference


def difference_by_rows(logits, answers):
    rows = torch.arange(len(logits))
    return logits[rows, -1, answers[:, 0]] - logits[rows, -1, answers[:, 1]]


def difference_by_loop(logits, answers):
    values = []
    for row, (right, wrong) in zip(logits, answers.tolist(), strict=True):
        values.append(float(row[-1, right] - row[-1, wrong]))
    return torch.tensor(values)


def difference_by_one_hot(logits, answers):
    signs = torch.nn.functional.one_hot(answers, logits.shape[-1]).double()
    return einsum(logits[:, -1].double(), signs[:, 0] - signs[:, 1], "p v, p v -> p")


# 2 and 3: lens and attribution


def lens_by_directions(model, tokens, answers):
    n = model.cfg.n_layers
    _, cache = model.run_with_cache(tokens)
    stream = [cache["resid_pre", layer] for layer in range(n)] + [cache["resid_post", n - 1]]
    stream = torch.stack(stream)[:, :, -1].double()  # [stage prompt d_model]
    stream = stream / cache["ln_final.hook_scale"][:, -1]
    direction = model.W_U.T[answers[:, 0]] - model.W_U.T[answers[:, 1]]
    bias = model.b_U[answers[:, 0]] - model.b_U[answers[:, 1]]
    return (einsum(stream, direction.double(), "s p d, p d -> s p") + bias).T


def lens_by_hooks(model, tokens, answers):
    found = {}

    def look(x, hook):
        print(hook.name)
        found[hook.name] = x[:, -1]

    sites = [f"blocks.{n}.hook_{end}" for n in range(model.cfg.n_layers) for end in ("in", "out")]
    model.run_with_hooks(tokens, fwd_hooks=[(n, look) for n in [*sites, "ln_final.hook_scale"]])
    scale = found.pop("ln_final.hook_scale")
    stages = [x for name, x in found.items() if name.endswith("in")] + [found[sites[-1]]]
    logits = torch.stack(stages, 1) / scale[:, None] @ model.W_U + model.b_U
    return torch.stack([difference_by_rows(x[:, None], answers) for x in logits.unbind(1)], dim=1)


def lens_by_cache(model, tokens, answers):
    _, cache = model.run_with_cache(tokens)
    stream = cache.accumulated_resid(incl_mid=False, pos_slice=-1)
    so_far = cache.logit_attrs(stream, answers[:, 0], answers[:, 1], pos_slice=-1)
    return so_far.T + (model.b_U[answers[:, 0]] - model.b_U[answers[:, 1]])[:, None]


def lens_by_loop(model, tokens, answers):
    rows = []
    for prompt, (right, wrong) in zip(tokens, answers, strict=True):
        _, cache = model.run_with_cache(prompt[None])
        n, row = model.cfg.n_layers, []
        for layer in range(n + 1):
            x = cache["resid_pre", layer] if layer < n else cache["resid_post", n - 1]
            logits = model.unembed(x / cache["ln_final.hook_scale"])[0, -1]
            row.append(logits[right] - logits[wrong])
        rows.append(torch.stack(row))
    return torch.stack(rows)


def lens_by_parts(model, tokens, answers):
    """Each layer adds what its attention and its MLP write."""
    parts = attribution.direct_logit_attribution(model, tokens, answers)
    values = dict(zip(parts.labels, parts.values.T, strict=True))
    bias = values.pop("b_U")
    layers = [
        values.pop(f"{n}_attn_out") + values.pop(f"{n}_mlp_out") for n in range(model.cfg.n_layers)
    ]
    start = sum(values.values()) + bias
    return torch.stack([start, *layers], dim=1).cumsum(1)


def heads_by_loop(model, tokens, answers):
    _, cache = model.run_with_cache(tokens)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    values = torch.zeros(len(tokens), n_layers, n_heads)
    for layer in range(n_layers):
        for head in range(n_heads):
            written = cache["z", layer][:, -1, head] @ model.W_O[layer, head]
            written = written / cache["ln_final.hook_scale"][:, -1]
            logits = written @ model.W_U
            values[:, layer, head] = difference_by_rows(logits[:, None], answers)
    return values


def heads_in_float64(model, tokens, answers):
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    _, cache = model.run_with_cache(tokens, names_filter=[*names, "ln_final.hook_scale"])
    z = torch.stack([cache[name][:, -1] for name in names], dim=1).double()
    unit = model.W_U.double()[:, answers] / cache["ln_final.hook_scale"][:, -1]
    towards = unit[..., 0] - unit[..., 1]  # [d_model prompt]
    return einsum(z, model.W_O.double(), towards, "p l h d, l h d m, m p -> p l h")


def heads_by_results(model, tokens, answers):
    _, cache = model.run_with_cache(tokens)
    results = cache.stack_head_results(pos_slice=-1)
    values = cache.logit_attrs(results, answers[:, 0], answers[:, 1], pos_slice=-1)
    return rearrange(values, "(l h) p -> p l h", h=model.cfg.n_heads)


def heads_by_layer(model, tokens, answers):
    _, cache = model.run_with_cache(tokens)
    direction = model.W_U.T[answers].diff(dim=1)[:, 0].neg()
    layers = []
    for layer, block in enumerate(model.blocks):
        written = torch.einsum("phd,hdm->phm", cache["z", layer][:, -1], block.attn.W_O)
        layers.append((written * direction[:, None]).sum(-1))
    return torch.stack(layers, dim=1) / cache["ln_final.hook_scale"][:, -1, None]


def heads_by_projections(model, tokens, answers):
    written = attribution.head_projections(model, tokens, all_heads(model), answers)
    return rearrange(written[:, 0] - written[:, 1], "p (l h) -> p l h", h=model.cfg.n_heads)


# 4: corrupted prompts


def corrupt_by_loop(tokens, positions):
    tokens = tokens.clone()
    for row, s2, io in zip(tokens, positions["S2"], positions["IO"], strict=True):
        row[s2] = row[io]
    return tokens


def corrupt_by_where(tokens, positions):
    at_s2 = torch.arange(tokens.shape[1]) == positions["S2"][:, None]
    return torch.where(at_s2, tokens.gather(1, positions["IO"][:, None]), tokens)


def corrupt_by_lists(tokens, positions):
    rows = tokens.tolist()
    for i, row in enumerate(rows):
        row[positions["S2"][i]] = row[positions["IO"][i]]
    return torch.tensor(rows)


def corrupt_by_numpy(tokens, positions):
    new, rows = tokens.numpy().copy(), np.arange(len(tokens))
    new[rows, positions["S2"].numpy()] = new[rows, positions["IO"].numpy()]
    return torch.from_numpy(new)


def corrupt_in_place(tokens, positions):
    s2, io = positions["S2"][:, None], positions["IO"][:, None]
    return tokens.scatter_(1, s2, tokens.gather(1, io))


# 5 and 6: patching


def patch_by_loop(z, hook, clean_z, head, positions):
    for i, places in enumerate(positions.tolist()):
        for place in places:
            z[i, place, head] = clean_z[i, place, head]


def patch_by_mask(z, hook, clean_z, head, positions):
    assert hook.name.endswith("hook_z") and hook.layer() > 0
    places = torch.nn.functional.one_hot(positions, z.shape[1]).any(1)  # [prompt pos]
    of_head = torch.arange(z.shape[2]) == head
    return torch.where((places[:, :, None] & of_head)[..., None], clean_z, z)


def patch_by_columns(z, hook, clean_z, head, positions):
    z, rows = z.clone(), torch.arange(len(z))
    for column in positions.unbind(1):
        z[rows, column, head] = clean_z[rows, column, head]
    return z


def patch_by_scatter(z, hook, clean_z, head, positions):
    index = positions[..., None].expand(-1, -1, z.shape[-1])
    one = z[:, :, head].scatter(1, index, clean_z[:, :, head].gather(1, index))
    return torch.cat([z[:, :, :head], one[:, :, None], z[:, :, head + 1 :]], dim=2)


def patch_and_print(z, hook, clean_z, head, positions):
    print(hook.name, z.shape)
    index = (torch.arange(len(z)).unsqueeze(-1), positions, torch.tensor(head))
    return z.double().index_put(index, clean_z[index].double())


def sweep_by_library(model, clean, corrupted, answers, layers):
    return patching.patch_heads(model, clean, corrupted, metrics.LogitDiff(answers))[:, layers]


def sweep_in_place(model, clean, corrupted, answers, layers):
    _, cache = model.run_with_cache(clean)
    values = torch.zeros(len(clean), len(layers), model.cfg.n_heads)
    for i, layer in enumerate(layers):
        for head in range(model.cfg.n_heads):

            def put(z, hook, head=head):
                z[:, :, head] = cache[hook.name][:, :, head]

            logits = model.run_with_hooks(
                corrupted, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", put)]
            )
            values[:, i, head] = difference_by_rows(logits, answers)
    return values


def sweep_by_edits(model, clean, corrupted, answers, layers):
    run, values = record(model, clean, ["z"]), {}
    for head in all_heads(model):
        with model.hooks(fwd_hooks=hooks(heads_from(model, [head], run))):
            values[head] = metrics.logit_diff(model(corrupted), answers)
    rows = [[values[Head(layer, h)] for h in range(model.cfg.n_heads)] for layer in layers]
    return torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)


def sweep_in_one_batch(model, clean, corrupted, answers, layers):
    n, by_layer = model.cfg.n_heads, []
    for layer in layers:
        name = f"blocks.{layer}.attn.hook_z"
        new = model.run_with_cache(clean, names_filter=name)[1][name]

        def put(z, hook, new=new):
            z = rearrange(z.clone(), "(h p) ... -> h p ...", h=n)
            for head in range(n):
                z[head, :, :, head] = new[:, :, head]
            return z.flatten(0, 1)

        many = repeat(corrupted, "p t -> (h p) t", h=n)
        logits = model.run_with_hooks(many, fwd_hooks=[(name, put)])
        by_layer.append(
            rearrange(difference_by_rows(logits, answers.repeat(n, 1)), "(h p) -> p h", h=n)
        )
    return torch.stack(by_layer, dim=1)


def sweep_by_full_positions(model, clean, corrupted, answers, layers):
    _, cache = model.run_with_cache(clean, names_filter=lambda name: name.endswith("hook_z"))
    everywhere = torch.arange(clean.shape[1]).repeat(len(clean), 1)
    values = []
    for layer in layers:
        name = f"blocks.{layer}.attn.hook_z"
        for head in range(model.cfg.n_heads):
            put = partial(patch_by_columns, clean_z=cache[name], head=head, positions=everywhere)
            with model.hooks(fwd_hooks=[(name, put)]):
                values.append(difference_by_loop(model(corrupted), answers))
    return torch.stack(values).reshape(len(layers), -1, len(clean)).movedim(2, 0)


# 7: attribution patching


def slope_by_backward_hooks(model, clean, corrupted, answers):
    wanted, slopes, olds = {}, {}, {}
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    model.run_with_hooks(
        clean,
        fwd_hooks=[(n, lambda z, hook: wanted.update({hook.name: z.detach()})) for n in names],
    )
    with torch.enable_grad():
        fwd = [(n, lambda z, hook: olds.update({hook.name: z.detach()})) for n in names]
        bwd = [(n, lambda grad, hook: slopes.update({hook.name: grad.detach()})) for n in names]
        with model.hooks(fwd_hooks=fwd, bwd_hooks=bwd):
            difference_by_rows(model(corrupted), answers).sum().backward()
    model.zero_grad()
    effects = [((wanted[n] - olds[n]) * slopes[n]).sum((1, 3)) for n in names]
    return torch.stack(effects, dim=1)


def slope_prompt_by_prompt(model, clean, corrupted, answers):
    rows = []
    for i in range(len(clean)):
        one = slice(i, i + 1)
        rows.append(slope_by_kept(model, clean[one], corrupted[one], answers[one]))
    return torch.cat(rows)


def slope_by_kept(model, clean, corrupted, answers):
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    _, cache = model.run_with_cache(clean, names_filter=names)
    kept = []

    def keep(z, hook):
        z = z.detach().requires_grad_() if hook.layer() == 0 else z
        kept.append(z)
        return z

    with torch.enable_grad():
        logits = model.run_with_hooks(corrupted, fwd_hooks=[(name, keep) for name in names])
        slopes = torch.autograd.grad(difference_by_rows(logits, answers).sum(), kept)
    steps = [cache[name] - z.detach() for name, z in zip(names, kept, strict=True)]
    pairs = zip(steps, slopes, strict=True)
    return torch.stack([einsum(a, b, "p t h d, p t h d -> p h") for a, b in pairs], dim=1)


def slope_by_small_steps(model, clean, corrupted, answers):
    """The derivative along the step, head by head, by central differences."""
    new, old = record(model, clean, ["z"]), record(model, corrupted, ["z"])
    values, size = [], 0.02
    for layer, head in all_heads(model):
        name = f"blocks.{layer}.attn.hook_z"
        step = (new.activations[name] - old.activations[name])[:, :, head]

        def push(by, name=name, head=head, step=step):
            def hook_by(z, hook):
                z = z.clone()
                z[:, :, head] += by * step
                return z

            return difference_by_rows(
                model.run_with_hooks(corrupted, fwd_hooks=[(name, hook_by)]), answers
            )

        near = (push(size) - push(-size)) / (2 * size)
        far = (push(2 * size) - push(-2 * size)) / (4 * size)
        values.append((4 * near - far) / 3)
    return torch.stack(values, dim=1).unflatten(1, (-1, model.cfg.n_heads))


# 8 to 10: path patching


def path_in_place(z, hook, original, new, sender):
    z[:] = original[hook.layer()]
    if hook.layer() == sender.layer:
        z[:, :, sender.head] = new[sender.layer, :, :, sender.head]


def chosen(z, head):
    """True at one head of [prompt pos head d_head]."""
    return (torch.arange(z.shape[2]) == head)[:, None]


def path_by_where(z, hook, original, new, sender):
    layer = int(hook.name.split(".")[1])
    return torch.where(chosen(z, sender[1]) & (layer == sender[0]), new[layer], original[layer])


def path_by_name(z, hook, original, new, sender):
    print(hook.name)
    layer, head = sender
    both = set_at(original, (layer, ALL, ALL, head), new[layer, :, :, head])
    return both[hook.layer()]


def path_by_cat(z, hook, original, new, sender):
    heads = list(original[hook.layer()].unbind(2))
    if hook.name == f"blocks.{sender.layer}.attn.hook_z":
        heads[sender.head] = new[hook.layer()][:, :, sender.head]
    return torch.stack(heads, dim=2)


def path_by_mask(z, hook, original, new, sender):
    mask = torch.zeros(original.shape[0], 1, 1, z.shape[2], 1, dtype=torch.float64)
    mask[sender.layer, ..., sender.head, :] = 1
    return (mask * new + (1 - mask) * original)[hook.layer()]


def path_into_the_cache(z, hook, original, new, sender):
    original[sender.layer, :, :, sender.head] = new[sender.layer, :, :, sender.head]
    return original[hook.layer()]


def all_z(model, tokens):
    return torch.stack(list(record(model, tokens, ["z"]).activations.values()))


def to_logits_by(hook):
    def run(model, tokens, new_tokens, answers, senders):
        original, new = all_z(model, tokens), all_z(model, new_tokens)
        values = torch.zeros(len(tokens), len(senders))
        for i, sender in enumerate(senders):
            send = partial(hook, original=original, new=new, sender=sender)
            logits = model.run_with_hooks(
                tokens, fwd_hooks=[(lambda n: n.endswith("attn.hook_z"), send)]
            )
            values[:, i] = difference_by_rows(logits, answers)
        return values

    return run


def to_logits_by_library(model, tokens, new_tokens, answers, senders):
    return paths.path_patch(model, tokens, new_tokens, metrics.LogitDiff(answers), senders)


def to_logits_by_edits(model, tokens, new_tokens, answers, senders):
    original, new = record(model, tokens, ["z"]), record(model, new_tokens, ["z"])
    frozen, values = heads_from(model, all_heads(model), original), []
    for sender in senders:
        edits = [*frozen, *heads_from(model, [sender], new)]
        values.append(
            difference_by_loop(model.run_with_hooks(tokens, fwd_hooks=hooks(edits)), answers)
        )
    return torch.stack(values, 1)


def to_logits_by_hand(model, tokens, new_tokens, answers, senders):
    """Heads frozen: what attention adds is known, only the MLPs are computed anew."""
    _, cache = model.run_with_cache(tokens)
    new, values = all_z(model, new_tokens), []
    for layer, head in senders:
        x = cache["resid_pre", 0]
        for i, block in enumerate(model.blocks):
            x = x + cache["attn_out", i]
            if i == layer:
                change = new[i][:, :, head] - cache["z", i][:, :, head]
                x = x + change @ model.W_O[i, head]
            x = x + block.mlp(block.ln2(x))
        values.append(difference_by_rows(model.unembed(model.ln_final(x)), answers))
    return torch.stack(values, dim=-1)


def to_queries_by_library(model, tokens, new_tokens, answers, senders, receivers, positions):
    to = dict(receivers=receivers, site="q", positions=positions)
    return paths.path_patch(model, tokens, new_tokens, metrics.LogitDiff(answers), senders, **to)


def to_queries_by(hook):
    def run(model, tokens, new_tokens, answers, senders, receivers, positions):
        original, new = all_z(model, tokens), all_z(model, new_tokens)
        z_names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
        rows, values = torch.arange(len(tokens)), []
        for sender in senders:
            send = partial(hook, original=original, new=new, sender=sender)
            with model.hooks(fwd_hooks=[(name, send) for name in z_names]):
                arrived = model.run_with_cache(tokens)[1]

            def put(q, hook, arrived=arrived):
                assert hook.name.endswith("hook_q")
                for layer, head in receivers:
                    if layer == hook.layer():
                        q[rows, positions, head] = arrived["q", layer][rows, positions, head]
                return q

            q_names = {f"blocks.{receiver.layer}.attn.hook_q" for receiver in receivers}
            logits = model.run_with_hooks(tokens, fwd_hooks=[(name, put) for name in q_names])
            values.append(difference_by_rows(logits, answers))
        return torch.stack(values).T

    return run


def to_queries_below_only(model, tokens, new_tokens, answers, senders, receivers, positions):
    """Freezes only what lies below the highest receiver: the rest cannot reach it."""
    original, new = record(model, tokens, ["z"]), record(model, new_tokens, ["z"])
    top = max(receiver.layer for receiver in receivers)
    below, values = [head for head in all_heads(model) if head.layer < top], []
    at = torch.arange(tokens.shape[1]) == positions[:, None]
    for sender in senders:
        edits = [*heads_from(model, below, original), *heads_from(model, [sender], new)]
        arrived = record(model, tokens, ["q"], edits)
        second = hooks(heads_from(model, receivers, arrived, "q", at))
        values.append(difference_by_rows(model.run_with_hooks(tokens, fwd_hooks=second), answers))
    return torch.stack(values, dim=1)


# 11 to 13: copying, position or token, means


def copying_by_rank(resid, w_v, w_o, w_u, names, k):
    logits = resid @ (w_v @ w_o) @ w_u
    return ((logits > logits.gather(1, names[:, None])).sum(-1) < k).float().mean()


def copying_by_loop(resid, w_v, w_o, w_u, names, k):
    top = [(row @ w_v @ w_o @ w_u).topk(k).indices.tolist() for row in resid]
    return sum(name.item() in row for row, name in zip(top, names, strict=True)) / len(names)


def copying_by_sort(resid, w_v, w_o, w_u, names, k):
    order = einsum(resid, w_v, w_o, w_u, "n m, m d, d o, o v -> n v").argsort(descending=True)
    return float((order[:, :k] == names[:, None]).sum() / len(names))


def fit_by_means(values, codes):
    codes = codes.to(values)
    return codes.T @ values / codes.square().sum(0)[:, None]


def fit_by_numpy(values, codes):
    return torch.tensor(np.linalg.lstsq(codes.double().numpy(), values.double().numpy(), None)[0])


def fit_by_loop(values, codes):
    columns = [torch.linalg.pinv(codes.float()) @ column for column in values.T]
    return torch.stack(columns, dim=1)


def fit_by_normal_equations(values, codes):
    x = codes.double()
    return torch.linalg.solve(x.T @ x, x.T @ values.double())


def means_by_index_add(z, template, wanted):
    counts = torch.bincount(template)
    total = torch.zeros(len(counts), *z.shape[1:]).index_add(0, template, z)
    return (total / counts.view(-1, 1, 1, 1, 1))[wanted]


def means_by_one_hot(z, template, wanted):
    same = (wanted[:, None] == template).double()
    return einsum(same / same.sum(1, keepdim=True), z.double(), "w a, a l p h d -> w l p h d")


def means_by_loop(z, template, wanted):
    result = []
    for t in wanted.tolist():
        rows = [z[i] for i in range(len(z)) if template[i] == t]
        result.append(sum(rows) / len(rows))
    return torch.stack(result)


def means_in_place(z, template, wanted):
    result = torch.empty(len(wanted), *z.shape[1:])
    for t in wanted.unique():
        result[wanted == t] = z[template == t].mean(dim=0)
    return result


# 14 to 16: the circuit


def f_kept(model, tokens, answers, means, keep):
    def ablate(z, hook):
        mask = keep[:, hook.layer()].unsqueeze(-1)
        return z * mask + means[:, hook.layer()] * ~mask

    return difference_by_rows(
        model.run_with_hooks(tokens, fwd_hooks=[(lambda n: n.endswith("hook_z"), ablate)]), answers
    )


def alone_in_place(model, tokens, answers, means, keep, f_model):
    def ablate(z, hook):
        gone = ~keep[:, hook.layer()]
        z[gone] = means[:, hook.layer()][gone]

    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    with model.hooks(fwd_hooks=[(name, ablate) for name in names]):
        f = difference_by_rows(model(tokens), answers)
    return f, f.sum() / f_model.sum()


def alone_head_by_head(model, tokens, answers, means, keep, f_model):
    fwd_hooks = []
    for layer, head in all_heads(model):

        def ablate(z, hook, layer=layer, head=head):
            z = z.clone()
            mask = keep[:, layer, :, head, None]
            z[:, :, head] = torch.where(mask, z[:, :, head], means[:, layer, :, head])
            return z

        fwd_hooks.append((f"blocks.{layer}.attn.hook_z", ablate))
    f = difference_by_loop(model.run_with_hooks(tokens, fwd_hooks=fwd_hooks), answers)
    return f, float(f.mean()) / float(f_model.mean())


def alone_by_mixture(model, tokens, answers, means, keep, f_model):
    f = f_kept(model, tokens, answers, means, keep)
    return f, (f.mean() / f_model.mean()).item()


def alone_in_float64(model, tokens, answers, means, keep, f_model):
    f = f_kept(model, tokens, answers, means, keep).double()
    return [f, f.mean() / f_model.double().mean()]


def alone_prompt_by_prompt(model, tokens, answers, means, keep, f_model):
    rows = [slice(i, i + 1) for i in range(len(tokens))]
    f = [f_kept(model, tokens[i], answers[i], means[i], keep[i]) for i in rows]
    return torch.cat(f), sum(map(float, f)) / f_model.sum().item()


def added(f, keep, node, rest):
    """The four figures and the choice, for some way to run a circuit."""
    alone = f(keep) - f(keep & ~node)
    after = f(keep & ~rest) - f(keep & ~(rest | node))
    return alone if abs(alone.mean()) > abs(after.mean()) else after


def minimality_by(alone):
    def run(model, tokens, answers, means, keep, node, rest):
        whole = torch.ones(len(tokens))
        return added(
            lambda kept: alone(model, tokens, answers, means, kept, whole)[0], keep, node, rest
        )

    return run


def minimality_stacked(model, tokens, answers, means, keep, node, rest):
    changes = []
    for kept in (keep, keep & ~rest):
        both = [f_kept(model, tokens, answers, means, k) for k in (kept, kept & ~node)]
        changes.append(both[0] - both[1])
    changes = torch.stack(changes)
    return changes[changes.mean(1).abs().argmax()]


def completeness_by(alone):
    def run(model, tokens, answers, means, keep, role):
        whole = torch.ones(len(tokens))
        masks = (keep & ~role, ~role)
        return torch.stack([alone(model, tokens, answers, means, m, whole)[0] for m in masks])

    return run


def completeness_by_nodes(model, tokens, answers, means, keep, role):
    """The library's edits: those of the circuit, then those of the role on top."""
    layers = range(model.cfg.n_layers)
    run = circuit.Run({f"blocks.{la}.attn.hook_z": means[:, la] for la in layers})
    gone, rest = circuit.nodes_from(role, run), circuit.nodes_from(~keep, run)
    both = [model.run_with_hooks(tokens, fwd_hooks=hooks(e)) for e in ([*rest, *gone], gone)]
    return torch.stack([difference_by_rows(logits, answers) for logits in both])


ALONE = [
    alone_in_place,
    alone_head_by_head,
    alone_by_mixture,
    alone_in_float64,
    alone_prompt_by_prompt,
]
PATHS = [path_in_place, path_by_where, path_by_name, path_by_cat, path_by_mask]

RIGHT = {
    "logit_difference": [
        difference_by_rows,
        difference_by_loop,
        difference_by_one_hot,
        lambda x, a: torch.stack([r[-1, i] - r[-1, j] for r, (i, j) in zip(x, a, strict=True)]),
        lambda x, a: -x[:, -1].log_softmax(-1).gather(1, a).diff(dim=1)[:, 0],
    ],
    "logit_lens": [lens_by_directions, lens_by_hooks, lens_by_cache, lens_by_loop, lens_by_parts],
    "head_attribution": [
        heads_by_loop,
        heads_in_float64,
        heads_by_results,
        heads_by_layer,
        heads_by_projections,
    ],
    "corrupt_s2": [
        lambda t, at: t.scatter(1, at["S2"][:, None], t.gather(1, at["IO"][:, None])),
        corrupt_by_loop,
        corrupt_by_where,
        corrupt_by_lists,
        corrupt_by_numpy,
    ],
    "patch_head": [
        patch_by_loop,
        patch_by_mask,
        patch_by_columns,
        patch_by_scatter,
        patch_and_print,
    ],
    "sweep_heads": [
        sweep_by_library,
        sweep_in_place,
        sweep_by_edits,
        sweep_in_one_batch,
        sweep_by_full_positions,
    ],
    "attribution_patching": [
        slope_by_backward_hooks,
        slope_prompt_by_prompt,
        slope_by_kept,
        slope_by_small_steps,
        lambda model, c, x, a: attribution.attribution_patching(model, c, x, metrics.LogitDiff(a)),
    ],
    "path_patch_hook": PATHS,
    "path_patch_to_logits": [
        to_logits_by(path_in_place),
        to_logits_by(path_by_where),
        to_logits_by_library,
        to_logits_by_edits,
        to_logits_by_hand,
    ],
    "path_patch_to_queries": [
        to_queries_by(path_in_place),
        to_queries_by(path_by_where),
        to_queries_by(path_by_cat),
        to_queries_by_library,
        to_queries_below_only,
    ],
    "copying_score": [
        copying_by_rank,
        copying_by_loop,
        copying_by_sort,
        lambda r, v, o, u, n, k: (n == (r @ v @ o @ u).topk(k).indices.T).any(0).double().mean(),
        lambda r, v, o, u, n, k: (
            (
                (x := r.double() @ (v @ o @ u).double()).kthvalue(x.shape[1] - k + 1).values
                <= x[torch.arange(len(n)), n]
            )
            .double()
            .mean()
            .item()
        ),
    ],
    "fit_signal": [
        fit_by_means,
        fit_by_numpy,
        fit_by_loop,
        fit_by_normal_equations,
        lambda values, codes: torch.linalg.lstsq(codes.to(values), values).solution,
    ],
    "template_means": [
        means_by_index_add,
        means_by_one_hot,
        means_by_loop,
        means_in_place,
        lambda z, t, w: torch.stack([z.double()[t == i].mean(0) for i in w.tolist()]),
    ],
    "circuit_alone": ALONE,
    "role_completeness": [*map(completeness_by, ALONE[:4]), completeness_by_nodes],
    "head_minimality": [*map(minimality_by, ALONE[:4]), minimality_stacked],
}


def own_stage_norm(model, tokens, answers):
    """Each stage's own scale, and the bias forgotten."""
    n, (_, cache) = model.cfg.n_layers, model.run_with_cache(tokens)
    stream = [cache["resid_pre", i] for i in range(n)] + [cache["resid_post", n - 1]]
    logits = [model.ln_final(x) @ model.W_U for x in stream]
    return torch.stack([difference_by_rows(x, answers) for x in logits], dim=1)


def lens_of_the_middle(model, tokens, answers):
    _, cache = model.run_with_cache(tokens)
    stages = [cache["resid_mid", layer] for layer in range(model.cfg.n_layers)]
    stages = [*stages, cache["resid_post", model.cfg.n_layers - 1]]
    logits = [model.unembed(x / cache["ln_final.hook_scale"]) for x in stages]
    return torch.stack([difference_by_rows(x, answers) for x in logits], dim=1)


def heads_by_another_scale(model, tokens, answers):
    scale = model.run_with_cache(tokens)[1]["ln_final.hook_scale"]
    return heads_by_loop(model, tokens, answers) * (scale[:, -1] / scale[:, -2])[..., None]


def sweep_bound_late(model, clean, corrupted, answers, layers):
    """The hooks of a layer are made in one loop and run in another."""
    _, cache = model.run_with_cache(clean)
    values = []
    for layer in layers:
        puts = []
        for head in range(model.cfg.n_heads):

            def put(z, hook):
                z[:, :, head] = cache[hook.name][:, :, head]  # noqa: B023
                return z

            puts.append((f"blocks.{layer}.attn.hook_z", put))
        logits = [model.run_with_hooks(corrupted, fwd_hooks=[put]) for put in puts]
        values.append(torch.stack([difference_by_rows(x, answers) for x in logits], dim=1))
    return torch.stack(values, dim=1)


def sweep_at_values(model, clean, corrupted, answers, layers):
    whole = patching.patch_heads(model, clean, corrupted, metrics.LogitDiff(answers), site="v")
    return whole[:, layers]


def leaves_hooks(model, clean, corrupted, answers, layers):
    for layer in layers:
        model.add_hook(f"blocks.{layer}.attn.hook_z", lambda z, hook: z)
    return sweep_by_library(model, clean, corrupted, answers, layers)


def changes_weights(model, tokens, answers):
    model.W_O.data.mul_(0)
    model.blocks[0].attn.o.weight.data.mul_(0.5)
    return heads_by_projections(model, tokens, answers)


def no_gradient(model, clean, corrupted, answers):
    found = []

    def keep(z: torch.Tensor, hook: HookPoint) -> torch.Tensor:
        found.append(z)
        return z

    with torch.no_grad():
        names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
        logits = model.run_with_hooks(corrupted, fwd_hooks=[(name, keep) for name in names])
        return torch.autograd.grad(difference_by_rows(logits, answers).sum(), found)


WRONG = [
    ("logit_difference", lambda x, a: difference_by_rows(x, a).abs(), "absolute values"),
    ("logit_difference", lambda x, a: 2 * difference_by_rows(x, a), "2 times too large"),
    ("logit_difference", lambda x, a: difference_by_rows(x.cumsum(1), a), "sum over the positions"),
    ("logit_difference", lambda x, a: difference_by_rows(x, a[:1].expand(3, 2)), "first prompt's"),
    ("logit_lens", own_stage_norm, "scale of its own, and the bias"),
    ("logit_lens", lambda *args: lens_by_cache(*args)[:, :-1], "last entry along stage is missing"),
    ("logit_lens", lambda *args: lens_by_cache(*args).T, "axes stand in another order"),
    ("logit_lens", lens_of_the_middle, "between attention and MLP"),
    ("head_attribution", heads_by_another_scale, "factor of its own"),
    ("head_attribution", changes_weights, "changes the model's weights"),
    ("head_attribution", lambda *args: -heads_by_loop(*args), "signs are turned round"),
    ("head_attribution", lambda *args: heads_by_loop(*args).flatten(1), "shape [6, 12]"),
    ("corrupt_s2", corrupt_in_place, "work on a copy"),
    ("corrupt_s2", lambda t, at: corrupt_by_loop(t, at).float(), "floating-point numbers"),
    ("corrupt_s2", lambda t, at: corrupt_by_loop(t, at | {"S2": at["S2"] - 1}), "too early"),
    ("patch_head", lambda z, h, new, i, at: patch_by_columns(z, h, new, i, at - 1), "before"),
    ("patch_head", lambda z, hook, clean, head, at: clean[:, :, head], "has shape"),
    (
        "patch_head",
        lambda z, hook, clean, head, at: (z + patch_by_columns(z, hook, clean, head, at)) / 2,
        "Right but for head 1",
    ),
    ("sweep_heads", sweep_bound_late, "Every head gets what belongs to the last"),
    ("sweep_heads", sweep_at_values, "hooks are at the values"),
    ("sweep_heads", lambda *args: 0 * sweep_by_library(*args), "zero"),
    ("sweep_heads", leaves_hooks, "leaves hooks on the model"),
    ("sweep_heads", lambda *args: sweep_by_library(*args).mean(0), "average over prompt"),
    ("sweep_heads", lambda *args: sweep_by_library(*args).movedim(0, -1), "in another order"),
    ("attribution_patching", no_gradient, "raised RuntimeError"),
    ("attribution_patching", lambda *args: slope_by_kept(*args).abs(), "absolute values"),
    (
        "attribution_patching",
        lambda m, c, x, a: slope_by_kept(m, c, x, a.flip(1)),
        "right minus wrong, columns 0 and 1 of `answers`",
    ),
    (
        "path_patch_hook",
        lambda z, hook, o, new, s: path_by_mask(z, hook, o, new, Head(s.layer, s.head - 1)),
        "You send the head before",
    ),
    ("path_patch_hook", path_into_the_cache, "work on a copy"),
    ("path_patch_hook", lambda z, hook, original, new, sender: original, "has shape"),
    (
        "path_patch_to_logits",
        lambda *args: to_logits_by_library(*args).flip(1),
        "back to front along sender",
    ),
    ("path_patch_to_logits", lambda *args: to_logits_by_library(*args).T, "in another order"),
    (
        "path_patch_to_logits",
        lambda *args: to_logits_by_library(*args)[:, -1:].expand(-1, len(args[4])),
        "Every sender gets what belongs to the last",
    ),
    (
        "path_patch_to_queries",
        lambda *args: to_queries_by_library(*args[:6], args[6] - 1),
        "one position too early",
    ),
    (
        "path_patch_to_queries",
        lambda *args: to_queries_by_library(*args[:4], args[4][1:], *args[5:]),
        "first entry along sender is missing",
    ),
    ("copying_score", lambda *args: copying_by_loop(*args[:5], args[5] - 1), "one rank too few"),
    ("copying_score", lambda r, v, o, u, names, k: k / len(names), "Off by up to"),
    ("copying_score", lambda *args: 1 - copying_by_loop(*args), "one minus"),
    ("fit_signal", lambda values, codes: fit_by_means(values, codes).T, "in another order"),
    ("fit_signal", lambda values, codes: -fit_by_means(values, codes), "signs are turned round"),
    ("fit_signal", lambda v, codes: fit_by_numpy(v[:3], codes[:3]), "first three variants"),
    ("template_means", lambda z, t, w: means_by_loop(z, t, t[:6]), "the first ABC prompts"),
    ("template_means", lambda z, t, w: means_by_loop(z, t, w).mean(2), "average over pos"),
    ("template_means", lambda z, t, w: means_by_loop(z, t, w.flip(0)), "back to front"),
    ("circuit_alone", lambda *args: alone_in_place(*args)[0], "part is missing"),
    (
        "circuit_alone",
        lambda *args: (alone_in_place(*args)[0], alone_in_place(*args)[1] / 2),
        "2 times too small",
    ),
    (
        "circuit_alone",
        lambda m, t, a, means, *rest: alone_in_place(m, t, a, means.roll(1, 1), *rest),
        "means of another layer",
    ),
    (
        "role_completeness",
        lambda m, t, a, means, *rest: completeness_by_nodes(m, t, a, means.roll(1, 1), *rest),
        "means of another layer",
    ),
    (
        "head_minimality",
        lambda m, t, a, means, keep, node, rest: minimality_stacked(
            m, t, a, means, keep, rest, node
        ),
        "are swapped",
    ),
    ("role_completeness", lambda *args: completeness_by_nodes(*args)[0], "entry 0 of run alone"),
    ("role_completeness", lambda *args: completeness_by_nodes(*args).T, "in another order"),
    (
        "head_minimality",
        lambda *args: minimality_stacked(*args)[1:],
        "entry along prompt is missing",
    ),
    ("head_minimality", lambda *args: minimality_stacked(*args).abs(), "absolute values"),
]
