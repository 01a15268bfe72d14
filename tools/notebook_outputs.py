"""What is committed of a run: outputs in the notebooks, results, README tables and pictures.

A project's README shows its tables between `<!-- results:start -->` and `<!-- results:end -->`;
the top one shows, between `<!-- summary:start <project> <claim> ... -->` and
`<!-- summary:end -->`, how many claims hold, those that do not, and a table of the named ones.
A cell tagged `readme-figure:<name>` also leaves its picture in `<project>/figures/<name>.png`, and
for dark pages in `<name>_dark.png`.
"""

import base64
import copy
import re
import tempfile
from io import BytesIO
from pathlib import Path

import nbformat
import plotly.graph_objects as go
from nbformat import NotebookNode
from PIL import Image

from tools import notebook_run
from tools.notebook_exercises import mark_checks
from tools.pictures import FINE, darkened, lighten_numbers, png, with_palette
from tools.results import PAPERS, markdown_table, summary
from tools.words import alt_text
from utils.ledger.results import merge_seeds, read_json, write_file, write_json
from utils.look import PNG_WIDTH
from utils.session import ROOT

OTHER_SEEDS = (1, 2, 3, 4)  # the notebook itself trains with seed 0
SEEDS_FILE = "toy_seeds.json"
MAX_BYTES = 2 * 2**20
PLOTLY = "application/vnd.plotly.v1+json"
FIGURE_TAG = "readme-figure:"
README_WIDTH = 640
# Pictures beside the interactive form, and light attention views: what GitHub can show.
STORED_ENV = {
    "PLOTLY_RENDERER": "plotly_mimetype+png",
    "MECH_INTERP_STATIC": "1",
    "MECH_INTERP_MODEL": "smollm2-135m",  # the tests re-run what is committed, without a hub
}
MARKED = re.compile(
    r"(<!-- (results|summary):start((?: [\w.-]+)*) -->\n).*?(<!-- \2:end -->)", re.DOTALL
)


def refresh(paths: list[Path]) -> None:
    """Run the notebooks and rewrite their committed outputs, results and pictures.

    Nothing is written of a run that failed. Raises as `execute` does, and ValueError for a notebook
    that is too large or that did not write one ledger.
    """
    for path in paths:
        notebook, results = nbformat.read(path, as_version=4), path.parent / "results"
        seeds = run_seeds(notebook, path)
        if seeds:  # before the full run, which shows the spread
            write_json(results / SEEDS_FILE, seeds)
        label, ledger = _run(notebook, path, STORED_ENV, path.stem)
        clean(notebook)
        mark_checks(notebook)
        content = (nbformat.writes(notebook) + "\n").encode()
        if len(content) > MAX_BYTES:
            raise ValueError(f"{path.name}: got {len(content)} bytes, want at most {MAX_BYTES}")
        write_file(path, content)
        write_json(results / f"{label}.json", merge_seeds(ledger, list(seeds.values())))
        write_figures(notebook, path.parent)


def keep(model: str) -> None:
    """Copy the ledgers of a model from the last `make notebooks` beside the committed ones.

    Claims about the toy are pooled over its stored seeds. Raises ValueError where there is none.
    """
    found = sorted(notebook_run.BUILD.glob(f"results/*/{model}.json"))
    if not found:
        raise ValueError(f"MODEL: got {model!r}, which build/results does not have")
    for path in found:
        results = ROOT / path.parent.name / "results"
        stored = results / SEEDS_FILE
        seeds = list(read_json(stored).values()) if stored.exists() else []
        write_json(results / path.name, merge_seeds(read_json(path), seeds))


def run_seeds(notebook: NotebookNode, path: Path) -> dict[str, dict]:
    """Ledgers of part A alone, for the other seeds of the toy; empty if there is no part A."""
    part_b = re.compile(r"^# Part B\b", re.MULTILINE)
    cells = notebook.cells
    starts = [
        i for i, c in enumerate(cells) if c.cell_type == "markdown" and part_b.search(c.source)
    ]
    seeds = {}
    for seed in OTHER_SEEDS if starts else ():
        part = copy.deepcopy(notebook)
        part.cells = part.cells[: starts[0]]
        env = STORED_ENV | {"TOY_SEED": str(seed), "PLOTLY_RENDERER": "json"}
        seeds[str(seed)] = _run(part, path, env, f"{path.stem}, seed {seed}")[1]
    return seeds


