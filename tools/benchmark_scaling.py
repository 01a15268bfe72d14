"""How the time of a sweep grows with layers, positions, prompts and patches; and the plots."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, LlamaConfig

from tools.benchmark_references import transformer_lens_loop
from utils.models import load_hf
from utils.patching import LogitDiff, patch_heads

BASE = {"layers": 8, "positions": 32, "prompts": 8, "patches": 16}
FACTORS = (0.5, 1, 2, 4)
N_TOKENS, N_HEADS = 1000, 4


def scaling(quick: bool) -> dict[str, dict]:
    """Seconds of a head sweep as one size at a time changes, with log-log fits."""
    result = {}
    repeats, factors = (1, FACTORS[:3]) if quick else (3, FACTORS)
    tokenizer = load_hf("smollm2-135m")[0].tokenizer
    for axis in BASE:
        sizes = [int(BASE[axis] * factor) for factor in factors]
        found = [_seconds(BASE | {axis: size}, repeats, tokenizer) for size in sizes]
        ours, lens = zip(*found, strict=True)
        result[axis] = {
            "sizes": sizes,
            "ours": {"seconds": ours, "exponent": exponent(sizes, ours)},
            "transformer_lens": {"seconds": lens, "exponent": exponent(sizes, lens)},
        }
    return result


def exponent(sizes: list[int], seconds: tuple[float, ...]) -> float:
    """Slope of a line through the logarithms."""
    return float(np.polyfit([math.log(s) for s in sizes], [math.log(s) for s in seconds], 1)[0])


def _seconds(size: dict[str, int], repeats: int, tokenizer) -> tuple[float, float]:
    """Ours and TransformerLens's loop, the best of some turns."""
    model = _random_llama(size["layers"], tokenizer)
    generator = torch.Generator().manual_seed(0)
    shape = (2, size["prompts"], size["positions"])
    clean, corrupted = torch.randint(1, N_TOKENS, shape, generator=generator)
    metric = LogitDiff(torch.tensor([[1, 2]]).repeat(size["prompts"], 1))
    heads = [(i * size["layers"] // size["patches"], i % N_HEADS) for i in range(size["patches"])]
    loop = transformer_lens_loop(model, clean, corrupted, metric, "z")
    patch_heads(model, clean, corrupted, metric, "z", heads[:1])  # checks the model
    ways = [lambda: patch_heads(model, clean, corrupted, metric, "z", heads), lambda: loop(heads)]
    turns = [[_timed(way) for way in ways] for _ in range(repeats)]
    ours, lens = (min(column) for column in zip(*turns, strict=True))
    return ours, lens


def _timed(run: Callable) -> float:
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


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
    """Ratios beside their targets, and time against size with logarithmic axes."""
    rows, fits = report["rows"], report["scaling"]
    titles = ["share of TransformerLens's time", *(f"seconds, {axis}" for axis in fits)]
    figure = make_subplots(rows=1 + len(fits), cols=1, subplot_titles=titles)
    works = [row["work"] for row in rows]
    figure.add_bar(x=works, y=[row["ratio"] for row in rows], name="ours", row=1, col=1)
    targets = [row["target"] for row in rows]
    marker = {"symbol": "line-ew-open", "size": 24}
    points = go.Scatter(x=works, y=targets, mode="markers", marker=marker, name="target")
    figure.add_trace(points, row=1, col=1)
    for place, (axis, fit) in enumerate(fits.items(), start=2):
        for way in ("ours", "transformer_lens"):
            name = f"{axis}: {way}, exponent {fit[way]['exponent']:.2f}"
            line = go.Scatter(x=fit["sizes"], y=fit[way]["seconds"], name=name)
            figure.add_trace(line, row=place, col=1)
        figure.update_xaxes(type="log", title=axis, row=place, col=1)
        figure.update_yaxes(type="log", row=place, col=1)
    figure.update_layout(height=400 * (1 + len(fits)), template="plotly_white")
    figure.write_html(path)
