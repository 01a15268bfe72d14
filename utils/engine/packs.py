"""Many interventions in one batch: how many fit, and what to do when memory runs out."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

Hooks = Sequence[tuple[str, Callable]]
Item = TypeVar("Item")

# Once a block of this size was freed, glibc keeps freed memory for the next one (32 MB is the
# most); before, it may clear fresh pages for every activation: a quarter of a sweep's time.
torch.empty(31 * 2**20, dtype=torch.uint8)


def in_packs(
    items: Sequence[Item],
    size: int,
    run: Callable[[list[Item]], Float[Tensor, "item *rest"]],
    desc: str | None = None,
) -> Float[Tensor, "item *rest"]:
    """``run`` on packs of so many items, joined; a pack that is out of memory is halved."""
    done, results = 0, []
    with tqdm(total=len(items), desc=desc, leave=False, disable=desc is None) as progress:
        while done < len(items):
            pack = list(items[done : done + size])
            try:
                results.append(run(pack))
            except (MemoryError, RuntimeError) as error:
                if len(pack) == 1 or not _out_of_memory(error):
                    raise
                size = len(pack) // 2
            else:
                done += len(pack)
                progress.update(len(pack))
                continue
            # here the failed pack's activations are no longer held by the error
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return torch.cat(results)


def pack_size(model: TransformerBridge, n_prompts: int, n_positions: int, start: int = 0) -> int:
    """How many copies of the prompts, from position `start` on, to run at once.

    On a GPU they may take half of the free memory, else a quarter of what the model takes.
    """
    cfg, weight = model.cfg, next(model.parameters())
    # numbers held at once: those of a position in one block, and the keys and values it reads
    width = 4 * (cfg.d_mlp or 0) + 12 * cfg.d_model + 3 * cfg.n_heads * n_positions
    numbers = n_prompts * ((n_positions - start) * width + 4 * n_positions * cfg.d_model)
    if weight.device.type == "cuda":
        memory = torch.cuda.mem_get_info(weight.device)[0] // 2
    else:
        memory = max(2**26, sum(p.nbytes for p in model.parameters()) // 4)
    return max(1, memory // (numbers * weight.element_size()))


def _out_of_memory(error: Exception) -> bool:
    # on a CPU torch raises a plain RuntimeError
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "allocate memory" in str(error)


def by_copy(interventions: Sequence[Hooks], n_prompts: int) -> Hooks:
    """Hooks on a batch of copies of the prompts that give copy i the hooks `interventions[i]`."""
    edits = defaultdict(list)
    for index, hooks in enumerate(interventions):
        for name, hook_fn in hooks:
            edits[name].append((slice(index * n_prompts, (index + 1) * n_prompts), hook_fn))

    def hook_for(name: str) -> Callable:
        def edit(activation: Tensor, hook) -> Tensor:
            activation = activation.clone()
            for rows, hook_fn in edits[name]:
                edited = hook_fn(activation[rows], hook)
                if edited is not None:
                    activation[rows] = edited
            return activation

        return edit

    return [(name, hook_for(name)) for name in edits]
