"""Call a learner's function so that nothing it does hangs or breaks the notebook around it."""

import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import TextIOBase

import torch
from torch import nn

PRINTED = 1000  # characters that one call may print


class Overrun(BaseException):
    """Ends a function that runs too long; no Exception, so that `except Exception` lets it pass."""


class NotRight(Exception):
    """Carries the sentence that tells the learner what is wrong."""


class Trickle(TextIOBase):
    """Passes the first `PRINTED` characters on and drops the rest."""

    def __init__(self, target: TextIOBase):
        self.target, self.left = target, PRINTED

    def write(self, text: str) -> int:
        if self.left > 0:
            self.target.write(text[: self.left])
            self.left -= len(text)
            if self.left <= 0:
                self.target.write("\n... (what else your function prints is not shown)\n")
        return len(text)

    def flush(self) -> None:
        self.target.flush()


@contextmanager
def contained(seconds: float) -> Iterator[None]:
    """Limit time and printing; random state, gradient mode and default dtype are put back.

    Raises Overrun inside when the time is over, as far as an interrupt can (not within one long
    operation of torch). There is no limit on Windows or outside the main thread.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        if not isinstance(sys.stdout, Trickle):  # a hook inside an experiment prints through it
            stack.enter_context(redirect_stdout(Trickle(sys.stdout)))
        stack.enter_context(_time_limit(seconds))
        yield


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    in_main = threading.current_thread() is threading.main_thread()
    if not hasattr(signal, "setitimer") or not in_main:
        yield
        return

    def stop(*_: object) -> None:
        raise Overrun

    began, handler = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    # again every second, in case a bare `except` swallowed the first
    left, again = signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # an outer limit goes on
            rest = max(left - (time.monotonic() - began), 0.01)
            signal.setitimer(signal.ITIMER_REAL, rest, again)


def describe(error: BaseException, answer: Callable) -> str:
    """Type and first line of the error, and the line of the learner's cell it came from."""
    source = getattr(getattr(answer, "__code__", None), "co_filename", None)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == source]
    where = f" at line {lines[-1]} of its cell" if lines else ""
    if isinstance(error, Overrun):
        return f"Your function ran too long and was ended{where}."
    text = (str(error).strip().split("\n")[0][:200] or "without a message").rstrip(".")
    return f"Your function raised {type(error).__name__}{where}: {text}."


class Watched:
    """The weights and hooks of models, to see whether a function changed them and undo it."""

    def __init__(self, models: list[nn.Module]):
        self.models = models
        self.weights = [[p.detach().clone() for p in model.parameters()] for model in models]
        self.hooks = [self._n_hooks(model) for model in models]

    @staticmethod
    def _n_hooks(model: nn.Module) -> int:
        return sum(
            len(point.fwd_hooks) + len(point.bwd_hooks) for point in model.hook_dict.values()
        )

    def undo(self) -> str | None:
        """Put everything back; what was changed, as a sentence for the learner."""
        said = None
        for model, weights, n_hooks in zip(self.models, self.weights, self.hooks, strict=True):
            if self._n_hooks(model) != n_hooks:
                model.reset_hooks()
                said = (
                    "Your function leaves hooks on the model; use `model.run_with_hooks` or "
                    "`with model.hooks(...)`, which take them off again."
                )
            with torch.no_grad():
                for parameter, before in zip(model.parameters(), weights, strict=True):
                    if not torch.equal(parameter, before):
                        parameter.copy_(before)
                        said = "Your function changes the model's weights; work on copies."
        return said


def keep_names(fallback: Callable[[str], Callable | None]) -> None:
    """In a notebook, what a learner's cell does to the notebook's own names is undone.

    After a cell with `@checks.<name>` every other name that stood before has its value again.
    `<name>` itself is what the check gave, or `fallback(name)` if the cell failed.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return
    before: dict[str, object] = {}

    def remember(info: object) -> None:
        before.clear()
        if "@checks." in info.raw_cell:
            before.update(shell.user_ns)

    def restore(result: object) -> None:
        if not before:
            return
        asked = re.findall(r"@checks\.(\w+)", result.info.raw_cell)
        own = {name for name in asked if fallback(name)}
        for name, value in before.items():
            mine = name in own or name.startswith("_") or name in ("In", "Out")
            if not mine and shell.user_ns.get(name) is not value:
                shell.user_ns[name] = value
                print(f"The notebook uses `{name}` itself: it keeps its value, take another name.")
        for name in own:
            if getattr(shell.user_ns.get(name), "checked_by", None) != name:
                shell.user_ns[name] = fallback(name)

    shell.events.register("pre_run_cell", remember)
    shell.events.register("post_run_cell", restore)
