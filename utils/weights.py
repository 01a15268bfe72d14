"""Copying and composition: what heads' weights do to tokens, and to one another."""

from collections.abc import Iterable
from typing import Literal

import torch
from einops import einsum, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import FactoredMatrix
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities import composition_scores as frobenius_scores

from utils.checks import check_count, check_range, check_tokens, generator_of, start_token
from utils.edits import hook_name, record
from utils.engine.memory import check_cache
from utils.heads import all_heads, check_heads
from utils.metrics import token_batches
from utils.prompts import ordinary_tokens
from utils.typed import checked

TOP = 5  # a head copies a name that it puts among so many largest logits


@checked
def ov_weights(
    model: TransformerBridge, heads: Iterable[tuple[int, int]]
) -> tuple[Float[Tensor, "n d_model d_head"], Float[Tensor, "n d_head d_model"]]:
    """W_V and W_O of each head; the OV circuit is their product (Elhage et al. 2021)."""
    layer, head = zip(*check_heads(model, heads), strict=True)
    circuit = model.OV  # A [layer head d_model d_head], B [layer head d_head d_model]
    return circuit.A[layer, head].detach(), circuit.B[layer, head].detach()


@checked
def qk_weights(
    model: TransformerBridge, heads: Iterable[tuple[int, int]]
) -> tuple[Float[Tensor, "n d_model d_head"], Float[Tensor, "n d_model d_head"]]:
    """W_Q and W_K of each head; the QK circuit is W_Q times W_K transposed (Elhage et al. 2021)."""
    layer, head = zip(*check_heads(model, heads), strict=True)
    circuit = model.QK
    return circuit.A[layer, head].detach(), circuit.B[layer, head].mT.detach()


@checked
def copying_of_output(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"]
) -> Float[Tensor, "prompt layer head"]:
    """Olsson's copying score: do heads raise the tokens they attend to, from -1 to 1?

    At every position a head's whole output goes through the unembedding; minus the mean logit, and
    only what is positive, it is a "raise". `on_paper_scale` of the share of all tokens' raise that
    falls on those attended to, weighted by attention (Olsson et al. 2022, appendix, "head
    activation evaluators": 25 random tokens, neither the most nor the least common, no start
    token). Raises ValueError if a prompt repeats a token.
    """
    return on_paper_scale(_share_on_attended(model, tokens, by_source=False))


@checked
def on_paper_scale(share: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """A share from 0 to 1 on the scale of Olsson et al.: a ratio from 0 to 0.5, stretched to -1..1.

    We read the ratio as own / (own + all) = share / (1 + share). Raising n tokens alike, a share
    of 1 / n, is 4 / (n + 1) - 1, for 25 tokens -0.85; zero is a share of a third.
    """
    return 4 * share / (1 + share) - 1


@checked
def copying_score(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"]
) -> Float[Tensor, "prompt layer head"]:
    """Copying by source token: 2 * share - 1 of what each source's value alone would raise.

    The output of a head is a sum over the tokens it attends to. Each term (value times W_O) has its
    raises as in `copying_of_output`; of all of them the share is taken that falls on the attended
    token itself, with the attention summed over destinations as weight. So a head may spread its
    attention, and the start token, where heads park it, can be left out. The split is ours. Raises
    ValueError if a prompt repeats a token. `on_paper_scale((score + 1) / 2)` is on Olsson's scale.
    """
    return 2 * _share_on_attended(model, tokens, by_source=True) - 1


@torch.no_grad()
def _share_on_attended(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"], by_source: bool
) -> Float[Tensor, "prompt layer head"]:
    """Of what each head raises, the share on attended tokens, weighted by attention.

    What is raised by a head's output at each position, or `by_source`: by the value of each source
    but the start token, counted as often as it is attended to.
    """
    batches, first = token_batches(model, tokens), int(by_source)
    check_count("positions of tokens", tokens.shape[1], least=2 + first)
    if any(len(row.unique()) < len(row) for row in tokens):
        raise ValueError("tokens must not repeat within a prompt")
    scores = []
    for batch in batches:
        # the direction that raises each token above the mean
        raises = model.W_U.T[batch[:, first:]] - model.W_U.mean(1)  # [prompt token d_model]
        site, shares = "v" if by_source else "z", []
        seen = record(model, batch, ["pattern", site]).activations
        for layer, block in enumerate(model.blocks):
            pattern = seen[hook_name(layer, "pattern")][..., first:]  # [prompt head dest src]
            x = seen[hook_name(layer, site)]
            x = _value_by_head(model, x)[:, 1:] if by_source else x
            written = einsum(x, block.attn.W_O, "p pos h d, h d model -> p h pos model")
            raised = einsum(written, raises, "p h pos model, p token model -> p h pos token").relu()
            if by_source:
                raised = pattern.sum(-2)[..., None] * raised
                own = raised.diagonal(dim1=-2, dim2=-1).sum(-1)
            else:
                own = (pattern * raised).sum((-2, -1))
            shares.append(own / raised.sum((-2, -1)).clamp_min(1e-12))
        scores.append(torch.stack(shares, dim=1))
    return torch.cat(scores)


@torch.no_grad()
@checked
def eigenvalue_copying_score(model: TransformerBridge) -> Float[Tensor, "layer head"]:
    """Sum of the eigenvalues of W_E W_V W_O W_U over the sum of their sizes, from -1 to 1.

    Near 1 the head copies: what it makes of a mix of tokens raises that mix (Elhage et al. 2021,
    "copying"). Embedding and unembedding are taken as they are: what the first MLP does to a token,
    and the scale of LayerNorm, are left out.
    """
    w_v, w_o = ov_weights(model, all_heads(model))
    # AB and BA share their non-zero eigenvalues: d_head numbers instead of a vocabulary of them
    small = w_o @ (model.W_U @ model.W_E) @ w_v
    eigenvalues = torch.linalg.eigvals(small.cpu().double())
    score = (eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1)).float().to(w_v.device)
    return score.unflatten(0, (-1, model.cfg.n_heads))


