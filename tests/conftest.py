"""One torch thread: tensors in tests are small, and threads that wait for each other cost more than they give."""

import os
from collections.abc import Iterator

import pytest
import torch
from support.runs import Forks

torch.set_num_threads(1)
if not torch.cuda.is_available():  # before Triton is imported: without a GPU its programs are interpreted
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs of the command in forks of a process that has imported everything: a second each, not ten."""
    process = Forks()
    yield process
    process.close()