def _run(notebook: NotebookNode, path: Path, env: dict[str, str], label: str) -> tuple[str, dict]:
    """Execute and return the model's label and the ledger that the run wrote."""
    with tempfile.TemporaryDirectory() as folder:
        notebook_run.execute(notebook, path.parent, env | {"MECH_INTERP_RESULTS": folder}, label)
        written = list(Path(folder).glob("*/*.json"))
        if len(written) != 1:
            raise ValueError(f"{path.name}: wrote {len(written)} ledgers, want one")
        return written[0].stem, read_json(written[0])


def clean(notebook: NotebookNode) -> None:
    """Leave only what a reader needs, in place; a second run then gives the same file.

    Drops progress bars (stderr) and what names this machine or this run; pictures get a palette
    and words for those who cannot see them.
    """
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook.metadata = nbformat.from_dict(metadata)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            data = output.get("data", {})
            if "text/html" in data:
                data["text/html"] = _fixed_names(data["text/html"], cell.id)
            if PLOTLY in data:
                lighten_numbers(data[PLOTLY])
            if "image/png" in data:
                _lighten(output)


def _fixed_names(html: str, cell_id: str) -> str:
    """circuitsvis names its views at random: number them instead."""
    for i, name in enumerate(dict.fromkeys(re.findall(r"circuits-vis-[0-9a-f-]{13}", html))):
        html = html.replace(name, f"circuits-vis-{cell_id}-{i}")
    return html


def _lighten(output: NotebookNode) -> None:
    """Give a picture a palette, the size at which it is shown (half its pixels), and its words.

    A picture has no slider: nobody could move it.
    """
    figure, content = output.data.get(PLOTLY), base64.b64decode(output.data["image/png"])
    if figure and figure["layout"].get("sliders"):
        still = {name: value for name, value in figure["layout"].items() if name != "sliders"}
        size = dict(width=PNG_WIDTH, height=still["height"], scale=2)
        content = go.Figure(figure["data"], still).to_image("png", **size)
    with Image.open(BytesIO(content)) as picture:
        width, height = picture.size
        output.data["image/png"] = base64.b64encode(png(with_palette(picture))).decode()
    shown = {"width": width // 2, "height": height // 2, "alt": alt_text(figure)}
    output.metadata["image/png"] = shown


def write_figures(notebook: NotebookNode, project: Path) -> None:
    """Write the pictures of cells tagged for the README. Raises ValueError for one without any."""
    for cell in notebook.cells:
        for tag in cell.metadata.get("tags", []):
            if tag.startswith(FIGURE_TAG):
                name = tag.removeprefix(FIGURE_TAG)
                shown = [o.data for o in cell.outputs if "image/png" in o.get("data", {})]
                if not shown:
                    raise ValueError(f"{tag}: its cell shows no picture")
                picture = base64.b64decode(shown[0]["image/png"])
                if PLOTLY in shown[0]:
                    picture = for_readme(shown[0][PLOTLY])
                write_file(project / "figures" / f"{name}.png", picture)
                write_file(project / "figures" / f"{name}_dark.png", darkened(picture))


def for_readme(figure: dict) -> bytes:
    """A figure drawn narrower than in a notebook: its letters are then larger on a phone."""
    drawn = go.Figure(figure["data"], figure["layout"])
    size = dict(width=README_WIDTH, height=drawn.layout.height, scale=2)
    with Image.open(BytesIO(drawn.to_image("png", **size))) as picture:
        return png(with_palette(picture, FINE))


def write_readmes() -> None:
    """Rewrite the tables of every README that has the markers."""
    for path in readmes():
        write_file(path, with_tables(path))


def readmes() -> list[Path]:
    """The READMEs that show results: the top one and those of the projects."""
    return sorted([*ROOT.glob("README.md"), *ROOT.glob("project-*/README.md")])


def with_tables(readme: Path) -> str:
    """The text of a README with its tables as the committed results say.

    Raises ValueError for markers that name a project without results.
    """

    def replace(match: re.Match) -> str:
        start, kind, names, end = match.groups()
        folder, *claims = names.split() or [readme.parent]
        files = sorted(p for p in (ROOT / folder).glob("results/*.json") if p.name != SEEDS_FILE)
        if not files:
            raise ValueError(f"{readme}: no results in {folder}")
        ledgers = {path.stem: read_json(path) for path in files}
        papers = ledgers.get(PAPERS)
        ours = [x for x in ledgers.values() if x is not papers]
        if kind == "summary":
            texts = [summary(ledger, claims, papers) for ledger in ours or [papers]]
        else:  # the papers' model: a column of each table, and a table of its own
            texts = [markdown_table(ledger, papers) for ledger in ours]
            texts += [markdown_table(papers)] if papers else []
        return start + "\n" + "\n".join(texts) + "\n" + end

    return MARKED.sub(replace, readme.read_text(encoding="utf-8"))
