"""One torch thread: tensors in tests are small, and threads that wait for each other cost more than they give."""

import atexit
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import torch

CACHE = tempfile.mkdtemp(prefix="opd-cache-")
COUNT = itertools.count()
os.environ["OPD_CACHE"] = CACHE  # before support.runs, whose processes have the environment of this moment
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

from support.runs import Forks  # noqa: E402

torch.set_num_threads(1)
if not torch.cuda.is_available():  # before Triton is imported: without a GPU its programs are interpreted
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same numbers alone, after others and in another worker."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what another one, or an earlier run, has converted, or has kept about a folder of equal content."""
    monkeypatch.setenv("OPD_CACHE", os.path.join(CACHE, str(next(COUNT))))
    monkeypatch.setattr("opd.models.remembered._file", lambda what, folder: None)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs of the command in forks of a process that has imported everything: a second each, not ten."""
    process = Forks()
    yield process
    process.close()
