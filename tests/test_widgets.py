"""Widgets: what they compute, what they refuse, and that every control moves the figure."""

import base64

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from tools.notebook_run import WIDGET, execute
from utils import ioi
from utils.ablation import mean_run
from utils.attribution import head_projections
from utils.circuit import Node, knock_out
from utils.edits import Run, heads_from, hooks, record
from utils.heads import Head, all_heads, attention_patterns
from utils.metrics import Estimate, logit_diff, per_token_loss
from utils.toy import train_toy
from utils.widgets import controls, own_text, sliders

PLOTLY = "application/vnd.plotly.v1+json"
SENTENCE = "When Mary and John went to the store, John gave a drink to"
OUT = {(Head(1, 0), "END"), (Head(1, 2), "END"), (Head(0, 1), "S2")}


@pytest.fixture(autouse=True)
def plain_figures(monkeypatch, no_grad):
    monkeypatch.setattr(pio.renderers, "default", "plotly_mimetype")


@pytest.fixture(scope="module")
def usual(random_gpt2):
    """Mean outputs by place, over ABC prompts."""
    abc = ioi.ioi_prompts(random_gpt2, n_prompts=8, seed=3)
    recorded = record(random_gpt2, abc.corrupted["abc"], ["z"]).activations
    return own_text.means_by_place(recorded, abc.positions)


@pytest.fixture(scope="module")
def film():
    run = train_toy(2, n_steps=20)
    return run, sliders.toy_training(run, at=10)


def figure_of(widget):
    """The figure that is on the screen."""
    (shown,) = widget.place.outputs
    return go.Figure(shown["data"][PLOTLY])


def numbers(values):
    """An array of a figure, which plotly sends as text."""
    array = np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])
    return array.reshape([int(n) for n in values.get("shape", str(len(array))).split(",")])


def control(widget, description):
    found = [c for c in controls.inputs(widget.children[:-1]) if c.description == description]
    assert len(found) == 1, description
    return found[0]


# A text


@pytest.mark.parametrize("name", ["zero", "mean"])
def test_losses_and_attention_are_those_of_a_plain_run(random_gpt2, name):
    model, off = random_gpt2, [Head(0, 2), Head(2, 1)]
    tokens = own_text.text_tokens(model, "A cat and a dog saw a cat.")
    source = 0.0 if name == "zero" else mean_run(model, tokens, per_position=False)
    run = own_text.run_text(model, tokens, all_heads(model), off, source)
    edits = hooks(heads_from(model, off, source))
    torch.testing.assert_close(run.losses, per_token_loss(model, tokens, edits)[0])
    with model.hooks(fwd_hooks=edits):
        wanted = attention_patterns(model, tokens)[0].flatten(0, 1)
    torch.testing.assert_close(run.attention, wanted)
    assert (run.losses - own_text.run_text(model, tokens, off).losses).abs().max() > 0.01


@pytest.mark.parametrize(("text", "came"), [("", 0), ("x", 1), ("word " * 60, 61)])
def test_a_text_too_short_or_too_long_is_refused(random_gpt2, text, came):
    with pytest.raises(ValueError, match=f"text: want 2 to 40 tokens, got {came}"):
        own_text.text_tokens(random_gpt2, text)


def test_a_model_without_a_tokenizer_is_refused(toy2):
    with pytest.raises(ValueError, match="text needs a model with a tokenizer"):
        own_text.text_tokens(toy2, "A text")


# A sentence


def test_a_sentence_becomes_a_prompt(random_gpt2):
    prompt = own_text.own_prompt(random_gpt2, SENTENCE + " ", "Mary", "John")
    words = own_text.token_words(random_gpt2, prompt.tokens)
    places = {place: words[at] for place, at in prompt.positions.items()}
    assert places == {"IO": " Mary", "S1": " John", "S1+1": " went", "S2": " John", "END": " to"}
    assert random_gpt2.to_string(prompt.answers[0]) == " Mary John"


@pytest.mark.parametrize(
    ("sentence", "io", "s", "said"),
    [
        (SENTENCE, "John", "John", "IO and S: want two names, got 'John' twice"),
        (SENTENCE, " ", "John", "IO: want a name, got none"),
        (SENTENCE, "Mary", "Zyxwvut", "S: want a name of one token, 'Zyxwvut' is "),
        (SENTENCE, "Anna", "John", "want 'Anna' .IO. once, found it 0 times"),
        (SENTENCE.replace("John gave", "she gave"), "Mary", "John", "'John' .S. twice, found it 1"),
        ("Mary met John and John gave it to", "Mary", "John", "want a space before 'Mary'"),
        ("word " * 60, "Mary", "John", "text: want 2 to 40 tokens"),
    ],
)
def test_a_bad_sentence_is_refused_by_name(random_gpt2, sentence, io, s, said):
    with pytest.raises(ValueError, match=said):
        own_text.own_prompt(random_gpt2, sentence, io, s)


