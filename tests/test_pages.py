"""The blocks of the pages run in order, page by page, in a folder with what the pages take for granted."""

from __future__ import annotations

import ast
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.blocks import Block, blocks, commands, run_block
from support.models import build, byte_tokenizer
from support.runs import Forks, sums, write_rows

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = {page: blocks(page) for page in PAGES}
RUN = [page for page, found in BLOCKS.items() if any(one.mark != "not run" for one in found)]


@pytest.fixture(scope="session")
def provided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands of a page name and no block of it makes: two small models, rows, a recipe."""
    folder = tmp_path_factory.mktemp("provided")
    tokenizer = byte_tokenizer()
    for seed, name in enumerate(("student", "teacher")):
        build("llama", tokenizer, seed=seed, max_position_embeddings=2048).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_rows(folder / "prompts.jsonl", sums(0, 6))
    write_rows(folder / "held_out.jsonl", sums(6, 3))
    (recipe,) = (one for one in BLOCKS[ROOT / "README.md"] if one.file == "my_recipe.yaml")
    (folder / "my_recipe.yaml").write_text(recipe.text)
    return folder


@pytest.fixture
def folder(provided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, as the working folder; modules that a page writes are forgotten afterwards."""
    copied = Path(shutil.copytree(provided, tmp_path / "page"))
    monkeypatch.chdir(copied)
    monkeypatch.syspath_prepend(copied)
    yield copied
    for name in [
        name for name, one in sys.modules.items() if str(getattr(one, "__file__", "")).startswith(str(copied))
    ]:
        del sys.modules[name]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_blocks_of_page_run(page: Path, folder: Path, forks: Forks):
    if page.stem == "evaluation":  # of the model that the README trains
        shutil.copytree(folder / "student", folder / "runs" / "mine" / "distil" / "model")
    names: dict[str, Any] = {"__name__": "page"}
    for block in BLOCKS[page]:
        if block.mark != "not run":
            run_block(block, folder, forks, names)


def test_blocks_that_do_not_run_say_why():
    for found in BLOCKS.values():
        for block in found:
            assert block.mark != "not run" or len(block.said.split()) >= 3, block.where


def page_of(folder: Path, text: str) -> list[Block]:
    page = folder / "page.md"
    page.write_text(text)
    return blocks(page)


def test_blocks_have_marks_of_comments_before_them(tmp_path: Path):
    found = page_of(
        tmp_path,
        "# A\n\nText. <!-- not run: it needs a GPU -->\n```sh\nopd x\n```\n\n<!-- run with: a=1 b=2 -->\n\n"
        "```sh\nopd y\n```\n\n```\nout\n```\n\n<!-- not run: far away -->\nMore text.\n\n  ```python\n  a = 1\n  ```\n",
    )
    assert [(one.line, one.language, one.mark, one.said) for one in found] == [
        (4, "sh", "not run", "it needs a GPU"),
        (10, "sh", "run with", "a=1 b=2"),
        (14, "", "", ""),
        (21, "python", "", ""),
    ]
    assert found[-1].text == "a = 1\n"


def test_commands_join_long_lines_and_here_documents():
    text = "# first\nopd a \\\n  --b\ncat > f <<'END'\n1\n\n# 2\nEND\nopd c  # why\n"
    assert list(commands(text)) == ["opd a --b", "cat > f <<'END'\n1\n\n# 2\nEND", "opd c  # why"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```sh\nfalse\n```\n", "false"),
        ("```sh\nopd check no_such.yaml\n```\n", "no_such.yaml"),
        ("```yaml\nstages:\n  - {name: a, trains: b, ...}\n```\n", "trains"),
        ("```yaml\nsampling: {temperature: -1}\n```\n", "temperature"),
        ("```\nopd train my_recipe.yaml\n```\n", "a block without a language"),
        ("```toml\na = 1\n```\n", "no test runs a block of 'toml'"),
    ],
)
def test_run_block_fails_for_wrong_block(text: str, message: str, tmp_path: Path, folder: Path, forks: Forks):
    (block,) = page_of(tmp_path, text)
    with pytest.raises(AssertionError, match=message):
        run_block(block, folder, forks, {})


def test_run_block_gives_overrides_to_recipes_alone(tmp_path: Path, folder: Path, forks: Forks):
    text = (
        "<!-- run with: seed=7 name=other -->\n```sh\nopd methods\nopd check my_recipe.yaml\necho $HOME > home\n```\n"
    )
    (block,) = page_of(tmp_path, text)
    run_block(block, folder, forks, {})
    (wrong,) = page_of(tmp_path, text.replace("seed=7", "sead=7"))
    with pytest.raises(AssertionError, match="sead"):
        run_block(wrong, folder, forks, {})


def messages_of_the_code() -> list[list[str]]:
    """The texts in the library, each as its parts between what is filled in."""
    found: list[list[str]] = []
    for file in (ROOT / "src" / "opd").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [one.value if isinstance(one, ast.Constant) else None for one in node.values]
                found.append("".join(part if isinstance(part, str) else "\0" for part in parts).split("\0"))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append([node.value])
    return found


def said(quoted: str, message: list[str]) -> bool:
    """Whether a quotation with `...` is of this message."""
    text, at = "\0".join(message), 0
    for part in filter(None, (part.strip() for part in quoted.split("..."))):
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def test_troubleshooting_quotes_messages_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    messages = messages_of_the_code()
    assert len(quoted) > 20
    assert [one for one in quoted if not any(said(one, message) for message in messages)] == []
    assert not any(said("... is not a run folder: ...", message) for message in messages)
