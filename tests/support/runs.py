"""Tiny recipes with everything that a kill can hit, and four ways to run one.

`start` is the command itself in a new process. `Forks.start` is the same command in a fork of a process that has only
imported things, which saves the imports and can strike itself: see `Strike`. `command` runs in this process.

Run as a script, this file is the process that forks.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

CHARACTERS = "0123456789+=;"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "200",
    "NO_COLOR": "1",
}


# --- recipes ---------------------------------------------------------------------------------------------------------


def tiny_model(seed: int = 0, *, hidden_size: int = 16, characters: str = CHARACTERS, **spec: Any) -> dict[str, Any]:
    """A model section: a Llama of a few thousand random weights, one token a character."""
    init = {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    return {"init": init, "tokenizer": {"characters": characters}, "seed": seed, **spec}


def sums(first: int, count: int) -> list[dict[str, Any]]:
    """Rows with every column that a method can ask for."""
    pairs = [(n % 5, n // 5 % 5) for n in range(first, first + count)]
    return [
        {"prompt": f"{a}+{b}=", "response": f"{a + b}", "answer": a + b, "privileged_context": f"{b}+{a}={a + b};"}
        for a, b in pairs
    ]


EVALUATE = {
    "data": {"path": "held_out.jsonl"},
    "reward": {"name": "final_number"},
    "sampling": {
        "greedy": {"temperature": 0, "max_completion_length": 3},
        "drawn": {"n": 2, "max_completion_length": 3},
    },
    "every": 3,
    "teacher": True,
    "kl": True,
}
DEFAULTS = {
    "data": {"path": "train.jsonl"},
    "prompts_per_step": 4,
    "sampling": {"max_completion_length": 4, "top_p": 0.9},
    "optimizer": {"learning_rate": 0.01, "schedule": "cosine", "warmup_steps": 2},
    "checkpoint": {"every": 2, "keep": 2},
    "samples_every": 3,
}


def two_stages() -> dict[str, Any]:
    """A teacher learns from responses; a student learns from the teacher, on its own responses or the data's."""
    teach = {"name": "teach", "train": "teacher", "method": "sft", "steps": 4}
    distil = {
        "name": "distil",
        "train": "student",
        "teacher": "teacher",
        "method": "gkd",
        "options": {"on_policy_share": 0.5},
        "steps": 8,
        "evaluate": EVALUATE,
        "diagnostics": {"every": 3, "k": 4, "bucket": 2},
    }
    models = {"teacher": tiny_model(1, hidden_size=24), "student": tiny_model(2)}
    return {"name": "tiny", "output_dir": "run", "models": models, "defaults": DEFAULTS, "stages": [teach, distil]}


def self_taught(**model: Any) -> dict[str, Any]:
    """The student's own moving average, reading the answer, teaches the student."""
    stage = {
        "name": "self",
        "train": "student",
        "method": "context_distillation",
        "options": {"template": "{privileged_context}{prompt}", "teacher": "ema", "decay": 0.7, "k": 4},
        "steps": 5,
    }
    models = {"student": tiny_model(3, **model)}
    return {"name": "tiny", "output_dir": "run", "models": models, "defaults": DEFAULTS, "stages": [stage]}


def one_stage(**stage: Any) -> dict[str, Any]:
    """The shortest recipe: one stage of reverse KL from a teacher; keywords replace fields of the stage."""
    described = {
        "name": "distil",
        "train": "student",
        "teacher": "teacher",
        "method": "reverse_kl",
        "data": {"path": "train.jsonl"},
        "steps": 2,
        "prompts_per_step": 2,
        "sampling": {"max_completion_length": 3},
        **stage,
    }
    models = {"teacher": tiny_model(1), "student": tiny_model(2)}
    stages = [{key: value for key, value in described.items() if value is not None}]
    return {"name": "tiny", "output_dir": "run", "models": models, "stages": stages}


