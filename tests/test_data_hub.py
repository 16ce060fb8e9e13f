"""Data sets by name, from a hub that this test runs itself: real HTTP, real huggingface_hub."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fbs_rl.data import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "README.md": b"# card",
    "data/train-00000.jsonl": b'{"text": "train text"}\n',
    "data/test-00000.jsonl": b'{"text": "test text"}\n',
}


class Hub(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks about datasets/someone/corpus, and 404 to all else."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0]
        api, files = "/api/datasets/someone/corpus", f"/datasets/someone/corpus/resolve/{COMMIT}/"
        if path in (api, f"{api}/revision/main"):
            siblings = [{"rfilename": name} for name in FILES]
            self._send(
                json.dumps({"id": "someone/corpus", "sha": COMMIT, "siblings": siblings}).encode(),
                with_body,
            )
        elif path.startswith(files) and path.removeprefix(files) in FILES:
            self._send(FILES[path.removeprefix(files)], with_body)
        else:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, body: bytes, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ask(words: list[str], home: Path, endpoint: str, **more: str) -> tuple[list[list[str]], str]:
    """What `hub.download` returns for the words in a process of its own, and what it raised."""
    program = (
        "import json, sys\nfrom fbs_rl.data import hub\n"
        "try: print(json.dumps([p for w in sys.argv[1:] for p in hub.download(w)]))\n"
        "except OSError as error: print('[]'); print(type(error).__name__, error, file=sys.stderr)\n"
    )
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PATH": "/usr/bin:/bin", **more}
    made = subprocess.run(
        [sys.executable, "-c", program, *words],
        env=environment, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    return json.loads(made.stdout.splitlines()[-1]), made.stderr


def test_files_of_a_data_set_become_local_files(endpoint: str, tmp_path: Path) -> None:
    words = ["hf:someone/corpus", "hf:someone/corpus/data/test-*", "hf:someone/corpus/*.jsonl"]
    found, errors = ask(words, tmp_path, endpoint)
    names = [f"hf:someone/corpus@{COMMIT}/data/{split}-00000.jsonl" for split in ("train", "test")]
    assert [name for _, name in found] == [names[0], names[1], names[1], names[0]], errors
    for path, name in found:
        assert Path(path).read_bytes() == FILES[name.split("/", 2)[2]]


def test_what_the_hub_does_not_have(endpoint: str, tmp_path: Path) -> None:
    found, errors = ask(["hf:someone/nothing"], tmp_path, endpoint)
    assert found == [] and "the hub has no data set someone/nothing" in errors
    found, errors = ask(["hf:someone/corpus/*.parquet"], tmp_path, endpoint)
    assert found == [] and "no file of a known format that matches *.parquet" in errors


def test_without_a_network_it_fails_within_seconds(tmp_path: Path) -> None:
    started = time.monotonic()
    found, errors = ask(["hf:someone/corpus"], tmp_path, "http://127.0.0.1:9")
    assert found == [] and "which cannot be reached from here" in errors
    found, errors = ask(["hf:someone/corpus"], tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert found == [] and "HF_HUB_OFFLINE is set" in errors
    assert time.monotonic() - started < 30


def test_a_name_needs_an_owner() -> None:
    with pytest.raises(ValueError, match="write hf:OWNER/NAME"):
        hub.download("hf:corpus")
