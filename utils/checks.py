"""What is refused before anything runs: what would fail deep inside, or give wrong values.

Types, shapes and finite numbers are checked by `utils.typed`; here is what they cannot say.
"""

import math
from collections.abc import Iterable
from operator import index
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from utils.typed import BadArgument, Hooks, checked, kind_of

# what weights, by identity and number of changes, were found finite, and whether norms are folded
# into them: looked at once, as a sweep checks its model for every head
_known: WeakKeyDictionary[TransformerBridge, tuple[list, bool]] = WeakKeyDictionary()


@checked
def start_token(model: TransformerBridge) -> int:
    """The token every prompt starts with: BOS, else end-of-text, else 0 (no tokenizer)."""
    names = ("bos_token_id", "eos_token_id")
    ids = [getattr(model.tokenizer, name, None) for name in names]
    return next((token for token in ids if token is not None), 0)


@checked
def check_model(model: TransformerBridge, folded: bool = True) -> None:
    """Raise ValueError for a model in a state that would give wrong or too coarse values.

    `folded`: for what reads or replaces parts of a run. Compatibility mode folds the weights of
    each LayerNorm and the biases of values into the matrices beside them (TransformerLens's
    `fold_ln`, `fold_value_biases`): what a part writes is then all in its own matrix.
    """
    if any(part.training for part in model.modules()):
        raise ValueError("model is in training mode: call model.eval()")
    weights = list(model.parameters())
    kinds = {weight.dtype for weight in weights}
    if coarse := kinds - {torch.float32, torch.float64}:
        kind = next(iter(coarse))
        raise ValueError(f"model is in {kind}, too coarse for single heads: call model.float()")
    is_folded = _finite_and_folded(model, weights)
    if torch.is_autocast_enabled(torch.device(model.cfg.device).type):
        raise ValueError("model runs under torch.autocast, too coarse for single heads: leave it")
    if folded and not (model.compatibility_mode and is_folded):
        raise ValueError("model must be in compatibility mode: call enable_compatibility_mode()")


def _finite_and_folded(model: TransformerBridge, weights: list[Tensor]) -> bool:
    """Whether the norms before attention only normalise (`fold_ln=False` leaves their weights).

    Raises ValueError for weights that are nan or infinite.
    """
    # tensors made in inference mode do not count their changes
    state = [(id(p), p.is_inference() or p._version) for p in weights]
    if model not in _known or _known[model][0] != state:
        if broken := [name for name, p in model.named_parameters() if not p.isfinite().all()]:
            what = f"{len(broken)} of its weights are nan or infinite, such as {broken[0]}"
            raise ValueError(f"model: {what}")
        norms = [block.ln1 for block in model.blocks if hasattr(block, "ln1")]
        scales = [weight for norm in norms for weight in norm.parameters()]
        _known[model] = state, all((w == w.flatten()[0]).all() for w in scales)
    return _known[model][1]


@checked
def check_tokens(
    model: TransformerBridge,
    tokens: Int[Tensor, "prompt pos"],
    name: str = "tokens",
    folded: bool = False,
) -> None:
    """Raise ValueError unless `tokens` is not empty, fits the model and has no padding.

    Without a mask a prompt that begins with padding would attend to it, and what is read at the
    end of one that ends with it belongs to no word. The model as in `check_model`.
    """
    check_model(model, folded)
    check_range(name, tokens, model.cfg.d_vocab)
    check_length(model, tokens.shape[1], name)
    padding = getattr(model.tokenizer, "pad_token_id", None)
    # where padding is also the start token, one of them is none
    width = 2 if padding == start_token(model) else 1
    if padding is None or tokens.shape[1] <= width:
        return
    is_padding = tokens == padding
    ends = {"begins": is_padding[:, :width].all(1), "ends": is_padding[:, -1]}
    for where, padded in ends.items():
        if padded.any():
            which = f"prompt {int(padded.nonzero()[0])} {where} with padding (token {padding})"
            raise ValueError(f"{name}: {which}, give prompts of one length")


def check_range(name: str, values: Int[Tensor, "*axes"], size: float = math.inf) -> None:
    """Raise ValueError unless there are values, all of them whole numbers in 0..size - 1."""
    if not isinstance(values, Int[Tensor, "..."]):
        raise BadArgument(f"{name} must be a tensor of whole numbers; got {kind_of(values)}")
    if values.numel() == 0:
        raise ValueError(f"{name} is empty: shape {list(values.shape)}")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= size:
        lie = "not be negative" if size == math.inf else f"lie in 0..{size - 1}"
        raise ValueError(f"{name} must {lie}, got {low}..{high}")


def indices(name: str, values: Iterable[int], size: int) -> list[int]:
    """The values as a list; ValueError unless there are some, whole numbers in 0..size - 1."""
    try:
        found = [index(value) for value in values]
    except TypeError:
        raise BadArgument(f"{name} must be whole numbers; got {kind_of(values)}") from None
    if not found or min(found) < 0 or max(found) >= size:
        raise ValueError(f"{name} must be one or more of 0..{size - 1}, got {found}")
    return found


@checked
def check_count(name: str, count: int, least: int = 1) -> None:
    """Raise ValueError for a count that is too small."""
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")


@checked
def check_length(model: TransformerBridge, n_tokens: int, name: str) -> None:
    """Raise ValueError for prompts that the model's context does not hold."""
    if n_tokens > model.cfg.n_ctx:
        raise ValueError(f"{name} of {n_tokens} tokens exceed the context of {model.cfg.n_ctx}")


@checked
def check_hooks(model: TransformerBridge, hooks: Hooks) -> None:
    """Raise ValueError for hooks at a place that the model lacks."""
    if lacking := [name for name, _ in hooks if name not in model.hook_dict]:
        raise ValueError(f"hooks: this model has no {lacking[0]!r}")


@checked
def generator_of(seed: int) -> torch.Generator:
    """A generator on the CPU: a seed means the same numbers on every machine."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie in 0..2**63 - 1, got {seed}")
    return torch.Generator().manual_seed(seed)
