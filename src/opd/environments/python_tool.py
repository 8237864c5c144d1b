"""The tool `python`: a short program in a process of its own, with limits on time, memory, files and network.

The limits keep a model's mistakes from a run. They are no security boundary against a determined attacker: the program
runs as the same user, and what refuses files and network is inside its own interpreter. Run untrusted code in a
container.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from opd.errors import ConfigError

OUTPUT = 65_536  # bytes of output and of a file; what is more is refused

# Runs in the new process before the program. The hook refuses by the names of Python's audit events.
_BEFORE = """
import resource, sys
seconds, memory, output, here = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
code = sys.stdin.read()
for what, most in ((resource.RLIMIT_CPU, int(seconds) + 1), (resource.RLIMIT_AS, memory),
                   (resource.RLIMIT_FSIZE, output), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(what, (most, most))
import linecache, math, os, random, re, statistics, traceback
from pathlib import Path
own = tuple(str(Path(one).resolve()) for one in {*sys.path, sys.prefix, sys.base_prefix} if one)
NO = ("socket.", "subprocess.", "os.system", "os.fork", "os.posix_spawn", "os.exec", "os.spawn", "os.kill", "pty.",
      "ctypes.", "shutil.", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown",
      "os.mkdir", "os.truncate", "signal.", "syslog.", "urllib.", "http.", "ftplib.", "smtplib.")
def hook(event, arguments):
    if event.startswith(NO):
        raise PermissionError(f"this tool does not allow {event}")
    if event == "open":
        path, mode, flags = arguments
        if isinstance(path, int):
            return
        found = os.path.realpath(os.fsdecode(path))
        writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        if not (found.startswith(here + os.sep) or (not writes and found.startswith(own))):
            raise PermissionError(f"this tool does not allow the file {found}")
sys.argv = ["program"]
sys.addaudithook(hook)
try:
    exec(compile(code, "program", "exec"), {"__name__": "__main__"})
except SystemExit:
    raise
except BaseException as error:
    lines = traceback.extract_tb(error.__traceback__)
    places = [f"line {one.lineno}" for one in lines if one.filename == "program"]
    print(f"{type(error).__name__}: {error}" + (f" ({places[-1]})" if places else ""))
"""


@dataclass(frozen=True, slots=True)
class PythonTool:
    """Runs a program. Each call is a new process in an empty folder; nothing stays from call to call.

    `timeout_s`: seconds of wall and of CPU time. `memory_mib`: of the process's address space.
    """

    timeout_s: float = 5.0
    memory_mib: int = 512

    def __post_init__(self) -> None:
        if sys.platform == "win32":
            raise ConfigError(
                "The tool `python` limits its process with `resource`, which Windows lacks. Leave it out."
            )
        if not 0 < self.timeout_s <= 3600 or self.memory_mib < 64:
            raise ConfigError(
                f"The tool `python` has a `timeout_s` above 0 and at most 3600 and a `memory_mib` of at least 64, got "
                f"{self.timeout_s} and {self.memory_mib}."
            )

    def __call__(self, code: str) -> str:
        """Runs a Python program and returns what it prints. It has no network, and no files but its own empty folder.

        Args:
            code: The program. Print the result.
        """
        with tempfile.TemporaryDirectory(prefix="opd-python-") as folder, tempfile.TemporaryFile() as output:
            place = str(Path(folder).resolve())
            limits = [str(self.timeout_s), str(self.memory_mib << 20), str(OUTPUT), place]
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BEFORE, *limits],
                cwd=place,
                env={"PYTHONIOENCODING": "utf-8:backslashreplace", "LC_ALL": "C.UTF-8"},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.communicate(str(code).encode(errors="replace"), timeout=self.timeout_s)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"the program took longer than {self.timeout_s:g} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            text = output.read(OUTPUT).decode(errors="replace").strip()
        if process.returncode < 0:
            return f"{text}\nerror: the program was ended by {signal.Signals(-process.returncode).name}".strip()
        return text or "(no output: print the result)"