def write_rows(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def prepare(folder: Path, recipe: Mapping[str, Any]) -> Path:
    """`folder` with recipe.yaml and its data; every path in the recipe is relative to it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", sums(0, 12))
    write_rows(folder / "held_out.jsonl", sums(12, 5))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
    return folder


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that has ended; `code` is negative for a signal."""

    code: int
    out: str
    err: str


def start(folder: Path, *arguments: str) -> Ended:
    """`python -m opd ARGUMENTS` in `folder`, as a user starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "opd", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def command(*arguments: str) -> Ended:
    """`opd ARGUMENTS` in this process. An exception that would be a traceback is raised."""
    from opd.cli import main

    out, err, before, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["opd", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = before
    return Ended(code, out.getvalue(), err.getvalue())


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """At the `nth` call of `call` that has `like` among its arguments, the process gets `signals`.

    `when` is before or after the call, or half: a write or a folder of weight files that is only begun.
    """

    call: str  # where it is looked up, e.g. opd.stage.checkpoint.os.rename
    nth: int = 1
    when: str = "before"
    like: str = ""
    signals: tuple[str, ...] = ("SIGKILL",)

    def install(self) -> None:
        owner, name = owner_of(self.call)
        real = getattr(owner, name)
        calls = 0

        def struck(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += not self.like or any(self.like in str(argument) for argument in arguments)
            if calls != self.nth:
                return real(*arguments, **options)
            calls += 1  # once only
            if self.when == "half" and name == "write":
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            elif self.when == "half":
                (Path(arguments[1]) / "shard-00001-model-00001-of-00003.safetensors").write_bytes(b"half of it")
            result = real(*arguments, **options) if self.when == "after" else None
            for one in self.signals:
                os.kill(os.getpid(), getattr(signal, one))
            return result if self.when == "after" else real(*arguments, **options)

        setattr(owner, name, struck)


def owner_of(dotted: str) -> tuple[Any, str]:
    """The object whose attribute the last part of the name is: a module, a module's module, or a class."""
    *path, name = dotted.split(".")
    owner: Any = None
    for i in range(len(path), 0, -1):
        with contextlib.suppress(ImportError):
            owner = importlib.import_module(".".join(path[:i]))
            break
    for part in path[i:]:
        owner = getattr(owner, part)
    return owner, name


def forbid(patch: pytest.MonkeyPatch, call: str) -> None:
    """From now on `call` must not be made."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError(f"{call} was called")

    patch.setattr(*owner_of(call), forbidden)


class Forks:
    """One process that has imported everything and trained nothing; every command is a fork of it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, folder: Path, *arguments: str, strike: Strike | None = None, processes: int = 1) -> Ended:
        """`opd ARGUMENTS` in `folder`; its output is also kept beside the folder.

        With several `processes`, what torchrun does: a world of them, and the end of all when one fails. A strike
        hits the last of them.
        """
        out, err = folder.with_suffix(".out"), folder.with_suffix(".err")
        job = {"folder": str(folder), "arguments": arguments, "out": str(out), "err": str(err), "processes": processes}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(job | {"strike": strike and asdict(strike)}), file=self._process.stdin, flush=True)
        return Ended(int(self._process.stdout.readline()), out.read_text(), err.read_text())

    def close(self) -> None:
        self._process.communicate(timeout=300)


def serve() -> None:
    """Fork and run what is asked for on stdin, one JSON object a line; answer each with its exit code."""
    import_all()
    for line in sys.stdin:
        job = json.loads(line)
        for name in ("out", "err"):
            Path(job[name]).write_bytes(b"")
        print(_world(job) if job["processes"] > 1 else _codes([_fork(job, {})])[0], flush=True)


def _fork(job: Mapping[str, Any], environment: Mapping[str, str]) -> int:
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        run_job(job)
    return child


