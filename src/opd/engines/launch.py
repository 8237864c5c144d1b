"""Starts vLLM's server as a child process on the loopback, and stops it. All flags that `opd` needs are here.

The child's environment may be another one, with its own torch. Of this library it sees only a folder with a link to the
package, for the worker extension, because the site-packages of this environment would replace its own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import httpx2

from opd.engines import guard
from opd.errors import ConfigError, TeacherError, TrainingError
from opd.files import expanded

MODULE = "vllm.entrypoints.openai.api_server"  # the script `vllm` of the package for CPUs does not start
WORKER = "opd.engines.worker.WeightLoader"
OF_TEACHER = ("--enable-scale-out", "--max-logprobs", "-1")  # scores by position; any k
OF_ENGINE = (
    *("--enable-scale-out", "--generation-config", "vllm"),  # no sampling defaults of the model's
    *("--logprobs-mode", "processed_logprobs"),  # of the distribution that is drawn from
    *("--worker-extension-cls", WORKER),
)
OF_SLEEPER = ("--enable-sleep-mode",)
CONTROL_ROUTES = {"VLLM_SERVER_DEV_MODE": "1"}  # by which an engine gets its weights
# The longest sequence that fits into the memory of the cache; vLLM refuses to start with a longer one than fits.
OF_BOTH = ("--host", "127.0.0.1", "--max-model-len", "auto")
QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONSAFEPATH": "1",  # a folder `vllm` where the run was started is not the package
    # GiB, on a CPU alone. Without it vLLM claims most of the machine's memory, and does not start when less is free.
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
# Not passed on: the paths of this environment, how its threads wait, and the places of torchrun's processes.
OWN = ("PYTHONPATH", "PYTHONHOME", "OMP_WAIT_POLICY", "VIRTUAL_ENV")
OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
PACKAGE = Path(__file__).absolute().parents[1]
PYTHON = "OPD_VLLM"  # environment variable with an interpreter that has vLLM
POLL_S, STOP_S = 0.5, 20.0
LAST_LINES = 12
INSTALL = (
    f"Name one in `start.python` or in the environment variable {PYTHON}; `pip install vllm` into an environment of "
    "its own makes one (for CPUs: docs/served.md)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to start. `flags` come last, so they replace earlier ones; `env` is added to the environment."""

    name: str  # of the model, for messages and for the log's name
    python: str  # `python_of`
    model: str  # a folder or hub id
    flags: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    log: Path
    patience_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A server that answers: its address, its name of the model, and the seconds that it took to start."""

    url: str
    model: str
    seconds: float


def python_of(named: str | None, where: str, env: Mapping[str, str]) -> str:
    """An interpreter that has vLLM: the named one, that of OPD_VLLM, or the running one. Raises ConfigError."""
    wanted = named or os.environ.get(PYTHON)
    if wanted is None:
        if find_spec("vllm") is None:
            raise ConfigError(f"{where}: no Python with vLLM is named, and this one has none. {INSTALL}.")
        return sys.executable
    said = "`start.python`" if named else f"the environment variable {PYTHON}"
    found = shutil.which(str(expanded(wanted)))
    if found is None:
        raise ConfigError(f"{where}: {said} is {wanted!r}, which is no program. {INSTALL}.")
    look = "import importlib.util, sys; sys.exit(0 if importlib.util.find_spec('vllm') else 3)"
    with _library() as library:
        status = subprocess.run([found, "-c", look], env=_environment(library, env), capture_output=True, check=False)
    if status.returncode:
        raise ConfigError(f"{where}: {said} is {wanted!r}, which has no vLLM. {INSTALL}.")
    return found


@contextlib.contextmanager
def running(launch: Launch) -> Iterator[Started]:
    """A server from when it answers until the block ends, in whatever way; it also ends when this process is killed.

    Raises ConfigError, with the last lines of its log, for a server that ends or does not answer within `patience_s`,
    and TrainingError with them, in place of an error of the block, for one that ended meanwhile.
    """
    began = time.monotonic()
    port, served = free_port(), f"{launch.name}-{secrets.token_hex(4)}"  # a name that another server does not have
    address = ("--port", str(port), "--served-model-name", served)
    command = [launch.python, "-m", MODULE, "--model", launch.model, *OF_BOTH, *address, *launch.flags]
    with _library() as library, launch.log.open("ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-I", str(Path(guard.__file__).absolute()), *command],
            env=_environment(library, launch.env),
            stdin=subprocess.PIPE,  # no other process holds it: it closes when this one ends
            stdout=log,
            stderr=log,
            start_new_session=True,  # a terminal's Ctrl-C reaches the run alone
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(launch, process, url, served, began + launch.patience_s, begin)
            yield Started(url=url, model=served, seconds=time.monotonic() - began)
        except (TeacherError, TrainingError) as error:
            status = process.poll()
            if status is None:
                raise
            raise TrainingError(f"{error}\n{_failed(launch, f'ended with exit status {status}', begin)}") from error
        finally:
            _stop(process)


def _wait(launch: Launch, process: subprocess.Popen[bytes], url: str, served: str, until: float, begin: int) -> None:
    """Return once the server answers with its model. Raises ConfigError."""
    with httpx2.Client(trust_env=False, timeout=5.0) as client:
        while not _serves(client, url, served):
            status, late = process.poll(), time.monotonic() > until
            if status is not None:
                raise ConfigError(_failed(launch, f"ended with exit status {status}", begin))
            if late:
                why = f"did not answer within {launch.patience_s:.3g} s (`start.patience_s`)"
                raise ConfigError(_failed(launch, why, begin))
            time.sleep(POLL_S)


def _serves(client: httpx2.Client, url: str, served: str) -> bool:
    try:
        response = client.get(f"{url}/v1/models")
        return response.is_success and any(row["id"] == served for row in response.json()["data"])
    except (httpx2.HTTPError, ValueError, KeyError, TypeError):
        return False


def _failed(launch: Launch, what: str, begin: int) -> str:
    with launch.log.open("rb") as log:
        log.seek(begin)
        lines = log.read().decode(errors="replace").splitlines()
    shown = "\n".join(f"  {line}" for line in lines[-LAST_LINES:]) or "  (empty)"
    return (
        f"The server of {launch.name} ({launch.python} -m {MODULE}) {what}. The last lines of its log {launch.log}:\n"
        f"{shown}\nCorrect `start` (`python`, `flags`, `env`, `patience_s`), or start the server yourself and give its "
        "`urls`; see docs/served.md."
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and its guard."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(guard.GRACE_S + STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _library() -> Iterator[str]:
    """A folder with nothing but this package, by a link."""
    with tempfile.TemporaryDirectory(prefix="opd-vllm-") as folder:
        (Path(folder) / "opd").symlink_to(PACKAGE, target_is_directory=True)
        yield folder


def _environment(library: str, more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server: this one's, with what a user has set for vLLM, and `more`."""
    given = {name: value for name, value in os.environ.items() if name not in (*OWN, *OF_TORCHRUN)}
    path = os.pathsep.join([library, *([more["PYTHONPATH"]] if "PYTHONPATH" in more else [])])
    return {**QUIET, **given, **more, "PYTHONPATH": path}


def free_port() -> int:
    """A port of the loopback that no program uses at the moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