def test_means_by_place_are_those_of_the_places():
    z = torch.arange(2 * 3 * 1 * 1.0).reshape(2, 3, 1, 1)
    means = own_text.means_by_place({"z": z}, {"IO": torch.tensor([0, 2])})
    assert means["IO"].activations["z"].tolist() == [[[[2.5]]]]  # of 0 and 5


@pytest.mark.parametrize("name", ["random_gpt2", "random_smollm2"])
def test_the_end_is_that_of_a_plain_run(request, name):
    """On one prompt of ours, whose template has the same means at every position."""
    model = request.getfixturevalue(name)
    prompt = own_text.own_prompt(model, SENTENCE, "Mary", "John")
    flat = record(model, prompt.tokens, ["z"]).activations
    flat = Run({name: z.mean(1, keepdim=True) for name, z in flat.items()})
    means = dict.fromkeys(("S2", "END"), flat)
    heads = [Head(1, 0), Head(2, 3), Head(0, 1)]
    run = own_text.run_at_end(model, prompt, heads, OUT, means)
    edits = hooks(knock_out(model, prompt, flat, OUT))
    with model.hooks(fwd_hooks=edits):
        logits = model(prompt.tokens)
        to_io, to_s = head_projections(model, prompt.tokens, heads, prompt.answers)[0]
        patterns = attention_patterns(model, prompt.tokens)[0]
    close = dict(atol=1e-4, rtol=1e-4)
    assert run.logit_diff == pytest.approx(logit_diff(logits, prompt.answers).item(), abs=1e-3)
    assert run.likeliest == logits[0, -1].argmax()
    shares = logits[0, -1].softmax(-1)[prompt.answers[0]].tolist()
    assert run.probabilities == pytest.approx(shares, rel=1e-3)
    torch.testing.assert_close(run.written, to_io - to_s, **close)
    torch.testing.assert_close(
        run.attention, torch.stack([patterns[h][-1] for h in heads]), **close
    )
    untouched = own_text.run_at_end(model, prompt, heads, frozenset(), means)
    assert abs(untouched.logit_diff - run.logit_diff) > 0.01


def test_a_place_without_a_mean_is_refused(random_gpt2, usual):
    prompt = own_text.own_prompt(random_gpt2, SENTENCE, "Mary", "John")
    with pytest.raises(ValueError, match="no place 'S1'"):
        own_text.run_at_end(random_gpt2, prompt, [Head(0, 0)], {(Head(0, 0), "S1")}, {})


# On the screen


def test_switches_and_text_move_the_figure(random_gpt2):
    groups = {"induction": [Head(1, 0), Head(1, 1)], "previous_token": [Head(0, 2)]}
    widget = controls.your_text(random_gpt2, groups, text="A cat and a dog, and a cat")
    names = [trace.name for trace in figure_of(widget).data if trace.type == "bar"]
    assert names == ["all heads"]
    control(widget, "L1H1").value = True
    one = figure_of(widget)
    assert list(one.data[2].y) == ["L1H0", "L1H1 off", "L0H2"]
    assert abs(numbers(one.data[0].y) - numbers(one.data[1].y)).max() > 1e-3
    control(widget, "all induction").value = True
    both = figure_of(widget)
    assert list(both.data[2].y) == ["L1H0 off", "L1H1 off", "L0H2"]
    assert abs(numbers(both.data[1].y) - numbers(one.data[1].y)).max() > 1e-3
    control(widget, "Look from token").value = 2
    assert "token 2" in str(figure_of(widget).layout.annotations)
    for name in ("L1H1", "all induction"):
        control(widget, name).value = False
    assert len(figure_of(widget).data) == 2


def test_a_click_sends_the_figure_and_not_plotlys_script(random_gpt2, monkeypatch):
    monkeypatch.setattr(pio.renderers, "default", "plotly_mimetype+notebook")
    sent, notebook = [], type(pio.renderers["notebook"])
    monkeypatch.setattr(notebook, "activate", lambda self: sent.append("script"))
    widget = controls.your_text(random_gpt2, {"a": [Head(0, 0), Head(0, 1)]}, text="A cat, a dog")
    for name in ("L0H0", "L0H1", "all a"):
        control(widget, name).value = True
    assert sent == ["script"]  # once, for the first figure of all
    (shown,) = widget.place.outputs
    assert sum(map(len, map(str, shown["data"].values()))) < 100_000


