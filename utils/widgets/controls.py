"""Widgets: controls over a figure, which a click or a key redraws at once.

    controls.by_steps(sliders.toy_training(run, at=135), "training step")
    controls.your_text(model, {"induction": [...], "previous token": [...]})
    controls.your_sentence(model, found_circuit, own_text.means_by_place(recorded, positions))

Where no kernel runs, the figure's first state stands in the widget's place. Whatever was typed is
shown as text, never as HTML.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from html import escape

import plotly.graph_objects as go
import plotly.io as pio
from ipywidgets import (
    HTML,
    Accordion,
    Box,
    HBox,
    IntSlider,
    Label,
    Layout,
    Output,
    SelectionSlider,
    Text,
    ToggleButton,
    VBox,
)
from transformer_lens.model_bridge import TransformerBridge

from utils.circuit import ROLE_POSITIONS, Circuit, Node, nodes
from utils.edits import Run, heads_from
from utils.heads import Head, check_heads
from utils.ioi import single_token_names
from utils.look import role_in_words
from utils.typed import checked
from utils.widgets.own_figures import end_figure, text_figure
from utils.widgets.own_text import (
    EndRun,
    TextRun,
    own_prompt,
    run_at_end,
    run_text,
    text_tokens,
    token_words,
)
from utils.widgets.sliders import show_frame

TEXT = "Professor Vandermeer lost her key. A porter found it, and Professor Vandermeer smiled."
SENTENCE = "When {0} and {1} went to the store, {1} gave a drink to"
Switched = frozenset[tuple[str, Head]]  # group and head


class Live(VBox):
    """Controls over a figure, which `draw()` makes anew whenever the value of one changes.

    A ValueError of `draw` is shown as a sentence, and the figure stays. Where there is no kernel
    `still` is shown, or else the figure's first state.
    """

    def __init__(
        self, controls: Sequence, draw: Callable[[], go.Figure], still: go.Figure | None = None
    ):
        self.draw, figure = draw, draw()
        first = _shown(figure)
        self.still = _shown(still) if still else first
        self.message = HTML(layout=Layout(min_height="1.6em"))
        room = Layout(min_height=f"{figure.layout.height}px")  # so that the page does not jump
        self.place = Output(layout=room)
        super().__init__([*controls, self.message, self.place])
        for control in inputs(controls):
            control.observe(self.redraw, "value")
        self._show(first)

    def redraw(self, _change: object = None) -> None:
        try:
            self._show(_shown(self.draw()))
        except ValueError as error:
            self.message.value = f'<b role="alert">{escape(str(error))}</b>'

    def _show(self, bundle: dict) -> None:
        self.place.outputs = ({"output_type": "display_data", "metadata": {}, "data": bundle},)
        self.message.value = ""

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The widget's view, and beside it what to show where there are no widgets."""
        return super()._repr_mimebundle_(**kwargs) | self.still | {"text/plain": "Widget"}


def _shown(figure: go.Figure) -> dict:
    """A figure as the chosen renderers show it.

    Its own method would send all of plotly's script again, five megabytes for every click.
    """
    return pio.renderers._build_mime_bundle(figure.to_dict())


@checked
def by_steps(figure: go.Figure, name: str) -> Live:
    """A figure of `utils.widgets.sliders` under a slider that the arrow keys move too.

    Raises ValueError for a figure without a slider of its own.
    """
    if len(figure.layout.sliders) != 1:
        raise ValueError("figure must have one slider of its own (`utils.widgets.sliders`)")
    (own,) = figure.layout.sliders
    options = [(step.label, i) for i, step in enumerate(own.steps)]
    wide = dict(layout=Layout(width="95%"), style=dict(description_width="initial"))
    slider = SelectionSlider(options=options, value=own.active, description=name, **wide)
    shown = go.Figure(figure.data, figure.layout)
    shown.layout.sliders = ()  # one is enough

    def draw() -> go.Figure:
        show_frame(shown, figure.frames[slider.value])
        return shown

    return Live([slider], draw, figure)


