"""Run the notebooks, or refresh what is committed of them.

    python -m tools.notebooks run [NAME ...]       execute into build/<name>.ipynb and .html
    python -m tools.notebooks outputs [NAME ...]   rewrite committed outputs, results and tables
    python -m tools.notebooks readme               rewrite the tables of the READMEs alone
    python -m tools.notebooks keep MODEL ...       keep a run's results beside the committed ones

NAME is a part of a notebook's path, such as "induction"; none means all of them.
"""

import argparse
import sys
from pathlib import Path

from nbclient.exceptions import CellExecutionError, DeadKernelError

from tools import notebook_run
from utils.session import ROOT


def find_notebooks(names: list[str] | None = None) -> list[Path]:
    """The project notebooks in order, or those whose path contains one of `names`.

    Raises ValueError for a name that fits none, or when there is none at all.
    """
    shown = {p: str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("project-*/*_notebook.ipynb"))}
    if not shown:
        raise ValueError(f"no notebook in {ROOT}")
    for name in names or ():
        if not any(name in text for text in shown.values()):
            raise ValueError(f"name: got {name!r}, have {', '.join(shown.values())}")
    return [p for p, text in shown.items() if not names or any(name in text for name in names)]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.notebooks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("run", "outputs", "readme", "keep"))
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args(arguments)
    try:
        paths = find_notebooks(options.names if options.command != "keep" else None)
        if options.command == "run":
            for path in paths:
                notebook_run.run(path)
            return 0
        sys.path += [str(project) for project in ROOT.glob("project-*")]  # their exercises
        from tools import notebook_outputs  # imports torch, which takes seconds: `run` need not

        if options.command == "keep":
            for model in options.names:
                notebook_outputs.keep(model)
        if options.command == "outputs":
            from tools import drawings, moving_picture

            drawings.write_drawings()
            moving_picture.write_moving_pictures()
            notebook_outputs.refresh(paths)
        notebook_outputs.write_readmes()
    except KeyboardInterrupt:
        kept = " What was run so far is in build/." if options.command == "run" else ""
        print(f"Interrupted.{kept}", file=sys.stderr)
        return 130  # as shells say it
    except OSError as error:  # such as a full disk
        print(f"{error}. What could be written of the run is in build/.", file=sys.stderr)
        return 1
    except (CellExecutionError, DeadKernelError, ValueError) as error:
        from nbconvert.filters import strip_ansi

        print(strip_ansi(str(error)), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
