"""Attention-only toys: build, train and watch one- and two-layer models learn to repeat.

run = train_toy(n_layers=2, seed=0)
run.steps, run.second_loss, run.prefix_matching  # one entry per snapshot
share_formed(run.steps, run.second_loss, centre=250, width=100)  # how much of the fall is there
"""

import math
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from utils.checks import check_count, generator_of
from utils.heads import attention_patterns, prefix_matching_score, previous_token_score, score_heads
from utils.metrics import half_losses, icl_score, per_token_loss
from utils.prompts import repeated_tokens
from utils.typed import checked

VOCAB = 64  # token 0 starts every sequence and occurs nowhere else
LONGEST = 23  # tokens in the longest segment, so that two copies fit
SHORTEST = 8
CONTEXT = 1 + 2 * LONGEST
BATCH = 64  # sequences a step
SNAPSHOT = 10  # steps from one measurement to the next
HELD_OUT, HELD_OUT_SEED = 64, 1_000_003
_cut_short: dict[tuple, tuple] = {}  # trainings that were interrupted, as of their last snapshot


class ToyRun(NamedTuple):
    """A trained toy (compatibility mode) and what was measured on its way, one row a snapshot.

    Losses and the in-context-learning score are in nats, means over the held-out `tokens`, which
    are two copies of `LONGEST` tokens; only `losses` has each token's (column i: token i + 1). The
    in-context-learning score is the loss around the middle of the second copy minus that around
    the middle of the first (each over 11 positions); the previous-token score is over the first
    copy, the one that is looked up later. `patterns` are means over as many prompts of two copies
    of `SHORTEST` tokens: maps small enough to see and to keep.
    """

    model: TransformerBridge
    tokens: Int[Tensor, "prompt pos"]
    steps: Int[Tensor, "snapshot"]
    first_loss: Float[Tensor, "snapshot"]
    second_loss: Float[Tensor, "snapshot"]
    icl_score: Float[Tensor, "snapshot"]
    losses: Float[Tensor, "snapshot prompt column"]
    prefix_matching: Float[Tensor, "snapshot layer head"]
    previous_token: Float[Tensor, "snapshot layer head"]
    patterns: Float[Tensor, "snapshot layer head dest src"]


@checked
def build_toy(
    n_layers: int,
    smeared: bool = False,
    seed: int = 0,
    n_heads: int = 4,
    d_model: int = 64,
    context: int = CONTEXT,
) -> TransformerBridge:
    """An untrained attention-only model of `VOCAB` tokens, with heads of 32 dimensions.

    `smeared` mixes each key of the first layer with the one before it (Olsson et al. 2022,
    argument 2), by a learned share per head. Raises ValueError for fewer than one layer, head,
    dimension or token of context.
    """
    sizes = dict(n_layers=n_layers, n_heads=n_heads, d_model=d_model, context=context)
    for name, size in sizes.items():
        check_count(name, size)
    generator_of(seed)  # raises for what is no seed
    config = TransformerBridgeConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        d_head=32,
        d_vocab=VOCAB,
        n_ctx=context,
        attn_only=True,
        act_fn=None,
        normalization_type="LN",
        seed=seed,
    )
    model = TransformerBridge.boot_native(config, device="cpu")
    if smeared:
        alpha = torch.nn.Parameter(torch.zeros(n_heads))
        # on the wrapped model, whose parameters are those that the optimiser gets
        model.original_model.register_parameter("smear_alpha", alpha)
        model.add_hook("blocks.0.attn.hook_k", lambda k, hook: smear(k, alpha), is_permanent=True)
    return model.eval()  # nothing in it behaves otherwise in training


@checked
def smear(
    k: Float[Tensor, "prompt pos head d_head"], alpha: Float[Tensor, "head"]
) -> Float[Tensor, "prompt pos head d_head"]:
    """k_j <- s k_j + (1 - s) k_(j-1) with s = sigmoid(alpha) per head; the first key stays."""
    share = torch.sigmoid(alpha)[:, None]
    return torch.cat([k[:, :1], share * k[:, 1:] + (1 - share) * k[:, :-1]], dim=1)


