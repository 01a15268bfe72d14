"""From the residual stream above the last block to a metric, with as few logits as it needs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformer_lens.model_bridge import TransformerBridge

from utils.checks import check_range
from utils.typed import Hooks, checked

Metric = Callable[[Float[Tensor, "prompt read vocab"]], Float[Tensor, "prompt *read"]]
LOGITS_AT_ONCE = 2**24  # logits held at once: 64 MB in float32
ROWS, VOCAB_PART = 1024, 2048


class Readout(ABC):
    """A metric that need not see every logit: the one place where a metric can say so.

    An ordinary metric is any function from logits to one value per prompt. In a small model the
    logits are a large part of the work, so one that reads a few of them, or can do with a part of
    the vocabulary at a time, also says how to get its value from the residual stream. `hooks` are
    in place between that stream and the logits.
    """

    hooks: Hooks = ()

    @abstractmethod
    def check(self, n_prompts: int, d_vocab: float, n_read: int = 1) -> None:
        """Raise ValueError unless it can measure so many prompts over this vocabulary."""

    @abstractmethod
    def __call__(self, logits: Float[Tensor, "prompt read vocab"]) -> Float[Tensor, "prompt *read"]:
        """The metric, from logits."""

    @abstractmethod
    def of_normed(
        self,
        normed: Float[Tensor, "copy prompt read d_model"],
        w_u: Float[Tensor, "d_model vocab"],
        b_u: Float[Tensor, "vocab"],
    ) -> Float[Tensor, "copy prompt *read"]:
        """The same, from what the unembedding reads: the final residual stream after `ln_final`."""


class LogitDiff(Readout):
    """`metrics.logit_diff` with these answers, [prompt 2], as a metric for sweeps.

    It reads two columns of the unembedding, so a sweep computes no others. `hooks`: such as
    `metrics.hold_final_scale`.
    """

    @checked
    def __init__(self, answers: Int[Tensor, "prompt 2"], hooks: Hooks = ()):
        check_range("answers", answers)
        same = (answers[:, 0] == answers[:, 1]).nonzero()
        if len(same):
            token = int(answers[same[0], 0])
            raise ValueError(f"answers: right and wrong of prompt {int(same[0])} are both {token}")
        self.answers, self.hooks = answers.long(), hooks

    def check(self, n_prompts: int, d_vocab: float, n_read: int = 1) -> None:
        _check_prompts("answers", self.answers, n_prompts)
        check_range("answers", self.answers, d_vocab)

    def __call__(self, logits: Float[Tensor, "prompt read vocab"]) -> Float[Tensor, "prompt"]:
        right, wrong = logits[:, -1].gather(1, self.answers.to(logits.device)).unbind(1)
        return right - wrong

    def of_normed(self, normed: Tensor, w_u: Tensor, b_u: Tensor) -> Float[Tensor, "copy prompt"]:
        right, wrong = self.answers.to(normed.device).unbind(1)
        direction = w_u[:, right] - w_u[:, wrong]
        return torch.einsum("cpd,dp->cp", normed[:, :, -1], direction) + b_u[right] - b_u[wrong]


class TokenLoss(Readout):
    """Loss in nats of predicting these tokens, [prompt read], one for each position read."""

    @checked
    def __init__(self, targets: Int[Tensor, "prompt read"]):
        check_range("targets", targets)
        self.targets = targets.long()

    def check(self, n_prompts: int, d_vocab: float, n_read: int = 1) -> None:
        _check_prompts("targets", self.targets, n_prompts)
        check_range("targets", self.targets, d_vocab)
        if self.targets.shape[1] != n_read:
            got = self.targets.shape[1]
            raise ValueError(
                f"targets are for {got} positions of a prompt, this run reads {n_read}"
            )

    def __call__(self, logits: Float[Tensor, "prompt read vocab"]) -> Float[Tensor, "prompt read"]:
        targets = self.targets.to(logits.device)
        return cross_entropy(rearrange(logits, "p r v -> p v r"), targets, reduction="none")

    def of_normed(
        self, normed: Tensor, w_u: Tensor, b_u: Tensor
    ) -> Float[Tensor, "copy prompt read"]:
        """Few rows and a part of the vocabulary at a time: they stay in the processor's cache."""
        targets = self.targets.to(normed.device)
        right = (normed * w_u.T[targets]).sum(-1) + b_u[targets]
        total = [_log_sum_exp(rows, w_u, b_u) for rows in normed.flatten(0, 2).split(ROWS)]
        return torch.cat(total).view(right.shape) - right


