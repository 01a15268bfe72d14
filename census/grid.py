"""What a census measures: a list of tasks, each one training of a toy or one model at a revision.

`toys()` varies one factor at a time about a centre, and batch size by context length as a whole
plane; `models(names)` takes hub ids (`owner/name@revision`), local folders and "smollm2-135m".
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

SEEDS = 4
SNAPSHOTS = 50  # measurements over a training, equally far apart
LONGEST = (16, 23, 33, 47)
STEPS = {8: 1500, 16: 1000, 32: 700, 64: 500, 128: 350}  # by batch: until heads form, and on
PYTHIA = [f"EleutherAI/pythia-{size}" for size in "14m 31m 70m 160m 410m 1b 1.4b 2.8b".split()]
PYTHIA += ["EleutherAI/pythia-6.9b", "EleutherAI/pythia-12b"]
# Pythia keeps the powers of two up to 512 steps, then every thousandth: 154 revisions.
PYTHIA_STEPS = [0, *(2**i for i in range(10)), *range(1000, 143_001, 1000)]


class Toy(NamedTuple):
    """One training: an attention-only toy of `utils.toy`, and the data and steps that it gets.

    Sequences are a start token, then a segment of `shortest` to `longest` tokens again and again
    until the `context` is full.
    """

    n_layers: int = 2
    smeared: bool = False
    n_heads: int = 4
    d_model: int = 64
    shortest: int = 8
    longest: int = 23
    context: int = 47
    batch: int = 64
    lr: float = 3e-3
    n_steps: int = 500
    seed: int = 0


class Model(NamedTuple):
    """One pretrained model: what `utils.models.load_model` takes."""

    name: str


class Task(NamedTuple):
    """One row of the results; `key` names it, and its file."""

    key: str
    setting: Toy | Model
    cpus: int = 1
    gpus: float = 0


CENTRE = Toy()


def with_context(longest: int) -> dict[str, int]:
    """Context and segments grown together, so that as large a share of the tokens repeats."""
    return {"longest": longest, "shortest": round(longest * 8 / 23), "context": 1 + 2 * longest}


def settings() -> list[Toy]:
    """The 33 settings, without seeds; the first is the centre."""
    plane = product(STEPS, LONGEST)
    one_factor = [{"n_layers": 1}, {"n_layers": 3}]
    one_factor += [{"n_layers": layers, "smeared": True} for layers in (1, 2)]
    one_factor += [{"n_heads": heads} for heads in (2, 8)]
    one_factor += [{"d_model": width} for width in (32, 128)]
    one_factor += [{"shortest": 5, "longest": 12}, {"shortest": 6, "longest": 17}]
    one_factor += [{"lr": lr} for lr in (1e-3, 2e-3, 6e-3)]
    found = [CENTRE, *(CENTRE._replace(**change) for change in one_factor)]
    found += [CENTRE._replace(batch=b, **with_context(longest)) for b, longest in plane]
    found = [toy._replace(n_steps=STEPS[toy.batch] * (1 + (toy.lr < 2e-3))) for toy in found]
    return list(dict.fromkeys(found))


def toys(n_seeds: int = SEEDS, choose: Sequence[str] = ()) -> list[Task]:
    """Every setting with every seed; `choose`, such as ["batch=16,32", "n_layers=2"], keeps some.

    Raises ValueError for fewer than one seed, an unknown factor or value, or when none is left.
    """
    if n_seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {n_seeds}")
    wanted = dict(map(_choice, choose))
    kept = [s for s in settings() if all(getattr(s, f) in v for f, v in wanted.items())]
    if not kept:
        raise ValueError(f"choose: no setting of the grid has {' and '.join(choose)}")
    chosen = [setting._replace(seed=seed) for seed in range(n_seeds) for setting in kept]
    return [Task(toy_key(toy), toy) for toy in chosen]


def toy_key(toy: Toy) -> str:
    """Such as "toy-l2-h4-d64-s8to23-c47-b64-lr0.003-n500-seed0"."""
    kind = f"toy-l{toy.n_layers}{'-smeared' * toy.smeared}-h{toy.n_heads}-d{toy.d_model}"
    data = f"s{toy.shortest}to{toy.longest}-c{toy.context}-b{toy.batch}"
    return f"{kind}-{data}-lr{toy.lr:g}-n{toy.n_steps}-seed{toy.seed}"


def toy_of(row: Mapping) -> Toy:
    """The setting of a row of the results; KeyError for a row that lacks a part of it."""
    return Toy(*(type(value)(row[name]) for name, value in CENTRE._asdict().items()))


def models(names: Iterable[str], gpus: float = 0) -> list[Task]:
    """A task for each model, in order; ValueError for none, or one that comes twice."""
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ValueError("models: the list is empty, give a hub id, a folder or smollm2-135m")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"models: {twice} comes twice")
    return [Task(model_key(name), Model(name), gpus=gpus) for name in names]


def model_key(name: str) -> str:
    """A file's name that no other model has, such as "model-owner-name@step0-1a2b3c4d"."""
    plain = re.sub(r"[^\w.@-]+", "-", name).strip("-.")[-80:]
    return f"model-{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def read_models(path: Path) -> list[str]:
    """The models of a list: one a line, `#` begins a remark."""
    return [line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines()]


def pythia() -> Iterator[str]:
    """The whole Pythia suite, every revision of every size."""
    for name, step in product(PYTHIA, PYTHIA_STEPS):
        yield f"{name}@step{step}"


def _choice(text: str) -> tuple[str, list]:
    """A factor and the values that are kept, of text such as "batch=16,32"."""
    factor, _, values = text.partition("=")
    if factor not in Toy._fields or not values:
        raise ValueError(f"choose: got {text!r}, want one of {', '.join(Toy._fields)}, =, values")
    kinds = {"smeared": lambda value: value.lower() in ("true", "1"), "lr": float}
    kind = kinds.get(factor, int)
    try:
        return factor, [kind(value) for value in values.split(",")]
    except ValueError:
        raise ValueError(f"choose: {values!r} are no values of {factor}") from None
