"""The server of `opd view`: who may read, what an address can name, and a page that follows a run at work."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.run_folders import FakeRun, write
from support.serving import serving

from opd.errors import ConfigError, RunError
from opd.viewer import pack
from opd.viewer.live import Live
from opd.viewer.serve import Server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write(tmp_path / "run", planned=40)


@pytest.fixture
def server(run: Path) -> Iterator[Server]:
    with serving(run) as made:
        yield made


def ask(server: Server, path: str, *, method: str = "GET", cookie: str | None = "own", **headers: str) -> Any:
    """(status, headers, body) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    given = {"Host": f"127.0.0.1:{server.port}", **{name.replace("_", "-"): value for name, value in headers.items()}}
    if cookie is not None:
        given["Cookie"] = f"{server.cookie}={server.token if cookie == 'own' else cookie}"
    connection.request(method, path, headers=given)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_address_gives_cookie_and_leaves_token_behind(server: Server):
    path = server.address.partition(str(server.port))[2]
    status, headers, _ = ask(server, path, cookie=None)
    assert (status, headers["Location"]) == (303, "/")
    assert "HttpOnly; SameSite=Strict" in headers["Set-Cookie"]
    assert headers["Set-Cookie"].startswith(f"opd{server.port}={server.token};")
    assert len(server.token) >= 32  # 192 bits


@pytest.mark.parametrize("path", ["/", "/state", "/data/0", "/block/0-curves", "/?token=wrong", "/nothing"])
@pytest.mark.parametrize("cookie", [None, "wrong", ""])
def test_reader_without_token_gets_401(server: Server, path: str, cookie: str | None):
    status, headers, body = ask(server, path, cookie=cookie)
    assert status == 401
    assert b"opd view printed" in body
    assert "Set-Cookie" not in headers


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.example.org:{port}", ""])
def test_other_host_gets_421(server: Server, host: str):
    assert ask(server, "/state", Host=host.format(port=server.port))[0] == 421


def test_localhost_is_this_host(server: Server):
    assert ask(server, "/state", Host=f"localhost:{server.port}")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_but_get_is_answered(server: Server, method: str):
    assert ask(server, "/state", method=method)[0] == 501


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/recipe.yaml",
            "/../run/recipe.yaml",
            "/block/../state",
            "/block/0-%2e%2e",
            "/block/9-curves",
            "/block/0-s7",
        ),
        *("/since/0/x", "/since/0", "/since/9/0", "/data/9", "/data/x", "/row/0-s5-0", "/row/0-s5-99?tokens=0-1"),
        *("/row/0-held_x-0?tokens=0-1", "/row/0-s5-0?tokens=0-1,", "/row/0-h-0?tokens=0-1"),
    ],
)
def test_address_without_content_gets_404(server: Server, path: str):
    assert ask(server, path)[0] == 404


def test_answers_are_not_stored_and_not_framed(server: Server):
    for path in ("/", "/state", "/block/0-curves"):
        _, headers, _ = ask(server, path)
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert "Access-Control-Allow-Origin" not in headers


def test_page_holds_no_block_and_may_load_from_here(server: Server):
    body = ask(server, "/")[2].decode()
    assert "connect-src &#39;self&#39;" in body
    assert 'type="text/plain"' not in body


def test_state_is_sent_once(server: Server):
    status, headers, body = ask(server, "/state")
    assert (status, json.loads(body)["stages"][0]["made"]) == (200, 20)
    assert ask(server, "/state", If_None_Match=headers["ETag"])[::2] == (304, b"")


def append(run: Path, step: int, text: str = "\n") -> None:
    with (run / "distil" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "train/loss": float(step)}) + text)


def test_new_lines_are_sent_alone(server: Server, run: Path):
    append(run, 21)
    append(run, 22)
    append(run, 23, text="")  # a line that is not complete
    assert json.loads(ask(server, "/state")[2])["stages"][0]["made"] == 22
    found = json.loads(ask(server, "/since/0/20")[2])
    place, values = found["lines"]["y"]["train/loss"]
    assert (found["lines"]["x"][place], values, found["made"]) == ([21, 22], [21.0, 22.0], 22)