def _log_sum_exp(
    rows: Float[Tensor, "row d_model"], w_u: Tensor, b_u: Tensor
) -> Float[Tensor, "row"]:
    """Of the logits, in place: several times faster than torch.logsumexp."""
    sums = []
    for w, b in zip(w_u.split(VOCAB_PART, 1), b_u.split(VOCAB_PART), strict=True):
        logits = torch.addmm(b, rows, w)
        top = logits.amax(-1, keepdim=True)
        sums.append(logits.sub_(top).exp_().sum(-1).log() + top[:, 0])
    return torch.stack(sums).logsumexp(0)


def read_out(
    model: TransformerBridge,
    metric: Metric,
    resid: Float[Tensor, "copy prompt read d_model"],
    last_alone: bool = True,
) -> Float[Tensor, "copy prompt *read"]:
    """The metric of each copy, from the residual stream above the last block."""
    if isinstance(metric, Readout):
        with model.hooks(fwd_hooks=list(metric.hooks)):
            normed = model.ln_final(resid.flatten(0, 1)).unflatten(0, resid.shape[:2])
        values = metric.of_normed(normed, model.W_U, model.b_U)
        for each in values:
            check_values(each, resid.shape[1:3], last_alone)
        return values
    at_once = max(1, LOGITS_AT_ONCE // (resid[0, ..., 0].numel() * model.cfg.d_vocab))
    values = []
    for some in resid.split(at_once):
        logits = model.unembed(model.ln_final(some.flatten(0, 1)))
        values += [values_of(metric, one, last_alone) for one in logits.split(resid.shape[1])]
    return torch.stack(values)


def values_of(
    metric: Metric, logits: Float[Tensor, "prompt read vocab"], last_alone: bool = True
) -> Float[Tensor, "prompt *read"]:
    """The metric; ValueError unless it gives one value per prompt, or per prompt and position."""
    values = metric(logits)
    check_values(values, logits.shape[:2], last_alone)
    return values


def check_values(values: Tensor, shape: tuple[int, int], last_alone: bool) -> None:
    """Raise ValueError unless a metric's values are one per prompt (or prompt and position)."""
    wanted = "[prompt]" if last_alone else "[prompt] or [prompt read]"
    got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    if got not in (shape[:1], *([] if last_alone else [shape])):
        raise ValueError(f"metric must give {wanted} values, got shape {got}")
    if not values.is_floating_point():
        raise ValueError(f"metric must give floating-point values, got {values.dtype}")
    if values.isnan().any():
        raise ValueError(f"metric gives nan for {int(values.isnan().sum())} of {list(got)} values")


def check_metric(
    metric: Metric, n_prompts: int, d_vocab: int, device: torch.device, n_read: int | None = None
) -> None:
    """Try a metric before anything runs; ValueError unless it reads the last position, per prompt.

    A metric gets that position alone (or the `n_read` that a sweep reads). One that reads others
    too, or averages over them, would be silently taken at its word, as one would whose value for a
    prompt depends on the other prompts: both are told by what odd logits there change.
    """
    if isinstance(metric, Readout):
        return metric.check(n_prompts, d_vocab, n_read or 1)
    last = torch.zeros(n_prompts, n_read or 1, d_vocab, device=device)
    try:
        alone = values_of(metric, last, n_read is None)
    except (LookupError, RuntimeError, AttributeError, TypeError) as error:
        if isinstance(error, ValueError):  # ours: it says what is wrong
            raise
        raise ValueError(f"metric fails on logits {list(last.shape)}: {error}") from error
    # what is wrong if odd logits, put there, change the values of those prompts
    mixes = "metric mixes prompts: the value of each must come from its own logits alone"
    tries = [
        (mixes, lambda odd: torch.cat([odd[:1], last[1:]]), slice(1, None)),
        (mixes, lambda odd: torch.cat([last[:1], odd[1:]]), slice(0, 1)),
    ]
    if n_read is None:
        other = "metric reads other positions than the last: take logits[:, -1]"
        tries.insert(0, (other, lambda odd: torch.cat([odd, last], dim=1), slice(None)))
    for odd in (torch.full_like(last, math.nan), last + 1e3 + torch.arange(d_vocab).to(last)):
        for wrong, logits, rows in tries:
            try:
                values = metric(logits(odd))
            except Exception:  # one that wants a single position, or no nan, is not told by these
                continue
            fits = values.shape == alone.shape
            if not (fits and torch.allclose(values[rows], alone[rows], atol=1e-4)):
                raise ValueError(wrong)


def read_hook(read: Sequence[int]) -> tuple[str, Callable]:
    """A hook that unembeds some positions alone: logits become [prompt read vocab]."""
    return ("unembed.hook_in", lambda resid, hook: resid[:, read])


def _check_prompts(name: str, ids: Int[Tensor, "prompt n"], n_prompts: int) -> None:
    if len(ids) != n_prompts:
        raise ValueError(f"{name} are for {len(ids)} prompts, this run has {n_prompts}")
