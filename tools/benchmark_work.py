"""What the benchmark times: each row's patches, our sweep, and the loops it is compared with."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tools.benchmark_references import (
    Metric,
    hugging_face_loop,
    transformer_lens_loop,
    two_pass_recipe,
)
from tools.benchmark_timing import Patch, Sweep
from utils.ablation import losses, mean_run
from utils.edits import heads_from, hooks
from utils.heads import Head, n_site_heads
from utils.ioi import ioi_prompts
from utils.metrics import LogitDiff, half_losses, per_token_loss
from utils.models import load_hf, load_model
from utils.patching import patch_heads, patch_stream
from utils.paths import path_patch
from utils.prompts import repeated_tokens

Chunk = tuple[list[Patch], list[Patch]]  # for ours; for the references: the same, or some of them
N_PROMPTS = 16
N_REPEATS, SEQ_LEN = 8, 25
SHARED, NOT_SHARED = "s2_io", "abc"  # corruptions that differ from S2 on, and from the first name


@dataclass
class Work:
    """One row: patches, the ways to run some of them, and what ours has to multiply for each."""

    name: str
    target: float
    patches: list[Patch]
    chunks: list[Chunk]  # timed by each way in turn
    ours: Sweep
    transformer_lens: Sweep
    hugging_face: Sweep | None
    macs: Callable[[Patch], float]  # multiply-adds


def smollm2_works(quick: bool) -> tuple[TransformerBridge, list[Work]]:
    """All rows of SmolLM2-135M."""
    model, hf = load_model("smollm2-135m"), load_hf("smollm2-135m")[0].model
    hf.to(next(model.parameters()).device)
    shared = 0.08 if torch.cuda.is_available() else 0.11
    rows = [
        ("head output, shared prefix", shared, "z", SHARED),
        ("head output, no shared prefix", 0.35, "z", NOT_SHARED),
        ("residual stream, layer by position", 0.20, "resid_pre", SHARED),
        ("queries", 0.15, "q", SHARED),
        ("keys, per key/value head", 0.15, "k", SHARED),
        ("values, per key/value head", 0.15, "v", SHARED),
    ]
    return model, [
        *(patching_work(model, hf, *row, quick) for row in rows),
        paths_work(model, "paths to the logits", (), quick),
        paths_work(model, "paths to queries", receivers(model), quick),
        ablation_work(model, hf, quick),
    ]


def gpt2_works(quick: bool) -> tuple[TransformerBridge, list[Work]]:
    """GPT-2 small's shape with random weights, and SmolLM2's tokenizer."""
    tokenizer = load_hf("smollm2-135m")[0].tokenizer
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), initializer_range=0.1)).eval()
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = load_model(folder)
    hf.to(next(model.parameters()).device)
    row = ("head output, GPT-2 small's shape", 0.15, "z", SHARED)
    return model, [patching_work(model, hf, *row, quick)]


def our_sweep(
    model: TransformerBridge, clean: Tensor, corrupted: Tensor, metric: Metric, site: str
) -> Sweep:
    """Heads at a site, or a grid of layers and positions of "resid_pre"; the mean over prompts."""

    def run(patches: Sequence[Patch]) -> Tensor:
        if site != "resid_pre":
            return patch_heads(model, clean, corrupted, metric, site, patches).mean(0)
        layers, at = (sorted(set(part)) for part in zip(*patches, strict=True))
        values = patch_stream(model, clean, corrupted, metric, site, at, layers)
        return values.mean(0).flatten()

    return run


def receivers(model: TransformerBridge) -> tuple[Head, Head]:
    """Two heads in the upper third, one layer apart."""
    layer = 2 * model.cfg.n_layers // 3
    return Head(layer, 0), Head(layer + 1, 1)


def patching_work(
    model: TransformerBridge,
    hf: PreTrainedModel,
    name: str,
    target: float,
    site: str,
    corruption: str,
    quick: bool,
) -> Work:
    """Every head, or position of "resid_pre", from the clean run into the corrupted one."""
    prompts = ioi_prompts(model, N_PROMPTS)
    clean, corrupted = prompts.tokens, prompts.corrupted[corruption]
    case = (clean, corrupted, LogitDiff(prompts.answers), site)
    n_layers, n_positions = model.cfg.n_layers, clean.shape[1]
    first = int((clean != corrupted).any(0).nonzero()[0])  # position that differs
    width = n_positions if site == "resid_pre" else n_site_heads(model, site)
    patches = [(layer, index) for layer in range(n_layers) for index in range(width)]

    def macs(patch: Patch) -> float:
        layer, index = patch
        start = first
        if site == "resid_pre":  # left of `first` both runs are the same: nothing to do
            start = index if index >= first else n_positions
        return (n_layers - layer) * N_PROMPTS * (n_positions - start) * sum(block_macs(model))

    return Work(
        name,
        target,
        patches,
        chunks(patches, n_layers, quick),
        our_sweep(model, *case),
        transformer_lens_loop(model, *case),
        hugging_face_loop(hf, *case),
        macs,
    )


def paths_work(model: TransformerBridge, name: str, to: Sequence[Head], quick: bool) -> Work:
    """Every head to the logits, or to the queries of some heads at the last position."""
    prompts = ioi_prompts(model, N_PROMPTS)
    case = (prompts.tokens, prompts.corrupted[NOT_SHARED], LogitDiff(prompts.answers))
    n_layers = model.cfg.n_layers
    top = max((head.layer for head in to), default=n_layers)
    lowest = min((head.layer for head in to), default=n_layers)
    patches = [(layer, head) for layer in range(top) for head in range(model.cfg.n_heads)]
    mlp, attention = block_macs(model)
    options = {"receivers": to, "site": "q", "positions": prompts.positions["END"]} if to else {}
    return Work(
        name,
        0.15,
        patches,
        chunks(patches, top, quick),
        lambda chosen: path_patch(model, *case, chosen, **options).mean(0),
        two_pass_recipe(model, *case, to),
        None,
        lambda patch: (
            N_PROMPTS * ((top - patch[0]) * mlp + (n_layers - lowest) * (mlp + attention))
        ),
    )


def ablation_work(model: TransformerBridge, hf: PreTrainedModel, quick: bool) -> Work:
    """Every head's output replaced by its mean; the loss on the second copy of repeated tokens."""
    tokens = repeated_tokens(model, N_REPEATS, SEQ_LEN)
    means = mean_run(model, tokens, per_position=False)
    columns = list(range(SEQ_LEN + 1, 2 * SEQ_LEN))
    cfg = model.cfg
    patches = [(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]

    def ours(chosen: Sequence[Patch]) -> Tensor:
        edits = {patch: heads_from(model, [patch], means) for patch in chosen}
        found = losses(model, tokens, edits, columns)
        return torch.stack([loss[:, columns].mean() for loss in found.values()])

    def transformer_lens(chosen: Sequence[Patch]) -> Tensor:
        edits = [heads_from(model, [patch], means) for patch in chosen]
        found = [per_token_loss(model, tokens, hooks(edit)) for edit in edits]
        return torch.stack([half_losses(loss, SEQ_LEN).second.mean() for loss in found])

    def second_half(logits: Tensor) -> Tensor:
        log_probs = logits[:, SEQ_LEN + 1 : -1].log_softmax(-1)
        return -log_probs.gather(2, tokens[:, SEQ_LEN + 2 :, None].to(logits.device))

    unembedded = N_REPEATS * len(columns) * cfg.d_model * cfg.d_vocab
    rows = N_REPEATS * tokens.shape[1]
    return Work(
        "mean ablation, loss on the second copy",
        0.45,
        patches,
        chunks(patches, cfg.n_layers, quick),
        ours,
        transformer_lens,
        hugging_face_loop(hf, tokens, tokens, second_half, "z", mean=True),
        lambda patch: (cfg.n_layers - patch[0]) * rows * sum(block_macs(model)) + unembedded,
    )


def chunks(patches: Sequence[Patch], n_layers: int, quick: bool) -> list[Chunk]:
    """Turns: ours the whole sweep, the references a third of it, spread over the layers.

    Quick: one turn of a quarter of the layers, those in the middle, which have as many blocks above
    them as all layers have on average; the references get one patch of every other one.
    """
    if not quick:
        thirds = [range(n_layers)[i::3] for i in range(min(3, n_layers))]
        return [(list(patches), [p for p in patches if p[0] in third]) for third in thirds]
    half = math.ceil(n_layers / 8)
    middle = range(n_layers // 2 - half, n_layers // 2 + half)
    ours = [patch for patch in patches if patch[0] in middle]
    by_layer = [[patch for patch in ours if patch[0] == layer] for layer in middle[::2]]
    return [(ours, [found[-1 - i % len(found)] for i, found in enumerate(by_layer)])]


def block_macs(model: TransformerBridge) -> tuple[int, int]:
    """Multiply-adds of one position in a block's MLP and in its attention's projections."""
    cfg = model.cfg
    matrices = 3 if cfg.gated_mlp else 2
    projections = 2 * cfg.n_heads + 2 * n_site_heads(model, "k")
    return matrices * cfg.d_model * cfg.d_mlp, projections * cfg.d_model * cfg.d_head
