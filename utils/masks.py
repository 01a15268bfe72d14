"""Mean-ablate heads at positions, prompt by prompt: the engine under `utils.circuit`.

What to ablate is a mask [prompt layer pos head]; what comes in its place is the mean of the head's
output z over the ABC distribution, template by template (Wang et al. 2022, section 2.1).
"""

from collections.abc import Callable, Sequence, Set
from functools import partial
from itertools import groupby

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from utils.ablation import head_outputs
from utils.engine.packs import in_packs, pack_size
from utils.engine.replay import Metric, Replay, layer_of
from utils.heads import check_heads
from utils.ioi import IOIPrompts
from utils.metrics import logit_diff, token_batches
from utils.roles import Node

Hooks = Sequence[tuple[str, Callable]]
Means = Float[Tensor, "template layer pos head d_head"]


@torch.no_grad()
def abc_means(model: TransformerBridge, prompts: IOIPrompts) -> Means:
    """Mean output z of every head over the ABC prompts of each template (section 2.1).

    Take a larger draw than the prompts that are evaluated, with another seed. A template without
    prompts is nan.
    """
    tokens = prompts.corrupted["abc"]
    template = prompts.template.to(tokens.device)
    n_prompts = torch.bincount(template)
    total: Tensor | float = 0.0
    batches = token_batches(model, tokens)
    for batch, which in zip(batches, template.split([len(b) for b in batches]), strict=True):
        z = head_outputs(model, batch)
        total = total + z.new_zeros(len(n_prompts), *z.shape[1:]).index_add(0, which, z)
    return total / n_prompts.view(-1, 1, 1, 1, 1)


def keep_mask(
    model: TransformerBridge, prompts: IOIPrompts, kept: Set[Node]
) -> Bool[Tensor, "prompt layer pos head"]:
    """True at every kept node, at that position of each prompt; False at every other.

    Raises ValueError for a head the model lacks or a position the prompts lack.
    """
    n_prompts, n_positions = prompts.tokens.shape
    device = prompts.tokens.device
    shape = (n_prompts, model.cfg.n_layers, n_positions, model.cfg.n_heads)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    rows = torch.arange(n_prompts, device=device)
    for head, position in kept:
        layer, index = check_heads(model, [head])[0]
        if position not in prompts.positions:
            raise ValueError(f"no position {position!r}, prompts have {list(prompts.positions)}")
        mask[rows, layer, prompts.positions[position].to(device), index] = True
    return mask


def mean_ablation_mask_hooks(
    means: Means,
    template: Int[Tensor, "prompt"],
    ablated: Bool[Tensor, "prompt layer pos head"],
) -> Hooks:
    """Hooks that set z to its template's mean wherever `ablated` is True; none for other layers.

    Raises ValueError when the three do not fit each other or the prompts they are run on.
    """
    if means.ndim != 5 or ablated.ndim != 4 or means.shape[1:4] != ablated.shape[1:]:
        raise ValueError(
            "means [template layer pos head d_head] and ablated [prompt layer pos head] must "
            f"agree, got {tuple(means.shape)} and {tuple(ablated.shape)}"
        )
    if template.shape != (len(ablated),) or template.max() >= len(means) or template.min() < 0:
        raise ValueError(
            f"template must be {len(ablated)} numbers in 0..{len(means) - 1}, got {template}"
        )
    missing = [i for i in template.unique().tolist() if means[i, 0, 0, 0, 0].isnan()]
    if missing:
        raise ValueError(f"means lacks template {missing}: take them over more prompts")

    def hook_for(layer: int) -> Callable:
        where = ablated[:, layer, :, :, None]

        def replace(z: Float[Tensor, "prompt pos head d_head"], hook) -> Tensor:
            if z.shape[:3] != where.shape[:3]:
                raise ValueError(
                    f"ablated is for [prompt pos head] {tuple(where.shape[:3])}, "
                    f"this run has {tuple(z.shape[:3])}"
                )
            return torch.where(where, means[template, layer], z)

        return replace

    layers = ablated.any(0).any(-1).any(-1).nonzero()[:, 0].tolist()
    return [(f"blocks.{layer}.attn.hook_z", hook_for(layer)) for layer in layers]


def masked_logit_diffs(
    model: TransformerBridge,
    prompts: IOIPrompts,
    means: Means,
    ablated: Sequence[Bool[Tensor, "prompt layer pos head"]],
) -> Float[Tensor, "run prompt"]:
    """The logit difference under each mask, in batches of prompts that fit in memory.

    The first mask is the one that is recorded. Raises ValueError for a mask that does not ablate
    at least what the first does.
    """
    masks, n_prompts = torch.stack(list(ablated)), len(prompts.tokens)
    if (masks[0] & ~masks).any():
        raise ValueError("ablated: every mask must ablate what the first does")
    batches = torch.arange(n_prompts).split(len(token_batches(model, prompts.tokens)[0]))
    values = [
        _measure(
            Replay(
                model,
                prompts.tokens[rows],
                hooks=mean_ablation_mask_hooks(means, prompts.template[rows], ablated[0][rows]),
            ),
            partial(logit_diff, answers=prompts.answers[rows]),
            means,
            prompts.template[rows],
            masks[:, rows],
        )
        for rows in batches
    ]
    return torch.cat(values, dim=1)


def _measure(
    recorded: Replay,
    metric: Metric,
    means: Means,
    template: Int[Tensor, "prompt"],
    masks: Bool[Tensor, "run prompt layer pos head"],
) -> Float[Tensor, "run prompt"]:
    """The metric under each mask, the first of which is that of the recording.

    Only the layers and positions that the difference to it can change are run again. Masks that
    start at one position share a run, one copy of the prompts for each.
    """
    n_prompts, n_layers, n_positions = masks.shape[1:4]
    changed = masks != masks[0]
    starts = [recorded.first_position(each) for each in changed.any(2).any(-1)]
    layers = [
        int(each.nonzero()[0]) if each.any() else n_layers - 1
        for each in changed.any(1).any(-1).any(-1)
    ]

    def run(pack: list[int]) -> Float[Tensor, "run prompt"]:
        start, lowest = starts[pack[0]], min(layers[i] for i in pack)
        hooks = mean_ablation_mask_hooks(
            means[:, :, start:],
            template.repeat(len(pack)),
            masks[pack, :, :, start:].flatten(0, 1),
        )
        again = [hook for hook in hooks if layer_of(hook[0]) >= lowest]
        return recorded.measure(metric, again, start, copies=len(pack))

    values = torch.zeros(len(masks), n_prompts, device=masks.device)
    order = sorted(range(len(masks)), key=lambda i: (starts[i], layers[i]))
    for start, same_start in groupby(order, key=lambda i: starts[i]):
        together = list(same_start)
        size = pack_size(recorded.model, n_prompts, n_positions, start)
        values[together] = in_packs(together, size, run, "ablating")
    return values
