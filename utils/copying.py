"""Copying: does a head raise the logit of the token it attends to? From runs and from weights."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge

from utils.heads import all_heads, cache_heads, check_heads, key_value_head
from utils.metrics import last_position_hooks, token_batches
from utils.prompts import check_tokens, ordinary_tokens, start_token


def ov_weights(
    model: TransformerBridge, heads: Iterable[tuple[int, int]]
) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head d_model"]]:
    """W_V and W_O of each head; the OV circuit is their product (Elhage et al. 2021)."""
    heads = check_heads(model, heads)
    shared = [key_value_head(model, head) for head in heads]
    w_v = torch.stack([model.blocks[h.layer].attn.W_V[h.head] for h in shared])
    w_o = torch.stack([model.blocks[h.layer].attn.W_O[h.head] for h in heads])
    return w_v.detach(), w_o.detach()


@torch.no_grad()
def copying_score(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"]
) -> Float[Tensor, "prompt layer head"]:
    """Olsson's copying score on random tokens that do not repeat: -1 never copies, 1 always.

    The output of a head is a sum over the tokens it attends to. Each term (value times W_O) goes
    through the unembedding; minus the mean logit, and only what is positive, it is a "raise". The
    share of the raise of all tokens in the prompt that falls on the attended token itself, summed
    over attended tokens with their attention as weight, runs from 0 to 1 and is rescaled to
    2 * share - 1. The start token is left out; a head that spreads its raise evenly scores close
    to -1. After Olsson et al. 2022, appendix (25 tokens, neither the most nor the least common);
    the split by attended token is ours, since the head may spread its attention. Raises
    ValueError if a prompt repeats a token.
    """
    batches = token_batches(model, tokens)
    if any(len(row.unique()) < len(row) for row in tokens):
        raise ValueError("tokens must not repeat within a prompt")
    if tokens.shape[1] < 3:
        raise ValueError(f"tokens need a start token and 2 more, got {tokens.shape[1]} positions")
    mean_logit = model.W_U.mean(1)
    scores = []
    for batch in batches:
        # directions in the residual stream that raise each token of the prompt above the mean
        raises = model.W_U.T[batch[:, 1:]] - mean_logit
        cache = cache_heads(model, batch, ["pattern", "v"])
        by_layer = [_own_share(model, layer, cache, raises) for layer in range(model.cfg.n_layers)]
        scores.append(2 * torch.stack(by_layer, dim=1) - 1)
    return torch.cat(scores)


@torch.no_grad()
def eigenvalue_copying_score(
    model: TransformerBridge, heads: Iterable[tuple[int, int]] | None = None
) -> Float[Tensor, "*heads"]:
    """Sum of the eigenvalues of W_E W_V W_O W_U over the sum of their sizes, from -1 to 1.

    Near 1 the head copies: what it makes of a mix of tokens raises that mix (Elhage et al. 2021,
    "copying"). Gives [layer head], or [n] for a list of heads. Embedding and unembedding are taken
    as they are: what the first MLP does to a token, and the scale of LayerNorm, are left out.
    """
    w_v, w_o = ov_weights(model, all_heads(model) if heads is None else heads)
    # AB and BA share their non-zero eigenvalues: d_head numbers instead of a vocabulary of them
    small = w_o @ (model.W_U @ model.W_E) @ w_v
    eigenvalues = torch.linalg.eigvals(small.cpu().double())
    score = (eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1)).float().to(w_v.device)
    return score if heads is not None else score.unflatten(0, (-1, model.cfg.n_heads))


@torch.no_grad()
def own_logit_largest(
    model: TransformerBridge, heads: Iterable[tuple[int, int]], n_tokens: int = 500, seed: int = 0
) -> Bool[Tensor, "token head"]:
    """Whether a token's own logit is the largest under W_E W_V W_O W_U, for sampled tokens.

    The mean over tokens is the share that a head copies (Elhage et al. 2021); chance is
    1 / vocabulary. Tokens are drawn from `ordinary_tokens`, all of them if there are fewer than
    `n_tokens`; logits are over the whole vocabulary.
    """
    if n_tokens < 1:
        raise ValueError(f"n_tokens must be at least 1, got {n_tokens}")
    w_v, w_o = ov_weights(model, heads)
    pool = ordinary_tokens(model)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    sample = pool[order[:n_tokens]].to(model.cfg.device)
    embedded = model.W_E[sample]
    largest = [
        (embedded @ v @ o @ model.W_U).argmax(-1) == sample
        for v, o in tqdm(list(zip(w_v, w_o, strict=True)), desc="OV circuits", leave=False)
    ]
    return torch.stack(largest, dim=1)


@torch.no_grad()
def name_copying_score(
    model: TransformerBridge,
    names: Int[Tensor, "name"],
    heads: Iterable[tuple[int, int]] | None = None,
    k: int = 5,
    sign: int = 1,
) -> Float[Tensor, "*heads"]:
    """Share of names that a head would write into the top `k` logits, attending to them.

    [start token, name] is run through the first block; its residual stream at the name, after the
    block's MLP, goes through the LayerNorm of the head's own layer, the head's W_V and W_O, the
    last LayerNorm and the unembedding (Wang et al. 2022, section 3.1, copy score). `sign=-1`
    turns the head's output round, for heads that write against the names they attend to. Gives
    [layer head], or [n] for a list of heads. In a deep model heads read streams that differ much
    from the first block's: see `name_copying_in_place`. Raises ValueError for names that are not
    token ids, heads the model lacks, `k` below 1 and a sign other than 1 or -1.
    """
    chosen = check_heads(model, all_heads(model) if heads is None else heads)
    _check_rank_and_sign(model, k, sign)
    if names.ndim != 1 or names.is_floating_point():
        raise ValueError(f"names must be a vector of token ids, got {names.dtype} {names.shape}")
    tokens = torch.stack([torch.full_like(names, start_token(model)), names], dim=1)
    check_tokens(model, tokens, "names")
    tokens = tokens.to(model.cfg.device)
    name = "blocks.0.hook_resid_post"
    with model.hooks(fwd_hooks=last_position_hooks()):
        resid = model.run_with_cache(tokens, names_filter=[name], stop_at_layer=1)[1][name][:, 1:]
    copied = []
    for head, v, o in tqdm(
        list(zip(chosen, *ov_weights(model, chosen), strict=True)), desc="copying", leave=False
    ):
        written = model.blocks[head.layer].ln1(resid)[:, 0] @ v @ o
        copied.append(_in_top_k(model, sign * written, tokens[:, 1], k))
    score = torch.stack(copied).float().mean(-1)
    return score if heads is not None else score.unflatten(0, (-1, model.cfg.n_heads))


@torch.no_grad()
def name_copying_in_place(
    model: TransformerBridge,
    tokens: Int[Tensor, "prompt pos"],
    positions: Int[Tensor, "prompt"],
    heads: Iterable[tuple[int, int]] | None = None,
    k: int = 5,
    sign: int = 1,
) -> Float[Tensor, "prompt *heads"]:
    """`name_copying_score` with what the head reads in the prompt itself: 1 if copied, else 0.

    The head's value vector at one position of each prompt goes through W_O, the last LayerNorm
    and the unembedding: is the token that stands there among the top `k`? Gives
    [prompt layer head], or [prompt n] for a list of heads. Raises as `name_copying_score`, and
    ValueError for positions that are not one of the prompt's own for each prompt.
    """
    chosen = check_heads(model, all_heads(model) if heads is None else heads)
    _check_rank_and_sign(model, k, sign)
    check_tokens(model, tokens)
    if positions.shape != (len(tokens),) or positions.is_floating_point():
        raise ValueError(f"positions must be [{len(tokens)}] integers, got {positions}")
    if positions.min() < 0 or positions.max() >= tokens.shape[1]:
        raise ValueError(f"positions must lie in 0..{tokens.shape[1] - 1}, got {positions}")
    prompt, positions = torch.arange(len(tokens)), positions.to(tokens.device)
    own = tokens[prompt, positions].to(model.cfg.device)
    cache = cache_heads(model, tokens, ["v"])
    copied = []
    for head, o in tqdm(
        list(zip(chosen, ov_weights(model, chosen)[1], strict=True)), desc="copying", leave=False
    ):
        v = cache["v", head.layer][prompt, positions, key_value_head(model, head).head]
        copied.append(_in_top_k(model, sign * v @ o, own, k))
    copied = torch.stack(copied, dim=1).float()
    return copied if heads is not None else copied.unflatten(1, (-1, model.cfg.n_heads))


def _own_share(
    model: TransformerBridge, layer: int, cache: ActivationCache, raises: Tensor
) -> Float[Tensor, "prompt head"]:
    """Share of the raise of each prompt's tokens that falls on the attended token."""
    pattern, v = cache["pattern", layer], cache["v", layer]
    v = v.repeat_interleave(model.cfg.n_heads // v.shape[2], dim=2)[:, 1:]
    written = torch.einsum("pshd,hdm->phsm", v, model.blocks[layer].attn.W_O)
    raised = torch.einsum("phsm,ptm->phst", written, raises).relu()
    attention = pattern[..., 1:].sum(-2)  # what each token receives, over all destinations
    own = (attention * raised.diagonal(dim1=-2, dim2=-1)).sum(-1)
    return own / (attention * raised.sum(-1)).sum(-1).clamp_min(1e-12)


def _in_top_k(
    model: TransformerBridge,
    written: Float[Tensor, "n d_model"],
    own: Int[Tensor, "n"],
    k: int,
) -> Bool[Tensor, "n"]:
    """Whether each own token is among the `k` largest logits that what is written would give."""
    resid, w_u, b_u = model.ln_final(written[:, None])[:, 0], model.W_U, model.b_U
    own_logit = (resid * w_u[:, own].T).sum(-1) + b_u[own]
    ahead = torch.zeros_like(own)
    alive = torch.arange(len(own), device=own.device)
    # most rows have k tokens ahead within the first part of the vocabulary: no need to go on
    for part in torch.arange(w_u.shape[1], device=own.device).split(4096):
        columns = slice(int(part[0]), int(part[-1]) + 1)
        logits = resid[alive] @ w_u[:, columns] + b_u[columns]
        # a tie counts against: a head that writes nothing copies nothing
        passes = (logits >= own_logit[alive, None]) & (part != own[alive, None])
        ahead[alive] += passes.sum(-1)
        alive = alive[ahead[alive] < k]
    return ahead < k


def _check_rank_and_sign(model: TransformerBridge, k: int, sign: int) -> None:
    if not 1 <= k <= model.cfg.d_vocab:
        raise ValueError(f"k must be between 1 and {model.cfg.d_vocab}, got {k}")
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, got {sign}")