@checked
def your_text(
    model: TransformerBridge,
    groups: Mapping[str, Sequence[tuple[int, int]]],
    source: Run | float = 0.0,
    text: str = TEXT,
) -> Live:
    """A text of your own: the loss of every token and where heads look, with some switched off.

    `groups`: name to heads, each with a switch. What a head that is off says instead comes from
    `source`: 0, or a mean run over positions. Raises ValueError for groups without a head, heads
    that the model lacks, and as `run_text`.
    """
    groups = {name: check_heads(model, heads, name="groups") for name, heads in groups.items()}
    if not groups:
        raise ValueError("groups is empty, give at least one")
    heads = list(dict.fromkeys(head for group in groups.values() for head in group))
    heads_from(model, heads, source)  # raises for a source that does not fit
    box = Text(value=text, description="Text", **_LINE)
    position = IntSlider(value=0, min=0, max=1, description="Look from token", **_LINE)
    switches, off = _switches(groups)

    @lru_cache(maxsize=100)
    def run(typed: str, out: frozenset[Head]) -> TextRun:
        return run_text(model, text_tokens(model, typed), heads, sorted(out), source)

    def draw() -> go.Figure:
        out = frozenset(head for _, head in off())
        words = token_words(model, text_tokens(model, box.value))
        position.max = len(words) - 1
        before, after = run(box.value, frozenset()), run(box.value, out)
        return text_figure(words, heads, before, after, out, position.value)

    words = token_words(model, text_tokens(model, text))
    again = [i for i, word in enumerate(words) if word in words[:i]]
    position.max = len(words) - 1
    position.value = again[0] if again else position.max
    return Live([box, position, switches], draw)


@checked
def your_sentence(model: TransformerBridge, found: Circuit, means: Mapping[str, Run]) -> Live:
    """A sentence of your own about two people: which name wins, and what the circuit does at END.

    Roles and heads can be knocked out; what they say instead is in `means`, by place
    (`own_text.means_by_place`). Raises ValueError as `circuit.nodes`, and for an empty circuit.
    """
    if not nodes(found):
        raise ValueError("found is empty, give at least one head")
    members = [(role, Head(*head)) for role, heads in found.items() for head in heads]
    at_end = [member for member in members if ROLE_POSITIONS[member[0]] == "END"] or members
    heads = list(dict.fromkeys(head for _, head in at_end))
    known = single_token_names(model)
    names = [*dict.fromkeys(n for n in ("Mary", "John", *known) if n in known)][:2]
    box = Text(value=SENTENCE.format(*names), description="Sentence", **_LINE)
    io = Text(value=names[0], description="IO, named once", **_LINE)
    s = Text(value=names[1], description="S, named twice", **_LINE)
    switches, off = _switches(found)

    @lru_cache(maxsize=100)
    def run(typed: tuple[str, str, str], out: Switched) -> EndRun:
        gone = {Node(head, ROLE_POSITIONS[role]) for role, head in out}
        return run_at_end(model, own_prompt(model, *typed), heads, gone, means)

    def draw() -> go.Figure:
        typed = (box.value, io.value, s.value)
        words = token_words(model, own_prompt(model, *typed).tokens)
        before, after = run(typed, frozenset()), run(typed, off())
        likeliest = model.tokenizer.decode([after.likeliest])
        out = {head for _, head in off()}
        return end_figure(words, typed[1:], heads, before, after, out, likeliest)

    return Live([box, HBox([io, s], layout=_WRAP), switches], draw)


_WRAP = Layout(flex_flow="row wrap")
_LINE = dict(
    continuous_update=False,  # when Enter is pressed, or the slider let go
    layout=Layout(width="95%", max_width="60em"),
    style=dict(description_width="9em"),
)


def _switches(groups: Mapping[str, Sequence[Head]]) -> tuple[VBox, Callable[[], Switched]]:
    """A switch for each group and, folded, one for each of its heads; what is off now."""
    buttons: dict[tuple[str, Head | None], ToggleButton] = {}
    rows = []
    for group, heads in groups.items():
        words = role_in_words(group)
        for head in (None, *heads):
            text, width = (f"all {words}", "15em") if head is None else (str(head), "5em")
            tip = f"switch off {text}" + ("" if head is None else f", {words}")
            layout = Layout(width=width)
            buttons[group, head] = ToggleButton(description=text, tooltip=tip, layout=layout)
        row = [button for (name, head), button in buttons.items() if head and name == group]
        rows.append(HBox([Label(words, layout=Layout(width="9em")), *row], layout=_WRAP))
    whole_groups = [button for (_, head), button in buttons.items() if head is None]
    each = Accordion([VBox(rows)], titles=["head by head"], selected_index=None)

    def off() -> Switched:
        pressed = [key for key, button in buttons.items() if button.value]
        whole = {group for group, head in pressed if head is None}
        return frozenset(
            (group, head)
            for group, head in buttons
            if head and (group in whole or (group, head) in pressed)
        )

    return VBox([HBox(whole_groups, layout=_WRAP), each]), off


def inputs(controls: Sequence) -> list:
    """The controls that have a value, wherever in the boxes."""
    parts = [inputs(c.children) if isinstance(c, Box) else [c] for c in controls]
    return [control for part in parts for control in part]