@checked
def toy_batch(
    generator: torch.Generator,
    n_sequences: int = BATCH,
    shortest: int = SHORTEST,
    longest: int = LONGEST,
    context: int = CONTEXT,
) -> Int[Tensor, "sequence pos"]:
    """Training data: token 0, then a random segment again and again until the context is full.

    The segment's tokens are distinct; its length is drawn per sequence, `shortest` to `longest`, so
    that no fixed distance leads back to the copy. Raises ValueError for fewer than one sequence,
    and lengths that are not in order within 2..`VOCAB` - 1.
    """
    check_count("n_sequences", n_sequences)
    check_count("context", context)
    if not 2 <= shortest <= longest < VOCAB:
        got = f"{shortest} to {longest}"
        raise ValueError(f"shortest and longest must be in order within 2..{VOCAB - 1}, got {got}")
    segments = 1 + torch.rand(n_sequences, VOCAB - 1, generator=generator).argsort(-1)
    lengths = torch.randint(shortest, longest + 1, (n_sequences, 1), generator=generator)
    body = segments.gather(1, torch.arange(context - 1) % lengths)
    return torch.nn.functional.pad(body, (1, 0))


@checked
def train_toy(n_layers: int, smeared: bool = False, seed: int = 0, n_steps: int = 500) -> ToyRun:
    """Train a toy to predict every next token; measure it every `SNAPSHOT` steps.

    Weights and data follow from `seed` alone, and all toys of a seed see the same batches. A
    training that was interrupted goes on where it stopped. Raises ValueError for fewer than one
    layer or step.
    """
    check_count("n_steps", n_steps)
    key = (n_layers, smeared, seed, n_steps)
    model = build_toy(n_layers, smeared, seed)
    held_out = repeated_tokens(model, HELD_OUT, LONGEST, seed=HELD_OUT_SEED)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = generator_of(seed)
    snapshots = [{"steps": torch.tensor(0)} | snapshot(model, held_out)]
    name = f"{n_layers} layer{'s' * (n_layers > 1)}{', smeared keys' * smeared}"
    trained = model.original_model  # the wrapped module, which has the parameters
    done = 0
    if key in _cut_short:
        done, snapshots, weights, of_optimiser, of_generator = deepcopy(_cut_short[key])
        trained.load_state_dict(weights)
        optimiser.load_state_dict(of_optimiser)
        generator.set_state(of_generator)
    steps = range(done + 1, n_steps + 1)
    for step in tqdm(steps, desc=name, mininterval=0.5, initial=done, total=n_steps):
        with torch.enable_grad():
            loss = model(toy_batch(generator), return_type="loss")
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        if step % SNAPSHOT == 0 or step == n_steps:
            snapshots.append({"steps": torch.tensor(step)} | snapshot(model, held_out))
            states = trained.state_dict(), optimiser.state_dict(), generator.get_state()
            _cut_short[key] = deepcopy((step, snapshots, *states))
    del _cut_short[key]
    # LayerNorm's gains go into the weights next to it, as in every model of the notebooks
    model.enable_compatibility_mode()
    over_time = {name: torch.stack([one[name] for one in snapshots]) for name in snapshots[0]}
    return ToyRun(model, held_out, **over_time)


@checked
def share_formed(
    steps: Int[Tensor, "snapshot"], values: Float[Tensor, "snapshot"], centre: float, width: float
) -> float:
    """Share of a quantity's change over training that falls within `centre` ± `width` / 2 steps.

    Values between snapshots are interpolated. Raises ValueError for unequal lengths, when nothing
    changed, the width is not positive or the window lies outside the training.
    """
    _check_rising(steps)
    if width <= 0:
        raise ValueError(f"width must be positive, got {width}")
    if len(values) == 0 or values[-1] == values[0]:
        raise ValueError("values end where they began: no change to share out")
    edges = [centre - width / 2, centre + width / 2]
    if edges[0] > steps[-1] or edges[1] < steps[0]:
        training = f"{steps[0]}..{steps[-1]}"
        raise ValueError(f"centre ± width / 2 must meet the training, {training}, got {edges}")
    before, after = np.interp(edges, steps.numpy(), values.numpy())
    return float(after - before) / (values[-1] - values[0]).item()


