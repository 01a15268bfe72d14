"""A Hugging Face hub on this machine, which can be told to fail."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
import time

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FROM_HUB = {"X-Repo-Commit": COMMIT}
REFUSING = "http://127.0.0.1:1"  # nobody listens there


@contextlib.contextmanager
def serving(answer):
    """The address of a server; `answer(path)` gives status, headers, and content or its writer.

    A writer gets the file that the client reads from; a None for an answer hangs up.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answered = answer(self.path)
            if answered is None:
                self.close_connection = True
                return
            status, headers, content = answered
            if isinstance(content, bytes):
                headers = {**headers, "Content-Length": str(len(content))}
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                with contextlib.suppress(OSError):  # the client has gone
                    self.wfile.write(content) if isinstance(content, bytes) else content(self.wfile)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.daemon_threads = True
    server.block_on_close = False
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def always(status, headers):
    return serving(lambda path: (status, headers, b""))


def a_hub(folder, asked, spoil=lambda path, answered: answered, revisions=None):
    """A hub: `folder` is each of its repositories, but "nobody" has none, and one is "gated".

    `spoil` gets each path and the answer, and gives the answer to send. `revisions` are those that
    repositories have beside: commit and folder, by repository and name.
    """
    revisions = revisions or {}

    def place(path):
        """Commit and folder that a path is about; None for a revision that is not there."""
        for (repo_id, revision), (commit, there) in revisions.items():
            if repo_id in path and (f"/{revision}" in path or commit in path):
                return commit, there
        named = re.search(r"/(?:revision|resolve|tree)/(step\w+)", path)
        return None if named else (COMMIT, folder)

    def answer(path):
        asked.append(path)
        path = path.split("?")[0].strip("/")
        if "nobody/" in path:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if "gated/" in path:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if path.endswith("/refs"):
            names = [name for repo_id, name in revisions if repo_id in path]
            named = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": COMMIT} for n in names]
            return 200, {}, json.dumps({"branches": named, "converts": [], "tags": []}).encode()
        if (at := place(path)) is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        commit, there = at
        files = {file.name: file.read_bytes() for file in sorted(there.iterdir())}
        if "/tree/" in path:
            facts = {"type": "file", "oid": "0"}
            tree = [{"path": name, "size": len(files[name]), **facts} for name in files]
            return 200, {}, json.dumps(tree).encode()
        if path.startswith("api/models/"):
            repo_id = "/".join(path.split("/")[2:4])
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}
            return 200, {}, json.dumps(info).encode()
        content = files.get(path.rpartition("/")[2])
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{published(content)}"', "X-Repo-Commit": commit}, content

    return serving(lambda path: spoil(path, answer(path)))


def published(content):
    """The hash that the hub gives for a file: git's for a small one, SHA-256 for a large one."""
    if len(content) < 10_000:
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.sha256(content).hexdigest()


def slowly(content, n_bytes, seconds):
    """A writer that sends so many bytes at a time, so many seconds apart."""

    def write(file):
        for i in range(0, len(content), n_bytes):
            file.write(content[i : i + n_bytes])
            file.flush()
            time.sleep(seconds)

    return write


def at_first(content, n_bytes, then=0):
    """A writer that sends the first bytes at once, and hangs up after so many seconds."""

    def write(file):
        file.write(content[:n_bytes])
        file.flush()
        time.sleep(then)

    return write
