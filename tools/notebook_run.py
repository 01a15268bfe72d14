"""Execute notebooks with visible progress, and leave them as files to open."""

import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from utils.ledger.results import write_file
from utils.session import ROOT

BUILD = ROOT / "build"
# Interactive both in Jupyter (first form) and in the page that nbconvert makes (second form).
RUN_ENV = {"PLOTLY_RENDERER": "plotly_mimetype+notebook"}
KEPT_EVERY = 10  # seconds: no more than that is lost when the disk fills or the run is killed
WIDGET = "application/vnd.jupyter.widget-view+json"


def run(path: Path) -> None:
    """Execute a notebook into build/<name>.ipynb and build/<name>.html and print the seconds.

    Raises as `execute` does, and OSError where the disk is full; what was run so far is then in
    build/<name>.ipynb.
    """
    began, notebook = time.monotonic(), nbformat.read(path, as_version=4)
    kept = began

    def keep() -> None:
        write_file(BUILD / path.name, nbformat.writes(notebook))

    def keep_at_times(**_: object) -> None:
        nonlocal kept
        if time.monotonic() - kept > KEPT_EVERY:
            kept = time.monotonic()
            with suppress(OSError):  # raised at the end, if it is still so
                keep()

    try:
        execute(notebook, path.parent, RUN_ENV, path.stem, keep_at_times)
    finally:  # a run that failed is worth opening too
        keep()
    from tools.pages import to_html  # takes a second to import

    write_file(BUILD / f"{path.stem}.html", to_html(notebook, path.stem))
    shown = (BUILD / path.stem).relative_to(ROOT)
    print(f"{path.stem}: {time.monotonic() - began:.0f} s; open {shown}.html or {shown}.ipynb")


def execute(
    notebook: NotebookNode,
    folder: Path,
    env: dict[str, str],
    label: str,
    after_cell: Callable | None = None,
) -> None:
    """Run every cell in place, in `folder`, with `env` added; one line of progress for each.

    Raises nbclient's CellExecutionError or DeadKernelError, and KeyboardInterrupt; outputs so far
    stay in `notebook`.
    """
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",  # that of this environment, whatever the notebook names
        # The kernel warns on every start that it talks to us, on this machine, unencrypted, and
        # complains when it is ended.
        extra_arguments=["--log-level=CRITICAL"],
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
        store_widget_state=False,
        on_cell_start=progress(notebook, label),
        on_cell_executed=after_cell,
    )
    try:
        client.execute(env=os.environ | env)
    except Exception as error:
        # nbclient takes Ctrl-C itself, ends the kernel, and trips over its absence
        if hasattr(client, "_async_cleanup_kernel_future"):
            raise KeyboardInterrupt from error
        raise
    finally:
        for cell in code:
            cell.outputs = [output for output in cell.outputs if not _leftover(output)]
            for output in cell.outputs:  # a widget's view leaves what stands in its place
                output.get("data", {}).pop(WIDGET, None)


def progress(notebook: NotebookNode, label: str):
    """A hook for nbclient that prints which code cell starts, when, and under which heading."""
    began, cells = time.monotonic(), notebook.cells
    code = [i for i, cell in enumerate(cells) if cell.cell_type == "code" and cell.source]

    def show(cell_index: int, **_: object) -> None:  # Markdown cells come too
        if cell_index in code:
            place, seconds = code.index(cell_index) + 1, time.monotonic() - began
            above = [c.source for c in cells[:cell_index] if c.cell_type == "markdown"]
            headings = re.findall(r"^#{1,6}\s+(.+)$", "\n".join(above), flags=re.MULTILINE)
            line = f"{label}: cell {place}/{len(code)}, {seconds:.0f} s: {(headings or [''])[-1]}"
            print(line, file=sys.stderr, flush=True)

    return show


def _leftover(output: NotebookNode) -> bool:
    """A widget, dead once its kernel has gone, without a figure; or a progress bar that is over."""
    over = output.get("name") == "stderr" and not output.text.strip()
    data = output.get("data", {})
    return over or (WIDGET in data and not set(data) - {WIDGET, "text/plain"})
