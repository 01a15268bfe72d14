"""How long a widget takes from a click to its figure, without what the browser adds."""

import statistics
import time
from collections.abc import Iterable

import plotly.io as pio
from ipywidgets import ToggleButton
from transformer_lens.model_bridge import TransformerBridge

from utils import ioi
from utils.circuit import Node
from utils.edits import record
from utils.heads import Head
from utils.metrics import Estimate
from utils.toy import train_toy
from utils.widgets import controls, own_text, sliders

CLICKS = 20


def clicks_to_figures(model: TransformerBridge) -> dict[str, float]:
    """Median milliseconds of 20 clicks on each widget, each to a state not seen before.

    Switches run the model once, on the text (some 20 tokens) and the sentence that they open with.
    """
    pio.renderers.default = "plotly_mimetype"
    heads = [Head(layer, layer % model.cfg.n_heads) for layer in range(model.cfg.n_layers)]
    half = heads[:: max(1, 2 * len(heads) // CLICKS)]  # of all depths
    abc = ioi.ioi_prompts(model, n_prompts=4)
    usual = record(model, abc.corrupted["abc"], ["z"]).activations
    at = own_text.means_by_place(usual, abc.positions)
    nodes: dict[Node, float] = {Node(head, "END"): 1 / (1 + i) for i, head in enumerate(heads)}
    kept = {n: {"all": Estimate(0.5, 0.1, 64)} for n in range(1, 1 + len(nodes))}
    return {
        "training": _drag(sliders.toy_training(train_toy(2, n_steps=20), at=0)),
        "text": _press(controls.your_text(model, {"induction": half})),
        "sentence": _press(controls.your_sentence(model, {"name_mover": half}, at)),
        "threshold": _drag(sliders.circuits_by_threshold(nodes, kept, set(list(nodes)[::2]))),
    }


def _press(widget: controls.Live) -> float:
    """All switches on, one after another, then off again in the same order."""
    each = [c for c in controls.inputs(widget.children[:-2]) if isinstance(c, ToggleButton)][1:]
    return _median((button, on) for on in (True, False) for button in each)


def _drag(figure) -> float:
    widget = controls.by_steps(figure, "step")
    (slider,) = controls.inputs(widget.children[:-2])
    first, n = slider.value, len(slider.options)
    return _median((slider, (first + 1 + i) % n) for i in range(CLICKS))


def _median(changes: Iterable[tuple]) -> float:
    took = []
    for control, value in changes:
        began = time.perf_counter()
        control.value = value
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)
