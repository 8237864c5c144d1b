"""The real server of vLLM on a CPU, from the environment that `make engines` builds, for tests marked `engine`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import pytest

import opd

PYTHON = os.environ.get("OPD_VLLM", "")
SITE = Path(__file__).parents[1] / "engines" / "site"
SOURCE = Path(opd.__file__).parents[1]
START_S = 600.0  # two busy cores take minutes
needs_vllm = pytest.mark.skipif(not PYTHON, reason="OPD_VLLM names no Python with vLLM; `make engines` builds one")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def vllm(
    folder: Path,
    log: Path,
    *flags: str,
    by_position: bool = True,
    python: str = PYTHON,
    threads: int = 1,
    imports: tuple[Path, ...] = (),
) -> Iterator[str]:
    """A server of the model in `folder`, named "teacher", in float32; its address. Later flags replace earlier ones.

    `imports`: more folders of modules for it. `by_position`: with the V2 runner under Triton's interpreter, which is
    slow and scores given tokens by position.
    """
    port = free_port()
    interpreted = {
        "TRITON_INTERPRET": "1",
        "TRITON_DEFAULT_BACKEND": "cpu",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_WAIT_POLICY")},
        **(interpreted if by_position else {}),
        "PYTHONPATH": os.pathsep.join(
            [str(SOURCE), *([str(SITE)] if by_position else []), *map(str, imports)]
        ),  # for the worker's extension
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
    }
    command = [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "teacher"),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256"),
        *("--max-logprobs", "40", "--enable-scale-out", "--generation-config", "vllm", "--enforce-eager"),
        *("--max-num-seqs", "16", *flags),
    ]
    with log.open("w") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + START_S
        while not _healthy(url):
            assert process.poll() is None, f"vLLM ended: {log.read_text()[-2000:]}"
            assert time.monotonic() < until, f"vLLM did not start: {log.read_text()[-2000:]}"
            time.sleep(1.0)
        yield url
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=2.0).status_code == 200
    except httpx2.HTTPError:
        return False
