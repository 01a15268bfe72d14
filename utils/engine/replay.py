"""Run again only the part of a forward pass that an intervention can change.

A sweep asks the same question hundreds of times: "what if this one activation were different?".
Nearly all of each forward pass is the same every time:

    layer 3   . . . a a #      # run again
    layer 2   . . . # # #      a attention alone: the last MLP runs where the logits are read
    layer 1   . . . . . .      . taken from the recorded run (below the patched layer: its input;
    layer 0   . . . . . .        left of the first changed position: its keys and values)
              0 1 2 3 4 5      an intervention at layer 2 that changes positions 3 and later

:class:`Replay` records one pass and then re-runs that part alone. The numbers are those of
``model.run_with_hooks`` (same blocks, same hooks, same order of operations). A sweep takes many
interventions at once: each is a copy of the prompts, and joins the batch at the block it changes.
"""

import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from utils.engine.packs import by_copy, in_packs, pack_size
from utils.engine.shortcuts import mlp_only_at
from utils.metrics import last_position_hooks
from utils.prompts import check_tokens, start_token

Hooks = Sequence[tuple[str, Callable]]
Read = slice | list[int]
Metric = Callable[[Float[Tensor, "prompt 1 vocab"]], Float[Tensor, "prompt"]]
LAST = slice(-1, None)
MAX_LOGITS = 2**24  # logits held at once: 64 MB in float32

# Along which dimension each argument of a block counts the positions it computes.
POSITION_DIM = {
    "attention_mask": -2,
    "position_embeddings": 1,
    "position_ids": -1,
    "cache_position": -1,
}
_CACHE_NAMES = {"past_key_values", "past_key_value", "layer_past"}
_checked: WeakSet = WeakSet()
_refused: WeakSet = WeakSet()


