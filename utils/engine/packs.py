"""Many interventions in one batch: who runs together, how many fit, and what if memory runs out."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import groupby
from typing import Any, TypeVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from utils.engine.interrupts import ctrl_c_waits
from utils.engine.memory import SHARE, activation_shape, check_cache, check_fits, free_memory
from utils.engine.readout import Metric, read_hook, read_out, values_of
from utils.engine.replay import Replay, can_replay, is_out_of_memory, layer_of
from utils.typed import Hooks

KEPT = ("hook_resid_pre", "attn.hook_k", "attn.hook_v")  # what a recording has of each block
Item = TypeVar("Item")
Values = Float[Tensor, "item prompt *read"]
Edit = Any  # a `utils.edits.Edit`, which stands above the engine


def sweep_in_packs(
    model: TransformerBridge,
    tokens: Int[Tensor, "prompt pos"],
    metric: Metric,
    interventions: Sequence[Sequence[Edit]],
    base: Sequence[Edit],
    read: Sequence[int] | None,
    desc: str,
) -> Values:
    """`utils.edits.sweep`, in packs of interventions that begin at the same position.

    In a pack those of lower blocks come first. Prompts run in parts where a copy of all of them
    does not fit. Raises ValueError for an edit at no block or that does not fit the prompts.
    """
    n_prompts, n_positions = tokens.shape
    last_alone = read is None  # the metric then gives one value per prompt
    read = [n_positions - 1] if read is None else list(read)
    n_part = min(n_prompts, rows_that_fit(model, n_positions))
    names = [f"blocks.{layer}.{x}" for layer in range(model.cfg.n_layers) for x in KEPT]
    check_cache(model, tokens, names)
    parts = [slice(i, min(i + n_part, n_prompts)) for i in range(0, n_prompts, n_part)]

    def run_whole(pack: list[int]) -> Values:
        whole = n_prompts * bytes_of_row(model, n_positions)
        check_fits("A run of the sweep", whole, n_prompts, tokens.device)
        own = [read_hook(read), *copy_hooks(base, [interventions[pack[0]]], slice(0, n_prompts))]
        own += getattr(metric, "hooks", ())
        return values_of(metric, model.run_with_hooks(tokens, fwd_hooks=own), last_alone)[None]

    with tqdm(total=len(interventions), desc=desc, leave=False) as progress:
        if not can_replay(model, tokens):
            return in_packs(range(len(interventions)), 1, run_whole, progress)
        recorded = [Replay(model, tokens[rows], copy_hooks(base, [], rows)) for rows in parts]
        # a run begins at or left of what is read; where it cannot take over a prefix, at 0
        leftmost = min(read) if recorded[0].shares_prefix else 0
        changes = [first_change(model, tokens, edits, base) for edits in interventions]
        begins = [(min(start, leftmost), layer) for start, layer in changes]

        def run_again(start: int, pack: list[int]) -> Values:
            n_bytes = len(pack) * n_part * bytes_of_row(model, n_positions, start)
            check_fits("A run of the sweep", n_bytes, n_prompts, tokens.device)
            layers, edits = [begins[i][1] for i in pack], [interventions[i] for i in pack]
            at = [position - start for position in read]
            resid = [
                run.run(layers, copy_hooks(base, edits, rows, start), start, at)
                for run, rows in zip(recorded, parts, strict=True)
            ]  # each [copy prompt read d_model]
            return read_out(model, metric, torch.cat(resid, dim=1), last_alone)

        # by start, and then by block: within a pack the copies join as `Replay.run` wants them
        order = sorted(range(len(interventions)), key=begins.__getitem__)
        found: dict[int, Tensor] = {}
        for start, group in groupby(order, key=lambda i: begins[i][0]):
            together = list(group)
            size = max(1, rows_that_fit(model, n_positions, start) // n_part)
            values = in_packs(together, size, partial(run_again, start), progress)
            found |= zip(together, values, strict=True)
    return torch.stack([found[i] for i in range(len(interventions))])


def check_edits(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"], edits: Sequence[Edit]
) -> None:
    """Raise ValueError for an edit that does not fit the model and the prompts."""
    seen: dict[int, Tensor] = {}  # what many edits share is looked at once
    for edit in {id(edit): edit for edit in edits}.values():
        layer_of(edit.name)
        if edit.name not in model.hook_dict:
            raise ValueError(f"edits: this model has no {edit.name}")
        # a tensor without data: an edit that does not fit its shape raises
        edit(torch.empty(activation_shape(model, tokens, edit.name), device="meta"))
        known = getattr(edit.source, "tokens", None)
        if edit.same_prompts and not (known is not None and torch.equal(known, tokens)):
            raise ValueError(f"edits: the source at {edit.name} was recorded on other prompts")
        values = getattr(edit.source, "activations", {}).get(edit.name)
        if values is not None and id(values) not in seen and not values.isfinite().all():
            raise ValueError(f"edits: the source at {edit.name} is nan or infinite somewhere")
        seen[id(values)] = values


def first_change(
    model: TransformerBridge,
    tokens: Int[Tensor, "prompt pos"],
    edits: Sequence[Edit],
    base: Sequence[Edit],
) -> tuple[int, int]:
    """The first position and the lowest block that the edits change, on top of `base`."""
    found = [(tokens.shape[1] - 1, model.cfg.n_layers - 1)]  # if they change nothing
    for edit in edits:
        where = edit.where.movedim(edit.position_axis, 0).flatten(1).any(1)  # [pos], or [1]
        changed = where.expand(tokens.shape[1])
        source_tokens = getattr(edit.source, "tokens", None)
        if source_tokens is not None and source_tokens.shape == tokens.shape:
            if list(map(id, edit.source.edits)) == list(map(id, base)):
                # one and the same edits (an equal edit may be of a tensor that was changed since):
                # left of the first token that differs, the runs agree
                changed = changed & (source_tokens != tokens).any(0).cumsum(0).bool().cpu()
        if changed.any():
            found.append((int(changed.int().argmax()), layer_of(edit.name)))
    starts, layers = zip(*found, strict=True)
    return min(starts), min(layers)


def copy_hooks(
    base: Sequence[Edit], copies: Sequence[Sequence[Edit]], rows: slice, start: int = 0
) -> Hooks:
    """Hooks on copies of some prompts: `base` on each of them, `copies[i]` on copy i alone."""
    by_name: dict[str, list[tuple[int | None, Edit]]] = defaultdict(list)
    for edit in base:
        by_name[edit.name].append((None, edit))
    for copy, edits in enumerate(copies):
        for edit in edits:
            by_name[edit.name].append((copy, edit))

    def hook_for(name: str) -> Callable:
        def hook_fn(x: Tensor, hook) -> Tensor:
            n_prompts = rows.stop - rows.start
            x = rearrange(x, "(copy prompt) ... -> copy prompt ...", prompt=n_prompts).clone()
            for copy, edit in by_name[name]:
                if copy is None:
                    x[:] = edit(x, rows, start)
                # copies join in order: those that join at a block above are as recorded here
                elif copy < len(x):
                    x[copy] = edit(x[copy], rows, start)
            return x.flatten(0, 1)

        return hook_fn

    return [(name, hook_for(name)) for name in by_name]


def in_packs(
    items: Sequence[Item],
    size: int,
    run: Callable[[list[Item]], Float[Tensor, "item *rest"]],
    progress: tqdm,
) -> Float[Tensor, "item *rest"]:
    """`run` on packs of so many items, joined; a pack that is out of memory is halved.

    So is one that `run` refuses, with a MemoryError, before the system would end the process.
    """
    raise_malloc_threshold()
    done, results = 0, []
    while done < len(items):
        pack = list(items[done : done + size])
        try:
            with ctrl_c_waits():
                results.append(run(pack))
            done += len(pack)
            progress.update(len(pack))
        except (MemoryError, RuntimeError) as error:
            if len(pack) == 1 or not is_out_of_memory(error):
                raise
            size = len(pack) // 2
        # out of the `except`, where the error no longer holds the failed pack's activations
        if size < len(pack) and torch.cuda.is_available():
            torch.cuda.empty_cache()
    return torch.cat(results)


def rows_that_fit(model: TransformerBridge, n_positions: int, start: int = 0) -> int:
    """How many prompts, every copy counted, to run at once from position `start` on.

    On a GPU they may take half of the free memory, else a quarter of what the model takes.
    """
    weight = next(model.parameters())
    free = free_memory(weight.device)
    if weight.device.type == "cuda":
        memory = free // 2
    else:
        memory = max(2**26, sum(p.nbytes for p in model.parameters()) // 4)
    memory = min(memory, int(SHARE * free))
    return max(1, memory // bytes_of_row(model, n_positions, start))


def bytes_of_row(model: TransformerBridge, n_positions: int, start: int = 0) -> int:
    """What running one prompt from position `start` on takes, about."""
    cfg = model.cfg
    # numbers held at once: about so many streams of a position in one block (the MLP's inner ones,
    # those beside it, attention scores), and the keys and values it reads
    width = 4 * (cfg.d_mlp or 0) + 12 * cfg.d_model + 3 * cfg.n_heads * n_positions
    numbers = (n_positions - start) * width + 4 * n_positions * cfg.d_model
    return numbers * next(model.parameters()).element_size()


def check_gradient(model: TransformerBridge, tokens: Int[Tensor, "prompt pos"]) -> None:
    """Raise MemoryError if what a gradient keeps of a run, that of every block, would not fit."""
    n_bytes = len(tokens) * model.cfg.n_layers * bytes_of_row(model, tokens.shape[1])
    check_fits("The gradient", n_bytes, len(tokens), tokens.device)


@cache
def raise_malloc_threshold() -> None:
    """Free one block of 31 MB, once a process, so that the C library keeps what is freed later.

    glibc raises its threshold for giving memory back to the size of the largest block freed so far
    (32 MB at most). Below it, every activation may get fresh pages that have to be cleared first: a
    quarter of a sweep's time.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
