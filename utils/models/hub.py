"""The Hugging Face hub: whether it answers, and a model's files from it or from the local cache."""

import contextlib
import threading
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from utils.models.weights import missing_part

GPT2_ID = "openai-community/gpt2"

# What from_pretrained reads, at the top of a repository. Pickled weights are not on the list.
WANTED_FILES = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "chat_template*",
]
HUB_HEADERS = ("X-Repo-Commit", "X-Error-Code")  # the hub sends one of them, a login page does not

_answer: list[bool] = []  # of hub_reachable, once it is known


def hub_reachable(timeout: float = 4.5) -> bool:
    """Whether the Hugging Face hub answers, in at most `timeout` seconds; asked once a process."""
    if not _answer:
        _answer.append(not constants.HF_HUB_OFFLINE and _ask_hub(timeout))
    return _answer[0]


def _ask_hub(timeout: float) -> bool:
    """One HEAD request, in a thread: looking a name up can hang past any time-out of its own."""
    url = constants.HUGGINGFACE_CO_URL_TEMPLATE.format(
        repo_id=GPT2_ID, revision="main", filename="config.json"
    )
    answers = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # whatever goes wrong, the answer is no
            session = huggingface_hub.utils.get_session()
            reply = session.head(url, timeout=timeout, follow_redirects=True)
            headers = [r.headers for r in (*reply.history, reply)]
            from_hub = any(name in header for header in headers for name in HUB_HEADERS)
            answers.append(from_hub and reply.status_code < 500)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(answers and answers[0])


def cached_folder(repo_id: str) -> Path | None:
    """The model's folder in the local hub cache, if everything needed is there; asks nobody."""
    with contextlib.suppress(LocalEntryNotFoundError):
        folder = huggingface_hub.snapshot_download(
            repo_id, allow_patterns=WANTED_FILES, local_files_only=True
        )
        if missing_part(Path(folder)) is None:
            return Path(folder)
    return None


def hub_folder(repo_id: str) -> Path:
    """The model's folder in the local hub cache, downloaded if need be; named by the commit.

    ValueError: no such model, or not open to this user. ConnectionError: the hub is out of reach.
    """
    folder = cached_folder(repo_id)
    if folder is not None:
        return folder
    if not hub_reachable():
        raise ConnectionError(
            f"{repo_id} is no local folder, it is not in the local cache, and the Hugging Face hub "
            "does not answer. Connect to the internet (or set HF_ENDPOINT to a mirror), or use the "
            'offline model: load_model("smollm2-135m")'
        )
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=WANTED_FILES))
    except GatedRepoError as error:
        raise ValueError(
            f"name={repo_id!r}: accept this model's licence on its hub page and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"name={repo_id!r}: no such folder here, and no such model on the hub (or private)"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConnectionError(f"{repo_id} could not be downloaded: {error}") from error
