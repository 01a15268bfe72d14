"""The one primitive of every intervention: where in a run an activation is replaced, and by what.

Zero ablation, mean ablation, activation patching, path patching and running a circuit alone differ
only in *where* the new value goes and *which run* it comes from:

    heads_from(model, heads, 0.0)                           # zero ablation
    heads_from(model, heads, mean_run(model, others))       # mean ablation (`utils.ablation`)
    heads_from(model, heads, record(model, clean, ["z"]))   # patching, on the corrupted prompts
    nodes_from(~circuit, means)                             # a circuit alone (`utils.circuit`)

    sent = [*heads_from(model, all_heads, original), *heads_from(model, [sender], new)]
    arrived = record(model, prompts, ["q"], sent)           # path patching (`utils.paths`):
    heads_from(model, receivers, arrived, "q")              # frozen but for the sender, then put

Each is a list of `Edit`; of two at one place the later wins. `hooks(edits)` makes ordinary
TransformerLens hooks of them, for `model.run_with_hooks`; `sweep` measures many such lists, each
alone, in a fraction of the time.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import NamedTuple
from weakref import ref

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from utils.checks import check_hooks, check_model, check_tokens, indices
from utils.engine.interrupts import ctrl_c_waits
from utils.engine.memory import check_cache
from utils.engine.packs import check_edits, sweep_in_packs
from utils.engine.readout import check_metric, read_hook
from utils.heads import HEAD_SITES, check_heads, n_site_heads
from utils.typed import BadArgument, checked, kind_of

# not "resid_mid": what a hook puts there reaches the MLP alone, and not the stream above it. To
# patch it, patch "resid_pre" and "attn_out" of the layer together.
STREAM_SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")


class Run(NamedTuple):
    """Activations by hook name: of one run (with its tokens and the edits it ran under), or others.

    Only `record` sets tokens and edits, as they must explain the activations in full: a run under
    the same `Edit` objects as a sweep's `base` is taken to agree with it up to the first token that
    differs. Means, mixtures, what was changed by hand and what was recorded under other hooks than
    those of edits have no tokens.
    An axis of prompts or positions of length one, as in a mean over them, stands for all. `model`
    (if known) refers to the model that ran, without keeping it alive, so that no other one is given
    its activations. Nor is a recorded run taken that was changed in place: `marks` tell.
    """

    activations: Mapping[str, Tensor]
    tokens: Int[Tensor, "prompt pos"] | None = None
    edits: Sequence["Edit"] = ()
    model: ref | None = None
    marks: Sequence[tuple[int, int]] = ()


class Edit(NamedTuple):
    """At hook point `name`, wherever `where` is True, the activation becomes the source's.

    Where it is False the activation stays. `where` has the axes of the activation: [prompt pos head
    1], for a pattern [prompt head dest 1], for the residual stream [prompt pos 1]. Any of them may
    have length one, for all. With
    `same_prompts` a sweep refuses a source that was recorded on others than its own.
    """

    name: str
    where: Bool[Tensor, "*axes"]
    source: Run | float
    same_prompts: bool = False

    def __call__(self, x: Tensor, rows: slice = slice(None), start: int = 0) -> Tensor:
        """The activation after the edit. (`rows`, `start`: the engine's part of the prompts.)"""
        new = self.source
        if isinstance(new, Run):
            if self.name not in (new.activations or ()):
                raise ValueError(f"source of the edit at {self.name} lacks it")
            new = self._part("source", new.activations[self.name], x, rows, start)
        elif not isinstance(new, Real) or not math.isfinite(new):
            wanted = f"source of the edit at {self.name} must be a Run or a finite number"
            raise BadArgument(f"{wanted}; got {kind_of(new)}")
        return torch.where(self._part("where", self.where, x, rows, start), new, x)

    @property
    def position_axis(self) -> int:
        return 2 if self.name.endswith("pattern") else 1

    def _part(self, what: str, values: Tensor, x: Tensor, rows: slice, start: int) -> Tensor:
        """What belongs to the part of a run that `x` holds; ValueError if it does not fit `x`.

        x: [prompt ...], or in the engine [copy prompt ...], of the prompts `rows`, from position
        `start` on.
        """
        axis = self.position_axis
        kind = "bool" if what == "where" else "float"
        if not isinstance(values, Tensor) or kind not in str(values.dtype):
            wanted = f"{what} of the edit at {self.name} must be a tensor of {kind}s"
            raise BadArgument(f"{wanted}; got {kind_of(values)}")
        fits = axis < values.ndim <= x.ndim  # copies of the prompts may stand in front
        if fits:
            values = values[rows] if len(values) > 1 else values
            if values.shape[axis] > 1:
                values = values.movedim(axis, 0)[start:].movedim(0, axis)
            # activations stand for all prompts or positions, not for all heads or their numbers
            alike = range(values.ndim) if what == "where" else (0, axis)
            sizes = zip(values.shape, x.shape[-values.ndim :], strict=True)
            fits = all(g == want or (g == 1 and i in alike) for i, (g, want) in enumerate(sizes))
        if not fits:
            got = f"{what} of the edit at {self.name} is for {list(values.shape)}"
            raise ValueError(f"{got}, this run has {list(x.shape)}")
        return values.to(x.device)


@checked
def hooks(edits: Iterable[Edit]) -> list[tuple[str, Callable]]:
    """The edits as TransformerLens hooks, for `model.run_with_hooks` or `model.hooks`."""
    return [(edit.name, lambda x, hook, edit=edit: edit(x)) for edit in edits]


@checked
@torch.no_grad()
def record(
    model: TransformerBridge,
    tokens: Int[Tensor, "prompt pos"],
    sites: Iterable[str],
    edits: Sequence[Edit] = (),
    n_layers: int | None = None,
) -> Run:
    """Run once, under `edits`, and keep these sites of every layer: "z", "q", "k", "v", "pattern",
    "resid_pre", "resid_mid", "resid_post", "attn_out" or "mlp_out". ("out" is "attn_out" before the
    norm that a few models, such as Gemma 2, put behind attention.)

    With `n_layers` only the lowest layers are run. Raises ValueError for a site that the model
    lacks, as `check_tokens`, and for a model that is not in compatibility mode; MemoryError if what
    is kept takes over 80 % of the free memory.
    """
    check_tokens(model, tokens, folded=True)
    if isinstance(sites, str):
        raise ValueError(f"sites must be a list, such as ['z'], got {sites!r}")
    n_layers = model.cfg.n_layers if n_layers is None else n_layers
    if not 0 <= n_layers <= model.cfg.n_layers:
        raise ValueError(f"n_layers must lie in 0..{model.cfg.n_layers}, got {n_layers}")
    layers = range(n_layers)
    _check_edits(model, tokens, edits)
    names = [hook_name(layer, site) for site in sites for layer in layers]
    if lacking := [name for name in names if name not in model.hook_dict]:
        raise ValueError(f"sites: this model has no {lacking[0]}")
    check_cache(model, tokens, names)
    # under hooks that are not in `edits` the tokens do not explain the activations
    points = model.hook_dict.values()
    plain = all(hook.is_permanent for point in points for hook in point.fwd_hooks)
    with ctrl_c_waits(), model.hooks(fwd_hooks=[read_hook([-1]), *hooks(edits)]):
        cache = model.run_with_cache(tokens, names_filter=names, stop_at_layer=n_layers)[1]
    kept = {name: cache[name] for name in names}
    # a copy of the tokens: whoever gave them may go on to change them
    of = tokens.clone() if plain else None
    return Run(kept, of, tuple(edits), ref(model), _marks(kept) if plain else ())


@checked
def only_at(
    tokens: Int[Tensor, "prompt pos"], position: Int[Tensor, "prompt"] | int
) -> Bool[Tensor, "prompt pos"]:
    """True at one position of each prompt (or the same of all); ValueError where there is none."""
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    found = columns == torch.as_tensor(position, device=tokens.device).reshape(-1, 1)
    if not found.any(1).all():
        raise ValueError(f"position must lie in 0..{tokens.shape[1] - 1}, got {position}")
    return found.expand(len(tokens), -1)


@checked
def heads_from(
    model: TransformerBridge,
    heads: Iterable[tuple[int, int]],
    source: Run | float,
    site: str = "z",
    at: Bool[Tensor, "prompt pos"] | None = None,
) -> list[Edit]:
    """Edits that take these heads' activations from `source`, all at once, one edit a layer.

    `site`: the heads' output "z" (before W_O), "q", "k", "v", or the attention "pattern". For "k"
    and "v" heads are key/value heads, which grouped query heads share (`heads.key_value_head`).
    `at` (see `only_at`): which positions, of a pattern which destinations; all if None. Raises
    ValueError for an unknown site or head, or a source that lacks the activation.
    """
    by_layer = defaultdict(list)
    for layer, head in check_heads(model, heads, site):
        by_layer[layer].append(head)
    return [_of_layer(model, layer, own, source, site, at) for layer, own in by_layer.items()]


@checked
def each_head_from(
    model: TransformerBridge, heads: Iterable[tuple[int, int]], source: Run | float, site: str = "z"
) -> list[list[Edit]]:
    """`heads_from` of each head alone, for a sweep: the model is checked once. Raises likewise."""
    chosen = check_heads(model, heads, site)
    return [[_of_layer(model, layer, [head], source, site)] for layer, head in chosen]


@checked
def stream_from(
    model: TransformerBridge,
    layer: int,
    source: Run | float,
    site: str = "resid_pre",
    at: Bool[Tensor, "prompt pos"] | None = None,
) -> list[Edit]:
    """The edit that takes a layer's residual stream, or what attention or MLP adds, from `source`.

    `site`: "resid_pre", "resid_post", "attn_out" or "mlp_out"; `at` as in `heads_from`. Raises
    ValueError for a layer or site the model lacks, or a source without it.
    """
    check_model(model)
    if site not in STREAM_SITES or hook_name(0, site) not in model.hook_dict:
        raise ValueError(f"site must be one of {STREAM_SITES} that the model has, got {site!r}")
    if not 0 <= layer < model.cfg.n_layers:
        raise ValueError(f"layer must lie in 0..{model.cfg.n_layers - 1}, got {layer}")
    return [_edit(layer, site, _places(at)[..., None], source, model)]


@checked
def nodes_from(mask: Bool[Tensor, "prompt layer pos head"], source: Run | float) -> list[Edit]:
    """Edits that take z from `source` wherever the mask is True, one for each layer with any."""
    if mask.numel() == 0:
        raise ValueError(f"mask is empty: shape {list(mask.shape)}")
    layers = mask.any(0).any(-1).any(-1).nonzero()[:, 0].tolist()
    return [_edit(layer, "z", mask[:, layer, :, :, None], source) for layer in layers]


@checked
@torch.no_grad()
def sweep(
    model: TransformerBridge,
    tokens: Int[Tensor, "prompt pos"],
    metric: Callable,
    interventions: Sequence[Sequence[Edit]],
    base: Sequence[Edit] = (),
    read: Sequence[int] | None = None,
    desc: str = "sweep",
) -> Float[Tensor, "intervention prompt *read"]:
    """The metric under each of the interventions alone, on top of the edits in `base`.

    Row i is the metric under `hooks([*base, *interventions[i]])`. It gets the logits of the last
    position, [prompt 1 vocab], or of the positions `read`. Only the blocks and positions that an
    intervention can change are run again (`utils.engine`), many interventions in one batch; a
    model whose blocks cannot be run on their own takes a whole run for each. Raises ValueError for
    no interventions, edits that do not fit the prompts, positions out of range, and a metric that
    does not give one value, and not nan, per prompt (or per prompt and position read).
    """
    read = None if read is None else indices("read", read, tokens.shape[1])
    check_sweep(model, {"tokens": tokens}, metric, None if read is None else len(read))
    if not interventions:
        raise ValueError("interventions is empty, give at least one")
    _check_edits(model, tokens, [edit for edits in (base, *interventions) for edit in edits])
    return sweep_in_packs(model, tokens, metric, interventions, base, read, desc)


@checked
def check_sweep(
    model: TransformerBridge,
    prompts: Mapping[str, Tensor],
    metric: Callable,
    n_read: int | None = None,
) -> None:
    """Raise ValueError for prompts (by name) or a metric that do not fit.

    The metric is of the last position, or of as many as are read, prompt by prompt.
    """
    for name, tokens in prompts.items():
        check_tokens(model, tokens, name, folded=True)
    check_hooks(model, getattr(metric, "hooks", ()))
    check_metric(metric, len(tokens), model.cfg.d_vocab, model.cfg.device, n_read)


@checked
def hook_name(layer: int, site: str) -> str:
    """The name of a layer's hook point at a site; "out" is what attention gives, before a norm."""
    return f"blocks.{layer}.{'attn.' if site in (*HEAD_SITES, 'out') else ''}hook_{site}"


def _of_layer(
    model: TransformerBridge,
    layer: int,
    heads: Sequence[int],
    source: Run | float,
    site: str,
    at: Bool[Tensor, "prompt pos"] | None = None,
) -> Edit:
    """The edit of some heads of one layer."""
    is_head = torch.zeros(n_site_heads(model, site), dtype=torch.bool)
    is_head[list(heads)] = True
    axes = "prompt head pos 1" if site == "pattern" else "prompt pos head 1"
    where = rearrange(_places(at)[..., None] & is_head, f"prompt pos head -> {axes}")
    return _edit(layer, site, where, source, model)


def _places(at: Bool[Tensor, "prompt pos"] | None) -> Bool[Tensor, "prompt pos"]:
    return torch.ones(1, 1, dtype=torch.bool) if at is None else at.cpu()


def _edit(
    layer: int,
    site: str,
    where: Bool[Tensor, "*axes"],
    source: Run | float,
    model: TransformerBridge | None = None,
) -> Edit:
    name = hook_name(layer, site)
    if isinstance(source, Run) and name not in (has := list(source.activations or ())):
        raise ValueError(f"source lacks {name}, it has {has[:3]} ...")
    if model is not None:
        _check_source(source, model)
    return Edit(name, where.cpu(), source)


def _check_edits(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"], edits: Sequence[Edit]
) -> None:
    for edit in edits:
        _check_source(edit.source, model)
    check_edits(model, tokens, edits)


def _check_source(source: Run | float, model: TransformerBridge) -> None:
    if not isinstance(source, Run):
        return
    if source.model is not None and source.model() is not model:
        raise ValueError("source is a run of another model than the one that it is to go into")
    if source.tokens is not None and source.marks not in ((), _marks(source.activations)):
        raise ValueError(
            "source was changed after it was recorded: give Run(activations) of what was changed"
        )


def _marks(activations: Mapping[str, Tensor]) -> tuple[tuple[int, int], ...]:
    """Each tensor's identity and how often it was changed in place (inference mode: unknown)."""
    return tuple((id(x), x.is_inference() or x._version) for x in activations.values())
