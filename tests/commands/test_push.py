"""`opd push` against a local server that speaks the hub's protocol: what is sent, and what each refusal says."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.runs import ENVIRONMENT, Ended, command, tiny_model

from opd.commands.push import folder_of
from opd.errors import ConfigError
from opd.models import saving
from opd.models.loading import load_model
from opd.recipe.schema import ModelSpec

REPO = "some-owner/a-model"


class Hub(ThreadingHTTPServer):
    """Keeps what it receives: bodies by path, and the files of the commit. `refuses` answers 403 to a path's start."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.bodies: dict[str, Any] = {}
        self.tokens: set[str | None] = set()
        self.blobs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.refuses = ""


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_request(self, *_: Any) -> None:
        pass

    def reply(self, body: Any, code: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks: list[bytes] = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rpartition("/")[2]] = self.content()
        self.reply({})

    def do_POST(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        raw = self.content()
        lines = [json.loads(line) for line in raw.splitlines() if line.strip()]
        hub.bodies[path] = lines if path.endswith("/commit/main") else lines[0]
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refuses and path.startswith(hub.refuses):
            self.reply({"error": "You don't have the rights to create a model under this namespace"}, 403)
        elif path == "/api/repos/create":
            self.reply({"url": f"{hub.url}/{REPO}", "name": REPO, "id": REPO})
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif path == f"/api/models/{REPO}/preupload/main":
            modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in lines[0]["files"]}
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            self.reply({"files": files})
        elif path == f"/{REPO}.git/info/lfs/objects/batch":
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/blob/{one['oid']}", "header": {}}}}
                for one in lines[0]["objects"]
            ]
            self.reply({"transfer": "basic", "objects": objects})
        elif path == f"/api/models/{REPO}/commit/main":
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.blobs[value["oid"]]
            self.reply({"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.url}/{REPO}/commit/{'0' * 40}"})
        else:
            self.reply({"error": f"no such address {path}"}, 404)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with the stages `first`, with model and adapter, and `second`, which finished later, with a model."""
    monkeypatch.chdir(tmp_path)
    folder = Path("run")
    for number, stage in enumerate(("first", "second")):
        lm = load_model(ModelSpec(**tiny_model(number)), name="student")
        saving.save(lm, folder / stage / "model")
        (folder / stage / "model/README.md").write_text(f"---\nlibrary_name: transformers\n---\n# {stage}\n")
        (folder / stage / "done.json").write_text("{}")
        os.utime(folder / stage / "done.json", (1e9 + number, 1e9 + number))
    (folder / "first/adapter").mkdir()
    (folder / "first/adapter/adapter_config.json").write_text("{}")
    (folder / "recipe.yaml").write_text("name: tiny\n")
    return folder


def push(*arguments: str, endpoint: str, token: str | None = "hf_secret", **environment: str) -> Ended:
    """`opd push` in a process of its own: huggingface_hub reads its endpoint when it is imported."""
    set_here = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": "home"}
    inherited = {
        name: value for name, value in ENVIRONMENT.items() if name not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    }
    done = subprocess.run(
        [sys.executable, "-m", "opd", "push", *arguments],
        env={**inherited, **set_here, **({} if token is None else {"HF_TOKEN": token}), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def test_push_uploads_every_file_to_private_repository(run: Path, hub: Hub):
    ended = push("run", REPO, endpoint=hub.url)
    assert ended.code == 0, ended.err
    created = hub.bodies["/api/repos/create"]
    assert (created["organization"], created["name"], created["visibility"]) == ("some-owner", "a-model", "private")
    assert hub.tokens == {"Bearer hf_secret"}
    folder = run / "second/model"
    assert hub.files == {file.name: file.read_bytes() for file in folder.iterdir()}
    weights = (folder / "model.safetensors").read_bytes()
    assert hub.blobs == {hashlib.sha256(weights).hexdigest(): weights}
    assert f"uploaded to {hub.url}/{REPO}" in ended.out
    assert "hf_secret" not in ended.out + ended.err


def test_push_uploads_chosen_stage_to_public_repository(run: Path, hub: Hub):
    ended = push("run", REPO, "--stage", "first", "--adapter", "--public", endpoint=hub.url)
    assert ended.code == 0, ended.err
    assert hub.bodies["/api/repos/create"]["visibility"] == "public"
    assert hub.files == {"adapter_config.json": b"{}"}


def test_push_reports_refusal_of_hub(run: Path, hub: Hub):
    hub.refuses = "/api/repos/create"
    ended = push("run", REPO, endpoint=hub.url)
    assert ended.code == 1
    assert ended.err.startswith(f"RunError: opd push: the hub refused {REPO} (")
    assert "You don't have the rights to create a model under this namespace" in ended.err
    assert "Traceback" not in ended.err
    assert hub.files == {}


def test_push_reports_missing_network(run: Path):
    ended = push("run", REPO, endpoint="http://127.0.0.1:9")  # a port that nothing listens on
    assert ended.code == 1
    assert ended.err.startswith("RunError: opd push: http://127.0.0.1:9 could not be reached")
    assert "Traceback" not in ended.err


def test_push_reports_offline_mode(run: Path, hub: Hub):
    ended = push("run", REPO, endpoint=hub.url, HF_HUB_OFFLINE="1")
    assert ended.code == 1
    assert "HF_HUB_OFFLINE" in ended.err
    assert hub.bodies == {}


def test_push_refuses_without_token(run: Path, hub: Hub):
    ended = push("run", REPO, endpoint=hub.url, token=None)
    assert ended.code == 2
    assert "found none. Set HF_TOKEN, or run `hf auth login`" in ended.err
    assert hub.bodies == {}


def test_push_only_lists_files_when_dry_run(run: Path, hub: Hub):
    ended = push("run", REPO, "--dry-run", endpoint=hub.url, token=None)
    assert ended.code == 0, ended.err
    listed = {line.split()[-1] for line in ended.out.splitlines()[:-1]}
    assert listed == {file.name for file in (run / "second/model").iterdir()}
    assert ended.out.splitlines()[-1].endswith(f"would be uploaded to {hub.url}/{REPO}. Nothing was sent.")
    assert hub.bodies == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "bad//name"), "cannot be a repository's name"),
        (("run", REPO, "--stage", "secnd"), "no finished stage 'secnd'. Did you mean 'second'?"),
        (("run", REPO, "--adapter"), "run/second has no adapter folder"),
        (("run/first", REPO), "run/first is neither a run's folder (with recipe.yaml) nor a model's folder"),
        (("run/first/model", REPO, "--adapter"), "is a model's folder, so leave out --stage and --adapter"),
    ],
)
def test_push_refuses_wrong_arguments(run: Path, arguments: tuple[str, ...], message: str):
    ended = command("push", *arguments, "--dry-run")
    assert ended.code == 2
    assert message in ended.err


def test_folder_of_takes_last_finished_stage(run: Path):
    assert folder_of(run, None, None) == run / "second/model"
    assert folder_of(run, "first", None) == run / "first/model"
    assert folder_of(run / "first/model", None, None) == run / "first/model"
    for done in run.glob("*/done.json"):
        done.unlink()
    with pytest.raises(ConfigError, match="no stage of run has finished"):
        folder_of(run, None, None)


def test_help_lists_push():
    assert "Upload a finished stage's model" in command("--help").out