def test_run_that_began_again_has_fewer_steps(server: Server, run: Path):
    ask(server, "/state")
    file = run / "distil" / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.with_suffix(".new").write_bytes(b"".join(line for line in lines if json.loads(line)["step"] <= 10))
    file.with_suffix(".new").replace(file)
    assert json.loads(ask(server, "/state")[2])["stages"][0]["made"] == 10


def test_stage_that_begins_later_is_in_state(server: Server, run: Path):
    recipe = (run / "recipe.yaml").read_text()
    stage = recipe[recipe.index("- name: distil") :]
    (run / "recipe.yaml").write_text(recipe + stage.replace("distil", "again"))
    (run / "again").mkdir()
    (run / "again" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    assert [one["name"] for one in json.loads(ask(server, "/state")[2])["stages"]] == ["distil", "again"]
    assert ask(server, "/block/1-curves")[0] == 200


@pytest.mark.parametrize("name", ["0-curves", "0-held", "0-s20"])
def test_blocks_open_as_those_of_a_report(server: Server, name: str):
    head, _ = pack.opened(ask(server, f"/block/{name}")[2])
    assert head.get("lines") or head["rows"]


def test_every_response_of_a_file_is_sent(server: Server, run: Path):
    head, _ = pack.opened(ask(server, "/block/0-s20")[2])
    table = pq.read_table(run / "distil" / "samples" / "step_000020.parquet")
    trained = [i for i, pick in enumerate(table["pick"].to_pylist()) if pick != "follow"]
    assert [row["id"] for row in head["rows"]] == [table["prompt_id"][i].as_py() for i in trained]


def test_long_response_is_loaded_by_parts(tmp_path: Path):
    run = write(tmp_path / "long", FakeRun(tokens=40_000, rows=8, steps=2, every=2, prompts=1))
    live = Live(run)
    block = live.block("0-s2")
    assert block is not None
    head, _ = pack.opened(block)
    row = head["rows"][0]
    file, place = row["place"]
    assert len(row["parts"]) > 1
    assert sum(b - a for a, b in row["parts"]) < row["length"] == 40_000
    start = row["parts"][0][1]
    spans = ",".join(f"{a}-{b}" for a, b in [*row["parts"], (start, start + 2048)])
    part = live.row(f"0-{file}-{place}", spans)
    assert part is not None
    got, columns = pack.opened(part)
    again = got["rows"][0]
    assert again["parts"][0] == [0, start + 2048]
    ids = pq.read_table(run / "distil" / "samples" / "step_000002.parquet")["response_ids"][place].as_py()
    vocabulary = [token[0] for token in got["vocabulary"]]
    kept = [ids[t] for a, b in again["parts"] for t in range(a, b)]
    assert [vocabulary[i] for i in columns["token"]] == kept
    whole, _ = pack.opened(live.row(f"0-{file}-{place}", "0-40000") or b"")
    assert "place" not in whole["rows"][0]


def test_folder_without_run_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match=r"is no run's folder: it has no recipe\.yaml"):
        Live(tmp_path)
    run = write(tmp_path / "empty")
    for file in (run / "distil").glob("*.json*"):
        file.unlink()
    with pytest.raises(ConfigError, match="holds no step of any stage yet"):
        Live(run)


def test_port_in_use_is_refused(server: Server, run: Path):
    with pytest.raises(RunError, match=f"Port {server.port} of 127.0.0.1 cannot be used"):
        Server(Live(run), server.port)


def test_run_is_read_and_not_changed(server: Server, run: Path):
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    for path in ("/", "/state", "/data/0", "/block/0-held", "/block/0-s20", "/block/0-follow"):
        ask(server, path)
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before
