"""A model in a folder: Hugging Face format, safetensors only, and no code of its own is run."""

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformer_lens.model_bridge.sources.transformers import (
    determine_architecture_from_hf_config,
    get_hf_model_class_for_architecture,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")
ONLY_SAFETENSORS = (
    "weights are read from safetensors files in the folder only, never from pickled files such as "
    "pytorch_model.bin, because unpickling can run any code"
)
ON_DISK = {"local_files_only": True, "trust_remote_code": False}


class Weights(NamedTuple):
    """An untouched Hugging Face model (float32, eval mode, CPU) and its tokenizer."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase


def missing_part(folder: Path) -> str | None:
    """What `folder` lacks to be a model in Hugging Face format with safetensors, or None."""
    present = {path.name for path in folder.iterdir() if path.is_file()}
    index, needed = "model.safetensors.index.json", {"model.safetensors"}
    if "config.json" not in present:
        return f"{folder} has no config.json, so it is no model in Hugging Face format"
    config = _read_dict(folder / "config.json")
    if "adapter_config.json" in present:  # where peft is installed, it names another model to load
        return f"{folder} holds an adapter (adapter_config.json), not a whole model"
    if config is not None and "transformers_weights" in config:
        return f"{folder / 'config.json'} names weights of its own: {ONLY_SAFETENSORS}"
    if index in present and not needed <= present:  # the weights are in several files
        listed = (_read_dict(folder / index) or {}).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            return f"{folder / index} is damaged"
        needed = {str(name) for name in listed.values()}
        strange = [name for name in needed if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
        if strange:
            return f"{folder / index} names {min(strange)!r}: {ONLY_SAFETENSORS}"
    if lost := sorted(needed - present):
        return f"{folder} has no {lost[0]}; {ONLY_SAFETENSORS}"
    if present.isdisjoint(TOKENIZER_FILES):
        return f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)})"
    return None


def _read_dict(path: Path) -> dict | None:
    """The JSON object in a file, or None if there is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def is_supported(folder: Path) -> bool:
    """Whether TransformerLens knows the model, and it predicts the next token."""
    try:
        config = AutoConfig.from_pretrained(folder, **ON_DISK)
        architecture = determine_architecture_from_hf_config(config)
        return get_hf_model_class_for_architecture(architecture) is AutoModelForCausalLM
    except (ValueError, OSError, TypeError, AttributeError, KeyError):
        return False


def read_folder(folder: Path) -> Weights:
    """Model and tokenizer of a local folder; ValueError says what is wrong with it.

    Absent files and an unknown architecture are found before any weights are read.
    """
    if missing := missing_part(folder):
        raise ValueError(missing)
    if not is_supported(folder):
        raise ValueError(
            f"{folder}: its architecture is not supported, wanted a decoder-only language model "
            "that TransformerLens knows: GPT-2, GPT-NeoX (Pythia), OPT, Llama (SmolLM2), Mistral, "
            "Qwen, Gemma, Phi, ... (TransformerBridge.list_supported_models() has all)"
        )
    try:
        return from_pretrained(folder)
    except Exception as error:  # safetensors, tokenizers and transformers each raise their own
        raise ValueError(f"{folder} cannot be read ({type(error).__name__}: {error})") from error


def from_pretrained(folder: Path, **options: str) -> Weights:
    """Model and tokenizer as transformers reads them; ValueError if tensors are absent."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **ON_DISK, **options)
    model, found = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        use_safetensors=True,  # the other format is a pickle
        attn_implementation="eager",  # attention patterns exist only in this form
        output_loading_info=True,
        **ON_DISK,
        **options,
    )
    if found["missing_keys"]:  # they would be random numbers
        raise ValueError(f"its weights lack {sorted(found['missing_keys'])[:3]} ...")
    n_layers, layer = model.config.num_hidden_layers, re.compile(r"\.(\d+)\.")
    for name in sorted(found["unexpected_keys"]):
        if (at := layer.search(name)) and int(at[1]) >= n_layers:  # the rest may be of other tasks
            raise ValueError(f"its configuration has {n_layers} layers, its weights have {name}")
    return Weights(model.eval(), tokenizer)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """SHA-256 over names and hashes of config.json and each `*.safetensors`, as 64 hex digits.

    These decide what a model computes of tokens: `read_folder` reads weights from no other file.
    """
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    lines = [f"{path.name} {file_sha256(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
