"""How the time of a sweep grows with layers, positions, prompts and patches; and the plots."""

from pathlib import Path

import numpy as np
import pandas as pd
import plotly.express as px
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, LlamaConfig

from tools.benchmark_references import transformer_lens_loop
from tools.benchmark_timing import timed
from tools.benchmark_work import LogitDiff, our_sweep
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
    """Ratios beside their targets, and time against size with logarithmic axes."""
    title = "share of TransformerLens's time"
    ratios = px.bar(report["rows"], x="work", y=["ratio", "target"], barmode="group", title=title)
    page = ratios.to_html()
    for axis, fit in report["scaling"].items():
        lines = {f"{way}, exponent {fit[way]['exponent']:.2f}": fit[way]["seconds"] for way in WAYS}
        frame = pd.DataFrame(lines, index=pd.Index(fit["sizes"], name=axis))
        growth = px.line(frame, log_x=True, log_y=True, markers=True, labels={"value": "seconds"})
        page += growth.to_html(full_html=False, include_plotlyjs=False)
    path.write_text(page)
