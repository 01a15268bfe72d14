"""Ctrl-C at a moment when hooks are in place waits until they are off."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Within it Ctrl-C is put off to the end, when nothing of ours is left on the model.

    A second Ctrl-C does not wait. Where something else handles it, nothing is changed.
    """
    usual, handler = signal.default_int_handler, signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is not usual:
        yield
        return
    came = []

    def note(number: int, frame: object) -> None:
        if came:
            usual(number, frame)
        came.append(True)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if came:
        raise KeyboardInterrupt
