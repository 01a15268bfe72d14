"""The Hugging Face hub: whether it answers, and a model's folder from it or from its cache."""

import contextlib
import functools
import threading
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from utils.models.download import GPT2_ID, asked, damaged, download
from utils.models.folder import missing_part

SECONDS = 4.5
PATIENCE = 24  # seconds without progress, after which a download is given up
HUB_HEADERS = ("X-Repo-Commit", "X-Error-Code")  # the hub sends one of them, a login page does not
ELSE = 'Or use the offline model: load_model("smollm2-135m")'


@functools.cache
def hub_trouble() -> str:
    """What is wrong with the hub's answer, in a few words, or nothing if it answers as a hub does.

    Known after at most 4.5 seconds; asked once a process.
    """
    found = []

    def ask() -> None:
        try:
            url = huggingface_hub.hf_hub_url(GPT2_ID, "config.json")
            session = huggingface_hub.utils.get_session()
            reply = session.head(url, timeout=SECONDS, follow_redirects=True)
            replies = [*reply.history, reply]
            from_hub = any(name in r.headers for r in replies for name in HUB_HEADERS)
            fine = from_hub and reply.status_code < 500
            found.append("" if fine else f"status {reply.status_code}, not an answer of the hub")
        except Exception as error:  # whatever goes wrong, it does not answer
            found.append(f"{type(error).__name__}: {error}")

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    # In a thread: looking a name up can hang past any time-out of the request's own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return found[0] if found else f"silent for {SECONDS} s"


def cached_folder(repo_id: str) -> Path | None:
    """The model's folder in the local hub cache, if everything needed is there; asks nobody."""
    with contextlib.suppress(LocalEntryNotFoundError):
        found = huggingface_hub.snapshot_download(local_files_only=True, **asked(repo_id))
        if missing_part(Path(found)) is None:
            return Path(found)
    return None


def hub_folder(repo_id: str, patience: float = PATIENCE) -> Path:
    """The model's folder in the local hub cache, downloaded if need be; named by the commit.

    Files whose hash is not the published one are fetched again. ValueError: no such model, or not
    open to this user. ConnectionError: the hub is out of reach, fails, sends damaged files, or
    brings nothing to speak of for `patience` seconds; the message says how to go on.
    """
    folder = cached_folder(repo_id)
    bad = damaged(repo_id, folder) if folder else []
    if folder and not bad:
        return folder
    if trouble := hub_trouble():
        what = f"{repo_id} is neither a local folder nor in the local cache"
        how = "Connect to the internet (or set HF_ENDPOINT to a mirror)"
        if bad:
            what = f"{repo_id} is damaged in the local cache: the hash of {bad[0]} is another"
            how = "Delete that file, and load again where the hub can be reached"
        raise ConnectionError(
            f"{what}, and the Hugging Face hub does not answer ({trouble}). {how}. {ELSE}"
        )
    for path in bad:
        path.unlink()
    if failure := download(repo_id, patience):
        raise ConnectionError(
            f"{repo_id} could not be downloaded ({failure}). Try again later. {ELSE}"
        )
    folder = cached_folder(repo_id)
    if folder is None:
        lacks = "config.json, a tokenizer, or weights in safetensors"
        raise ValueError(f"name={repo_id!r}: on the hub it lacks {lacks}")
    bad = damaged(repo_id, folder)
    for path in bad:
        path.unlink()
    if bad:
        raise ConnectionError(
            f"{repo_id} arrived damaged: the hash of {bad[0]} is not the published one. "
            f"It was deleted: load the model again. {ELSE}"
        )
    return folder
