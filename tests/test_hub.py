"""The hub answering, refusing, silent; and a download through huggingface_hub from a stand-in."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from stand_in_hub import COMMIT, FROM_HUB, REFUSING, a_hub, always

from utils.models.hub import hub_trouble
from utils.session import ROOT

pytestmark = pytest.mark.timeout(300)  # whatever waits for a hub ends


def address(listener):
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def silent(connects):
    """An address that never answers: it takes the connection, or drops even its first packet."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=5 * connects))
        for _ in range(0 if connects else 8):  # a full queue: the kernel drops what else comes
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield address(listener)


@pytest.fixture
def ask(monkeypatch):
    """Whether the hub at an address answers, asked afresh and past any proxy, in 15 seconds."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    huggingface_hub.close_session()

    def asking(endpoint):
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        hub_trouble.cache_clear()
        start = time.monotonic()
        trouble = hub_trouble()
        assert time.monotonic() - start < 15
        return not trouble

    yield asking
    huggingface_hub.close_session()
    hub_trouble.cache_clear()


@pytest.mark.parametrize("offline", [False, True])
def test_it_is_asked_once_and_offline_never(ask, monkeypatch, random_gpt2_folder, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with a_hub(random_gpt2_folder, asked := []) as endpoint:
        assert ask(endpoint) is not offline
    assert bool(hub_trouble()) is offline  # although nobody is there any more
    assert len(asked) == (not offline)


def test_a_redirect_of_the_hub_is_followed(ask):
    with always(200, {}) as there, always(307, {"Location": there, **FROM_HUB}) as endpoint:
        assert ask(endpoint) is True


REFUSED = contextlib.nullcontext(REFUSING)


@pytest.mark.parametrize("nobody", [lambda: REFUSED, lambda: silent(True), lambda: silent(False)])
def test_refused_connections_and_silently_dropped_packets(ask, nobody):
    with nobody() as endpoint:
        assert ask(endpoint) is False


def test_name_look_up_that_hangs(ask, monkeypatch):
    released, asked = threading.Event(), []

    def hang(host, *arguments, **options):
        asked.append(host)
        released.wait(30)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    assert ask("http://hub.invalid") is False
    released.set()
    assert asked in (["hub.invalid"], [b"hub.invalid"])


@pytest.mark.parametrize(
    "status, headers, answer",
    [
        (404, {"X-Error-Code": "RepoNotFound"}, True),  # a hub that has no GPT-2
        (200, {}, False),  # a login page
        (503, FROM_HUB, False),  # a hub out of order
        (500, {}, False),
        (302, {"Location": "/login"}, False),  # endlessly
    ],
)
def test_answers_of_hubs_and_others(ask, status, headers, answer):
    with always(status, headers) as endpoint:
        assert ask(endpoint) is answer


# --- whole loads, each in a process of its own: huggingface_hub reads its settings at import

SCRIPT = """
import json, sys, time, torch
from utils.models import download, load_model, model_label, weights_digest
download.PINNED.clear()  # the stand-in has other weights
tokens = torch.arange(50).reshape(2, 25)
for name in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        model = load_model(name, device="cpu")
        values = model(tokens).log_softmax(-1)[0, :5, 7]
        result = [model_label(model), weights_digest(model), values.tolist()]
    except Exception as error:
        result = [type(error).__name__, str(error)]
    print("RESULT", json.dumps([name, time.monotonic() - start, *result]))
"""


def load_in_a_process(names, endpoint, home):
    """{name: (seconds, label or error, digest or message, ...)} and all that was printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MECH_"))}
    environment.update(HF_ENDPOINT=endpoint, HF_HOME=str(home), NO_PROXY="*")
    command = [sys.executable, "-c", SCRIPT, json.dumps(names)]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, env=environment, **options)
    assert done.returncode == 0, done.stderr
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return {name: rest for name, *rest in map(json.loads, lines)}, done.stdout


def test_download_then_the_same_without_the_hub(random_gpt2_folder, random_gpt2, tmp_path):
    (random_gpt2_folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody should fetch")
    asked, names = [], ["someone/tiny", None, "nobody/nothing", "gated/model"]
    with a_hub(random_gpt2_folder, asked) as endpoint:
        online, printed = load_in_a_process(names, endpoint, tmp_path)
    (random_gpt2_folder / "pytorch_model.bin").unlink()

    expected = random_gpt2(torch.arange(50).reshape(2, 25)).log_softmax(-1)[0, :5, 7]
    for name, label in [("someone/tiny", "someone-tiny"), (None, "gpt2-small")]:
        _, found, digest, values = online[name]  # an error has no values
        assert (found, digest) == (label, COMMIT)
        assert torch.allclose(torch.tensor(values), expected, atol=1e-3)
    assert f"Weights: Hugging Face hub, someone/tiny at commit {COMMIT[:12]}." in printed
    for name in ("nobody/nothing", "gated/model"):
        _, error, message = online[name]
        assert error == "ValueError" and "no such model or revision on the hub" in message
        assert name in message and "set HF_TOKEN" in message
    assert any("model.safetensors" in path for path in asked)
    assert not any("pytorch_model.bin" in path for path in asked)

    offline, _ = load_in_a_process([*names, "gpt2-small"], REFUSING, tmp_path)
    assert offline["someone/tiny"][1:] == online["someone/tiny"][1:]
    assert offline[None][1] == offline["gpt2-small"][1] == "gpt2-small"
    assert offline["nobody/nothing"][1] == "ConnectionError"
    assert offline["nobody/nothing"][0] < 10


def test_silent_hub_and_empty_cache(tmp_path, smollm2):
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listener:
        names = ["gpt2-small", "any/other", None]
        results, printed = load_in_a_process(names, address(listener), tmp_path)
        listener.setblocking(False)
        listener.accept()[0].close()
        with pytest.raises(BlockingIOError):  # asked once: nothing else tried and waited
            listener.accept()
    for name in ("gpt2-small", "any/other"):
        _, error, message = results[name]
        assert error == "ConnectionError" and 'load_model("smollm2-135m")' in message
    assert results["gpt2-small"][0] < 10  # and the second was not asked again: see above
    assert results[None][1] == "smollm2-135m"
    assert printed.count("Using SmolLM2-135M-Instruct in place of GPT-2 small: openai") == 1
    assert "hub does not answer (silent for 4.5 s)" in printed


def test_an_unfinished_download_is_not_taken_for_a_model(tmp_path):
    snapshot = tmp_path / f"hub/models--openai-community--gpt2/snapshots/{COMMIT}"
    references = snapshot.parents[1] / "refs"
    for folder in (snapshot, references):
        folder.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "gpt2"}')
    (references / "main").write_text(COMMIT)
    results, _ = load_in_a_process(["gpt2-small"], REFUSING, tmp_path)
    assert results["gpt2-small"][1] == "ConnectionError"
