"""Run first_distillation.ipynb in a new folder and store its outputs, without progress lines and paths of this machine.

python examples/run_notebook.py
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "first_distillation.ipynb"


def kept(output: Any) -> bool:
    """Whether an output is stored: what a cell prints and draws; of a run, lines without this machine's speed."""
    if output.output_type == "stream":
        return output.name == "stdout"
    text = output.get("data", {}).get("text/plain", "")
    return "image/png" in output.get("data", {}) or not re.search(r"so far$|tokens/s", text)


def stored(notebook: Any) -> Any:
    """The executed notebook as it is stored."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if kept(output)]
            for output in cell.outputs:
                output.get("data", {}).pop("text/html", None)  # of a run's lines, which their text says too
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=3000, kernel_name="python3", resources=resources, record_timing=False)
        executed = client.execute()
    nbformat.write(stored(executed), NOTEBOOK)


if __name__ == "__main__":
    sys.exit(main())
