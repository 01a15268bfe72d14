"""Which nodes make up a circuit: how much each one adds on the way from none to the whole model.

With a dial m for every head at every position, z becomes m z + (1 - m) mean: all dials at 0 is the
empty circuit, all at 1 the model. Turned up together from 0 to 1, each dial's slope, summed up on
the way, is what its node adds (integrated gradients over a node mask: Sundararajan et al. 2017; for
circuits, Hanna et al. 2024). The attributions add up to F(M) - F(empty).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from utils.circuit import Node
from utils.edits import Run, hook_name
from utils.heads import Head
from utils.ioi import IOIPrompts
from utils.metrics import logit_diff
from utils.prompts import check_count
from utils.typed import checked

BATCH = 16  # prompts at a time: the gradient keeps every activation


@checked
def node_attribution(
    model: TransformerBridge, prompts: IOIPrompts, means: Run, n_steps: int = 5
) -> Float[Tensor, "prompt layer pos head"]:
    """What every head at every position adds to the logit difference of each prompt.

    `means` as for `circuit.run_circuit` (`circuit.means_run`). More steps bring the sum closer to
    F(M) - F(empty). Raises ValueError for fewer than one step.
    """
    check_count("n_steps", n_steps)
    parts = []
    for first in tqdm(range(0, len(prompts.tokens), BATCH), desc="node attribution", leave=False):
        rows = slice(first, first + BATCH)
        usual = {name: mean[rows] for name, mean in means.activations.items()}
        tokens, answers = prompts.tokens[rows], prompts.answers[rows]
        slopes = [
            _slopes(model, tokens, answers, usual, (step + 0.5) / n_steps)
            for step in range(n_steps)
        ]
        parts.append(torch.stack(slopes).mean(0))
    return torch.cat(parts)


def named_nodes(
    attribution: Float[Tensor, "prompt layer pos head"], prompts: IOIPrompts
) -> dict[Node, Float[Tensor, "prompt"]]:
    """The attributions by node, (head, place), at the named places of each prompt alone."""
    prompt = torch.arange(len(attribution))
    n_layers, n_heads = attribution.shape[1], attribution.shape[3]
    return {
        (Head(layer, head), place): attribution[prompt, layer, at.cpu(), head]
        for place, at in prompts.positions.items()
        for layer in range(n_layers)
        for head in range(n_heads)
    }


def _slopes(
    model: TransformerBridge,
    tokens: Int[Tensor, "prompt pos"],
    answers: Int[Tensor, "prompt 2"],
    usual: dict[str, Tensor],
    dial: float,
) -> Float[Tensor, "prompt layer pos head"]:
    """d F / d m of every node with all dials here."""
    layers = range(model.cfg.n_layers)
    shape = (len(layers), *tokens.shape, model.cfg.n_heads, 1)
    dials = torch.full(shape, dial, device=tokens.device, requires_grad=True)

    def turn(layer: int):
        mean = usual[hook_name(layer, "z")]
        return lambda z, hook: mean + dials[layer] * (z - mean)

    with torch.enable_grad():
        hooks = [(hook_name(layer, "z"), turn(layer)) for layer in layers]
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
        total = logit_diff(logits[:, -1:], answers).sum()
        (slopes,) = torch.autograd.grad(total, dials)
    return slopes[..., 0].movedim(0, 1).cpu()
