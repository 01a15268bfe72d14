"""How long sweeps take, beside TransformerLens's own loops and a plain Hugging Face loop.

    python -m tools.benchmark [--quick]

Every row runs the same patches by all three ways in turn, checks that they agree (where they do
not, it fails at the end), and reports ratios of times. `--quick` runs a few patches of each row, in
the middle layers, and extrapolates; what a sweep costs before its first patch is added once. Writes
build/benchmark.json and build/benchmark.html.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from tools.benchmark_scaling import scaling, write_plots
from tools.benchmark_timing import PeakMemory, machine, matmul_rate, timed
from tools.benchmark_widgets import clicks_to_figures
from tools.benchmark_work import Work, gpt2_works, smollm2_works

BUILD = Path("build")
AGREE = 1e-3  # the ways may differ by less, in logits or nats


@dataclass
class Row:
    """What is reported: seconds for all patches, and the share of TransformerLens's time."""

    work: str
    patches: int
    timed: int  # by our sweep
    timed_references: int
    ours_s: float
    transformer_lens_s: float
    hugging_face_s: float | None
    ratio: float
    target: float
    max_abs_diff: float
    limit_ratio: float  # our time over that of its multiply-adds at the rate of this machine
    peak_memory: float  # of our sweep, in sizes of the model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few patches of each row")
    quick = parser.parse_args().quick
    torch.set_grad_enabled(False)
    BUILD.mkdir(exist_ok=True)
    rows, clicks = [], {}
    for works in (smollm2_works, gpt2_works):
        model, found = works(quick)
        for work in found:
            print(f"{work.name} ...", end=" ", flush=True)
            rows.append(time_row(model, work))
            print(f"{rows[-1].ratio:.3f} of TransformerLens's time", flush=True)
        clicks = clicks or clicks_to_figures(model)
        del model, found
    report = {"machine": machine(), "quick": quick, "rows": [asdict(row) for row in rows]}
    report["clicks_ms"] = clicks
    report["scaling"] = scaling(quick)
    (BUILD / "benchmark.json").write_text(json.dumps(report, indent=1))
    write_plots(report, BUILD / "benchmark.html")
    print("\n" + table(rows, report["scaling"]))
    shown = ", ".join(f"{name} {ms:.0f} ms" for name, ms in clicks.items())
    print(f"from a click to the figure of a widget (median): {shown}")
    if differ := [row.work for row in rows if not row.max_abs_diff < AGREE]:
        sys.exit(f"The ways differ by {AGREE} or more in: {', '.join(differ)}.")


def time_row(model: TransformerBridge, work: Work) -> Row:
    """Time each way in turn, chunk by chunk; the values of patches timed by all are compared."""
    top = max(work.patches)
    setup = min(timed(work.ours, [top])[0] for _ in range(2))  # also warms up
    ways = [work.ours, work.transformer_lens, work.hugging_face]
    seconds, difference, peak, rates = [0.0, 0.0, 0.0], 0.0, 1.0, []
    for patches, some in work.chunks:
        rates.append(matmul_rate(model))
        with PeakMemory(model) as memory:
            took, values = timed(work.ours, patches)
        peak = max(peak, memory.share)
        seconds[0] += max(took - setup, 0.0)
        values = values[[patches.index(patch) for patch in some]]
        for way in (1, 2):
            if ways[way] is not None:
                took, reference = timed(ways[way], some)
                seconds[way] += took
                difference = max(difference, float((values - reference).abs().max()))
        rates.append(matmul_rate(model))
    n_ours, n_some = (sum(map(len, column)) for column in zip(*work.chunks, strict=True))
    ours = setup + seconds[0] * len(work.patches) / n_ours
    lens, hf = (s * len(work.patches) / n_some for s in seconds[1:])
    return Row(
        work=work.name,
        patches=len(work.patches),
        timed=n_ours,
        timed_references=n_some,
        ours_s=ours,
        transformer_lens_s=lens,
        hugging_face_s=hf or None,
        ratio=ours / lens,
        target=work.target,
        max_abs_diff=difference,
        limit_ratio=ours * statistics.median(rates) / sum(map(work.macs, work.patches)),
        peak_memory=peak,
    )


def table(rows: Sequence[Row], fits: dict) -> str:
    """The rows as text, then the fitted exponents."""
    hidden = ["patches", "timed", "timed_references"]
    names = ["work", "ours", "TL", "HF", "ratio", "target", "max diff", "limit", "memory"]
    frame = pd.DataFrame(rows).drop(columns=hidden).set_axis(names, axis=1)
    diff = {"max diff": "{:.1e}".format}
    exponents = [
        f"  cost ~ {axis} ** {fit['ours']['exponent']:.2f}, "
        f"{axis} ** {fit['transformer_lens']['exponent']:.2f}"
        for axis, fit in fits.items()
    ]
    return "\n".join(
        [
            frame.to_string(index=False, float_format="{:.3f}".format, formatters=diff, na_rep="-"),
            "ours, TL, HF: seconds for all patches; ratio: ours / TL; limit: ours / time of its",
            "multiply-adds; memory: peak in sizes of the model. Fitted exponents (ours, TL):",
            *exponents,
        ]
    )


if __name__ == "__main__":
    main()