@torch.no_grad()
@checked
def own_logit_largest(
    model: TransformerBridge, heads: Iterable[tuple[int, int]], n_tokens: int = 500, seed: int = 0
) -> Bool[Tensor, "token n_heads"]:
    """Whether a token's own logit is the largest under W_E W_V W_O W_U, for sampled tokens.

    The mean over tokens is the share that a head copies (Elhage et al. 2021); chance is
    1 / vocabulary. Tokens are drawn from `ordinary_tokens`, all of them if there are fewer than
    `n_tokens`; logits are over the whole vocabulary.
    """
    check_count("n_tokens", n_tokens)
    w_v, w_o = ov_weights(model, heads)
    pool = ordinary_tokens(model)
    order = torch.randperm(len(pool), generator=generator_of(seed))
    sample = pool[order[:n_tokens]].to(model.cfg.device)
    largest = [
        (model.W_E[sample] @ v @ o @ model.W_U).argmax(-1) == sample
        for v, o in tqdm(list(zip(w_v, w_o, strict=True)), desc="OV circuits", leave=False)
    ]
    return torch.stack(largest, dim=1)


@torch.no_grad()
@checked
def name_copying_score(
    model: TransformerBridge,
    names: Int[Tensor, "name"],
    heads: Iterable[tuple[int, int]],
    sign: Literal[1, -1] = 1,
) -> Float[Tensor, "n_heads"]:
    """Share of names that a head would write into the `TOP` logits, attending to them.

    [start token, name] is run through the first block; its residual stream at the name, after the
    block's MLP, goes through the LayerNorm of the head's own layer, the head's W_V and W_O, the
    last LayerNorm and the unembedding (Wang et al. 2022, section 3.1, copy score). `sign=-1`
    turns the head's output round, for heads that write against the names they attend to. In a
    deep model heads read streams that differ much from the first block's: see
    `name_copying_in_place`. Raises ValueError for names that are no token ids, heads the model
    lacks and another sign; MemoryError if what they write takes over 80 % of the free memory.
    """
    heads = check_heads(model, heads)
    tokens = torch.nn.functional.pad(names[:, None], (1, 0), value=start_token(model))
    check_tokens(model, tokens, "names", folded=True)
    tokens = tokens.to(model.cfg.device)
    stream = "blocks.0.hook_resid_post"
    check_cache(model, tokens, [stream] * len(heads))  # a stream for each: it reads and writes one
    cache = model.run_with_cache(tokens, names_filter=[stream], stop_at_layer=1)[1]
    read = torch.stack([model.blocks[h.layer].ln1(cache[stream][:, 1:]) for h in heads])
    w_v, w_o = ov_weights(model, heads)
    written = read[:, :, 0] @ w_v @ w_o  # [n_heads name d_model]
    return _in_top_k(model, sign * written.transpose(0, 1), names).float().mean(0)


