"""Run again only the part of a forward pass that an intervention can change.

A sweep asks the same question hundreds of times: "what if this one activation were different?".
Nearly all of each forward pass is the same every time:

    layer 3   . . . # # #      # run again
    layer 2   . . . # # #      . taken from the recorded run (below the patched layer: its input;
    layer 1   . . . . . .        left of the first changed position: its keys and values)
    layer 0   . . . . . .
              0 1 2 3 4 5      an intervention at layer 2 that changes positions 3 and later

`Replay` records one pass and then runs that part alone again. The numbers are those of
`model.run_with_hooks` (same blocks, same hooks, same order of operations). Many interventions run
at once: each is a copy of the prompts, and joins the batch at the block it changes first.
"""

import inspect
import re
import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from utils.engine.interrupts import ctrl_c_waits
from utils.engine.readout import read_hook
from utils.engine.shortcuts import given_attention
from utils.typed import Hooks

# Along which dimension each argument of a block counts the positions it computes.
POSITION_DIM = {
    "attention_mask": -2,
    "position_embeddings": 1,
    "position_ids": -1,
    "cache_position": -1,
}
CACHE_NAMES = {"past_key_values", "past_key_value", "layer_past"}
_exact: WeakKeyDictionary[TransformerBridge, bool] = WeakKeyDictionary()


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
    """One forward pass over `tokens` under `hooks`, recorded, of which a part can be run again.

    `hidden` is what each block was given; `shares_prefix` says whether a run may start at a later
    position, with the keys and values to its left taken from the recording.
    """

    def __init__(
        self, model: TransformerBridge, tokens: Int[Tensor, "prompt pos"], hooks: Hooks = ()
    ):
        self.model, self.tokens = model, tokens
        self.hidden: list[Float[Tensor, "prompt pos d_model"]] = []
        self._arguments: list[dict[str, Any]] = []
        self._tape = _KeyValueTape()
        with ctrl_c_waits():
            notes = [
                b.register_forward_pre_hook(self._note, with_kwargs=True) for b in model.blocks
            ]
            try:
                model.run_with_hooks(tokens, fwd_hooks=[read_hook([-1]), *hooks])
            finally:
                for note in notes:
                    note.remove()

    def _note(self, block: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Keep what a block is given, and hand it the tape as its key/value cache."""
        names = inspect.signature(block.original_component.forward).parameters
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        kwargs |= dict.fromkeys(CACHE_NAMES & kwargs.keys(), self._tape)
        self.hidden.append(kwargs.pop("hidden_states"))
        self._arguments.append(kwargs)
        return (self.hidden[-1],), kwargs

    @property
    def shares_prefix(self) -> bool:
        known = all(
            name in POSITION_DIM or not isinstance(value, Tensor)
            for name, value in self._arguments[0].items()
        )
        return known and len(self._tape.recorded) == self.model.cfg.n_layers

    def run(
        self, layers: Sequence[int], hooks: Hooks, start: int, read: Sequence[int]
    ) -> Float[Tensor, "copy prompt read d_model"]:
        """The residual stream above the last block, in copies of the prompts that run at once.

        Copy i is as recorded below block `layers[i]` (rising) and left of position `start`. Hooks
        see what is run again: the copies that have joined so far, one after the other along the
        first axis, from `start` on. `read`: positions to return, counted from `start`.
        """
        n_prompts = len(self.tokens)
        self._tape.start = start
        # [copy*prompt pos d_model]: no copy yet, at each block those that it changes first join
        hidden = self.hidden[0][:0, start:]
        with self.model.hooks(fwd_hooks=list(hooks)):
            for layer in range(layers[0], self.model.cfg.n_layers):
                joining = self.hidden[layer][:, start:].repeat(layers.count(layer), 1, 1)
                hidden = torch.cat([hidden, joining]) if len(joining) else hidden
                self._tape.copies = copies = len(hidden) // n_prompts
                arguments = {
                    name: _fitted(name, value, start, copies)
                    for name, value in self._arguments[layer].items()
                }
                hidden = output_of(self.model.blocks[layer](hidden, **arguments))
        return rearrange(hidden[:, read], "(copy prompt) r d -> copy prompt r d", prompt=n_prompts)


def can_replay(model: TransformerBridge, tokens: Int[Tensor, "prompt pos"]) -> bool:
    """Whether blocks run on their own give the whole run's result; found out on first use.

    The one check behind every sweep and path: where it fails, a warning says so once, and they take
    plain runs. Running out of memory is no verdict on the model: that error is passed on.
    """
    if model not in _exact:
        try:
            with ctrl_c_waits():
                _exact[model] = _is_exact(model, tokens[:2])  # many would tell no more
        except (TypeError, RuntimeError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            _exact[model] = False
        if not _exact[model]:
            warnings.warn(
                "replay: the blocks of this model cannot be run on their own with the same result; "
                "sweeps take the plain path (one full forward per intervention).",
                stacklevel=4,
            )
    return _exact[model]


def _is_exact(model: TransformerBridge, tokens: Int[Tensor, "prompt pos"]) -> bool:
    """A patch replayed beside an unpatched copy of all blocks, and one block's attention given.

    The patch sets the residual stream halfway up to 0, from the middle position on.
    """
    layer, middle = (model.cfg.n_layers - 1) // 2, tokens.shape[1] // 2
    block = f"blocks.{layer}"

    def clear(resid: Tensor, hook, start: int = 0) -> Tensor:
        resid = resid.clone()
        resid[-len(tokens) :, middle - start :] = 0  # in the last copy
        return resid

    recorded = Replay(model, tokens)
    start = middle if recorded.shares_prefix else 0
    at = f"{block}.hook_resid_pre"
    whole = model.run_with_hooks(tokens, fwd_hooks=[read_hook([-1]), (at, clear)])
    names = [f"{block}.attn.hook_out", f"{block}.hook_resid_post"]
    with model.hooks(fwd_hooks=[read_hook([-1])]):
        unpatched, cache = model.run_with_cache(tokens, names_filter=names)
    again = recorded.run([0, layer], [(at, lambda r, hook: clear(r, hook, start))], start, [-1])
    with given_attention(model, layer, cache[names[0]]):
        above = output_of(model.blocks[layer](recorded.hidden[layer]))
    pairs = [
        (model.unembed(model.ln_final(again.flatten(0, 1))), torch.cat([unpatched, whole])),
        (above, cache[names[1]]),
    ]
    return all(torch.allclose(got, want, atol=1e-3, rtol=1e-4) for got, want in pairs)


def is_out_of_memory(error: Exception) -> bool:
    """Whether that is what went wrong: on a CPU torch raises a plain RuntimeError."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "allocate memory" in str(error)


def layer_of(hook_name: str) -> int:
    """The block that a hook point lies in; ValueError if it lies in none."""
    match = re.match(r"blocks\.(\d+)\.", str(hook_name))
    if match is None:
        raise ValueError(f"edits: want names like 'blocks.3.attn.hook_z', got {hook_name!r}")
    return int(match.group(1))


def output_of(result: Tensor | tuple) -> Tensor:
    """The residual stream that a block gives, with or without the rest of what it returns."""
    return result[0] if isinstance(result, tuple) else result


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
