"""A program that starts, answers and ends as vLLM's server does, for tests of the process. STAND_IN says how."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("--model", "--served-model-name", "--host", "--max-model-len"):
    parser.add_argument(name)
parser.add_argument("--port", type=int)
given, others = parser.parse_known_args()
how = os.environ.get("STAND_IN", "answers")
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


def end(*_: object) -> None:
    worker.kill()
    sys.exit(0)


signal.signal(signal.SIGTERM, end)
print("flags:", *others, flush=True)
print("pids:", os.getpid(), worker.pid, flush=True)
print("control routes:", os.environ.get("VLLM_SERVER_DEV_MODE"), flush=True)
print("library:", *sorted(os.listdir(os.environ["PYTHONPATH"].split(os.pathsep)[0])), flush=True)
if how == "ends":
    print("RuntimeError: no memory for the cache", flush=True)
    sys.exit(3)
if how == "hangs":
    time.sleep(600)
if how == "scores":
    from support.engines import Engine

    from opd.models.loading import load_model
    from opd.recipe.schema import ModelSpec

    lm = load_model(ModelSpec(path=given.model), name="teacher", seed=0)
    engine = Engine(lm=lm, name=given.served_model_name, longest=512)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        said = {"object": "list", "data": [{"id": given.served_model_name, "max_model_len": 512}]}
        self.said(200, said)

    def do_POST(self) -> None:
        from support.http_server import Arrived

        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = engine.answer(Arrived(self.path, dict(self.headers), request))
        self.said(answer.status, answer.body)

    def said(self, status: int, body: object) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


assert Path(given.model).exists()
ThreadingHTTPServer((given.host, given.port), Handler).serve_forever()