@checked
def plateaus(
    steps: Int[Tensor, "snapshot"], values: Float[Tensor, "snapshot"], centre: float, width: float
) -> tuple[float, float]:
    """Rate of change just before and just after a window, as shares of the mean rate inside.

    Share formed over length, of half a window on either side (or what the training has of it; nan
    where it has less than a quarter), over that of the window. A change at one rate all along gives
    1 and 1, a step inside 0 and 0. Raises as `share_formed`,
    and ValueError when nothing changed in the window.
    """
    _check_rising(steps)
    first, last = steps[0].item(), steps[-1].item()
    inside = share_formed(steps, values, centre, width) / width
    if inside == 0:
        raise ValueError("values do not change in the window: no rate to compare with")
    rates = []
    for opens in (centre - width, centre + width / 2):
        left, right = max(first, opens), min(last, opens + width / 2)
        if right - left < width / 4:
            rates.append(math.nan)
            continue
        formed = share_formed(steps, values, (left + right) / 2, right - left)
        rates.append(abs(formed / (right - left) / inside))
    return rates[0], rates[1]


class LossPath(NamedTuple):
    """Training as a path in the plane of the first two principal components.

    `explained`: share of the variance along each. The corner is the snapshot farthest from the
    straight line between first and last, at `bend` times that line's length.
    """

    points: Float[Tensor, "snapshot 2"]
    explained: Float[Tensor, "2"]
    corner: int
    bend: float


@checked
def path_of(losses: Float[Tensor, "snapshot *tokens"]) -> LossPath:
    """The path of the per-token losses over training (Olsson et al. 2022, argument 1).

    Raises ValueError for fewer than three snapshots, or a path that ends where it began.
    """
    if losses.ndim < 2 or len(losses) < 3:
        got = list(losses.shape)
        raise ValueError(f"losses: want [snapshot token], three snapshots or more, got {got}")
    flat = losses.flatten(1)
    u, s, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    points = u[:, :2] * s[:2]
    points *= torch.where(points[-1] < points[0], -1, 1)  # a direction has no sign of its own
    along = points[-1] - points[0]
    length = along.norm().item()
    if length == 0:
        raise ValueError("losses end where they began: there is no path")
    across = torch.stack([-along[1], along[0]]) / length
    away = ((points - points[0]) @ across).abs()  # [snapshot]
    corner = int(away.argmax())
    return LossPath(points, s[:2] ** 2 / (s**2).sum(), corner, away[corner].item() / length)


def _check_rising(steps: Int[Tensor, "snapshot"]) -> None:
    if (steps.diff() <= 0).any():
        raise ValueError(f"steps must rise, got {steps.tolist()[-3:]} at the end")


@torch.no_grad()
@checked
def snapshot(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"], shortest: int = SHORTEST
) -> dict[str, Tensor]:
    """What `ToyRun` has of a snapshot, by name, on two copies each. Raises as `half_losses`."""
    check_count("shortest", shortest, least=2)
    loss = per_token_loss(model, tokens)
    longest = loss.shape[1] // 2
    early, around = 1 + longest // 2, min(5, longest // 3)
    icl = icl_score(loss, early=early, late=early + longest, window=around)
    prefix = score_heads(model, tokens, prefix_matching_score)
    previous = score_heads(model, tokens[:, : 1 + longest], previous_token_score)
    first, second = half_losses(loss, longest)
    short = repeated_tokens(model, HELD_OUT, shortest, seed=HELD_OUT_SEED)
    return {
        "first_loss": first.mean(),
        "second_loss": second.mean(),
        "icl_score": icl.mean(),
        "losses": loss,
        "prefix_matching": prefix.mean(0),
        "previous_token": previous.mean(0),
        "patterns": attention_patterns(model, short).mean(0),
    }


@checked
def tiny_model(n_layers: int = 4, seed: int = 0, grouped: bool = False) -> TransformerBridge:
    """A random model with MLPs, to try code on in milliseconds: 4 layers of 3 heads, 60 tokens.

    Its weights are large and its norms have scales and biases, so that no path is negligible.
    `grouped`: 4 heads a layer, of which two share each key/value head.
    """
    check_count("n_layers", n_layers)
    generator = generator_of(seed)
    config = TransformerBridgeConfig(
        n_layers=n_layers,
        d_model=24,
        n_heads=4 if grouped else 3,
        n_key_value_heads=2 if grouped else None,
        d_head=6 if grouped else 8,
        d_mlp=48,
        d_vocab=60,
        n_ctx=64,
        act_fn="gelu",
        normalization_type="LN",
        seed=seed,
    )
    model = TransformerBridge.boot_native(config, device="cpu")
    with torch.no_grad():
        for parameter in model.original_model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.enable_compatibility_mode()
    return model.eval()
