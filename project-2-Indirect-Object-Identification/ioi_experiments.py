"""The experiments that the exercises ask for: right as they stand, wrong by their keywords.

Each is the plain way to do it, one whole run after another, as a learner would write it;
`ioi_exercises` says which keyword is which mistake. `utils` does the same faster.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from unittest import mock

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from utils.edits import hook_name
from utils.heads import Head
from utils.metrics import logit_diff
from utils.toy import tiny_model

ALL = slice(None)
Answers = Int[Tensor, "prompt 2"]
Mask = Bool[Tensor, "prompt layer pos head"]
Means = Float[Tensor, "prompt layer pos head d_head"]
Tokens = Int[Tensor, "prompt pos"]
Z = Float[Tensor, "prompt pos head d_head"]
EveryZ = Float[Tensor, "layer prompt pos head d_head"]


def run_under(
    model: TransformerBridge, tokens: Tokens, answers: Answers, hooks: Iterable = ()
) -> Float[Tensor, "prompt"]:
    """The logit difference under hooks."""
    return logit_diff(model.run_with_hooks(tokens, fwd_hooks=list(hooks)), answers)


def every(model: TransformerBridge, hook: Callable, layers: Iterable[int] | None = None) -> list:
    """The hook at z of every layer, or of some."""
    layers = range(model.cfg.n_layers) if layers is None else layers
    return [(hook_name(layer, "z"), hook) for layer in layers]


def record_z(model: TransformerBridge, tokens: Tokens) -> EveryZ:
    """What the heads of every layer give."""
    names = [hook_name(layer, "z") for layer in range(model.cfg.n_layers)]
    run = model.run_with_cache(tokens, names_filter=names)[1]
    return torch.stack([run[name] for name in names])


def otherwise(name: str, part: Callable, experiment: Callable) -> Callable:
    """The experiment with another function in place of the one of this name in this file."""

    def run(*args: object) -> object:
        with mock.patch.dict(globals(), {name: part}):
            return experiment(*args)

    return run


# Part 2: the residual stream at the end, read as it grows and head by head


def at_the_end(
    model: TransformerBridge, tokens: Tokens, names: Sequence[str], position: int = -1
) -> tuple[Float[Tensor, "prompt name *rest"], Float[Tensor, "prompt 1 1"]]:
    """What stands at some hook points, and the scale of the final norm, at one position."""
    run = model.run_with_cache(tokens, names_filter=[*names, "ln_final.hook_scale"])[1]
    found = torch.stack([run[name][:, position] for name in names], dim=1)
    return found, run["ln_final.hook_scale"][:, position][:, None]


def direction(model: TransformerBridge, answers: Answers) -> Float[Tensor, "prompt d_model"]:
    """The unembedding of the right minus that of the wrong name."""
    return (model.W_U[:, answers[:, 0]] - model.W_U[:, answers[:, 1]]).T


def logit_lens(
    model: TransformerBridge,
    tokens: Tokens,
    answers: Answers,
    *,
    norm: Callable[[Tensor, Tensor], Tensor] = lambda stream, scale: stream / scale,
    read: Callable[[Tensor], Tensor] = lambda logits: logits,
    bias: float = 1,
    position: int = -1,
    site: str = "resid_pre",
) -> Float[Tensor, "prompt stage"]:
    """The logit difference read off the stream before every layer and at the end."""
    last = model.cfg.n_layers - 1
    names = [hook_name(layer, site) for layer in range(last + 1)]
    names += [hook_name(last, "resid_post")]
    found = []
    stream, scale = at_the_end(model, tokens, names, position)  # [prompt stage d_model]
    for stage in norm(stream, scale).unbind(1):
        logits = read(stage @ model.W_U + bias * model.b_U)
        found.append(logit_diff(logits[:, None], answers))
    return torch.stack(found, dim=1)


def head_attribution(
    model: TransformerBridge,
    tokens: Tokens,
    answers: Answers,
    *,
    change: Callable[[Tensor], Tensor] = lambda scale: scale,
    towards: Callable = direction,
    weights: Callable[[TransformerBridge], Tensor] = lambda model: model.W_O,
    shown: Callable[[Tensor], Tensor] = lambda written: written,
    bias: bool = False,
    position: int = -1,
) -> Float[Tensor, "prompt layer head"]:
    """What every head writes to the logit difference at the last position."""
    names = [hook_name(layer, "z") for layer in range(model.cfg.n_layers)]
    z, scale = at_the_end(model, tokens, names, position)
    written = shown(torch.einsum("plhd,lhdm->plhm", z, weights(model)))
    if bias:
        written = written + model.b_O[:, None]
    return torch.einsum("plhm,pm->plh", written, towards(model, answers)) / change(scale)


# Part 3: patching


def patched(
    z: Z, clean_z: Z, head: int | slice, positions: Int[Tensor, "prompt place"]
) -> Float[Tensor, "prompt pos head d_head"]:
    """z with a head taken from the clean run at each prompt's own positions."""
    index = (torch.arange(len(z), device=z.device)[:, None], positions, head)
    z = z.clone()
    z[index] = clean_z[index]
    return z


