"""Execute a notebook with visible progress, in the Python that runs this."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from traitlets import default

WIDGET = "application/vnd.jupyter.widget-view+json"


class NotebookFailed(Exception):
    """A cell failed; the message shows its source and its error."""


def execute(
    notebook: nbformat.NotebookNode, folder: Path, env: dict[str, str], label: str
) -> nbformat.NotebookNode:
    """Run every cell of `notebook` in place, in `folder`, with `env` added, showing progress.

    Raises NotebookFailed with the failing cell; its outputs so far stay in `notebook`.
    """
    progress = _Progress(notebook, label)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_manager_class=_ThisPython,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
        store_widget_state=False,
        on_cell_start=progress.cell,
    )
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    try:
        with progress:
            client.execute(env=os.environ | env)
    except CellExecutionError as error:
        raise NotebookFailed(progress.report(_plain_text(error.traceback))) from None
    except DeadKernelError as error:
        raise NotebookFailed(progress.report(f"{error} (out of memory?)")) from None
    finally:
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if not _leftover(o)]
    return notebook


def _leftover(output: nbformat.NotebookNode) -> bool:
    """A widget's view, which is dead once its kernel has gone, or a progress bar that is over."""
    over = output.get("name") == "stderr" and not output.text.strip()
    return over or WIDGET in output.get("data", {})


class _OneKernel(KernelSpecManager):
    """Whatever kernel a notebook names, run this Python's own."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        # The kernel warns on every start that it talks to us, on this machine, unencrypted.
        quiet = "--log-level=ERROR"
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", quiet]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


class _ThisPython(AsyncKernelManager):
    @default("kernel_spec_manager")
    def _one_kernel(self) -> KernelSpecManager:
        return _OneKernel()


class _Progress:
    """One updating line on a terminal, one line per cell elsewhere."""

    def __init__(self, notebook: nbformat.NotebookNode, label: str):
        self.cells, self.label = notebook.cells, label
        self.code = [i for i, c in enumerate(self.cells) if c.cell_type == "code" and c.source]
        self.now: int | None = None
        self.started = time.monotonic()
        self.live = sys.stderr.isatty()
        self.done = threading.Event()

    def __enter__(self) -> None:
        self.ticker = threading.Thread(target=self._tick, daemon=True)
        if self.live:
            self.ticker.start()

    def __exit__(self, *error: object) -> None:
        self.done.set()
        if self.live:
            self.ticker.join()
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def cell(self, cell_index: int, **_: object) -> None:
        """nbclient calls this before each cell, Markdown included."""
        if cell_index in self.code:
            self.now = cell_index
            if not self.live:
                print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        seconds = time.monotonic() - self.started
        at = 0 if self.now is None else self.code.index(self.now) + 1
        return f"{self.label}: cell {at}/{len(self.code)}, {seconds:.0f} s: {self.heading()}"

    def heading(self) -> str:
        """The last heading above the running cell."""
        text = "\n".join(c.source for c in self.cells[: self.now or 0] if c.cell_type == "markdown")
        found = re.findall(r"^#{1,6}\s+(.+)$", text, flags=re.MULTILINE)
        return found[-1] if found else "starting"

    def report(self, error: str) -> str:
        source = "" if self.now is None else self.cells[self.now].source
        indented = "\n".join(f"    {row}" for row in source.splitlines())
        return f"{self.line()}\nThis cell failed:\n\n{indented}\n\n{error}"

    def _tick(self) -> None:
        while not self.done.wait(0.5):
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80  # some report 0
            print(f"\r\033[K{self.line()[: width - 1]}", end="", file=sys.stderr, flush=True)


def _plain_text(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
