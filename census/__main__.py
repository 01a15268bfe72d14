"""A census: the same measurements over many toys or models, as tasks on Ray.

    python -m census                                the toys: 33 settings, 4 seeds each
    python -m census --models smollm2-135m owner/name@revision FOLDER
    python -m census --report                       tables and figures of what is there

What is done is never done again: stop it at any time, and give the same command to go on.
"""

import argparse
import os
import sys
from pathlib import Path

from census import grid
from census.rows import Results
from utils.session import ROOT


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m census",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--results", type=Path, default=ROOT / "build/census", help="folder (build/census)")
    add("--seeds", type=int, default=grid.SEEDS, help="seeds of each toy (4)")
    add("--choose", nargs="+", default=[], metavar="FACTOR=VALUES", help="some toys: batch=16,32")
    add("--models", nargs="+", metavar="NAME", help="models in place of toys")
    add("--list", type=Path, metavar="FILE", help="models of a file, one a line")
    add("--pythia", action="store_true", help="every revision of the whole Pythia suite")
    add("--gpus", type=float, default=0, help="GPUs that each model takes (0; 0.5: two share one)")
    add("--address", help="of a Ray cluster (this machine alone without one)")
    add("--workers", type=int, help="tasks at once on this machine (one a core)")
    add("--dashboard", action="store_true", help="Ray's dashboard, on this machine too")
    add("--again", action="store_true", help="try failed tasks again")
    add("--dry-run", action="store_true", help="print the tasks, their time and memory")
    add("--report", action="store_true", help="tables and figures, into <results>/report")
    return parser.parse_args(arguments)


def tasks_of(options: argparse.Namespace) -> list[grid.Task]:
    """What is asked for; ValueError for what cannot be done."""
    given = [bool(options.models), bool(options.list), options.pythia]
    if sum(given) > 1 or (any(given) and options.choose):
        raise ValueError("give one of --models, --list, --pythia, or --choose for toys")
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"workers must be at least 1, got {options.workers}")
    if options.gpus < 0:
        raise ValueError(f"gpus must be 0 or more, got {options.gpus:g}")
    if not any(given):
        return grid.toys(options.seeds, options.choose)
    names = list(grid.pythia()) if options.pythia else options.models
    return grid.models(grid.read_models(options.list) if options.list else names, options.gpus)


def census(options: argparse.Namespace) -> int:
    """Do what the options say; the exit status."""
    results = Results(options.results.resolve())
    if options.report:
        from census.report import write

        for path in write(results, results.folder / "report"):
            print(path)
        return 0
    tasks = tasks_of(options)
    if options.dry_run:
        from census import costs

        print("\n".join(costs.lines(tasks, options.workers or os.cpu_count() or 1)))
        return 0
    from census import measure, run  # Ray and torch only here

    if names := [t.setting.name for t in tasks if isinstance(t.setting, grid.Model)]:
        from census.known import check_models

        check_models(names)
    results.prepare()
    if options.again:
        results.forget_failed()
    run.start(options.address, options.workers, options.dashboard)
    run.check_resources(tasks)
    failed = run.run(tasks, results, measure.work)
    return 1 if failed else 0


def main(arguments: list[str]) -> int:
    """The command line; one sentence for what goes wrong."""
    try:
        return census(parse(arguments))
    except (ValueError, OSError) as error:  # ConnectionError, a full disk
        print(f"census: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. Give the same command again to go on.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
