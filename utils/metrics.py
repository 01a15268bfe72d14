"""Metrics: losses, in-context-learning score, answers' logits and ranks, means with errors."""

import math
import warnings
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities import lm_cross_entropy_loss

from utils.checks import check_hooks, check_tokens
from utils.engine.memory import check_cache
from utils.engine.readout import LogitDiff as LogitDiff  # defined where the engine can use them
from utils.engine.readout import TokenLoss as TokenLoss
from utils.engine.readout import read_hook
from utils.typed import Hooks, checked

MAX_LOGITS = 2**26  # logits held at once: 256 MB in float32, and as much again for log-probs


class Estimate(NamedTuple):
    """A mean over `n` values with the standard error of that mean."""

    mean: float
    stderr: float
    n: int

    def __str__(self) -> str:
        # two digits at least, and as many as it takes for the error not to print as zero
        known = self.stderr > 0 and not math.isnan(self.stderr)
        digits = max(2, -math.floor(math.log10(self.stderr))) if known else 2
        mean = f"{round(self.mean, digits) + 0.0:.{digits}f}"  # no minus before a zero
        return mean if math.isnan(self.stderr) else f"{mean} ± {self.stderr:.{digits}f}"


class HalfLosses(NamedTuple):
    """Mean loss of each prompt on the first and on the second copy, in nats."""

    first: Float[Tensor, "prompt"]
    second: Float[Tensor, "prompt"]


@checked
def estimate(
    values: Float[Tensor, "n"],
    strata: Int[Tensor, "n"] | None = None,
    clusters: Int[Tensor, "n"] | None = None,
) -> Estimate:
    """Mean and its standard error: sample standard deviation / sqrt(n); nan error for one value.

    With `strata`, such as frame and order, of which every sample has the same shares, only the
    spread within them counts (stratified sampling, shares as drawn). With `clusters`, such as
    frames of which another sample would have others, the error is that of the clusters' means,
    however many values each has; the mean is still over values. Raises ValueError for no values,
    one that is nan (a mean over the rest would be of other prompts), a stratum with a single one,
    or both kinds of groups.
    """
    if len(values) == 0:
        raise ValueError("values is empty, want at least one")
    if strata is not None and clusters is not None:
        raise ValueError("strata and clusters: give one of them")
    values, n = values.float(), len(values)
    if clusters is not None:
        means = torch.stack([values[clusters == one].mean() for one in clusters.unique()])
        error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else math.nan
        return Estimate(values.mean().item(), error, n)
    if strata is None:
        strata = torch.zeros(n, dtype=torch.int64, device=values.device)
    groups = [values[strata == stratum] for stratum in strata.unique()]
    if n > 1 and min(map(len, groups)) < 2:
        raise ValueError("strata: want two values or more in each")
    variance = sum(len(group) * group.var() for group in groups) / n if n > 1 else math.nan
    return Estimate(values.mean().item(), math.sqrt(variance / n), n)


@checked
def proportion(successes: Bool[Tensor, "n"]) -> Estimate:
    """A share with the half-width of its Wilson interval over 1.96 as standard error (Wilson 1927).

    Unlike the usual error it is not zero where all succeed, or none. ValueError for no values.
    """
    if len(successes) == 0:
        raise ValueError("successes is empty, want at least one")
    n, z = len(successes), 1.96
    share = successes.float().mean().item()
    half = math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return Estimate(share, half, n)


