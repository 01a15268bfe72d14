"""Folders of files kept in the user's cache: complete and checked by SHA-256, or not there."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

MANIFEST = "manifest.json"
LOCK_SECONDS = 180  # past this the lock is not worth waiting for: writers cannot harm each other
STALE_SECONDS = 3600


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_roots() -> list[Path]:
    """Folders that may hold the cache, best first: the user's own, then a temporary one."""
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    named = os.environ.get("MECH_INTERP_CACHE")
    root = Path(named or Path(user) / "mech-interp-replications").expanduser()
    if not hasattr(os, "getuid"):
        return [root, Path(tempfile.gettempdir()) / "mech-interp-replications"]
    spare = Path(tempfile.gettempdir()) / f"mech-interp-replications-{os.getuid()}"
    # Somebody else's folder in a shared temporary directory is not to be trusted.
    foreign = spare.exists() and spare.stat().st_uid != os.getuid()
    return [root] if foreign else [root, spare]


def writable_root() -> Path | None:
    """The first cache root that can be written to; says so when it is not the first."""
    first, *_ = roots = cache_roots()
    for root in roots:
        with contextlib.suppress(OSError):
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            tempfile.TemporaryFile(dir=root).close()
            if root != first:
                print(f"Cannot write to {first}: converted weights are kept in {root}.")
            return root
    return None


def verified_folder(key: str) -> Path | None:
    """The cache's folder of that name, if it is complete and every file is as it was written."""
    return next((root / key for root in cache_roots() if manifest_holds(root / key)), None)


def write_manifest(folder: Path) -> None:
    """Record name, size and SHA-256 of every file in `folder`."""
    files = {p.name: [p.stat().st_size, file_sha256(p)] for p in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1))


def manifest_holds(folder: Path) -> bool:
    """Whether `folder` holds exactly the files of its manifest, each with its size and SHA-256."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        present = {p.name: p for p in folder.iterdir() if p.name != MANIFEST}
        return present.keys() == files.keys() and all(
            present[name].stat().st_size == size and file_sha256(present[name]) == digest
            for name, (size, digest) in files.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def only_writer(target: Path) -> Iterator[None]:
    """Wait while another process writes `target`, so that the same work is not done twice."""
    lock = FileLock(f"{target}.lock")
    # Where the file system cannot lock, go on: `publish` needs no lock to be safe.
    with contextlib.suppress(Timeout, OSError, NotImplementedError):
        try:
            lock.acquire(timeout=min(1, LOCK_SECONDS))
        except Timeout:
            print(f"Waiting for another process that writes {target} ...", flush=True)
            lock.acquire(timeout=LOCK_SECONDS)
    try:
        yield
    finally:
        lock.release()


def publish(save: Callable[[Path], None], target: Path) -> None:
    """Let `save` fill a folder, and make it `target`, complete or not at all; OSError if it cannot.

    The folder is new, beside the target, and renamed when it is complete: readers never see a
    half-written file, and two writers never write into the same folder.
    """
    _remove_stale(target)
    fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        save(fresh)
        write_manifest(fresh)
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
            os.replace(target, old / "damaged")
            shutil.rmtree(old, ignore_errors=True)
        os.rename(fresh, target)
    except Exception as error:  # safetensors raises a type of its own for a full disk
        raise OSError(f"could not write {target}: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _remove_stale(target: Path) -> None:
    """Remove what writers that were killed left beside `target`."""
    for folder in target.parent.glob(f".{target.name}.*"):
        if folder.is_dir() and time.time() - folder.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
