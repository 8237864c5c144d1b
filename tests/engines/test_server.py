"""The client of a served model: connections, proxies, limits, and a key that is shown nowhere."""

from __future__ import annotations

import gzip
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.http_server import Said
from support.judges import SECRET, completion, serving
from support.judges import Server as RealServer

from opd.engines import server as module
from opd.engines.server import Answer, BodyError, Connection, Server, proxy_of
from opd.errors import ConfigError


def rule(text: str) -> Said:
    return completion(f"about {text}")


@pytest.fixture
def real() -> Iterator[RealServer]:
    with serving(rule, keeps_connections=True) as one:
        yield one


def client(real: RealServer, **settings: Any) -> Server:
    return Server(url=real.url, **{"timeout_s": 5.0, "patience_s": 5.0, "backoff_s": 0.01, **settings})


def text_of(raw: bytes) -> str:
    return json.loads(raw)["choices"][0]["message"]["content"]


def post(connection: Connection, text: str = "?") -> Answer[str]:
    return connection.post("chat/completions", {"messages": [{"content": text}]}, text_of)


def posted(server: Server) -> Answer[str]:
    with server.connected() as connection:
        return post(connection)


# --- connections -----------------------------------------------------------------------------------------------------


def test_connected_shares_its_connections_between_threads(real: RealServer):
    with client(real, concurrency=3).connected() as connection, ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda i: post(connection, str(i)), range(24)))
    assert answers == [Answer(value=f"about {i}") for i in range(24)]
    assert real.connections <= 3


def test_post_notices_a_connection_that_was_closed(real: RealServer):
    """The server closes after each answer and does not say so; no request is lost, none is sent twice."""
    real.rule = lambda text: Said(body=rule(text).body, then_close=True)
    with client(real, retries=0).connected() as connection:
        for _ in range(3):
            assert post(connection) == Answer(value="about ?")
            time.sleep(0.05)
    assert real.connections == len(real.requests) == 3


def test_post_does_not_reuse_an_idle_connection(real: RealServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "IDLE_S", 0.05)
    with client(real).connected() as connection:
        post(connection)
        time.sleep(0.2)
        post(connection)
    assert real.connections == 2


def test_post_uses_a_new_connection_after_a_failure(real: RealServer):
    real.script = [rule("?"), Said(hang_up=True), Said(status=500, body=b"x" * (1 << 20)), rule("?")]
    with client(real).connected() as connection:
        assert post(connection).requests == 1
        assert post(connection) == Answer(value="about ?", requests=3)
    assert real.connections == 3