def test_what_was_typed_is_shown_as_text(random_gpt2):
    widget = controls.your_text(random_gpt2, {"a": [Head(0, 0)]})
    control(widget, "Text").value = "a <b> & <a href='x'>y</a>"
    labels = "".join(figure_of(widget).layout.xaxis.ticktext[1:])
    assert "<" not in labels and "&lt;" in labels and "&amp;" in labels
    before = figure_of(widget)
    control(widget, "Text").value = "x"
    assert "want 2 to 40 tokens" in widget.message.value and figure_of(widget) == before
    control(widget, "Text").value = "a b c"
    assert widget.message.value == "" and figure_of(widget) != before


def test_a_knock_out_moves_the_sentence(random_gpt2, usual):
    found = {"name_mover": [Head(1, 0), Head(2, 2)], "induction": [Head(0, 1)]}
    widget = controls.your_sentence(random_gpt2, found, usual)
    first = figure_of(widget)
    assert list(first.data[0].y) == ["L1H0", "L2H2"]  # those at END
    for name in ("L1H0", "all induction", "all name mover"):
        before = figure_of(widget)
        control(widget, name).value = True
        assert figure_of(widget).layout.title.text != before.layout.title.text
    assert list(figure_of(widget).data[0].y) == ["L1H0 out", "L2H2 out"]
    control(widget, "IO, named once").value = "<i>No</i>"
    assert "&lt;i&gt;" in widget.message.value and "<i>" not in widget.message.value


def test_the_slider_moves_maps_and_marks_together(film):
    run, figure = film
    widget = controls.by_steps(figure, "training step")
    slider = control(widget, "training step")
    assert slider.label == "10" and len(figure.layout.sliders) == 1
    slider.label = "20"
    shown = figure_of(widget)
    assert not shown.layout.sliders and not shown.frames
    maps = np.stack([numbers(t.z) for t in shown.data if t.type == "heatmap"]) / 100
    assert abs(maps - run.patterns[-1].flatten(0, 1).numpy()).max() < 0.0051
    marks = [t for t in shown.data if t.type == "scatter" and t.mode == "markers"]
    assert [set(t.x) for t in marks] == [{20}, {20}]
    last = [run.first_loss[-1], run.second_loss[-1], *run.prefix_matching[-1].flatten()]
    assert np.concatenate([numbers(t.y) for t in marks]) == pytest.approx(
        [x.item() for x in last], abs=1e-3
    )


def test_the_threshold_moves_the_circuit():
    contributions = {Node(Head(i, i % 3), "END"): 1 / (1 + i) for i in range(6)}
    kept = {n: {"all": Estimate(n / 6, 0.01, 9)} for n in (2, 4, 6)}
    named = set(list(contributions)[:3])
    figure = sliders.circuits_by_threshold(contributions, kept, named)
    widget = controls.by_steps(figure, "threshold")
    for label, with_role, without in (("50.0% (2 nodes)", 2, 0), ("16.7% (6 nodes)", 3, 3)):
        control(widget, "threshold").label = label
        role, none, _, now = figure_of(widget).data
        assert (len(role.x), len(none.x)) == (with_role, without)
        assert now.y[0] == pytest.approx((with_role + without) / 6, abs=1e-3)
    with pytest.raises(ValueError, match=r"want sizes of 1\.\.6 nodes, got .*7"):
        sliders.circuits_by_threshold(contributions, kept | {7: kept[6]}, named)


def test_a_slider_opens_at_one_of_its_frames():
    with pytest.raises(ValueError, match=r"start must lie in 0\.\.0, got 1"):
        sliders.with_slider(go.Figure(), [("a", {})], "x", 1)


# Without a kernel


def test_a_widget_brings_its_figure(film):
    bundle = controls.by_steps(film[1], "training step")._repr_mimebundle_()
    assert set(bundle) == {WIDGET, PLOTLY, "text/plain"}
    assert len(bundle[PLOTLY]["frames"]) == 3 and bundle[PLOTLY]["layout"]["sliders"]


def test_a_run_keeps_the_figure_of_a_widget_and_nothing_of_one_without(tmp_path):
    def cell(*kinds):
        bundle = dict.fromkeys(["text/plain", *kinds], "{}")
        return new_code_cell(f"display({bundle}, raw=True)")

    notebook = new_notebook(cells=[cell(WIDGET, "text/html"), cell(WIDGET), cell()])
    execute(notebook, tmp_path, {}, "widgets")
    outputs = [[set(output.data) for output in c.outputs] for c in notebook.cells]
    assert outputs == [[{"text/plain", "text/html"}], [], [{"text/plain"}]]
