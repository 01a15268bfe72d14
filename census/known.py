"""Whether the models of a census are there, asked before any task starts."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from utils.models.download import GPT2_ID
from utils.models.folder import missing_part
from utils.models.hub import cached_folder, hub_trouble
from utils.models.load import GPT2_NAMES, HUB_ID, SMOLLM2_NAME
from utils.models.offline import find_gguf


def check_models(names: Iterable[str]) -> None:
    """ValueError for a model or revision that is not there; ConnectionError if none can be asked.

    One question to the hub for each model, and one more for a revision that is no branch or tag.
    """
    revisions = defaultdict(list)
    for name in names:
        if name.lower() == SMOLLM2_NAME:
            find_gguf()
        elif name.lower() in GPT2_NAMES:
            revisions[GPT2_ID].append("")
        elif (folder := Path(name).expanduser()).is_dir():
            if missing := missing_part(folder):
                raise ValueError(f"models: {missing}")
        elif HUB_ID.fullmatch(name):
            repo_id, _, revision = name.partition("@")
            revisions[repo_id].append(revision)
        else:
            want = "a hub id (owner/name@revision), a local folder or smollm2-135m"
            raise ValueError(f"models: {name!r} is no model: want {want}")
    for repo_id, wanted in revisions.items():
        missing = [r for r in wanted if not cached_folder(f"{repo_id}@{r}" if r else repo_id)]
        if missing:
            _ask(repo_id, missing)


def _ask(repo_id: str, wanted: list[str]) -> None:
    if trouble := hub_trouble():
        raise ConnectionError(
            f"models: {repo_id} is not in the local cache, and the hub does not answer ({trouble})"
        )
    api = huggingface_hub.HfApi()
    try:
        refs = api.list_repo_refs(repo_id)
        named = {ref.name for ref in [*refs.branches, *refs.tags]}
        for revision in wanted:
            known = not revision or revision in named
            if not known and not api.revision_exists(repo_id, revision):
                raise ValueError(f"models: {repo_id} has no revision {revision!r} on the hub")
    except RepositoryNotFoundError:
        raise ValueError(f"models: no {repo_id} on the hub, or it is private") from None
    except HfHubHTTPError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"models: the hub fails at {repo_id} ({reason})") from error