@torch.no_grad()
@checked
def name_copying_in_place(
    model: TransformerBridge,
    tokens: Int[Tensor, "prompt pos"],
    positions: Int[Tensor, "prompt"],
    sign: Literal[1, -1] = 1,
) -> Float[Tensor, "prompt layer head"]:
    """`name_copying_score` with what a head reads in the prompt itself: 1 if copied, else 0.

    The head's value vector at one position of each prompt goes through W_O, the last LayerNorm
    and the unembedding: is the token that stands there among the `TOP`? Raises as
    `name_copying_score`, and ValueError for positions outside the prompt.
    """
    check_tokens(model, tokens, folded=True)
    check_range("positions", positions, tokens.shape[1])
    prompt = torch.arange(len(tokens))
    own = tokens[prompt, positions]
    values = record(model, tokens, ["v"]).activations.values()
    copied = []
    layers = zip(model.blocks, values, strict=True)
    for block, v in tqdm(layers, desc="copying", total=len(model.blocks), leave=False):
        v = _value_by_head(model, v)[prompt, positions]
        written = einsum(sign * v, block.attn.W_O, "prompt h d, h d model -> prompt h model")
        copied.append(_in_top_k(model, written, own).float())
    return torch.stack(copied, dim=1)


@torch.no_grad()
@checked
def composition_scores(
    model: TransformerBridge,
    kind: Literal["Q", "K", "V"],
    writers: Iterable[tuple[int, int]],
    readers: Iterable[tuple[int, int]],
) -> Float[Tensor, "writer reader"]:
    """Composition `||W_OV M|| / (||W_OV|| ||M||)` of every writer with every reader, from 0 to 1.

    M is what the reader applies to its input (Frobenius norms; Elhage et al. 2021, "composition"):
    W_QK by its query side ("Q"), W_QK by its key side ("K") or W_OV ("V"). Rotary positions turn
    W_QK with the distance between the two tokens; the score is taken without that turn. Under
    grouped keys and values the heads of a group share W_K and W_V. Raises ValueError for an
    unknown kind or head, or a reader that is not in a later layer than every writer.
    """
    writers = check_heads(model, writers, name="writers")
    readers = check_heads(model, readers, name="readers")
    if max(w.layer for w in writers) >= min(r.layer for r in readers):
        raise ValueError("readers: every reader must be in a later layer than every writer")
    w_q, w_k = qk_weights(model, readers)
    reads = {
        "Q": FactoredMatrix(w_q, w_k.mT),
        "K": FactoredMatrix(w_k, w_q.mT),
        "V": FactoredMatrix(*ov_weights(model, readers)),
    }
    return frobenius_scores(FactoredMatrix(*ov_weights(model, writers)), reads[kind])


@checked
def composition_baseline(model: TransformerBridge, n: int = 100) -> Float[Tensor, "n"]:
    """Composition scores of `n` pairs of heads with Gaussian weights of the model's shapes.

    What two heads score that know nothing of each other, in a residual stream without preferred
    directions; the three kinds share it. Raises ValueError for n below 1.
    """
    check_count("n", n)
    shape = (n, 4, model.cfg.d_model, model.cfg.d_head)
    weights = torch.randn(shape, generator=generator_of(0))
    w_v, w_o, w_q, w_k = weights.unbind(1)
    writes, reads = FactoredMatrix(w_v, w_o.mT), FactoredMatrix(w_q, w_k.mT)
    return frobenius_scores(writes, reads, broadcast_dims=False)


def _value_by_head(
    model: TransformerBridge, v: Float[Tensor, "prompt pos group d_head"]
) -> Float[Tensor, "prompt pos head d_head"]:
    """The values as each head reads them; under grouped keys and values several share one."""
    shared = model.cfg.n_heads // v.shape[2]
    return repeat(v, "prompt pos group d_head -> prompt pos (group s) d_head", s=shared)


def _in_top_k(
    model: TransformerBridge, written: Float[Tensor, "n head d_model"], own: Int[Tensor, "n"]
) -> Bool[Tensor, "n head"]:
    """Whether each own token is among the `TOP` logits that what is written would give."""
    resid = model.ln_final(written).flatten(0, 1)
    own = own.to(resid.device).repeat_interleave(written.shape[1])
    own_logit = (resid * model.W_U[:, own].T).sum(-1) + model.b_U[own]
    ahead, alive = torch.zeros_like(own), torch.arange(len(own), device=own.device)
    # most rows have enough tokens ahead in the first part of the vocabulary: only the others go on
    for part in torch.arange(model.cfg.d_vocab, device=own.device).split(4096):
        columns = slice(int(part[0]), int(part[-1]) + 1)
        logits = resid[alive] @ model.W_U[:, columns] + model.b_U[columns]
        # a tie counts against: a head that writes nothing copies nothing
        passes = (logits >= own_logit[alive, None]) & (part != own[alive, None])
        ahead[alive] += passes.sum(-1)
        alive = alive[ahead[alive] < TOP]
    return (ahead < TOP).unflatten(0, written.shape[:2])