class _KeyValueTape:
    """Stands in for the model's key/value cache: records a pass, then puts its prefix in front."""

    def __init__(self) -> None:
        self.recorded: dict[int, tuple[Tensor, Tensor]] = {}
        self.start: int | None = None  # None while recording
        self.copies = 1

    def update(self, k: Tensor, v: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        if self.start is None:
            self.recorded[layer] = (k, v)
            return k, v
        old_k, old_v = self.recorded[layer]
        return self._joined(old_k, k), self._joined(old_v, v)

    def _joined(self, old: Tensor, new: Tensor) -> Tensor:
        """What was recorded left of `start`, the same for every copy, and the new from there on."""
        joined = new.new_empty(*new.shape[:2], self.start + new.shape[2], new.shape[3])
        joined.unflatten(0, (self.copies, -1))[..., : self.start, :] = old[:, :, : self.start]
        joined[:, :, self.start :] = new
        return joined


class Replay:
    """One recorded forward pass over ``tokens``, to be run again under hooks.

    Args:
        model: a TransformerBridge.
        tokens: ``[prompt pos]``, no padding.
        hooks: record the run under these hooks (a run with most heads ablated, say).
        keep: names of hook points whose activations are kept, in ``activations``.

    ``Replay(model, tokens).run(hooks)`` gives the logits of
    ``model.run_with_hooks(tokens, fwd_hooks=hooks)`` at the positions asked for.
    A run applies only the hooks it is given: hand it those of the recording too, for the layers
    and positions it runs again.
    A model whose blocks cannot be run on their own with the same result is noticed the first time
    (a warning says so) and takes the plain path from then on. Raises as `check_tokens`.
    """

    def __init__(
        self,
        model: TransformerBridge,
        tokens: Int[Tensor, "prompt pos"],
        hooks: Hooks = (),
        keep: Sequence[str] = (),
    ):
        check_tokens(model, tokens)
        _check_padding(model, tokens)
        self.model, self.tokens = model, tokens
        self.activations: Mapping[str, Tensor] = {}
        self.hidden: list[Float[Tensor, "prompt pos d_model"]] = []  # what each block was given
        self._arguments: list[dict[str, Any]] = []
        self._tape = _KeyValueTape()
        self._hooks = list(hooks)
        if hooks and model not in _checked:
            Replay(model, tokens)  # checks the model without hooks
        if model in _refused and not keep:
            return
        recorded = self._record(keep)
        if model not in _checked and model not in _refused:
            self._check(recorded)

    @property
    def _shares_prefix(self) -> bool:
        """Whether keys and values left of a position can be taken from the recorded run."""
        known = all(
            name in POSITION_DIM or not isinstance(value, Tensor)
            for name, value in self._arguments[0].items()
        )
        return known and len(self._tape.recorded) == self.model.cfg.n_layers

    def run(
        self, hooks: Hooks, start: int = 0, read: Read = slice(None), copies: int = 1
    ) -> Float[Tensor, "copies*prompt read vocab"]:
        """Logits under ``hooks`` at the positions ``read``.

        Args:
            hooks: TransformerLens hooks on the blocks. With ``start`` above 0 they see activations
                from that position on, so an intervention must leave earlier positions as recorded.
            start: first position that the intervention can change: use :meth:`first_position`,
                which is 0 for models that cannot share a prefix.
            read: which of the positions from ``start`` on to unembed, a slice or a list;
                ``LAST`` is the last one alone. In a small model the unembedding is a
                large part of the work.
            copies: run this many copies of the prompts at once, one after the other along the
                first axis, so that hooks can treat each copy differently: one large matrix
                product is faster than many small ones.

        Raises ValueError for a hook that is not on a block.
        """
        layer = self._lowest(hooks)
        if self.model in _refused:
            below = [hook for hook in self._hooks if layer_of(hook[0]) < layer]
            tokens = self.tokens.repeat(copies, 1)
            return self.model.run_with_hooks(tokens, fwd_hooks=[*below, *hooks])[:, read]
        return self._unembed(self._run_from([layer] * copies, hooks, start, read))

    def measure(
        self, metric: Metric, hooks: Hooks, start: int = 0, copies: int = 1, read: Read = LAST
    ) -> Float[Tensor, "copy prompt *read"]:
        """The metric under ``hooks``, for each of the copies.

        As :meth:`run`; ``metric`` gets the logits of one copy, [prompt read vocab]: those of the
        last position unless others are asked for. Raises ValueError also when it does not give
        one value per prompt, or one per prompt and position read.
        """
        if self.model in _refused:
            logits = self.run(hooks, start, read, copies)
            return torch.stack([_values(metric, x, read) for x in logits.split(len(self.tokens))])
        layers = [self._lowest(hooks)] * copies
        return self.read_out(metric, self._run_from(layers, hooks, start, read), read)

    def sweep(
        self,
        metric: Metric,
        interventions: Sequence[Hooks],
        start: int = 0,
        desc: str | None = None,
        read: Read = LAST,
    ) -> Float[Tensor, "intervention prompt *read"]:
        """The metric under each of the interventions alone.

        Row i is ``measure(metric, interventions[i], start, read=read)[0]``, but many run in one
        batch, as large as memory allows. ``desc`` names the progress bar (none without).
        """
        order = sorted(
            range(len(interventions)), key=lambda index: self._lowest(interventions[index])
        )

        def measure(indices: list[int]) -> Float[Tensor, "intervention prompt *read"]:
            chosen = [interventions[index] for index in indices]
            if self.model in _refused:
                return torch.cat([self.measure(metric, hooks, read=read) for hooks in chosen])
            layers = [self._lowest(hooks) for hooks in chosen]
            hooks = by_copy(chosen, len(self.tokens))
            return self.read_out(metric, self._run_from(layers, hooks, start, read), read)

        size = pack_size(self.model, *self.tokens.shape, start)
        values = in_packs(order, size, measure, desc)
        return values[torch.tensor(order, device=values.device).argsort()]

    def read_out(
        self,
        metric: Metric,
        resid: Float[Tensor, "copies*prompt read d_model"],
        read: Read = LAST,
    ) -> Float[Tensor, "copy prompt *read"]:
        """The metric of each copy, from the residual stream above the last block at `read`.

        A metric with a method ``of_normed`` (`patching.LogitDiff`) needs no unembedding.
        """
        n_prompts, values = len(self.tokens), []
        if hasattr(metric, "of_normed"):
            normed = self.model.ln_final(resid)
            return metric.of_normed(self.model, normed.unflatten(0, (-1, n_prompts)))
        at_once = max(1, MAX_LOGITS // (n_prompts * resid.shape[1] * self.model.cfg.d_vocab))
        for some in resid.split(at_once * n_prompts):
            logits = self._unembed(some)
            values += [_values(metric, one, read) for one in logits.split(n_prompts)]
        return torch.stack(values)

    def _unembed(self, resid: Float[Tensor, "row read d_model"]) -> Tensor:
        return self.model.unembed(self.model.ln_final(resid))

    def _lowest(self, hooks: Hooks) -> int:
        """The lowest block that hooks are on; the last for none."""
        return min((layer_of(name) for name, _ in hooks), default=self.model.cfg.n_layers - 1)

    def first_position(self, changed: Bool[Tensor, "prompt pos"]) -> int:
        """Where to start a run that changes the positions ``changed``: 0 if no prefix is shared."""
        if self.model in _refused or not self._shares_prefix or not changed.any():
            return 0
        return int(changed.any(dim=0).nonzero()[0])

    def activations_of(
        self, tokens: Int[Tensor, "prompt pos"], names: Sequence[str], start: int
    ) -> dict[str, Tensor]:
        """Activations, from position ``start`` on, of prompts that are the recorded ones before it.

        An attention pattern begins at that destination, and has all sources. Nothing but the
        prompts may differ from the recorded run: not for a recording under hooks.
        """
        kept: dict[str, Tensor] = {}
        keep = [(name, lambda x, hook, name=name: kept.update({name: x.clone()})) for name in names]
        if not start:
            self.model.run_with_hooks(tokens, fwd_hooks=[*last_position_hooks(), *keep])
            return kept
        embedded = self.model(tokens, stop_at_layer=0)[:, start:]
        put = ("blocks.0.hook_resid_pre", lambda resid, hook: embedded)
        self._run_from([0], [put, *keep], start, LAST)
        return kept

    def _record(self, keep: Sequence[str]) -> Float[Tensor, "prompt 1 vocab"]:
        """Run the prompts once, noting what each block gets; the logits of the last position."""

        def note(block, args, kwargs):
            names = inspect.signature(block.original_component.forward).parameters
            kwargs = dict(zip(names, args, strict=False)) | kwargs
            for name in _CACHE_NAMES & kwargs.keys():
                kwargs[name] = self._tape
            self.hidden.append(kwargs.pop("hidden_states"))
            self._arguments.append(kwargs)
            return (self.hidden[-1],), kwargs

        handles = [
            block.register_forward_pre_hook(note, with_kwargs=True) for block in self.model.blocks
        ]
        try:
            with self.model.hooks(fwd_hooks=[*last_position_hooks(), *self._hooks]):
                if not keep:
                    return self.model(self.tokens)
                logits, self.activations = self.model.run_with_cache(
                    self.tokens, names_filter=list(keep)
                )
                return logits
        finally:
            for handle in handles:
                handle.remove()

    def _run_from(
        self, layers: Sequence[int], hooks: Hooks, start: int, read: Read
    ) -> Float[Tensor, "copies*prompt read d_model"]:
        """The residual stream above the last block; copy i joins at block ``layers[i]``."""
        if start and not self._shares_prefix:
            raise ValueError(f"start: this model shares no prefix, want 0, got {start}")
        self._tape.start = start
        hidden = self.hidden[0][:0, start:]
        top = self.model.cfg.n_layers - 1
        with self.model.hooks(fwd_hooks=list(hooks)), ExitStack() as stack:
            for index in range(layers[0], top + 1):
                if joining := layers.count(index):
                    new = self.hidden[index][:, start:].repeat(joining, 1, 1)
                    hidden = torch.cat([hidden, new])
                self._tape.copies = copies = len(hidden) // len(self.tokens)
                arguments = {
                    name: _fitted(name, value, start, copies)
                    for name, value in self._arguments[index].items()
                }
                if index == top and _only_on_attention(hooks, top):
                    stack.enter_context(mlp_only_at(self.model.blocks[top], read))
                out = self.model.blocks[index](hidden, **arguments)
                hidden = out[0] if isinstance(out, tuple) else out
        return hidden[:, read]

    def _check(self, recorded: Float[Tensor, "prompt 1 vocab"]) -> None:
        """One patch both ways, beside a copy without it: the same logits at the last position.

        The patch sets the residual stream halfway up to 0, from the middle position on.
        """
        layer, middle = (self.model.cfg.n_layers - 1) // 2, self.tokens.shape[1] // 2
        start = middle if self._shares_prefix else 0

        def clear(at: int) -> Hooks:
            def hook_fn(resid: Tensor, hook) -> Tensor:
                return torch.cat([resid[:, :at], torch.zeros_like(resid[:, at:])], dim=1)

            return [(f"blocks.{layer}.hook_resid_pre", hook_fn)]

        whole_hooks = [*last_position_hooks(), *clear(middle)]
        whole = self.model.run_with_hooks(self.tokens, fwd_hooks=whole_hooks)
        hooks = by_copy([clear(middle - start), []], len(self.tokens))
        try:
            again = self._unembed(self._run_from([layer] * 2, hooks, start, LAST))
            exact = torch.allclose(again, torch.cat([whole, recorded]), atol=1e-3, rtol=1e-4)
        except (TypeError, RuntimeError, AttributeError):
            exact = False
        (_checked if exact else _refused).add(self.model)
        if not exact:
            warnings.warn(
                "replay: the blocks of this model cannot be run on their own with the same result; "
                "sweeps take the plain path (one full forward per intervention).",
                stacklevel=3,
            )


def _check_padding(model: TransformerBridge, tokens: Int[Tensor, "prompt pos"]) -> None:
    """Raise for prompts that begin with padding: without a mask they would attend to it."""
    pad = getattr(model.tokenizer, "pad_token_id", None)
    if pad is None:
        return
    # where padding is also the start token, one of them is none
    leading = tokens[:, : 2 if pad == start_token(model) else 1]
    padded = (leading == pad).all(1) & (leading.shape[1] < tokens.shape[1])
    if padded.any():
        raise ValueError(
            f"tokens: prompt {int(padded.nonzero()[0])} begins with padding (token {pad}), "
            "give prompts of one length"
        )


def _values(metric: Metric, logits: Tensor, read: Read) -> Float[Tensor, "prompt *read"]:
    values = metric(logits)
    wanted, shapes = "[prompt]", [logits.shape[:1]]
    if read != LAST:
        wanted, shapes = "[prompt] or [prompt read]", [*shapes, logits.shape[:2]]
    if values.shape not in shapes:
        raise ValueError(f"metric must give {wanted} values, got shape {tuple(values.shape)}")
    return values


def _only_on_attention(hooks: Hooks, layer: int) -> bool:
    return all(".attn." in name for name, _ in hooks if layer_of(name) == layer)


def layer_of(hook_name: str) -> int:
    match = re.match(r"blocks\.(\d+)\.", hook_name)
    if match is None:
        raise ValueError(f"hooks: want names like 'blocks.3.attn.hook_z', got {hook_name!r}")
    return int(match.group(1))


def _fitted(name: str, value: Any, start: int, copies: int) -> Any:
    """A recorded argument of a block, for the positions from `start` on and so many copies."""
    if name not in POSITION_DIM or value is None:
        return value
    if isinstance(value, tuple):
        return tuple(_fitted(name, part, start, copies) for part in value)
    dim = POSITION_DIM[name]
    value = value.narrow(dim, start, value.shape[dim] - start)
    # one row for all prompts is broadcast, as it was in the recorded run
    alone = value.ndim == 1 or len(value) == 1
    return value if alone else value.repeat(copies, *[1] * (value.ndim - 1))
