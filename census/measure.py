"""One pretrained model: the row that the census keeps of it. Everything comes from `utils`."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from census.grid import Task, Toy
from utils import ablation, attribution, heads, ioi, metrics, prompts
from utils.edits import heads_from
from utils.models import load_model, model_label, weights_digest

N_REPEATS, SEQ_LEN = 8, 50  # random repeats, as in the notebook
N_TEXTS, TEXT_LEN = 12, 512  # English texts, for the in-context-learning score
N_IOI = 64
LEAST = 0.4  # score from which on a head has a role by its pattern
N_ABLATED, N_DRAWS = 8, 3  # heads at most, and random controls
SITES = {  # role: the stripe that tells it
    "induction": heads.induction_score,
    "previous_token": heads.previous_token_score,
    "duplicate_token": heads.duplicate_token_score,
}


def work(task: Task) -> dict:
    """The figures of a task's row."""
    torch.set_num_threads(task.cpus)  # so that a row does not depend on how many run at once
    if isinstance(task.setting, Toy):
        from census.training import train

        return train(task.setting)
    return measure(load_model(task.setting.name))


@torch.no_grad()
def measure(model: TransformerBridge) -> dict:
    """Losses, scores of every head, roles, ablation and, where the tokenizer allows it, IOI."""
    cfg = model.cfg
    row = {"label": model_label(model), "digest": weights_digest(model)}
    row |= {"n_layers": cfg.n_layers, "n_heads": cfg.n_heads, "d_model": cfg.d_model}
    row["n_parameters"] = sum(p.numel() for p in model.parameters())
    scores = repeat_scores(model)
    row |= {f"{name}_scores": values.flatten().tolist() for name, values in scores.items()}
    row |= roles({role: scores[role] for role in SITES})
    row |= on_repeats(model, scores["induction"]) | on_text(model)
    return row | on_names(model)


def repeat_scores(model: TransformerBridge) -> dict[str, Float[Tensor, "layer head"]]:
    """Mean score of every head by each stripe, and by prefix matching over four copies."""
    tokens = prompts.repeated_tokens(model, N_REPEATS, SEQ_LEN)
    first = tokens[:, : 1 + SEQ_LEN]  # previous tokens are looked for before anything repeats
    found = {}
    for role, score in SITES.items():
        alone = role == "previous_token"
        options = {} if alone else {"seq_len": SEQ_LEN}
        found[role] = heads.score_heads(model, first if alone else tokens, score, **options)
    four = prompts.repeated_tokens(model, N_REPEATS, 25, n_repeats=4)
    found["prefix"] = heads.score_heads(model, four, heads.prefix_matching_score)
    return {name: values.mean(0).cpu() for name, values in found.items()}


def roles(scores: dict[str, Float[Tensor, "layer head"]]) -> dict:
    """Heads of each role, how many, and how deep on average (0: first layer, 1: last)."""
    row = {}
    for role, values in scores.items():
        found = heads.top_heads(values, threshold=LEAST)
        depth = [head.layer / max(1, len(values) - 1) for head in found]
        row |= {f"{role}_heads": list(map(str, found)), f"n_{role}": len(found)}
        row |= {f"{role}_depth": sum(depth) / len(depth) if depth else math.nan}
        row |= {f"best_{role}": values.max().item()}
    return row


def on_repeats(model: TransformerBridge, induction: Float[Tensor, "layer head"]) -> dict:
    """Loss on either copy in nats, and what mean ablation of the top heads takes of the gain."""
    tokens = prompts.repeated_tokens(model, N_REPEATS, SEQ_LEN, seed=1)  # not those that chose
    ranked = heads.top_heads(induction, k=min(N_ABLATED, induction.numel()))
    sizes = ablation.control_sizes(model, ranked, range(1, len(ranked) + 1))
    top = ranked[: max(sizes, default=0)]
    draws = ablation.random_control(model, top, N_DRAWS, exclude=ranked) if top else []
    means = ablation.mean_run(model, prompts.repeated_tokens(model, 32, SEQ_LEN, seed=2))
    sets = {"top": top, **{i: draw for i, draw in enumerate(draws)}} if top else {}
    edits = {name: heads_from(model, chosen, means) for name, chosen in sets.items()}
    losses = ablation.losses(model, tokens, {"none": [], **edits})
    halves = {name: metrics.half_losses(loss, SEQ_LEN) for name, loss in losses.items()}
    first, second = (half.mean().item() for half in halves["none"])
    lost = {name: (half.second.mean().item() - second) / (first - second)
            for name, half in halves.items() if name != "none"}  # fmt: skip
    control = [value for name, value in lost.items() if name != "top"]
    row = {"first_loss": first, "second_loss": second, "n_ablated": len(top)}
    row["lost_to_ablation"] = lost.get("top", math.nan)
    return row | {"lost_to_control": sum(control) / len(control) if control else math.nan}


def on_text(model: TransformerBridge) -> dict:
    """The in-context-learning score on English text, in nats, with its standard error."""
    length = min(TEXT_LEN, model.cfg.n_ctx)
    late = length - 12
    try:
        texts = prompts.long_texts(model, N_TEXTS, length)
        loss = metrics.per_token_loss(model, texts)
        score = metrics.estimate(metrics.icl_score(loss, early=late // 10, late=late))
    except ValueError:  # no tokenizer, or a context that is too short for it
        score = metrics.Estimate(math.nan, math.nan, 0)
    return {"icl": score.mean, "icl_stderr": score.stderr}


def on_names(model: TransformerBridge) -> dict:
    """Indirect objects: logit difference, accuracy, and what the strongest name movers write."""
    try:
        asked = ioi.ioi_prompts(model, N_IOI)
    except ValueError:  # a tokenizer that splits the names
        return {"ioi_logit_diff": math.nan, "ioi_stderr": math.nan, "ioi_accuracy": math.nan,
                "name_movers": [], "name_movers_write": []}  # fmt: skip
    logits = torch.cat([
        model.run_with_hooks(batch, fwd_hooks=metrics.last_position_hooks())
        for batch in metrics.token_batches(model, asked.tokens)
    ])  # fmt: skip
    diff = metrics.estimate(metrics.logit_diff(logits, asked.answers).cpu())
    every = heads.all_heads(model)
    to_io, to_s = attribution.head_projections(model, asked.tokens, every, asked.answers).mean(0)
    written = (to_io - to_s).unflatten(0, (model.cfg.n_layers, model.cfg.n_heads)).cpu()
    movers = heads.top_heads(written, k=min(3, written.numel()))
    return {
        "ioi_logit_diff": diff.mean,
        "ioi_stderr": diff.stderr,
        "ioi_accuracy": metrics.accuracy(logits, asked.answers).mean().item(),
        "name_movers": list(map(str, movers)),
        "name_movers_write": [written[mover].item() for mover in movers],
    }