def _world(job: Mapping[str, Any]) -> int:
    """The first exit code that is not 0."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # outlives them, as torchrun's does
    world = {
        "WORLD_SIZE": str(job["processes"]),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    last = job["processes"] - 1
    children = [
        _fork(dict(job) | {"strike": job["strike"] if rank == last else None}, world | {"RANK": str(rank)})
        for rank in range(job["processes"])
    ]
    return next((code for code in _codes(children) if code), 0)


def _codes(children: list[int], patience: float = 120.0) -> list[int]:
    """Exit codes in the order in which they come; 97 for all if one runs on for `patience` seconds after a failure."""
    codes: list[int] = []
    running, until = set(children), float("inf")
    while running:
        child, status = os.waitpid(-1, os.WNOHANG if until < float("inf") else 0)
        if child == 0:
            time.sleep(0.01)
            if time.monotonic() > until:
                for one in running:
                    os.kill(one, signal.SIGKILL)
                    os.waitpid(one, 0)
                return [97]
            continue
        running.discard(child)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1] != 0 and until == float("inf"):
            until = time.monotonic() + patience
    return codes


def import_all() -> None:
    """Everything that a run imports, also on first use: saving a model and making an array do that too."""
    distributed = ("fsdp", "device_mesh", "tensor", "rendezvous", "checkpoint.hf_storage")
    for module in (
        *("opd.runs.stages", "opd.commands.report.console", "peft", "pandas", "pyarrow.parquet"),
        *(f"torch.distributed.{name}" for name in distributed),
    ):
        importlib.import_module(module)
    from opd.models import saving
    from opd.models.loading import load_model
    from opd.recipe.schema import ModelSpec

    with tempfile.TemporaryDirectory() as folder:
        saving.save(load_model(ModelSpec(**tiny_model()), name="tiny"), Path(folder))


def run_job(job: dict[str, Any]) -> None:
    """Run the command of a job in this process, which ends with it."""
    from opd.cli import main

    code = 99
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(job["out"], os.O_WRONLY | os.O_APPEND), 1)
        os.dup2(os.open(job["err"], os.O_WRONLY | os.O_APPEND), 2)
        os.chdir(job["folder"])
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and under nohup this one
        if job["strike"] is not None:
            Strike(**job["strike"]).install()
        sys.argv = ["opd", *job["arguments"]]
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- what a run leaves -----------------------------------------------------------------------------------------------


def left(run: Path) -> dict[str, Any]:
    """Every file of a run by its path, as what has to be the same however often it was stopped.

    Bytes; of Parquet the rows; of weights the bytes behind the header, and what that says in whatever order; of
    wall-clock numbers the steps alone; of the environment and the time taken nothing.
    """
    import pyarrow.parquet as pq

    found: dict[str, Any] = {}
    for file in sorted(path for path in run.rglob("*") if path.is_file()):
        name = file.relative_to(run).as_posix()
        if file.suffix == ".parquet":
            found[name] = repr(pq.read_table(file).to_pylist())  # text: a NaN equals itself
        elif file.suffix == ".safetensors":
            content = file.read_bytes()
            end = 8 + int.from_bytes(content[:8], "little")
            found[name] = (json.loads(content[8:end]), content[end:])
        elif file.name == "timings.jsonl":
            found[name] = [json.loads(line)["step"] for line in file.read_text().splitlines()]
        elif file.name == "report.html":
            found[name] = None  # it shows the seconds
        elif file.name in ("environment.json", "done.json", "state.json", "progress.json"):
            found[name] = sorted(json.loads(file.read_text()))
        else:
            found[name] = file.read_bytes()
    return found


def assert_same(run: Path, expected: Path) -> None:
    """The same files, with the same content; metrics line for line."""
    got, wanted = left(run), left(expected)
    for name in (name for name in wanted if name.endswith("metrics.jsonl")):
        assert got[name].splitlines() == wanted[name].splitlines()
    assert sorted(got) == sorted(wanted)
    differing = [name for name in wanted if got[name] != wanted[name]]
    assert not differing, {name: (got[name], wanted[name]) for name in differing}


if __name__ == "__main__":
    serve()
