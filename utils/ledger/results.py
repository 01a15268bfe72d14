"""Results files: numbers as JSON, written whole or not at all, shown as text, merged over seeds."""

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
SIGNS = {HOLDS: "✓", FAILS: "✗", UNDECIDED: "?"}


def read_json(path: str | Path) -> dict:
    """The JSON file at `path`."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_json(path: Path, data: dict) -> None:
    """Write `data` as JSON (never NaN), whole or not at all: a reader never sees half a file."""
    write_file(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, creating its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plain(value: float | None) -> float | None:
    """A JSON number of four significant digits; None for NaN and infinity."""
    if value is None or not math.isfinite(value := float(value)):
        return None
    return float(f"{value:.4g}")


def cells(claim: dict) -> tuple[str, str, str]:
    """Verdict with its sign, published figure and our figure of an entry, as text."""
    published = "–" if claim["published"] is None else str(claim["published"])
    if not isinstance(claim["published"], str):  # in words a dash is no minus sign
        published = published.replace("-", "−")
    if claim["published_model"]:
        published += f" ({claim['published_model']})"
    return f"{SIGNS[claim['verdict']]} {verdict(claim)}", published, _figure(claim)


def quantity(claim: dict) -> str:
    """What our figure is, in few words; nothing in a ledger of before it was written down."""
    return (claim.get("quantity") or "").replace("-1", "−1")


def _figure(claim: dict) -> str:
    measured, stderr, n = claim["measured"], claim["stderr"], claim["n"]
    if measured is None:
        return "–"
    text = decimals(measured)
    if stderr is not None:
        text += f" ± {decimals(stderr)}"
    if n is not None:
        counted = f" {claim['n_of']}" if claim.get("n_of") else ""
        text += f" (n = {n}{counted})"
    return text


def others(claim: dict) -> str:
    """The other figures that the rule looks at, by name."""
    known = {name: x for name, x in claim["others"].items() if x is not None}
    return ", ".join(f"{_words(name)} {decimals(x, _places(x))}" for name, x in known.items())


def _words(name: str) -> str:
    return re.sub("^n_", "number of ", name).replace("_", " ")


def _places(value: float) -> int:
    """How many decimals: three, but none for a count or a step."""
    return 0 if abs(value) > 1 and value == int(value) else 3


def why(claim: dict) -> str:
    """What decides beside the figure reported: others, claims it needs that fail, or its bound."""
    found = [f"with {others(claim)}"] if others(claim) else []
    found += [f"but needs “{other}”" for other in claim.get("for_want_of", [])]
    bound = "" if claim.get("for_want_of") else rule(claim)
    return "; ".join(filter(None, [", ".join(found), bound]))


def rule(claim: dict) -> str:
    """What the claim's figure is held against, in words; empty if that is not known."""
    words = re.sub(r"-(?=\d)", "−", claim.get("holds_when", ""))
    return f"holds when {words}" if words else ""


def decimals(value: float, places: int = 3) -> str:
    """A number as people write it: never -0.000, and a true minus sign."""
    text = f"{value:.{places}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def counts(claims: Iterable[dict]) -> str:
    """How many claims hold, do not (some since another does not), or are undecided, in one line."""
    claims = list(claims)
    verdicts = [claim["verdict"] for claim in claims]
    held, failed, open_ = (verdicts.count(v) for v in (HOLDS, FAILS, UNDECIDED))
    text = f"{held} of {len(verdicts)} claims hold"
    text += f", {failed} {'do' if failed > 1 else 'does'} not" if failed else ""
    wanting = sum(c["verdict"] == FAILS and bool(c.get("for_want_of")) for c in claims)
    text += f" ({wanting} of them since a claim that they need does not)" if wanting else ""
    return text + (f", {open_} {'are' if open_ > 1 else 'is'} undecided" if open_ else "")


def verdict(claim: dict) -> str:
    """An entry's verdict in words, with the number of seeds if it was merged over some."""
    over = seeds(claim)
    if claim["verdict"] == HOLDS:
        over = over.removeprefix("holds ")
    return claim["verdict"] + (f" ({over})" if over else "")


def seeds(claim: dict) -> str:
    """In how many seeds an entry holds, in words; nothing if it was not merged over any."""
    held = claim.get("holds_in", "").replace("/", " of ")
    return f"holds in {held} seeds" if held else ""


def merge_seeds(full: dict, seeds: Iterable[dict]) -> dict:
    """The ledger `full` with its toy claims averaged over its own seed and those in `seeds`.

    measured, stderr and n are then over seeds. A claim holds, or does not, if it is so for every
    seed, and is undecided otherwise; `holds_in` says for how many it holds, such as "4/5". Raises
    ValueError if a seed lacks a toy claim.
    """
    by_seed = [{c["id"]: c for c in run["claims"]} for run in [full, *seeds]]
    claims = []
    for claim in full["claims"]:
        if claim["id"].startswith("toy."):
            if any(claim["id"] not in run for run in by_seed):
                raise ValueError(f"seeds: {claim['id']} is missing from one")
            claim = claim | _over_seeds([run[claim["id"]] for run in by_seed])
        claims.append(claim)
    return full | {"claims": claims}


def _over_seeds(runs: list[dict]) -> dict:
    values = [r["measured"] for r in runs if r["measured"] is not None]
    held, n = sum(r["verdict"] == HOLDS for r in runs), len(values)
    verdicts = {r["verdict"] for r in runs}
    by_name = {name: [r["others"][name] for r in runs] for name in runs[0]["others"]}
    return {
        "measured": plain(mean(values)) if values else None,
        "stderr": plain(stdev(values) / math.sqrt(n)) if n > 1 else None,
        "n": n,
        "n_of": "seeds",
        "others": {k: None if None in x else plain(mean(x)) for k, x in by_name.items()},
        "verdict": verdicts.pop() if len(verdicts) == 1 else UNDECIDED,
        "holds_in": f"{held}/{len(runs)}",
    }