def sweep_heads(
    model: TransformerBridge,
    clean: Tokens,
    corrupted: Tokens,
    answers: Answers,
    layers: list[int],
    *,
    at: slice = ALL,
    together: bool = False,
    kept: Callable[[int], bool] = lambda head: False,
) -> Float[Tensor, "prompt layer head"]:
    """The logit difference of the corrupted run with one head patched at a time."""
    from_clean, n_heads = record_z(model, clean), model.cfg.n_heads
    columns = torch.arange(clean.shape[1], device=clean.device)[at].expand(len(clean), -1)
    found, earlier = [], []
    for layer, head in [(layer, head) for layer in layers for head in range(n_heads)]:
        put = partial(patched, head=ALL if together else head, positions=columns)
        hook = partial(lambda z, hook, put: put(z, from_clean[hook.layer()]), put=put)
        earlier = [*(earlier if kept(head) else []), (hook_name(layer, "z"), hook)]
        found.append(run_under(model, corrupted, answers, earlier))
    return torch.stack(found, dim=1).unflatten(1, (len(layers), n_heads))


def attribution_patching(
    model: TransformerBridge,
    clean: Tokens,
    corrupted: Tokens,
    answers: Answers,
    *,
    effect: Callable[..., Tensor] = lambda new, old, slope: (new - old) * slope,
    summed: Callable[[Tensor], Tensor] = lambda x: x.sum((-3, -1)),
    on_clean: bool = False,
    cut: bool = False,
) -> Float[Tensor, "prompt layer head"]:
    """First-order guess at the change of the logit difference, had each head been the clean one."""
    found: list[Tensor] = []

    def keep(z: Tensor, hook: HookPoint) -> Tensor:
        found.append(z.detach().requires_grad_() if cut else z)
        return found[-1]

    with torch.enable_grad():
        hooks = [*every(model, keep), ("hook_embed", lambda x, hook: x.requires_grad_())]
        values = run_under(model, clean if on_clean else corrupted, answers, hooks)
        slope = torch.stack(torch.autograd.grad(values.sum(), found))
    with torch.no_grad():
        effects = effect(record_z(model, clean), record_z(model, corrupted), slope)
    return summed(effects).movedim(0, 1)


# Part 4: path patching


def path_patch_hook(
    z: Z, hook: HookPoint, original: EveryZ, new: EveryZ, sender: Head
) -> Float[Tensor, "prompt pos head d_head"]:
    """Freeze every head of this layer; if the sender is one of them, take it from `new`."""
    z = original[hook.layer()].clone()
    if hook.layer() == sender.layer:
        z[:, :, sender.head] = new[sender.layer, :, :, sender.head]
    return z


def path_patch_to_logits(
    model: TransformerBridge,
    tokens: Tokens,
    new_tokens: Tokens,
    answers: Answers,
    senders: list[Head],
    *,
    hook: Callable = path_patch_hook,
    base: Tokens | None = None,
) -> Float[Tensor, "prompt sender"]:
    """The logit difference with one sender's path to the logits taken from the new run."""
    runs = dict(original=record_z(model, tokens), new=record_z(model, new_tokens))
    found = []
    for sender in senders:
        send = partial(hook, **runs, sender=sender)
        start = tokens if base is None else base
        found.append(run_under(model, start, answers, every(model, send)))
    return torch.stack(found, dim=1)


def path_patch_to_queries(
    model: TransformerBridge,
    tokens: Tokens,
    new_tokens: Tokens,
    answers: Answers,
    senders: list[Head],
    receivers: list[Head],
    positions: Int[Tensor, "prompt"],
    *,
    first: Callable = path_patch_hook,
    second: Callable | None = None,
    site: str = "q",
    everywhere: bool = False,
    whole_layer: bool = False,
    from_new: bool = False,
    any_layer: bool = False,
) -> Float[Tensor, "prompt sender"]:
    """The logit difference with one sender's path to the receivers' queries from the new run."""
    runs = dict(original=record_z(model, tokens), new=record_z(model, new_tokens))
    names = {hook_name(receiver.layer, site) for receiver in receivers}
    rows = torch.arange(len(tokens), device=tokens.device)
    place = (ALL, ALL) if everywhere else (rows, positions)
    found = []
    for sender in senders:
        sent = every(model, partial(first, **runs, sender=sender))
        with model.hooks(fwd_hooks=[] if from_new else sent):
            source = new_tokens if from_new else tokens
            arrived = model.run_with_cache(source, names_filter=sorted(names))[1]

        def put(x: Tensor, hook: HookPoint, arrived: dict = arrived) -> Tensor:
            x = x.clone()
            for receiver in receivers:
                if any_layer or receiver.layer == hook.layer():
                    index = (*place, ALL if whole_layer else receiver.head)
                    x[index] = arrived[hook.name][index]
            return x

        again = every(model, partial(second, **runs, sender=sender)) if second else []
        hooks = [*again, *((name, put) for name in names)]
        found.append(run_under(model, tokens, answers, hooks))
    return torch.stack(found, dim=1)


