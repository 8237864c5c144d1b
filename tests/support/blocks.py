"""The fenced blocks of the pages, in order, with what a comment before a block says about running it.

`<!-- not run: REASON -->` leaves a block out, `<!-- run with: KEY=VALUE ... -->` adds overrides to its commands that
take a recipe. `<!-- no block runs: REASON -->` is of a whole page.
A block whose first line is `# NAME.py` or `# NAME.yaml` becomes that file; a block without a language is output.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from opd.errors import ConfigError
from opd.recipe import schema
from opd.recipe.load import load_recipe
from support.runs import ENVIRONMENT, Ended, Forks

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (not run|run with): ([^>]+?) -->\s*\Z")
OF_A_PAGE = re.compile(r"^<!-- no block runs: ([^>]+?) -->$", re.MULTILINE)
WITH_RECIPE = ("check", "train", "doctor", "plan", "probe")
ENDS = {"doctor": (0, 3), "probe": (0, 3)}  # exit statuses beside which a command has done its work
SECTIONS = [one for one in vars(schema).values() if isinstance(one, type) and issubclass(one, BaseModel)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    page: Path
    line: int
    language: str  # "" for output
    text: str
    mark: str  # "", "not run" or "run with"
    said: str  # the rest of the mark

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file that the block is, by its first line."""
        named = re.match(r"# (\w+\.(?:py|yaml))\n", self.text)
        return named[1] if named else None


def blocks(page: Path) -> list[Block]:
    """The blocks of a page; none if a comment says that no block of it runs."""
    text = page.read_text()
    if OF_A_PAGE.search(text):
        return []
    found: list[Block] = []
    end = 0
    for fence in FENCE.finditer(text):
        mark = MARK.search(text[end : fence.start()])
        inside = re.sub(rf"^{fence['indent']}", "", fence["text"], flags=re.MULTILINE)
        found.append(
            Block(
                page=page,
                line=text[: fence.start()].count("\n") + 1,
                language=fence["language"],
                text=inside,
                mark=mark[1] if mark else "",
                said=mark[2] if mark else "",
            )
        )
        end = fence.end()
    return found


def run_block(block: Block, folder: Path, forks: Forks, names: dict[str, Any]) -> None:
    """Run a block in `folder`, as a reader would. Python blocks of a page share `names`."""
    if block.file is not None:
        (folder / block.file).write_text(block.text)
    if block.language == "python":
        exec(compile(block.text, block.where, "exec"), names)
    elif block.language == "yaml":
        check_yaml(block, folder)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language in ("sh", "bash"):
        extra = block.said.split() if block.mark == "run with" else []
        for command in commands(block.text):
            ended = run_command(command, extra, folder, forks)
            name = command.split()[1] if command.startswith("opd ") else ""
            assert ended.code in ENDS.get(name, (0,)), f"{block.where}: {command}\n{ended.out}\n{ended.err}"
    else:
        assert block.language == "", f"{block.where}: no test runs a block of {block.language!r}"
        command = re.search(r"^(opd|make|pip|python|vllm|torchrun) .*", block.text, re.MULTILINE)
        assert command is None, f"{block.where}: a command in a block without a language: {command and command[0]}"


def commands(text: str) -> Iterator[str]:
    """The commands of a shell block: one per line; a line that goes on and a here-document are one."""
    lines = iter(text.splitlines())
    for line in lines:
        command = line
        while command.endswith("\\"):
            command = command[:-1] + next(lines).strip()
        if word := re.search(r"<<'?(\w+)'?", command):
            for more in lines:
                command += f"\n{more}"
                if more == word[1]:
                    break
        if command.strip() and not command.lstrip().startswith("#"):
            yield command


def run_command(command: str, extra: list[str], folder: Path, forks: Forks) -> Ended:
    """Run one command: `opd` in a fork of a process that has imported it, anything else in a shell."""
    words = [] if "\n" in command else shlex.split(command, comments=True)
    if words[:1] == ["opd"] and not {"|", ">", "&&", "$"} & set(words):
        return forks.start(folder, *words[1:], *(extra if words[1] in WITH_RECIPE else []))
    path = f"{Path(sys.executable).parent}{os.pathsep}{ENVIRONMENT.get('PATH', '')}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**ENVIRONMENT, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def check_yaml(block: Block, folder: Path) -> None:
    """A whole recipe loads; a part of one, also with `...`, has the keys and values of a section of the schema."""
    read = yaml.safe_load(block.text)
    partly = _without_dots(read)
    if block.file is not None and partly == read and {"models", "stages"} <= set(read):
        load_recipe(folder / block.file)
        return
    problems = _problems(partly)
    assert not problems, f"{block.where}: no section of a recipe is like this: {problems}"


def _without_dots(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_dots(one) for key, one in value.items() if key != "..."}
    return [_without_dots(one) for one in value] if isinstance(value, list) else value


def _problems(value: Any) -> str:
    """What the section that is nearest to these keys and values says against them; "" if nothing."""
    if isinstance(value, list):
        return "; ".join(filter(None, map(_problems, value)))
    found: list[str] = []
    for section in SECTIONS:
        if set(value) <= set(section.model_fields):
            try:
                section.model_validate(value)
            except ValidationError as error:
                wrong = [one for one in error.errors() if one["type"] != "missing"]
                if wrong:
                    found.append(f"{section.__name__}: {wrong}")
                    continue
            except ConfigError as error:
                found.append(str(error))
                continue
            return ""
    return "; ".join(found) or f"no section has the keys {', '.join(map(str, value))}"
