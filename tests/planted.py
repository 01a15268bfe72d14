"""A small attention-only model whose IOI circuit is known, because its weights are set by hand.

Layer 1, head 1 (S-inhibition): END attends to S2, by position, and writes who stands there.
Layer 2, head 2 (name mover): END attends to every name but that one, and writes the name's logit.
Layer 2, head 0 (negative name mover): attends likewise and writes against it, more weakly.
With `by_order`, layer 2, head 3: END attends to the first name, by position, and writes its logit,
so it supports the answer in ABBA and opposes it in BABA.
All other heads are small and random. Prompts are start, two names, a filler, S2, filler, END.
"""

import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from utils.heads import Head
from utils.ioi import IOIPrompts

S_INHIBITION, NAME_MOVER, NEGATIVE, FIRST_NAME = Head(1, 1), Head(2, 2), Head(2, 0), Head(2, 3)
PLANTED = {
    "s_inhibition": [S_INHIBITION],
    "name_mover": [NAME_MOVER],
    "negative_name_mover": [NEGATIVE],
}
N_NAMES, N_FILLERS, N_POSITIONS = 8, 4, 7
S2, END = 4, 6
D_MODEL, D_HEAD, N_HEADS, N_LAYERS = 64, 16, 4, 3
NAMES = torch.arange(1, 1 + N_NAMES)
FILLERS = torch.arange(1 + N_NAMES, 1 + N_NAMES + N_FILLERS)


def planted_model(noise: float = 0.04, by_order: bool = False) -> TransformerBridge:
    """The model in compatibility mode; `noise` is the spread of the other heads' weights."""
    config = TransformerBridgeConfig(
        n_layers=N_LAYERS,
        d_model=D_MODEL,
        n_heads=N_HEADS,
        d_head=D_HEAD,
        d_vocab=1 + N_NAMES + N_FILLERS,
        n_ctx=N_POSITIONS,
        attn_only=True,
        act_fn=None,
        normalization_type="LN",
        seed=0,
    )
    model = TransformerBridge.boot_native(config, device="cpu").eval()
    with torch.no_grad():
        _set_weights(model, noise, by_order)
    model.enable_compatibility_mode()
    return model


def planted_prompts(n_prompts: int, seed: int = 0) -> IOIPrompts:
    """Prompts of the planted model: random names, random fillers, both orders."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(n_prompts, N_NAMES, generator=generator).argsort(1)
    io, s, *others = NAMES[rank].unbind(1)
    filler = FILLERS[torch.randint(N_FILLERS, (n_prompts, 2), generator=generator)]
    is_abba = torch.arange(n_prompts) % 2 == 0

    def prompts(first, second, third):
        a, b = torch.where(is_abba, first, second), torch.where(is_abba, second, first)
        start, end = torch.zeros_like(io), torch.full_like(io, int(FILLERS[0]))
        return torch.stack([start, a, b, filler[:, 0], third, filler[:, 1], end], dim=1)

    s1 = torch.where(is_abba, 2, 1)
    return IOIPrompts(
        tokens=prompts(io, s, s),
        answers=torch.stack([io, s], dim=1),
        positions={
            "IO": torch.where(is_abba, 1, 2),
            "S1": s1,
            "S1+1": s1 + 1,
            "S2": torch.full_like(io, S2),
            "END": torch.full_like(io, END),
        },
        template=torch.zeros_like(io),
        is_abba=is_abba,
        corrupted={"s2_io": prompts(io, s, io), "abc": prompts(*others[:3])},
    )


def _set_weights(model: TransformerBridge, noise: float, by_order: bool) -> None:
    # Directions of the residual stream, orthonormal and without a mean, so that LayerNorm's
    # centring leaves them alone: the first column of the basis is all ones, and is not used.
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(D_MODEL, 1)
    basis = torch.cat([ones, torch.randn(D_MODEL, D_MODEL - 1, generator=generator)], dim=1)
    directions = torch.linalg.qr(basis).Q[:, 1:].T
    sizes = [1 + N_NAMES + N_FILLERS, N_POSITIONS, N_NAMES, N_NAMES]
    token, position, inhibited, answer = directions[: sum(sizes)].split(sizes)
    name = token[NAMES]

    model.embed.original_component.weight.copy_(token)
    model.pos_embed.original_component.weight.copy_(position)
    unembed = model.unembed.original_component.weight
    unembed.zero_()
    unembed[NAMES] = answer
    for block in model.blocks:
        for part in (block.attn.q, block.attn.k, block.attn.v, block.attn.o):
            weight = part.original_component.weight
            weight.copy_(noise * torch.randn(weight.shape, generator=generator))
            if part.original_component.bias is not None:
                part.original_component.bias.zero_()

    # in a head: one dimension for each name, and one (the next) that all names have in common
    each, common = torch.eye(D_HEAD)[:N_NAMES], torch.eye(D_HEAD)[N_NAMES]
    copy = name.T @ each  # [d_model d_head]
    _set_head(
        model,
        S_INHIBITION,
        q=1.3 * torch.outer(position[END], common),
        k=1.3 * torch.outer(position[S2], common),
        v=copy,
        o=0.25 * each.T @ inhibited,
    )
    for head, strength in ((NAME_MOVER, 0.3), (NEGATIVE, -0.1)):
        _set_head(
            model,
            head,
            q=torch.outer(position[END], common) - 1.5 * inhibited.T @ each,
            k=copy + torch.outer(name.sum(0), common),
            v=copy,
            o=strength * each.T @ answer,
        )
    if by_order:
        to_first = dict(q=1.3 * torch.outer(position[END], common))
        to_first["k"] = 1.3 * torch.outer(position[1], common)
        _set_head(model, FIRST_NAME, **to_first, v=copy, o=0.1 * each.T @ answer)


def _set_head(model: TransformerBridge, head: Head, **weights: torch.Tensor) -> None:
    """Weights as TransformerLens has them: W_Q, W_K, W_V [d_model d_head], W_O [d_head d_model]."""
    attention = model.blocks[head.layer].attn
    rows = slice(head.head * D_HEAD, (head.head + 1) * D_HEAD)
    for part in "qkv":
        getattr(attention, part).original_component.weight[rows] = weights[part].T
    attention.o.original_component.weight[:, rows] = weights["o"].T
