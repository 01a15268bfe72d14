"""A headless Chromium for tests, and a notebook that it has open in JupyterLab."""

import io
import os
import shutil
from contextlib import contextmanager
from functools import partial

import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"),
    reason="no Chromium here, and `make test` could not install one",
)
SECOND = 1000  # milliseconds
VIEWS = ".js-plotly-plot, svg, img, table, [id^='circuits-vis']"
CONTROLS = {  # of ipywidgets: where a mouse and where a key acts, and the key
    "slider": (".noUi-base", ".noUi-handle", "ArrowRight"),
    "switch": (".widget-toggle-button", ".widget-toggle-button", "Space"),
}


@contextmanager
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        assert CHROMIUM, "CI is set, and there is no Chromium"
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def inked(locator) -> float:
    """Share of what is on the screen of an element that has not its most frequent colour."""
    picture = Image.open(io.BytesIO(locator.screenshot())).convert("RGB")
    counts = [count for count, _ in picture.getcolors(picture.width * picture.height)]
    return 1 - max(counts) / sum(counts)


class LabNotebook:
    """A notebook that is open in JupyterLab, by the index of its cells.

    Reads the state of cells from JupyterLab's own objects (`--expose-app-in-browser`); what a
    learner does is done with keys and mouse.
    """

    CELLS = "jupyterapp.shell.currentWidget.content.widgets"

    def __init__(self, page, url):
        self.page = page
        page.goto(f"{url}?reset")  # without the tabs of an earlier visit
        page.wait_for_function("window.jupyterapp", timeout=60 * SECOND)
        page.wait_for_function(
            """path => {
                const tab = jupyterapp.shell.currentWidget;
                return path.endsWith(`/${tab?.context?.path}`) && tab.content.widgets.length > 1
                    && tab.sessionContext.session?.kernel?.status == 'idle';
            }""",
            arg=url,
            timeout=90 * SECOND,
        )

    def cell(self, index):
        """The cell's element, active and on the screen."""
        self.page.evaluate(
            """async index => {
                const notebook = jupyterapp.shell.currentWidget.content;
                notebook.activeCellIndex = index;
                notebook.mode = 'command';
                notebook.activate();
                await notebook.scrollToItem(index, 'start');
            }""",
            index,
        )
        return self.page.locator(".jp-Notebook .jp-Cell.jp-mod-active")

    def run(self, index, timeout=120):
        """Run a cell with Shift+Enter and wait for its end; what it printed.

        Fails where the cell raises.
        """
        before = self.count(index)
        self.cell(index)
        self.page.keyboard.press("Shift+Enter")
        self.page.wait_for_function(
            f"""([index, before]) => {{
                const model = {self.CELLS}[index].model;
                return model.executionCount > before && model.executionState == 'idle';
            }}""",
            arg=[index, before],
            timeout=timeout * SECOND,
        )
        outputs = self.outputs(index)
        errors = [o["evalue"] for o in outputs if o["output_type"] == "error"]
        assert errors == [], f"cell {index}"
        return "".join(o.get("text", "") for o in outputs)

    def count(self, index):
        return self.page.evaluate(f"{self.CELLS}[{index}].model.executionCount ?? 0")

    def outputs(self, index):
        return self.page.evaluate(f"{self.CELLS}[{index}].model.outputs.toJSON()")

    def type_into(self, index, source):
        """Replace what a cell says, as a learner would: with the keyboard."""
        self.cell(index)
        for key in ("Enter", "Control+A", "Delete"):
            self.page.keyboard.press(key)
        self.page.keyboard.insert_text(source)

    def shown(self, index):
        """The views among a cell's outputs: figures, drawings, tables and attention."""
        cell = self.cell(index)
        return cell.locator(f".jp-OutputArea-output:has({VIEWS})")

    def move_controls(self, index):
        """Move the first slider and the first switch of a widget, with mouse and keyboard.

        Fails where the figure stays as it was; returns how many controls there were.
        """
        cell, found = self.cell(index), 0
        for mouse, focus, key in CONTROLS.values():
            if cell.locator(mouse).count():
                found += 1
                track = cell.locator(mouse).first
                place = dict(x=track.bounding_box()["width"] / 4, y=2)
                self.see_change(cell, partial(track.click, position=place))
                self.see_change(cell, partial(cell.locator(focus).first.press, key))
        return found

    def see_change(self, cell, act):
        """Do something and wait until a figure of the cell looks different."""
        figure = cell.locator(".js-plotly-plot").last
        figure.scroll_into_view_if_needed()
        before = figure.screenshot()
        act()
        for _ in range(100):
            self.page.wait_for_timeout(100)
            if figure.screenshot() != before:
                return
        raise AssertionError("the figure did not change")