# Part 7: a circuit alone; masks are True at heads and positions


def run_kept(
    model: TransformerBridge,
    tokens: Tokens,
    answers: Answers,
    means: Means,
    keep: Mask,
    layers: Iterable[int] | None = None,
) -> Float[Tensor, "prompt"]:
    """F: the logit difference with all but `keep` mean-ablated."""

    def ablate(z: Tensor, hook: HookPoint) -> Tensor:
        layer = hook.layer()
        return torch.where(keep[:, layer, :, :, None].to(z.device), z, means[:, layer].to(z))

    return run_under(model, tokens, answers, every(model, ablate, layers))


def circuit_alone(
    model: TransformerBridge,
    tokens: Tokens,
    answers: Answers,
    means: Means,
    keep: Mask,
    f_model: Float[Tensor, "prompt"],
    *,
    share: Callable[[Tensor, Tensor], object] = lambda f, whole: f.mean() / whole.mean(),
    layers: Callable[[Mask], Iterable[int] | None] = lambda keep: None,
) -> tuple[Float[Tensor, "prompt"], float]:
    """F(C) of every prompt, and the faithfulness: mean F(C) over mean F(M)."""
    f = run_kept(model, tokens, answers, means, keep, layers(keep))
    return f, share(f, f_model)


def larger_on_average(alone: Tensor, after: Tensor) -> Float[Tensor, "prompt"]:
    """Whichever of two changes has the larger mean, in size."""
    return alone if alone.mean().abs() >= after.mean().abs() else after


def head_minimality(
    model: TransformerBridge,
    tokens: Tokens,
    answers: Answers,
    means: Means,
    keep: Mask,
    node: Mask,
    rest: Mask,
    *,
    choose: Callable[[Tensor, Tensor], Tensor] = larger_on_average,
    among: Callable[[Mask], Mask] = lambda keep: keep,
    whole: bool = False,
) -> Float[Tensor, "prompt"]:
    """What one head adds to the circuit, with the rest of its role or without, if that is more."""
    f = partial(run_kept, model, tokens, answers, means)
    keep = among(keep)
    with_all, with_some = f(keep), f(keep & ~rest)
    if whole:
        with_all = with_some = run_under(model, tokens, answers)
    return choose(with_all - f(keep & ~node), with_some - f(keep & ~rest & ~node))


def role_completeness(
    model: TransformerBridge,
    tokens: Tokens,
    answers: Answers,
    means: Means,
    keep: Mask,
    role: Mask,
    *,
    without: Callable[[Mask, Mask], Mask] = lambda keep, role: keep & ~role,
    among: Callable[[Mask], Mask] = torch.ones_like,
) -> Float[Tensor, "run prompt"]:
    """F(C - G) and F(M - G): a role knocked out of the circuit, and out of the whole model."""
    f = partial(run_kept, model, tokens, answers, means)
    return torch.stack([f(without(keep, role)), f(without(among(keep), role))])


# What they are tried on


def generator(seed: int) -> torch.Generator:
    """A generator on the CPU, so that the cases are the same everywhere."""
    return torch.Generator().manual_seed(seed)


@cache
def small_model() -> TransformerBridge:
    """Four layers of three random heads, which run in milliseconds."""
    return tiny_model()


def random_tokens(seed: int, n_prompts: int = 6, n_pos: int = 7) -> Tokens:
    """Prompts of tokens that the small model knows."""
    return torch.randint(1, 60, (n_prompts, n_pos), generator=generator(seed))


def random_task(seed: int) -> tuple[TransformerBridge, Tokens, Answers]:
    """The small model, prompts, and two different tokens for each as its answers."""
    tokens, draws = random_tokens(seed), generator(seed + 1000)
    answers = [torch.randperm(60, generator=draws)[:2] for _ in tokens]
    return small_model(), tokens, torch.stack(answers)


def random_pair(seed: int) -> tuple[TransformerBridge, Tokens, Tokens, Answers]:
    """The small model, two sets of prompts, and answers."""
    model, tokens, answers = random_task(seed)
    return model, tokens, random_tokens(seed + 1), answers
