"""A server as a child process: its start, its end in every way, its log in errors, and its environment."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from support.stand_in import PATHS, TESTS, all_end, pids, start

from opd.engines import guard, launch, sync
from opd.engines.launch import Launch, python_of, running
from opd.errors import ConfigError, TeacherError, TrainingError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it looks at processes in /proc")


def launched(folder: Path, how: str = "answers", **more: Any) -> Launch:
    section = start(how)
    settings = {"flags": ("--dtype", "float32"), "patience_s": 30.0, **more}
    return Launch(name="m", python=section["python"], model=".", env=section["env"], log=folder / "log", **settings)


def test_running_answers_and_ends_with_the_block(tmp_path):
    with running(launched(tmp_path)) as one:
        served = httpx2.get(f"{one.url}/v1/models").json()["data"][0]["id"]
        assert served == one.model
        assert 0 < one.seconds < 30
        processes = pids(tmp_path / "log")
        assert not all_end(processes, 0.0)
    assert all_end(processes)
    said = (tmp_path / "log").read_text()
    assert "flags: --dtype float32" in said
    assert "library: opd\n" in said  # and nothing else of this environment


def test_running_ends_after_an_error_in_the_block(tmp_path):
    with pytest.raises(KeyboardInterrupt), running(launched(tmp_path)):
        raise KeyboardInterrupt
    assert all_end(pids(tmp_path / "log"))


def test_running_shows_the_log_of_a_server_that_ends(tmp_path):
    (tmp_path / "log").write_text("of an earlier start\n")
    what = r"(?s)The server of m .* ended with exit status 3\. .*no memory for the cache\nCorrect `start`"
    with pytest.raises(ConfigError, match=what) as error, running(launched(tmp_path, "ends")):
        pass
    assert "earlier" not in str(error.value)
    assert all_end(pids(tmp_path / "log"))


def test_running_shows_the_log_of_a_server_that_ended_meanwhile(tmp_path):
    def use() -> None:
        with running(launched(tmp_path)):
            os.kill(pids(tmp_path / "log")[0], signal.SIGKILL)
            assert all_end(pids(tmp_path / "log"))
            time.sleep(0.5)  # until the guard has seen it
            raise TeacherError("no answer")

    with pytest.raises(TrainingError, match=r"(?s)no answer\nThe server of m .* exit status 137\. .*library: opd\nCor"):
        use()


def test_running_gives_up_after_its_patience(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"did not answer within 2 s \(`start.patience_s`\)"),
        running(launched(tmp_path, "hangs", patience_s=2.0)),
    ):
        pass
    assert all_end(pids(tmp_path / "log"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_server_ends_with_a_killed_run(tmp_path, number):
    """The run is killed while the server starts, and once it answers."""
    for how in ("hangs", "answers"):
        log = tmp_path / how
        program = (
            "import sys, time; from pathlib import Path\n"
            "from support.stand_in import start; from opd.engines.launch import Launch, running\n"
            f"section, log = start({how!r}), Path({str(log)!r})\n"
            "one = Launch(name='m', python=section['python'], model='.', flags=(), env=section['env'], log=log, "
            "patience_s=60.0)\n"
            "with running(one): time.sleep(60)\n"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS[1:]))}
        run = subprocess.Popen([sys.executable, "-c", program], env=environment)
        until = time.monotonic() + 30
        while not (log.exists() and "library:" in log.read_text()):
            assert run.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        run.send_signal(number)
        run.wait()
        assert all_end(pids(log))


def test_guard_kills_a_server_that_ignores_sigterm(tmp_path):
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    quick = Path(guard.__file__).read_text().replace("GRACE_S = 10.0", "GRACE_S = 0.5")
    (tmp_path / "guard.py").write_text(quick)
    command = [sys.executable, str(tmp_path / "guard.py"), sys.executable, "-c", deaf]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGTERM)  # a run that gets one finishes its step first
    time.sleep(0.3)
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(10) == 128 + signal.SIGKILL


def test_python_of_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.delenv(launch.PYTHON, raising=False)
    with pytest.raises(ConfigError, match=r"no Python with vLLM is named, and this one has none\. Name one"):
        python_of(None, "here", {})
    with pytest.raises(ConfigError, match=r"here: `start.python` is '/no/such', which is no program"):
        python_of("/no/such", "here", {})
    with pytest.raises(ConfigError, match=r"`start.python` is '.*', which has no vLLM\. Name one"):
        python_of(sys.executable, "here", {})
    monkeypatch.setenv(launch.PYTHON, sys.executable)
    with pytest.raises(ConfigError, match=r"the environment variable OPD_VLLM is '.*', which has no vLLM"):
        python_of(None, "here", {})
    assert python_of(None, "here", start()["env"]) == sys.executable


def test_page_of_servers_has_every_flag():
    """Its command lines are those of a server that a run starts."""
    page = (TESTS.parent / "docs" / "served.md").read_text()
    lines = [
        " ".join(block.replace("\\\n", " ").split()) for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    ]
    teacher, engine = (next(line for line in lines if f"serve ./{who}" in line) for who in ("teacher", "student"))
    assert teacher.endswith(" ".join(launch.OF_TEACHER))
    assert engine.endswith(" ".join(launch.OF_ENGINE))
    assert engine.startswith(" ".join(f"{name}={value}" for name, value in launch.CONTROL_ROUTES.items()))
    for flag in launch.OF_ENGINE[0], "--logprobs-mode processed_logprobs", f"--worker-extension-cls {launch.WORKER}":
        assert flag in sync.START
