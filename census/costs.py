"""What a census would cost, before it runs: `--dry-run`, and the paper estimates of the docs.

Arithmetic, not measurement: floating-point operations over a rate, plus what starting costs. A
machine whose cores are shared, or a slow disk, takes longer.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from census.grid import SNAPSHOTS, Model, Task, Toy
from utils.toy import HELD_OUT, VOCAB

CPU_RATE, GPU_RATE = 4e10, 2e13  # operations a second: a core on toys, a data-centre GPU in float32
STEP = 0.003  # seconds a layer and step that do not depend on how much is computed
READ = 3e8  # bytes a second from file to folded weights in memory
START = 20  # seconds until a model begins to load: imports, the process of the download
TOKENS = 16_000  # tokens that `measure` runs through a model, all its passes together
REQUESTS = 16  # to the hub for a revision: its list of files, then two for each file
BASE = 0.7e9  # bytes of a process that has imported everything
SIZE = re.compile(r"[-_](\d+(?:\.\d+)?)([mb])(?:\b|[-_@])", re.IGNORECASE)


class Cost(NamedTuple):
    """Of one task; None where the number of parameters is not known before it is loaded."""

    seconds: float | None
    memory: float | None  # bytes
    download: float = 0  # bytes
    requests: int = 0


def cost(task: Task) -> Cost:
    """The estimate for one task."""
    return _of_toy(task.setting) if isinstance(task.setting, Toy) else _of_model(task)


def lines(tasks: Sequence[Task], n_at_once: int) -> list[str]:
    """The tasks with their estimates, and the sum for so many at once."""
    found = [(task, cost(task)) for task in tasks]
    shown = [f"{task.key}: {_text(c.seconds, 1, 's')}, {_text(c.memory, 1e9, 'GB', 1)}"
             for task, c in found]  # fmt: skip
    known = [c for _, c in found if c.seconds is not None]
    minutes = sum(c.seconds for c in known) / 60 / n_at_once
    most = max((c.memory for c in known), default=0) / 1e9
    total = f"{len(tasks)} tasks, {n_at_once} at once: about {minutes:.0f} minutes"
    total += f", {n_at_once * most:.1f} GB of memory at most"
    if fetched := sum(c.download for c in known):
        requests = sum(c.requests for c in known)
        total += f", {fetched / 1e9:.0f} GB to download in {requests} requests"
    unknown = len(found) - len(known)
    return [*shown, total + (f" (without {unknown} of unknown size)" if unknown else "")]


def n_parameters(name: str) -> float | None:
    """As a model's name says, such as "owner/pythia-1.4b@step0"; None where it does not."""
    found = SIZE.search(f"{name.partition('@')[0]}-")
    return float(found[1]) * {"m": 1e6, "b": 1e9}[found[2].lower()] if found else None


def _of_toy(toy: Toy) -> Cost:
    inner = toy.n_heads * 32
    per_layer = 8 * toy.d_model * inner + 4 * toy.context * inner
    forward = toy.n_layers * per_layer + 2 * VOCAB * toy.d_model  # operations a token
    training = 3 * forward * toy.n_steps * toy.batch * toy.context
    measured = 3 * forward * SNAPSHOTS * HELD_OUT * (1 + 2 * toy.longest)
    seconds = (training + measured) / CPU_RATE + STEP * toy.n_layers * (toy.n_steps + SNAPSHOTS)
    held = 40 * toy.n_layers * toy.batch * toy.context * (inner + toy.d_model)
    return Cost(seconds, BASE + held)


def _of_model(task: Task) -> Cost:
    assert isinstance(task.setting, Model)
    n = n_parameters(task.setting.name)
    if n is None:
        return Cost(None, None)
    seconds = START + 4 * n / READ + 2 * n * TOKENS / (GPU_RATE if task.gpus else CPU_RATE)
    on_hub = "/" in task.setting.name
    return Cost(seconds, BASE + 10 * n, 2 * n if on_hub else 0, REQUESTS if on_hub else 0)


def _text(value: float | None, unit: float, name: str, digits: int = 0) -> str:
    return f"? {name}" if value is None else f"{value / unit:.{digits}f} {name}"
