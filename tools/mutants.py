"""Would the tests notice? Small changes, one at a time, to the analysis and to the engine.

    python -m tools.mutants [--n 300] [--report]

Every change (a mutant, as cosmic-ray's operators make them) runs in a fork of this process, which
has torch and the libraries loaded already, and never reaches a file: the changed module takes the
place of the one that Python would find. It meets the test files that import that module, those
named after it first, until one test fails; what passes two minutes of them has survived.
Annotations and docstrings are left alone. One row for each mutant in build/mutants.jsonl; a second
run does those without a row.
"""

import argparse
import ast
import importlib
import importlib.abc
import importlib.util
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ANALYSIS = "heads metrics edits ablation patching paths circuit attribution weights selection toy"
ENGINE = "replay packs direct readout memory shortcuts"
MODULES = [*ANALYSIS.split(), *(f"engine/{name}" for name in ENGINE.split())]
ROWS = Path("build/mutants.jsonl")
BAD_INPUTS = "tests/test_bad_inputs.py"  # of every module, and slow
NOT_OF_IT = "notebooks notebook_tools site browser jupyterlab drawings census make faults hub"
NOT_OF_IT += " rooms mutants"
SECONDS = 120
LOADED = "torch transformer_lens transformers pandas plotly pytest hypothesis beartype".split()


class Mutant(NamedTuple):
    path: str
    line: int
    operator: str
    occurrence: int

    @property
    def changed(self) -> str:
        """The file's source, changed."""
        from cosmic_ray.mutating import mutate_code  # `make mutants` installs it, and nothing else
        from cosmic_ray.operators.provider import OperatorProvider

        operator = OperatorProvider()[self.operator]()
        return mutate_code(Path(self.path).read_text(encoding="utf-8"), operator, self.occurrence)

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".")


def untouched(source: str) -> set[int]:
    """Lines of imports, docstrings, annotations and `no_grad`, none of which make a figure."""
    documented = ast.FunctionDef | ast.ClassDef | ast.Module
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        aside = [node] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, documented) and ast.get_docstring(node):
            aside.append(node.body[0])
        if isinstance(node, ast.FunctionDef):
            aside += [node.args, node.returns]
            aside += [d for d in node.decorator_list if "no_grad" in ast.unparse(d)]
        if isinstance(node, ast.AnnAssign):
            aside.append(node.annotation)
        for part in aside:
            inside = [x for x in ast.walk(part or ast.Pass()) if hasattr(x, "lineno")]
            lines.update(n for x in inside for n in range(x.lineno, x.end_lineno + 1))
    return lines


def mutants_of(path: str) -> Iterator[list[Mutant]]:
    """For every place of a file that can be changed: the ways to change it."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.operators.provider import OperatorProvider

    source = Path(path).read_text(encoding="utf-8")
    nodes, left_alone = list(ast_nodes(get_ast(source))), untouched(source)
    places: dict[tuple, list[Mutant]] = {}
    for name in OperatorProvider():
        if name.startswith("Variable"):  # needs to be told which
            continue
        operator = OperatorProvider()[name]()
        found = [place for node in nodes for place in operator.mutation_positions(node)]
        for occurrence, (start, _) in enumerate(found):
            if start[0] not in left_alone:
                places.setdefault(start, []).append(Mutant(path, start[0], name, occurrence))
    yield from places.values()


def sample(n: int, seed: int = 0) -> list[Mutant]:
    """One way to change each of `n` places, drawn from all; the first of a larger `n` are these."""
    places = [ways for name in MODULES for ways in mutants_of(f"utils/{name}.py")]
    draw = random.Random(seed)
    draw.shuffle(places)
    return [draw.choice(ways) for ways in places][:n]


def tests_of(module: str, operator: str = "") -> list[str]:
    """The test files that import a module, those named after it first, then the shortest.

    The engine is met through the sweeps that stand on it; a check of arguments first by bad ones.
    """
    package, _, name = module.rpartition(".")
    if package == "utils.engine":
        above = [
            path for door in ("edits", "patching", "paths") for path in tests_of(f"utils.{door}")
        ]
        return list(dict.fromkeys(["tests/test_replay.py", *above]))
    imports = re.compile(rf"from {package} import [^#]*?\b{name}\b|{re.escape(module)}\b", re.M)
    found = []
    for path in Path("tests").glob("test_*.py"):
        kind, text = path.stem.removeprefix("test_"), path.read_text(encoding="utf-8")
        named = kind.startswith(name) or name.startswith(kind)
        if kind not in NOT_OF_IT.split() and (named or imports.search(text)):
            found.append((not named, len(text), str(path)))
    files = [path for *_, path in sorted(found) if path != BAD_INPUTS]
    return [BAD_INPUTS, *files] if operator == "RemoveDecorator" else [*files, BAD_INPUTS]


class Changed(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Gives one module with another source than its file's."""

    def __init__(self, module: str, path: str, source: str) -> None:
        self.module, self.path, self.source = module, path, source

    def find_spec(self, name: str, path: object, target: object = None):
        return importlib.util.spec_from_loader(name, self) if name == self.module else None

    def get_filename(self, name: str) -> str:
        return os.path.abspath(self.path)

    def get_data(self, path: str) -> bytes:
        return self.source.encode()


