"""How long sweeps take, beside TransformerLens's own loops and a plain Hugging Face loop.

    python -m tools.benchmark [--quick]

Every row runs the same patches by all three ways in turn, checks that they agree (where they do
not, it fails at the end), and reports ratios of times. `--quick` runs a few patches of each row, in
the middle layers, and extrapolates; what a sweep costs before its first patch is added once. Writes
build/benchmark.json and build/benchmark.html.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tools.benchmark_scaling import scaling, write_plots
from tools.benchmark_work import Patch, Sweep, Work, gpt2_works, smollm2_works

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
    rows = []
    for works in (smollm2_works, gpt2_works):
        model, found = works(quick)
        for work in found:
            rows.append(time_row(model, work))
            print(_line(rows[-1]), flush=True)
        del model, found
    fits = scaling(quick)
    report = {"machine": machine(), "quick": quick, "rows": [asdict(r) for r in rows]}
    report["scaling"] = fits
    (BUILD / "benchmark.json").write_text(json.dumps(report, indent=1))
    write_plots(report, BUILD / "benchmark.html")
    print("\n" + table(rows, fits))
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


def timed(sweep: Sweep, patches: Sequence[Patch]) -> tuple[float, Tensor]:
    """Seconds, and the values."""
    synchronize()
    begin = time.perf_counter()
    values = sweep(patches)
    synchronize()
    return time.perf_counter() - begin, values


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate(model: TransformerBridge) -> float:
    """Multiply-adds a second in a product of the shape that an MLP of the model has."""
    device, cfg = next(model.parameters()).device, model.cfg
    rows, repeats = 1024, 1000 if device.type == "cuda" else 10
    x = torch.randn(rows, cfg.d_model, device=device)
    weight = torch.randn(cfg.d_mlp, cfg.d_model, device=device)
    torch.nn.functional.linear(x, weight)
    seconds = timed(lambda _: [torch.nn.functional.linear(x, weight) for _ in range(repeats)], [])
    return repeats * rows * cfg.d_model * cfg.d_mlp / seconds[0]


class PeakMemory:
    """Most memory held within it beyond what was held before, in sizes of the model, plus 1."""

    def __init__(self, model: TransformerBridge):
        self.model_bytes = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
        self.share = 1.0

    def __enter__(self) -> "PeakMemory":
        self.stop = threading.Event()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.before = self.most = self._held()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        self.thread.join()
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self.most
        self.share = 1 + (peak - self.before) / self.model_bytes

    def _watch(self) -> None:
        while not self.stop.wait(0.005):
            self.most = max(self.most, self._held())

    def _held(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.memory_allocated()
        statm = Path("/proc/self/statm")  # other systems: not measured
        return (
            int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
        )


def machine() -> dict[str, object]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "transformer_lens": version("transformer-lens"),
        "fp32_precision": torch.backends.mkldnn.matmul.fp32_precision,
    }


def table(rows: Sequence[Row], fits: dict) -> str:
    """The rows as text, then the fitted exponents."""
    head = f"{'work':<42}{'ours':>8}{'TL':>8}{'HF':>8}{'ratio':>8}{'target':>8}"
    lines = [head + f"{'limit':>8}{'memory':>8}{'max diff':>10}"]
    lines += [_line(row) for row in rows]
    lines.append(
        "ours, TL, HF: seconds for all patches; ratio: ours / TL; limit: ours / time of its"
    )
    lines.append("multiply-adds; memory: peak in sizes of the model. Fitted exponents (ours, TL):")
    lines += [
        f"  cost ~ {axis} ** {fit['ours']['exponent']:.2f}, "
        f"{axis} ** {fit['transformer_lens']['exponent']:.2f}"
        for axis, fit in fits.items()
    ]
    return "\n".join(lines)


def _line(row: Row) -> str:
    hf = "-" if row.hugging_face_s is None else f"{row.hugging_face_s:.1f}"
    return (
        f"{row.work:<42}{row.ours_s:>8.1f}{row.transformer_lens_s:>8.1f}{hf:>8}{row.ratio:>8.3f}"
        f"{row.target:>8.2f}{row.limit_ratio:>8.2f}{row.peak_memory:>8.2f}{row.max_abs_diff:>10.1e}"
    )


if __name__ == "__main__":
    main()
