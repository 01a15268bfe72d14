"""Seconds, memory and the machine: what the benchmark measures with."""

import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import psutil
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

Patch = tuple[int, int]  # layer, and head or position
Sweep = Callable[[Sequence[Patch]], Tensor]  # one value per patch


def timed(sweep: Sweep, patches: Sequence[Patch]) -> tuple[float, Tensor]:
    """Seconds, and the values."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    begin = time.perf_counter()
    values = sweep(patches)
    wait()
    return time.perf_counter() - begin, values


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
        self.before = self.most = _held()
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
            self.most = max(self.most, _held())


def _held() -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def machine() -> dict[str, object]:
    """What the times depend on."""
    return {
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformer_lens": version("transformer-lens"),
        "fp32_precision": torch.backends.mkldnn.matmul.fp32_precision,
    }
