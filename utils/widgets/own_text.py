"""A text of your own: its losses, where heads look and what they write, with heads taken out.

Each answer takes one run of the model, so that a widget gives it at once (`controls`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities import lm_cross_entropy_loss

from utils.checks import check_range, check_tokens, start_token
from utils.circuit import Nodes
from utils.edits import Edit, Run, heads_from, hook_name, hooks, only_at
from utils.engine.packs import check_edits
from utils.heads import check_heads
from utils.ioi import NamePrompts
from utils.metrics import logit_diff
from utils.typed import checked

MOST_TOKENS = 40  # more do not fit a figure, nor the time of a click


class TextRun(NamedTuple):
    """Loss in nats of predicting each token but the first, and some heads' attention."""

    losses: Float[Tensor, "pos-1"]
    attention: Float[Tensor, "head dest src"]


class EndRun(NamedTuple):
    """At END: logit(IO) - logit(S), both probabilities, and of some heads what they do there.

    `attention` goes from END to every token, `written` is what each head adds to the difference
    directly (`attribution.head_projections`); `likeliest` is the token with the highest logit.
    """

    logit_diff: float
    probabilities: tuple[float, float]
    likeliest: int
    attention: Float[Tensor, "head src"]
    written: Float[Tensor, "head"]


@checked
def text_tokens(model: TransformerBridge, text: str) -> Int[Tensor, "1 pos"]:
    """Start token and text. ValueError without a tokenizer, or unless it is 2 to 40 tokens."""
    if model.tokenizer is None:
        raise ValueError("text needs a model with a tokenizer, got one without")
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    most = min(MOST_TOKENS, model.cfg.n_ctx - 1)
    if not 2 <= len(ids) <= most:
        raise ValueError(f"text: want 2 to {most} tokens, got {len(ids)}")
    return torch.tensor([[start_token(model), *ids]], device=model.cfg.device)


@checked
def token_words(model: TransformerBridge, tokens: Int[Tensor, "1 pos"]) -> list[str]:
    """Each token as text. ValueError without a tokenizer, or for ids outside the vocabulary."""
    if model.tokenizer is None:
        raise ValueError("model has no tokenizer, so its tokens have no words")
    check_range("tokens", tokens, model.cfg.d_vocab)
    return [model.tokenizer.decode([token]) for token in tokens[0].tolist()]


@torch.no_grad()
@checked
def run_text(
    model: TransformerBridge,
    tokens: Int[Tensor, "1 pos"],
    heads: Sequence[tuple[int, int]],
    off: Iterable[tuple[int, int]] = (),
    source: Run | float = 0.0,
) -> TextRun:
    """The losses, and the attention of `heads`, with the output of the heads `off` from `source`.

    0 is zero ablation, a mean run mean ablation. Raises ValueError as `heads_from`.
    """
    heads = check_heads(model, heads)
    edits = heads_from(model, off, source) if (off := list(off)) else []
    logits, cache = _run_once(model, tokens, edits)
    losses = lm_cross_entropy_loss(logits, tokens.to(logits.device), per_token=True)[0]
    patterns = [cache["pattern", layer][0, head] for layer, head in heads]
    return TextRun(losses.cpu(), torch.stack(patterns).cpu())


