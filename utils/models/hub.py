"""The Hugging Face hub: whether it answers, and a model's folder from it or from its cache."""

import contextlib
import functools
import threading
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from utils.models.folder import missing_part

GPT2_ID = "openai-community/gpt2"
SECONDS = 4.5
HUB_HEADERS = ("X-Repo-Commit", "X-Error-Code")  # the hub sends one of them, a login page does not

# What from_pretrained reads, at the top of a repository. Pickled weights are not on the list.
TOKENIZER = ["*token*", "vocab*", "merges.txt", "spiece.model", "chat_template*"]
WANTED = {
    "allow_patterns": ["*config.json", "model*.safetensors*", *TOKENIZER],
    "ignore_patterns": ["*/*"],
}


@functools.cache
def hub_reachable() -> bool:
    """Whether the Hugging Face hub answers, in at most 4.5 seconds; asked once a process."""
    answers = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # whatever goes wrong, the answer is no
            url = huggingface_hub.hf_hub_url(GPT2_ID, "config.json")
            session = huggingface_hub.utils.get_session()
            reply = session.head(url, timeout=SECONDS, follow_redirects=True)
            replies = [*reply.history, reply]
            from_hub = any(name in r.headers for r in replies for name in HUB_HEADERS)
            answers.append(from_hub and reply.status_code < 500)

    if not constants.HF_HUB_OFFLINE:
        # In a thread: looking a name up can hang past any time-out of the request's own.
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(SECONDS)
    return any(answers)


def cached_folder(repo_id: str) -> Path | None:
    """The model's folder in the local hub cache, if everything needed is there; asks nobody."""
    with contextlib.suppress(LocalEntryNotFoundError):
        found = huggingface_hub.snapshot_download(repo_id, local_files_only=True, **WANTED)
        if missing_part(Path(found)) is None:
            return Path(found)
    return None


def hub_folder(repo_id: str) -> Path:
    """The model's folder in the local hub cache, downloaded if need be; named by the commit.

    ValueError: no such model, or not open to this user. ConnectionError: the hub is out of reach.
    """
    if folder := cached_folder(repo_id):
        return folder
    if not hub_reachable():
        raise ConnectionError(
            f"{repo_id} is no local folder, it is not in the local cache, and the Hugging Face hub "
            "does not answer. Connect to the internet (or set HF_ENDPOINT to a mirror), or use the "
            'offline model: load_model("smollm2-135m")'
        )
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, **WANTED))
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"name={repo_id!r}: no such folder here, and no such model on the hub, or it is "
            "private or its licence must be accepted on its page there (then set HF_TOKEN)"
        ) from error
    except OSError as error:
        raise ConnectionError(f"{repo_id} could not be downloaded: {error}") from error
