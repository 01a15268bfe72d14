"""How much memory is free, and what a run would take: refused before the system has to end us."""

import contextlib
from collections.abc import Iterable
from math import prod
from pathlib import Path

import psutil
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

SHARE = 0.8  # of what is free may be taken
CGROUP = Path("/sys/fs/cgroup")  # of the container we are in, if any


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device; on a CPU within the limits of a container."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, KeyError):  # no container, or one without limit
        limit, used = (int((CGROUP / f"memory.{x}").read_text()) for x in ("max", "current"))
        kept = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(kept["inactive_file"]))  # files it can forget
    return max(0, free)


def check_fits(what: str, n_bytes: float, n_prompts: int, device: torch.device) -> None:
    """Raise MemoryError if that takes more than 80 % of the free memory; it says what would fit."""
    room = SHARE * free_memory(device)
    if n_bytes > room:
        fits = int(n_prompts * room / n_bytes)
        raise MemoryError(
            f"{what} would take {_gb(n_bytes)} for {n_prompts} prompts, and of the free memory "
            f"{_gb(room)} may be taken: give fewer prompts (about {fits} fit), shorter ones, or "
            "keep fewer activations (`sites`, `names_filter`)"
        )


def check_cache(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"], names: Iterable[str]
) -> None:
    """Raise MemoryError if the activations at these hook points of blocks would not fit."""
    weight = next(model.parameters())
    numbers = sum(prod(activation_shape(model, tokens, name)) for name in names)
    what = "The activations to keep"
    check_fits(what, numbers * weight.element_size(), len(tokens), weight.device)


def activation_shape(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"], name: str
) -> tuple[int, ...]:
    """The shape of the activation at a hook point of a block, in a run on these prompts."""
    cfg, (n_prompts, n_positions) = model.cfg, tokens.shape
    site = name.rpartition("hook_")[2]
    if site == "pattern":
        return n_prompts, cfg.n_heads, n_positions, n_positions
    if site == "scale":
        return n_prompts, n_positions, 1
    if site in ("z", "q", "k", "v"):
        grouped = getattr(cfg, "n_key_value_heads", None) if site in "kv" else None
        return n_prompts, n_positions, grouped or cfg.n_heads, cfg.d_head
    return n_prompts, n_positions, cfg.d_model


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"