@checked
def own_prompt(model: TransformerBridge, sentence: str, io: str, s: str) -> NamePrompts:
    """A sentence about two people as a prompt: `io` once, `s` twice, then the place of the answer.

    ValueError says what is wrong: names that are missing, the same, or not one token of this model,
    or that do not stand in the sentence as often as they should.
    """
    names = {"IO": io.strip(), "S": s.strip()}
    if names["IO"] == names["S"]:
        raise ValueError(f"IO and S: want two names, got {io.strip()!r} twice")
    tokens = text_tokens(model, sentence.rstrip())
    answers, places = [], {}
    for (role, name), times in zip(names.items(), (1, 2), strict=True):
        if not name:
            raise ValueError(f"{role}: want a name, got none")
        ids = model.tokenizer(" " + name, add_special_tokens=False).input_ids
        if len(ids) != 1 or model.tokenizer.decode(ids).strip() != name:
            pieces = [model.tokenizer.decode([i]).strip() for i in ids]
            raise ValueError(f"{role}: want a name of one token, {name!r} is {len(ids)}: {pieces}")
        said = len(re.findall(rf"\b{re.escape(name)}\b", sentence))
        if said != times:
            want = "once" if times == 1 else "twice"
            raise ValueError(f"sentence: want {name!r} ({role}) {want}, found it {said} times")
        found = (tokens[0] == ids[0]).nonzero()[:, 0].tolist()
        if len(found) != times:
            raise ValueError(f"sentence: want a space before {name!r} every time, and a word first")
        answers.append(ids[0])
        places |= {"IO": found[0]} if times == 1 else {"S1": found[0], "S2": found[1]}
    places |= {"S1+1": places["S1"] + 1, "END": tokens.shape[1] - 1}
    positions = {place: torch.tensor([at]) for place, at in places.items()}
    return NamePrompts(tokens, torch.tensor([answers], device=tokens.device), positions)


@checked
def means_by_place(
    recorded: Mapping[str, Float[Tensor, "prompt pos head d_head"]],
    positions: Mapping[str, Int[Tensor, "prompt"]],
) -> dict[str, Run]:
    """The mean output of every head at each named place, over recorded prompts.

    With ABC prompts of many frames: what a head says there whoever is named, in any sentence.
    Raises ValueError for positions outside the prompts.
    """
    for place, at in positions.items():
        for z in recorded.values():
            check_range(f"positions[{place!r}]", at, z.shape[1])
    return {
        place: Run(
            {n: z[torch.arange(len(z)), at].mean(0)[None, None] for n, z in recorded.items()}
        )
        for place, at in positions.items()
    }


@torch.no_grad()
@checked
def run_at_end(
    model: TransformerBridge,
    prompt: NamePrompts,
    heads: Sequence[tuple[int, int]],
    out: Nodes,
    means: Mapping[str, Run],
) -> EndRun:
    """What the model says at END with the nodes `out` replaced by their means at their places.

    Raises ValueError for a place that the prompt or the means lack, and as `heads_from`.
    """
    heads = check_heads(model, heads)
    logits, cache = _run_once(model, prompt.tokens, _knocked_out(model, prompt, out, means))
    written = cache.stack_head_results(pos_slice=-1)  # [layer*head 1 d_model]
    written = cache.logit_attrs(written, *prompt.answers.T, pos_slice=-1)[:, 0]
    attention = [cache["pattern", layer][0, head, -1] for layer, head in heads]
    likely = logits[0, -1].softmax(-1)
    return EndRun(
        logit_diff(logits, prompt.answers).item(),
        tuple(likely[prompt.answers[0]].tolist()),
        int(likely.argmax()),
        torch.stack(attention).cpu(),
        written[[layer * model.cfg.n_heads + head for layer, head in heads]].cpu(),
    )


def _run_once(
    model: TransformerBridge, tokens: Int[Tensor, "1 pos"], edits: Sequence[Edit]
) -> tuple[Float[Tensor, "1 pos vocab"], ActivationCache]:
    """The logits, and what heads attend to and gather, under the edits."""
    check_tokens(model, tokens, folded=True)
    check_edits(model, tokens, edits)
    layers = range(model.cfg.n_layers)
    names = [hook_name(layer, site) for layer in layers for site in ("pattern", "z")]
    with model.hooks(fwd_hooks=hooks(edits)):
        return model.run_with_cache(tokens, names_filter=[*names, "ln_final.hook_scale"])


def _knocked_out(
    model: TransformerBridge, prompt: NamePrompts, out: Nodes, means: Mapping[str, Run]
) -> list[Edit]:
    edits = []
    for place in sorted({place for _, place in out}):
        if place not in prompt.positions or place not in means:
            raise ValueError(f"out: no place {place!r} in {[*prompt.positions]} and {[*means]}")
        at = only_at(prompt.tokens, prompt.positions[place].to(prompt.tokens.device))
        edits += heads_from(model, [h for h, p in sorted(out) if p == place], means[place], at=at)
    return edits
