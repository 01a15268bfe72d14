"""A download from the Hugging Face hub that always ends, and whether what arrived is whole.

It runs in a process of its own, which can be ended whatever it hangs on.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from huggingface_hub.utils.sha import git_hash
from tqdm.auto import tqdm

from utils.models.folder import file_sha256

GPT2_ID = "openai-community/gpt2"
PINNED = {  # commit, and SHA-256 of model.safetensors
    GPT2_ID: (
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    )
}
SLOWEST = 20_000  # bytes a second: less is no progress
# What from_pretrained reads, at the top of a repository. Pickled weights are not on the list.
TOKENIZER = ["*token*", "vocab*", "merges.txt", "spiece.model", "chat_template*"]
WANTED = {
    "allow_patterns": ["*config.json", "model*.safetensors*", *TOKENIZER],
    "ignore_patterns": ["*/*"],
}
ABSENT = 3  # exit status: the hub does not have it, or not for this user
SCRIPT = f"""
import json, sys
from huggingface_hub import errors, snapshot_download
print(flush=True)  # from here on it is the hub that takes its time
try:
    snapshot_download(**json.loads(sys.argv[1]))
except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
    sys.exit({ABSENT})
except Exception as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}".splitlines()[0])
"""


def asked(name: str) -> dict:
    """What is wanted of "owner/name" or "owner/name@revision": the commit, if pinned, and files."""
    repo_id, _, revision = name.partition("@")
    return {"repo_id": repo_id, "revision": revision or PINNED.get(repo_id, (None,))[0], **WANTED}


def download(repo_id: str, patience: float) -> str:
    """Fetch a model into the hub's cache; what went wrong, in a few words, or nothing.

    It is ended when for `patience` seconds no file is finished and less than 20 kB a second
    arrive. ValueError: no such model, or not open to this user.
    """
    owned = repo_id.partition("@")[0].replace("/", "--")
    storage = Path(constants.HF_HUB_CACHE, f"models--{owned}")
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if token := huggingface_hub.get_token():  # Colab gives it to this process alone
        environment["HF_TOKEN"] = token
    command = [sys.executable, "-c", SCRIPT, json.dumps(asked(repo_id))]
    before, best, since = _cut_short(storage), (0, 0), time.monotonic()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        tqdm(desc=repo_id, unit="B", unit_scale=True, delay=1, leave=False) as bar,
        subprocess.Popen(command, env=environment, stdout=said, stderr=said) as process,
    ):
        try:
            while process.poll() is None and time.monotonic() - since < patience:
                time.sleep(0.05)
                n_files, n_bytes = _arrived(storage)
                bar.update(n_bytes - bar.n)
                progress = (n_files, int(n_bytes / (SLOWEST * patience)))
                started = os.fstat(said.fileno()).st_size > 0
                if progress > best or not started:
                    best, since = progress, time.monotonic()
        finally:
            status = process.poll()
            process.kill()
            process.wait()
            for path in _cut_short(storage) - before:
                path.unlink(missing_ok=True)
        said.seek(0)
        # huggingface_hub says what failed, then when it tries again
        last = [x for x in said.read().splitlines() if x and not x.startswith("Retrying")][-1:]
    if status == ABSENT:
        raise ValueError(
            f"name={repo_id!r}: no such folder here, and no such model or revision on the hub, or "
            "it is private or its licence must be accepted on its page there (then set HF_TOKEN)"
        )
    failure = [f"no progress for {patience:.0f} s"] if status is None else []
    return "" if status == 0 else "; ".join([*failure, *last])[:300]


def damaged(repo_id: str, folder: Path) -> list[Path]:
    """Which of the files we read are not what the hub published, or not what is pinned.

    The hub's cache names a file by its hash: SHA-256 for large ones, git's for others. (A cache
    without links, as on Windows, does not: there only what is pinned is compared.)
    """
    paths = [folder / name for name in filter_repo_objects(os.listdir(folder), **WANTED)]
    found = [path.resolve() for path in paths if not _is_as_named(path.resolve())]
    weights = folder / "model.safetensors"
    if not found and repo_id in PINNED and file_sha256(weights) != PINNED[repo_id][1]:
        return [weights.resolve()]
    return found


def _is_as_named(blob: Path) -> bool:
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        return file_sha256(blob) == blob.name
    if re.fullmatch("[0-9a-f]{40}", blob.name):
        return git_hash(blob.read_bytes()) == blob.name
    return True


def _arrived(storage: Path) -> tuple[int, int]:
    """How many files of a model are in the cache, and their size in bytes."""
    sizes = []
    for path in storage.rglob("*"):
        with contextlib.suppress(OSError):  # renamed meanwhile
            sizes += [path.stat().st_size] if path.is_file() and not path.is_symlink() else []
    return len(sizes), sum(sizes)


def _cut_short(storage: Path) -> set[Path]:
    """The unfinished files of downloads that were ended; no later download goes on with them."""
    return set(storage.glob("blobs/*.*.incomplete"))