def test_connected_keeps_no_cookie(real: RealServer):
    real.rule = lambda text: Said(body=rule(text).body, headers=(("Set-Cookie", "who=you; Path=/"),))
    with client(real).connected() as connection:
        assert [post(connection).value for _ in range(2)] == ["about ?"] * 2
    assert all("Cookie" not in headers for headers in real.headers)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_post_fails_when_the_body_is_too_large(real: RealServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LARGEST_BODY", 1000)
    real.rule = lambda text: completion("x" * 2000)
    assert posted(client(real, retries=1)) == Answer(failure="the answer has more than 1000 bytes", requests=2)


def test_post_gives_up_an_error_that_trickles(real: RealServer):
    real.script = [Said(status=400, body=b"not so " * 500, trickle_s=0.05)]
    started = time.monotonic()
    failure = posted(client(real, timeout_s=0.5)).failure
    assert time.monotonic() - started < 30
    assert failure is not None
    assert failure.startswith("HTTP 400: not")


def test_post_reports_the_reason_when_an_error_is_empty(real: RealServer):
    real.script = [Said(status=404, body=b"")]
    assert posted(client(real)).failure == "HTTP 404: Not Found"


def test_post_requests_uncompressed_body(real: RealServer):
    posted(client(real))
    assert real.headers[0]["Accept-Encoding"] == "identity"


def test_post_tries_again_when_read_refuses_the_body(real: RealServer):
    def read(raw: bytes) -> str:
        if gzip.decompress(raw) == b"no":
            raise BodyError(f"it says no, and {SECRET}")
        return "yes"

    real.script = [Said(body=gzip.compress(b"no")), Said(body=gzip.compress(b"yes"))]
    with client(real, key=SECRET, retries=1).connected() as connection:
        assert connection.post("chat/completions", {"messages": [{"content": ""}]}, read).requests == 2
        real.script = [Said(body=gzip.compress(b"no"))] * 2
        refused = connection.post("chat/completions", {"messages": [{"content": ""}]}, read)
    assert refused == Answer(failure="it says no, and [key]", requests=2)


@pytest.mark.parametrize("host", ["a..b", "localhost:99999", "localhost:x"])
def test_post_fails_when_the_address_cannot_be_used(host: str):
    answer = posted(Server(url=f"http://{host}/v1", retries=1, backoff_s=0.01))
    assert answer.requests == 2
    assert str(answer.failure).startswith("no connection (")


# --- the key ---------------------------------------------------------------------------------------------------------


def test_post_logs_no_key(real: RealServer, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    real.script = [rule("?"), Said(hang_up=True), Said(status=401, body={"error": SECRET})]
    with client(real, key=SECRET).connected() as connection:
        answers = [post(connection) for _ in range(2)]
        assert real.headers[0]["Authorization"] == f"Bearer {SECRET}"
        assert SECRET not in repr(answers) + repr(connection) + repr(connection.client.headers)
    assert "HTTP Request: POST" in caplog.text
    assert SECRET not in caplog.text


def test_shown_cuts_no_key_in_half(real: RealServer):
    server = client(real, key=SECRET)
    for spaces in range(1200 - len(SECRET), 1201):
        assert "sk-" not in server.shown(b" " * spaces + SECRET.encode())


@pytest.mark.parametrize("key", [f"{SECRET}\n", f" {SECRET}", f"{SECRET}\N{EURO SIGN}"])
def test_server_refuses_a_key_that_no_header_carries(key: str):
    with pytest.raises(ConfigError, match="an HTTP header cannot hold") as refused:
        Server(url="http://host/v1", key=key)
    assert SECRET not in str(refused.value)


# --- proxies ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_post_goes_through_the_proxy_of_the_environment(real: RealServer, no_proxies: pytest.MonkeyPatch, scheme: str):
    no_proxies.setenv("http_proxy", real.url.replace("http://", scheme).removesuffix("/v1"))
    assert posted(Server(url="http://judge.invalid/v1", retries=0)) == Answer(value="about ?")
    assert real.targets == ["http://judge.invalid/v1/chat/completions"]


def test_post_goes_to_the_server_when_no_proxy_names_it(real: RealServer, no_proxies: pytest.MonkeyPatch):
    no_proxies.setenv("http_proxy", "http://nobody.invalid:1")
    no_proxies.setenv("no_proxy", "127.0.0.1")
    assert posted(client(real)) == Answer(value="about ?")


def test_post_ignores_a_socks_proxy_for_all(real: RealServer, no_proxies: pytest.MonkeyPatch):
    no_proxies.setenv("all_proxy", "socks5://nobody.invalid:1")
    assert posted(client(real)) == Answer(value="about ?")


@pytest.mark.parametrize("address", ["socks5://me:{}@host:1", "http://me:{}@host:port", "ftp://me:{}@host"])
def test_proxy_of_refuses_non_http_proxy(no_proxies: pytest.MonkeyPatch, address: str):
    no_proxies.setenv("https_proxy", address.format(SECRET))
    with pytest.raises(
        ConfigError, match=r"https_proxy is not the address of an HTTP proxy .* judge\.org would"
    ) as refused:
        proxy_of("https://judge.org/v1")
    assert SECRET not in str(refused.value)
    assert proxy_of("http://judge.org/v1") is None


# --- imports ---------------------------------------------------------------------------------------------------------


def test_help_imports_no_http_client():
    code = "import sys, opd, opd.cli, opd.recipe.load; sys.exit('httpx2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
