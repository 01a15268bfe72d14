"""One training of a toy: the row that the census keeps of it.

The loss is computed straight from the weights, without the hook points of the model: a third of
the time saved, and the same numbers (within 1e-4 over the first steps, as a test says). What is
measured goes through the model and `utils`, as in the notebook.
"""

import math
from numbers import Real

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge

from census.grid import SNAPSHOTS, Toy
from utils.checks import generator_of
from utils.prompts import repeated_tokens
from utils.toy import HELD_OUT, HELD_OUT_SEED, build_toy, share_formed, smear, snapshot, toy_batch
from utils.typed import checked

FORMED = 0.5  # prefix-matching score of the best head from which on a head has formed
WINDOW = 4  # snapshots over which the sharpest drop is taken


@checked
def check_toy(toy: Toy) -> None:
    """Raise ValueError for a setting that cannot be trained or measured."""
    for name, value in toy._asdict().items():
        least, kind = (0, Real) if name in ("smeared", "seed", "lr") else (1, int)
        if not (isinstance(value, kind) and least <= value < math.inf):
            whole = " and whole" if kind is int else ""
            raise ValueError(f"{name} must be at least {least}{whole}, got {value!r}")
    toy_batch(generator_of(toy.seed), 1, toy.shortest, toy.longest)  # raises for other lengths
    if toy.context < (two := 1 + 2 * toy.longest):
        raise ValueError(f"context must hold two segments, {two} tokens, got {toy.context}")
    if toy.lr <= 0:
        raise ValueError(f"lr must be positive, got {toy.lr}")


def loss_of(model: TransformerBridge, tokens: Int[Tensor, "sequence pos"]) -> Float[Tensor, ""]:
    """The mean loss of `model(tokens, return_type="loss")`, without its hook points."""
    net, n_heads = model.original_model, model.cfg.n_heads
    x = net.tok_embed.weight[tokens] + net.pos.weight[: tokens.shape[1]]  # [sequence pos d_model]
    for layer, block in enumerate(net.layers):
        y, attn = _norm(block.ln1, x), block.attn
        q, k, v = (
            functional.linear(y, part.weight, part.bias).unflatten(-1, (n_heads, -1))
            for part in (attn.q, attn.k, attn.v)
        )  # [sequence pos head d_head]
        if layer == 0 and hasattr(net, "smear_alpha"):
            k = smear(k, net.smear_alpha)
        z = functional.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (q, k, v)), is_causal=True
        ).transpose(1, 2)
        x = x + functional.linear(z.flatten(-2), attn.o.weight, attn.o.bias)
    logits = functional.linear(_norm(net.ln_out, x)[:, :-1], net.head.weight)
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(toy: Toy) -> dict:
    """The figures of a row: train, measure `SNAPSHOTS` times on the way, and sum up."""
    return trained(toy)[1]


def trained(toy: Toy) -> tuple[TransformerBridge, dict]:
    """The trained model, and the figures of its row."""
    check_toy(toy)
    lengths = toy.shortest, toy.longest, toy.context
    model = build_toy(toy.n_layers, toy.smeared, toy.seed, toy.n_heads, toy.d_model, toy.context)
    held_out = repeated_tokens(model, HELD_OUT, toy.longest, seed=HELD_OUT_SEED)
    optimiser = torch.optim.AdamW(model.parameters(), lr=toy.lr)
    generator = generator_of(toy.seed)
    interval = max(1, toy.n_steps // SNAPSHOTS)
    steps, snapshots = [0], [snapshot(model, held_out, toy.shortest)]
    for step in range(1, toy.n_steps + 1):
        with torch.enable_grad():
            loss = loss_of(model, toy_batch(generator, toy.batch, *lengths))
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        if step % interval == 0 or step == toy.n_steps:
            steps.append(step)
            snapshots.append(snapshot(model, held_out, toy.shortest))
    over_time = {name: torch.stack([one[name] for one in snapshots]) for name in snapshots[0]}
    prefix = over_time["prefix_matching"].flatten(1).max(1)  # the best head's score, and which
    curves = {name: over_time[name] for name in ("first_loss", "second_loss")}
    curves |= {"icl": over_time["icl_score"], "prefix": prefix.values}
    curves["previous"] = over_time["previous_token"].flatten(1).amax(1)
    curves["prefix_layer"] = (prefix.indices // toy.n_heads).float()
    n_parameters = sum(p.numel() for p in model.parameters())
    return model, {"n_parameters": n_parameters} | summary(toy, torch.tensor(steps), curves)


def summary(
    toy: Toy, steps: Int[Tensor, "snapshot"], curves: dict[str, Float[Tensor, "snapshot"]]
) -> dict:
    """When heads formed, how much of that in a window of a quarter of the training, and the ends.

    The window lies around the sharpest rise of the best prefix-matching score, as in the notebook.
    Emergence is nan, and so are the shares, where no head formed.
    """
    ends = {f"final_{name}": values[-1].item() for name, values in curves.items()}
    formed = ends["final_prefix"] >= FORMED
    window = min(WINDOW, len(steps) - 1)
    drop = sharpest_drop(steps, curves["second_loss"], window) if formed else math.nan
    row = {"formed": formed, "emergence_step": drop}
    row["emergence_tokens"] = drop * toy.batch * toy.context
    rise = sharpest_drop(steps, -curves["prefix"], window) if formed else math.nan
    for name in ("icl", "prefix"):
        share = share_formed(steps, curves[name], rise, toy.n_steps / 4) if formed else math.nan
        row[f"{name}_in_window"] = share
    row["steps"] = steps.tolist()
    return row | ends | {f"{name}_curve": values.tolist() for name, values in curves.items()}


@checked
def sharpest_drop(
    steps: Int[Tensor, "snapshot"], loss: Float[Tensor, "snapshot"], window: int = 2
) -> float:
    """The step at which the loss falls fastest: the middle of the steepest `window` snapshots.

    The slope over `window` intervals is that of the loss smoothed over as many snapshots. Raises
    ValueError for unequal lengths, steps that do not rise, a window that does not fit, or a loss
    that is nan, as that of a training which diverged.
    """
    if not 1 <= window < len(steps):
        raise ValueError(f"window must be between 1 and {len(steps) - 1}, got {window}")
    if (steps.diff() <= 0).any():
        raise ValueError(f"steps must rise, got {steps.tolist()[-3:]} at the end")
    fall = (loss[:-window] - loss[window:]) / (steps[window:] - steps[:-window])
    start = int(fall.argmax())
    return (steps[start] + steps[start + window]).item() / 2


def _norm(norm: torch.nn.Module, x: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d"]:
    return functional.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, eps=1e-5)
