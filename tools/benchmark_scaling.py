"""How the time of a sweep grows with layers, positions, prompts and patches; and the plots."""

from pathlib import Path

import numpy as np
import pandas as pd
import plotly.express as px
import torch
from nbformat.v4 import new_code_cell, new_notebook, new_output
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, LlamaConfig

from tools.benchmark_references import transformer_lens_loop
from tools.benchmark_timing import timed
from tools.benchmark_work import LogitDiff, our_sweep
from tools.pages import to_html
from utils.models import load_hf

BASE = {"layers": 8, "positions": 32, "prompts": 8, "patches": 16}
FACTORS = (0.5, 1, 2, 4)
N_TOKENS, N_HEADS = 1000, 4
WAYS = ("ours", "transformer_lens")


def scaling(quick: bool) -> dict[str, dict]:
    """Seconds of a head sweep as one size at a time changes, with log-log fits."""
    result = {}
    repeats, factors = (1, FACTORS[:3]) if quick else (3, FACTORS)
    tokenizer = load_hf("smollm2-135m")[0].tokenizer
    for axis in BASE:
        sizes = [int(BASE[axis] * factor) for factor in factors]
        found = [_seconds(BASE | {axis: size}, repeats, tokenizer) for size in sizes]
        result[axis] = {"sizes": sizes}
        for way, seconds in zip(WAYS, zip(*found, strict=True), strict=True):
            result[axis][way] = {"seconds": seconds, "exponent": exponent(sizes, seconds)}
    return result


def exponent(sizes: list[int], seconds: tuple[float, ...]) -> float:
    """Slope of a line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def _seconds(size: dict[str, int], repeats: int, tokenizer) -> tuple[float, float]:
    """Ours and TransformerLens's loop, the best of some turns."""
    model = _random_llama(size["layers"], tokenizer)
    generator = torch.Generator().manual_seed(0)
    shape = (2, size["prompts"], size["positions"])
    clean, corrupted = torch.randint(1, N_TOKENS, shape, generator=generator)
    metric = LogitDiff(torch.tensor([[1, 2]]).repeat(size["prompts"], 1))
    heads = [(i * size["layers"] // size["patches"], i % N_HEADS) for i in range(size["patches"])]
    case = (model, clean, corrupted, metric, "z")
    ways = [our_sweep(*case), transformer_lens_loop(*case)]
    ways[0](heads[:1])  # checks the model
    turns = [[timed(way, heads)[0] for way in ways] for _ in range(repeats)]
    return tuple(np.min(turns, axis=0).tolist())


def _random_llama(n_layers: int, tokenizer) -> TransformerBridge:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=n_layers,
        num_attention_heads=N_HEADS,
        hidden_size=256,
        intermediate_size=1024,
        vocab_size=N_TOKENS,
    )
    hf = AutoModelForCausalLM.from_config(config).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = TransformerBridge.boot_transformers(
        "random", hf_model=hf.to(device), tokenizer=tokenizer, device=device, dtype=torch.float32
    )
    model.enable_compatibility_mode()
    return model


def write_plots(report: dict, path: Path) -> None:
    """Ratios beside their targets, and time against size with logarithmic axes, as a page."""
    title = "share of TransformerLens's time"
    figures = [
        px.bar(report["rows"], x="work", y=["ratio", "target"], barmode="group", title=title)
    ]
    for axis, fit in report["scaling"].items():
        lines = {f"{way}, exponent {fit[way]['exponent']:.2f}": fit[way]["seconds"] for way in WAYS}
        frame = pd.DataFrame(lines, index=pd.Index(fit["sizes"], name=axis))
        labels = {"value": "seconds"}
        figures.append(px.line(frame, log_x=True, log_y=True, markers=True, labels=labels))
    look = dict(full_html=False, config={"responsive": True})
    shown = [f.to_html(include_plotlyjs=i == 0, **look) for i, f in enumerate(figures)]
    outputs = [new_output("display_data", {"text/html": html}) for html in shown]
    cell = new_code_cell("# make benchmark", outputs=outputs)
    path.write_text(to_html(new_notebook(cells=[cell]), "The benchmark"))
