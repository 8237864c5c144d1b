"""Output of this process that is turned off: a file of its own, so that a command without a display loads no rich."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import IO


def quiet_libraries() -> None:
    """Turn off progress bars and advice of other libraries, which would break the display."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if "transformers" in sys.modules:  # it reads the variables above when it is imported
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def write_nowhere(stream: IO[str]) -> None:
    """Throw away what is written to a stream of this process from now on."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
