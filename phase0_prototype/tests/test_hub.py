"""From a name to a directory. A small server stands in for the hub; the line without network is the real one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from phase0_prototype import hub
from phase0_prototype.errors import UserError
from phase0_prototype.hub import resolve_model

COMMIT = "c" * 40
CONFIG = b'{"architectures": ["LlamaForCausalLM"]}'


class Hub(BaseHTTPRequestHandler):
    """Knows `good/model` with a few files; `gated/model` refuses; nothing else exists."""

    def do_GET(self) -> None:
        self.respond(body=True)

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def respond(self, *, body: bool) -> None:
        status, code, content = 404, "RepoNotFound", b"{}"
        if "/gated/model" in self.path:
            status, code = 403, "GatedRepo"
        elif "/revision/nowhere" in self.path:
            code = "RevisionNotFound"
        elif self.path.endswith("config.json"):
            status, code, content = 200, "", CONFIG
        elif "/good/model/tree" in self.path:
            files = ["config.json", "original/config.json", "pytorch_model.bin"]
            entries = [{"type": "file", "path": f, "size": len(CONFIG), "oid": "0" * 40} for f in files]
            status, code, content = 200, "", json.dumps(entries).encode()
        elif "/api/models/good/model" in self.path:
            names = ["config.json", "original/config.json", "pytorch_model.bin"]
            info = {"id": "good/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            status, code, content = 200, "", json.dumps(info).encode()
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"' + "e" * 40 + '"')
        self.send_header("Content-Length", str(len(content)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


ASK = """
    import json, sys
    from phase0_prototype import hub
    from phase0_prototype.errors import UserError

    hub.TIMEOUT_S = 1.0
    answers = []
    for model, revision in json.loads(sys.argv[1]):
        try:
            answers.append("found " + str(hub.resolve_model(model, revision=revision)))
        except UserError as error:
            answers.append(str(error))
    print(json.dumps(answers))
"""


def ask(home: Path, questions: list[tuple[str, str | None]], **environment: str) -> list[str]:
    """Resolve in a process of its own: huggingface_hub reads its environment when it is imported."""
    variables = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ASK), json.dumps(questions)],
        env=variables | {"HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    answers: list[str] = json.loads(done.stdout.splitlines()[-1])
    assert not any("\n" in answer for answer in answers)
    return answers


def test_directory_is_used_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


def test_shipped_model_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SHIPPED", {"titan-tiny": tmp_path})
    with pytest.raises(UserError, match="titan-tiny is not in this installation"):
        resolve_model("titan-tiny")
    (tmp_path / "config.json").write_bytes(CONFIG)
    assert resolve_model("titan-tiny") == tmp_path


@pytest.mark.parametrize("name", ["titan-tny", "/no/such/place", "./no/place", "a/b/c", "", Path("no/place")])
def test_name_that_is_nothing_lists_what_it_could_be(name: str | Path) -> None:
    with pytest.raises(UserError, match=r"neither a directory.*titan-tiny.*hub id"):
        resolve_model(name)


def test_file_asks_for_its_directory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="give the directory"):
        resolve_model(tmp_path / "model.safetensors")


def test_hub_id_is_downloaded_once_and_then_needs_no_network(endpoint: str, tmp_path: Path) -> None:
    (answer,) = ask(tmp_path, [("good/model", None)], HF_ENDPOINT=endpoint)
    assert answer.startswith("found ")
    directory = Path(answer.removeprefix("found "))
    assert (directory / "config.json").read_bytes() == CONFIG
    assert not (directory / "pytorch_model.bin").exists()
    assert not (directory / "original").exists()
    offline = ask(tmp_path, [("good/model", None), ("good/other", None)], HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    assert offline[0] == answer
    assert "HF_HUB_OFFLINE is set" in offline[1]


def test_refusals_of_the_hub_are_one_line_with_the_remedy(endpoint: str, tmp_path: Path) -> None:
    questions = [("gated/model", None), ("no/model", None), ("good/model", "nowhere")]
    gated, unknown, revision = ask(tmp_path, questions, HF_ENDPOINT=endpoint)
    assert "gated" in gated and "licence" in gated and "HF_TOKEN" in gated
    assert "no/model is neither a directory nor a model" in unknown
    assert "no revision 'nowhere'" in revision


@pytest.mark.parametrize("listening", [False, True])
def test_without_network_one_line_says_so_within_seconds(listening: bool, tmp_path: Path) -> None:
    """Nobody listens on the port, or whoever does never answers."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        if listening:
            mute.listen()
        started = time.monotonic()
        (answer,) = ask(tmp_path, [("good/model", None)], HF_ENDPOINT=f"http://127.0.0.1:{mute.getsockname()[1]}")
    assert time.monotonic() - started < 10  # the timeout is 1 s here, 4 s for users
    assert "no network?" in answer and "local directory" in answer and "HF_HOME" in answer
