"""From the residual stream above the last block to a metric, with as few logits as it needs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformer_lens.model_bridge import TransformerBridge

Hooks = Sequence[tuple[str, Callable]]
Metric = Callable[[Float[Tensor, "prompt read vocab"]], Float[Tensor, "prompt *read"]]
LOGITS_AT_ONCE = 2**24  # logits held at once: 64 MB in float32
VOCAB_PART = 2048


class Readout(ABC):
    """A metric that need not see every logit: the one place where a metric can say so.

    An ordinary metric is any function from logits to one value per prompt. In a small model the
    logits are a large part of the work, so one that reads a few of them, or can do with a part of
    the vocabulary at a time, also says how to get its value from the residual stream. `hooks` are
    in place between that stream and the logits.
    """

    hooks: Hooks = ()

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

    def __init__(self, answers: Int[Tensor, "prompt 2"], hooks: Hooks = ()):
        if answers.ndim != 2 or answers.shape[1] != 2:
            raise ValueError(f"answers must have shape [prompt 2], got {list(answers.shape)}")
        if answers.numel() and answers.min() < 0:
            raise ValueError(f"answers must be token ids, got {int(answers.min())}")
        self.answers, self.hooks = answers, hooks

    def __call__(self, logits: Float[Tensor, "prompt read vocab"]) -> Float[Tensor, "prompt"]:
        right, wrong = logits[:, -1].gather(1, self.answers.to(logits.device)).unbind(1)
        return right - wrong

    def of_normed(self, normed: Tensor, w_u: Tensor, b_u: Tensor) -> Float[Tensor, "copy prompt"]:
        _check_prompts("answers", self.answers, normed)
        right, wrong = self.answers.to(normed.device).unbind(1)
        direction = w_u[:, right] - w_u[:, wrong]
        return torch.einsum("cpd,dp->cp", normed[:, :, -1], direction) + b_u[right] - b_u[wrong]


class TokenLoss(Readout):
    """Loss in nats of predicting these tokens, [prompt read], one for each position read."""

    def __init__(self, targets: Int[Tensor, "prompt read"]):
        self.targets = targets

    def __call__(self, logits: Float[Tensor, "prompt read vocab"]) -> Float[Tensor, "prompt read"]:
        targets = self.targets.to(logits.device)
        return cross_entropy(rearrange(logits, "p r v -> p v r"), targets, reduction="none")

    def of_normed(
        self, normed: Tensor, w_u: Tensor, b_u: Tensor
    ) -> Float[Tensor, "copy prompt read"]:
        """A part of the vocabulary at a time, so that the logits stay in the processor's cache."""
        _check_prompts("targets", self.targets, normed)
        targets = self.targets.to(normed.device)
        right = (normed * w_u.T[targets]).sum(-1) + b_u[targets]
        rows, sums = normed.flatten(0, 2), []
        for w, b in zip(w_u.split(VOCAB_PART, 1), b_u.split(VOCAB_PART), strict=True):
            logits = torch.addmm(b, rows, w)
            top = logits.amax(-1, keepdim=True)
            # several times faster than torch.logsumexp
            sums.append((logits - top).exp().sum(-1).log() + top[:, 0])
        return torch.stack(sums).logsumexp(0).view(right.shape) - right


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
        check_values(values[0], resid.shape[1:3], last_alone)
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


def read_hook(read: Sequence[int]) -> tuple[str, Callable]:
    """A hook that unembeds some positions alone: logits become [prompt read vocab]."""
    return ("unembed.hook_in", lambda resid, hook: resid[:, read])


def _check_prompts(name: str, given: Tensor, normed: Float[Tensor, "copy prompt *rest"]) -> None:
    if len(given) != normed.shape[1]:
        raise ValueError(f"{name} are for {len(given)} prompts, this run has {normed.shape[1]}")