def start(mutant: Mutant | None, files: list[str]) -> int:
    """A process that runs these tests on a mutant (None: on what is there); its id."""
    if pid := os.fork():
        return pid
    os.setpgid(0, 0)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    if mutant:
        sys.meta_path.insert(0, Changed(mutant.module, mutant.path, mutant.changed))
    import pytest

    options = ["-x", "-q", "-m", "not nightly", "-p", "no:cacheprovider"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # libraries are loaded before it
    os._exit(int(pytest.main([*options, *files])))


def run(mutants: list[Mutant], workers: int) -> None:
    """Each of the mutants on its tests, so many at once; a row for each as soon as it is known."""
    waiting, running = list(mutants), {}
    while waiting or running:
        while waiting and len(running) < workers:
            mutant = waiting.pop(0)
            running[start(mutant, tests_of(mutant.module, mutant.operator))] = (
                mutant,
                time.monotonic(),
            )
        time.sleep(0.1)
        for pid, (mutant, began) in list(running.items()):
            seconds = time.monotonic() - began
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended and seconds < SECONDS:
                continue
            if not ended:
                os.killpg(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
            del running[pid]
            row = mutant._asdict() | {"survived": not ended or status == 0}
            row["seconds"] = round(seconds, 1)
            with ROWS.open("a", encoding="utf-8") as rows:
                rows.write(json.dumps(row) + "\n")
            print(len(waiting) + len(running), "left:", *mutant, row["survived"], flush=True)


def known() -> dict[Mutant, bool]:
    """The mutants that have a row, and whether they survived."""
    lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []
    rows = [json.loads(line) for line in lines]
    return {Mutant(*(row[name] for name in Mutant._fields)): row["survived"] for row in rows}


def report(mutants: list[Mutant]) -> None:
    """How many were killed in each module, and what the survivors changed."""
    found = {mutant: survived for mutant, survived in known().items() if mutant in mutants}
    for path in sorted({mutant.path for mutant in found}):
        of_path = [survived for mutant, survived in found.items() if mutant.path == path]
        print(f"{path:30} {of_path.count(False):4} of {len(of_path)} killed")
    for mutant in sorted(mutant for mutant, survived in found.items() if survived):
        was = Path(mutant.path).read_text(encoding="utf-8").splitlines()
        now = mutant.changed.splitlines()
        line = next(i for i, pair in enumerate(zip(was, now, strict=False)) if pair[0] != pair[1])
        print(f"\n{mutant.path}:{line + 1}\n- {was[line].strip()}\n+ {now[line].strip()}")
    killed = list(found.values()).count(False)
    print(f"\n{killed} of {len(found)} killed: {killed / max(1, len(found)):.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, default=300, help="how many mutants (default 300)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="how many at once")
    parser.add_argument("--report", action="store_true", help="only show what is known")
    options = parser.parse_args()
    mutants = sample(options.n)
    if not options.report:
        ROWS.parent.mkdir(exist_ok=True)
        os.environ["OMP_NUM_THREADS"] = "1"
        for name in LOADED:
            importlib.import_module(name)
        if files := sorted({file for m in mutants for file in tests_of(m.module)}):
            if os.waitpid(start(None, files), 0)[1]:
                sys.exit("some of these tests fail as it is: mend them first")
        done = known()
        run([mutant for mutant in mutants if mutant not in done], options.workers)
    report(mutants)


if __name__ == "__main__":
    main()