@checked
def token_batches(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"]
) -> tuple[Int[Tensor, "batch pos"], ...]:
    """Split prompts so that the logits of one batch would stay under `MAX_LOGITS` numbers."""
    check_tokens(model, tokens)
    return tokens.split(max(1, MAX_LOGITS // (tokens.shape[1] * model.cfg.d_vocab)))


def last_position_hooks() -> Hooks:
    """Unembed the last position alone, [prompt 1 vocab]: a run then takes a fifth less time."""
    return [read_hook([-1])]


@checked
def hold_final_scale(model: TransformerBridge, tokens: Int[Tensor, "prompt pos"]) -> Hooks:
    """Hooks under which the last LayerNorm divides by what it divides by on these prompts now.

    An intervention also changes the length of the final residual stream, and so what every other
    component writes to the logits. With its scale held, only the intervention's own path counts.
    They also serve a sweep, which runs several copies of the prompts at once and reads some of
    their last positions alone. TransformerLens's warning about it is turned off, for the whole
    process. Raises as `check_tokens`, and MemoryError if the scales take over 80 % of the free
    memory.
    """
    check_tokens(model, tokens)
    name = "ln_final.hook_scale"
    check_cache(model, tokens, [name])
    with model.hooks(fwd_hooks=last_position_hooks()):  # the logits are not wanted
        scale = model.run_with_cache(tokens, names_filter=[name])[1][name]  # [prompt pos 1]
    warnings.filterwarnings("ignore", message="A forward hook edited hook_scale")  # it is meant

    def hold(live: Float[Tensor, "copy*prompt pos 1"], hook) -> Float[Tensor, "copy*prompt pos 1"]:
        copies = len(live) // len(scale)  # of all prompts, at as many of the last positions
        return scale[:, -live.shape[1] :].repeat(copies, 1, 1)

    return [(name, hold)]


@checked
@torch.no_grad()
def per_token_loss(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"], hooks: Hooks = ()
) -> Float[Tensor, "prompt pos-1"]:
    """Loss in nats of predicting each token but the first; column i is about token i + 1.

    Runs in batches that fit in memory, so the hooks must treat all prompts alike. Raises as
    `check_tokens`, and ValueError for a hook at no place of the model.
    """
    check_hooks(model, hooks)
    losses = []
    for batch in token_batches(model, tokens):
        logits = model.run_with_hooks(batch, fwd_hooks=list(hooks))
        losses.append(lm_cross_entropy_loss(logits, batch.to(logits.device), per_token=True))
    return torch.cat(losses)


@checked
def half_losses(loss: Float[Tensor, "prompt column"], seq_len: int) -> HalfLosses:
    """Mean loss on the first and the second copy of `repeated_tokens`, per prompt, in nats.

    The second copy is taken without its first token: nothing says yet that a repeat begins, so it
    cannot be predicted. Raises ValueError unless the loss is of two copies of at least 2 tokens.
    """
    if seq_len < 2 or loss.shape[1] != 2 * seq_len:
        raise ValueError(
            f"seq_len={seq_len} needs 2 or more tokens and a loss of {2 * seq_len} columns, "
            f"got {loss.shape[1]}"
        )
    return HalfLosses(loss[:, :seq_len].mean(1), loss[:, seq_len + 1 :].mean(1))


@checked
def icl_score(
    loss: Float[Tensor, "prompt column"], early: int = 50, late: int = 500, window: int = 10
) -> Float[Tensor, "prompt"]:
    """In-context-learning score: loss at token `late` minus loss at token `early`, in nats.

    Negative when the context helps. Olsson et al. 2022 ("defining in-context learning") take
    single positions (`window=0`) and average over 10,000 texts; with few texts, averaging the
    2 * window + 1 positions around each cuts the noise. Raises ValueError when a window leaves
    the text or the two are not in order.
    """
    if window < 0 or early - window < 1 or late + window > loss.shape[1] or early >= late:
        raise ValueError(
            f"early={early} and late={late} with window={window} must be in order and within "
            f"1..{loss.shape[1]}"
        )

    def at(position: int) -> Float[Tensor, "prompt"]:
        # column i of the loss is about token i + 1
        return loss[:, position - 1 - window : position + window].mean(1)

    return at(late) - at(early)


@checked
def repeats_bigram(tokens: Int[Tensor, "prompt pos"]) -> Bool[Tensor, "prompt pos-1"]:
    """True for tokens that come after the same token as once before in the prompt.

    Column i is about token i + 1, as in a loss: the pair of tokens i and i + 1 stood there earlier.
    What an induction head can predict (Olsson et al. 2022; "AR hits" in Arora et al. 2023).
    """
    same = tokens[:, :, None] == tokens[:, None, :]
    pair = same[:, :-1, :-1] & same[:, 1:, 1:]  # [prompt, i, earlier]
    return pair.tril(-1).any(-1)


@checked
def logit_diff(
    logits: Float[Tensor, "prompt pos vocab"], answers: Int[Tensor, "prompt 2"]
) -> Float[Tensor, "prompt"]:
    """Logit of the right minus logit of the wrong answer at the last position, per prompt.

    Raises ValueError for answers outside the vocabulary, or of which right and wrong are one.
    """
    _last_and_right(logits, answers)  # raises for answers that do not fit
    return LogitDiff(answers)(logits)


@checked
def normalised_effect(
    patched: Float[Tensor, "prompt *rest"],
    clean: Float[Tensor, "prompt"],
    corrupted: Float[Tensor, "prompt"],
) -> Float[Tensor, "prompt *rest"]:
    """Patched metric on a scale where the corrupted run is 0 and the clean run is 1.

    Each prompt's change is divided by the mean gap between clean and corrupted, not by its own,
    which can be near zero: the mean over prompts is then the ratio of the means. Raises ValueError
    when the mean gap is zero.
    """
    gap = (clean - corrupted).mean()
    if gap.abs() < 1e-6:
        raise ValueError("clean and corrupted have the same mean: there is no effect to restore")
    start = corrupted.reshape(-1, *[1] * (patched.ndim - 1))
    return (patched - start) / gap


@checked
def accuracy(
    logits: Float[Tensor, "prompt pos vocab"], answers: Int[Tensor, "prompt 2"]
) -> Float[Tensor, "prompt"]:
    """1 where the right answer's logit is above the wrong one's at the last position, else 0."""
    return (logit_diff(logits, answers) > 0).float()


@checked
def answer_probability(
    logits: Float[Tensor, "prompt pos vocab"], answers: Int[Tensor, "prompt 2"]
) -> Float[Tensor, "prompt"]:
    """Probability of the right answer, among all tokens, at the last position."""
    last, right = _last_and_right(logits, answers)
    return last.softmax(-1).gather(1, right)[:, 0]


@checked
def answer_rank(
    logits: Float[Tensor, "prompt pos vocab"], answers: Int[Tensor, "prompt 2"]
) -> Int[Tensor, "prompt"]:
    """Rank of the right answer at the last position: 1 when no token has a higher logit."""
    last, right = _last_and_right(logits, answers)
    return 1 + (last > last.gather(1, right)).sum(1)


def _last_and_right(logits: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the last position [prompt vocab] and right answers [prompt 1], if they fit."""
    if logits.shape[1] == 0:
        raise ValueError("logits is empty, want those of one position at least")
    LogitDiff(answers).check(len(logits), logits.shape[-1])
    return logits[:, -1], answers[:, :1].to(logits.device)
