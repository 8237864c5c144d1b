"""Shared parts of all benchmarks: workers that take turns, peak memory, calibration, medians, results as JSON.

A contestant is a worker: a separate process, started from the benchmark's file with `--worker NAME`, so that memory is
measured per contestant. Workers wait for a line on stdin, do one piece of work, answer with one line, and wait again.
The benchmark calls them in turn, in an order that rotates every round, so that a slower machine slows down all of them;
while one works, the others sleep.

Peak memory is the resident high-water mark (VmHWM, reset through /proc/self/clear_refs) above the resident size at the
start, after freed memory was returned to the kernel.

Beside wall seconds, `timed` records the CPU seconds of the process, all its threads together: they vary less with the
load of the machine. A request with `threads` runs with that number of torch's threads, any other with torch's default.
`--quick` runs small sizes, to try the code; its results are in results/quick.

On a machine with a GPU, step, loss and decode run on it, with float32 products in TF32; then peak memory is torch's
allocated memory, clocks are read when the GPU has finished, and torch's cache is emptied between turns. Their results
are in results/gpu. The other benchmarks always run on CPUs.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
RESULTS = HERE / "results"
THREADS = torch.get_num_threads()
RACED_ON_GPU = ("step", "loss", "decode")
GIB = 2**30

Record = dict[str, Any]

if ON_GPU:
    torch.set_float32_matmul_precision("high")


# --- The worker's side ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Channel:
    """A worker's connection. Output of libraries goes to stderr, so that stdout has only answers."""

    out: Any = field(init=False)

    def __post_init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def receive(self) -> Record:
        """The next request; ends the process after the last one."""
        line = sys.stdin.readline()
        if not line:
            self.out.flush()
            os._exit(0)
        request: Record = json.loads(line)
        torch.set_num_threads(request.pop("threads", THREADS))
        return request

    def send(self, answer: Record) -> None:
        if ON_GPU:
            torch.cuda.empty_cache()
        self.out.write(json.dumps(answer) + "\n")
        self.out.flush()


def serve(work: Callable[[Record], Record]) -> None:
    """Answer every request with `work(request)`."""
    channel = Channel()
    channel.send({"ready": True})
    while True:
        channel.send(work(channel.receive()))


class PeakMemory:
    """Peak memory above the memory at creation: resident, or allocated on the GPU."""

    def __init__(self) -> None:
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return
        self.start = resident()
        Path("/proc/self/clear_refs").write_text("5")

    def above_start(self) -> int:
        """Bytes of the peak so far."""
        if ON_GPU:
            return torch.cuda.max_memory_allocated() - self.start
        return _status("VmHWM") - self.start


def resident() -> int:
    """Bytes of this process in memory, after freed memory was returned to the kernel."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}: peak memory is measured on Linux only.")


@contextmanager
def timed(record: Record, name: str) -> Iterator[None]:
    """Add the seconds that the block takes to record[name], and its CPU seconds to record[name + "_cpu"]."""
    wait_for_device()
    start, cpu = time.perf_counter(), time.process_time()
    yield
    wait_for_device()
    record[name] = record.get(name, 0.0) + time.perf_counter() - start
    record[f"{name}_cpu"] = record.get(f"{name}_cpu", 0.0) + time.process_time() - cpu


def wait_for_device() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


# --- The benchmark's side ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Worker:
    """One contestant's process."""

    name: str
    process: subprocess.Popen[str]
    log: Any

    def ask(self, request: Mapping[str, Any]) -> Record:
        """Send one request; returns its answer. Raises RuntimeError with the end of the worker's output if it dies."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Record:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            tail = "".join(self.log.readlines()[-30:])
            raise RuntimeError(f"Contestant {self.name} ended with exit status {self.process.wait()}:\n{tail}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


@contextmanager
def workers(
    script: str,
    names: Sequence[str],
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    interpreter: str = sys.executable,
) -> Iterator[dict[str, Worker]]:
    """Start one process per contestant, one after the other; all are ended on exit, also after errors.

    `environment`: variables that the processes get in addition to this one's.
    """
    started: dict[str, Worker] = {}
    pipes: Record = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    try:
        for name in names:
            command = [interpreter, script, "--worker", name, *arguments]
            log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the worker
            process = subprocess.Popen(command, stderr=log, env={**os.environ, **(environment or {})}, **pipes)
            started[name] = Worker(name, process, log)
            started[name].answer()
        yield started
    finally:
        for worker in started.values():
            worker.close()


def take_turns(started: Mapping[str, Worker], request: Mapping[str, Any], rounds: int) -> dict[str, list[Record]]:
    """`rounds` answers of every worker to one request, interleaved; the order rotates."""
    answers: dict[str, list[Record]] = {name: [] for name in started}
    names = list(started)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            answers[name].append(started[name].ask(request))
    return answers


def calibrate(seconds: float = 1.0, device: torch.device = DEVICE) -> float:
    """GFLOP/s of a float32 matmul of size 2,048 (8,192 on a GPU): the median over about `seconds`."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device).unbind()
    torch.mm(a, b)
    wait_for_device()
    rates: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(rates) < 3:
        start = time.perf_counter()
        torch.mm(a, b)
        wait_for_device()
        rates.append(2 * size**3 / (time.perf_counter() - start) / 1e9)
    return median(rates)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


def machine() -> Record:
    """The machine of the measurement."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory * 1024 / GIB, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in ("opd", "torch", "transformers", "trl", "liger_kernel")},
        "commit": _commit(),
    }


@contextmanager
def measured(benchmark: str, quick: bool = False) -> Iterator[Record]:
    """A result to fill, written to results/<benchmark>.json at the end, with the machine's rate before and after.

    `quick`: it is written to results/quick.
    """
    on_gpu = ON_GPU and benchmark in RACED_ON_GPU
    device, folder = (DEVICE, RESULTS / "gpu") if on_gpu else (torch.device("cpu"), RESULTS)
    folder = RESULTS / "quick" if quick else folder
    started = time.perf_counter()
    result: Record = {
        "benchmark": benchmark,
        "machine": machine(),
        "calibration_gflops": {"before": calibrate(device=device)},
    }
    say(f"{benchmark}: matmul at {result['calibration_gflops']['before']:.0f} GFLOP/s before")
    yield result
    result["calibration_gflops"]["after"] = calibrate(device=device)
    result["seconds"] = time.perf_counter() - started
    say(f"{benchmark}: matmul at {result['calibration_gflops']['after']:.0f} GFLOP/s after; {result['seconds']:.0f} s")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{benchmark}.json").write_text(json.dumps(result, indent=1) + "\n")


def say(line: str) -> None:
    print(line, flush=True)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the sources, with a + if src has changed since."""
    git = ["git", "-C", str(HERE.parent)]
    done = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "src"], check=False).returncode == 1
    return done.stdout.strip() + "+" * changed or None
