"""Places to try things in: a copy of the repository, an environment made of links, a kernel."""

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from utils.session import ROOT

LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "build", "my", "__pycache__", ".*_cache")


def copy_repository(folder: Path) -> Path:
    """The files as they are now, committed or not."""
    return shutil.copytree(ROOT, folder, ignore=LEFT_OUT)


def make_environment(folder: Path, *names: str, bring: Callable = os.symlink) -> Path:
    """A virtual environment with these packages and what they need; returns its Python.

    Nothing is downloaded: each file of our own environment is brought, as a link or a copy.
    """
    venv.create(folder)
    for distribution in needed("pip", *names).values():
        for file in distribution.files:
            path = folder / os.path.relpath(file.locate(), sys.prefix)
            if file.suffix != ".pyc" and path.parent != folder / "bin":  # those name their Python
                path.parent.mkdir(parents=True, exist_ok=True)
                bring(file.locate(), path)
    return folder / "bin" / "python"


def needed(*names: str) -> dict[str, metadata.Distribution]:
    """Packages by name, and all that they require here, extras included."""
    found, seen, left = {}, set(), [*map(Requirement, names)]
    while left:
        wanted = left.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found[name] = metadata.distribution(name)
        for line in map(Requirement, found[name].requires or []):
            if not line.marker or any(line.marker.evaluate({"extra": e}) for e in {"", *extras}):
                left.append(line)
    return found


def versions(python: Path) -> dict[str, str]:
    """What is installed beside a Python."""
    command = [python, "-m", "pip", "list", "--format=json"]
    listed = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return {canonicalize_name(package["name"]): package["version"] for package in listed}
