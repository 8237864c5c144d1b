"""`opd --version`, and the completion that typer makes for shells."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import ENVIRONMENT, command

import opd

SHELLS = ("bash", "zsh", "fish")
# A program named opd, as the console script is.
RUN = "import sys; sys.argv[0] = 'opd'; from opd.cli import main; main()"


def answer(folder: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        env={**ENVIRONMENT, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def completed(folder: Path, shell: str, *words: str) -> set[str]:
    """What a shell is told for the last of the words."""
    if shell == "bash":
        asked = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    else:
        asked = {"_TYPER_COMPLETE_ARGS": " ".join(words)}
    if shell == "fish":
        asked["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    out = answer(folder, _OPD_COMPLETE=f"complete_{shell}", **asked)
    if shell == "zsh":  # _arguments '*: :(("train":"Run a recipe."))'
        return set(re.findall(r'[(\n]"([^"]+)"', out))
    return {line.split("\t")[0] for line in out.splitlines()}


def test_version_is_that_of_the_package():
    assert command("--version").out == f"opd {opd.__version__}\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_script_names_the_program(shell: str, tmp_path: Path):
    script = answer(tmp_path, _OPD_COMPLETE=f"source_{shell}")
    assert f"_OPD_COMPLETE=complete_{shell}" in script
    if (program := shutil.which(shell)) is not None:  # its syntax, where the shell is here
        subprocess.run([program, "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_commands_recipes_and_methods(shell: str, tmp_path: Path):
    (tmp_path / "simple.yaml").touch()
    (tmp_path / "simple.txt").touch()
    assert completed(tmp_path, shell, "opd", "tr") == {"train"}
    assert completed(tmp_path, shell, "opd", "train", "sim") == {"simct", "simple.yaml"}
    assert completed(tmp_path, shell, "opd", "describe", "gk") == {"gkd"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_a_recipe_of_the_package(tmp_path: Path):
    """The whole way: bash reads the script, and its function fills COMPREPLY."""
    program = tmp_path / "opd"
    program.write_text(f"#!{sys.executable}\n{RUN}\n")
    program.chmod(0o755)
    text = f"""{answer(tmp_path, _OPD_COMPLETE="source_bash")}
COMP_WORDS=(opd train quickst); COMP_CWORD=2; _opd_completion opd; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", text], env={**ENVIRONMENT, "PATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["quickstart", "quickstart_served"]
