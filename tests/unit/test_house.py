"""The house rules that a program can check: direction of imports, sizes, generated pages, recipes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opd.errors import ConfigError
from opd.methods import METHODS, build
from opd.methods.describe import markdown, recipes_of
from opd.recipe import load_recipe

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "opd"
FILES = sorted(SOURCE.rglob("*.py"))
PIECES = {
    "baselines",
    "contexts",
    "credit",
    "gates",
    "drift",
    "keep",
    "normalise",
    "observers",
    "signals",
    "sources",
    "supports",
    "updates",
    "weights",
    "teachers",
    "method",
}
PURE = {
    "binding",
    "divergences",
    "errors",
    "filters",
    "needs",
    "overlap",
    "packed",
    "remembered",
    "sequences",
    "solutions",
    "templates",
    "types",
    "units",
}


def imports_of(file: Path) -> set[str]:
    """Modules of opd that a file imports at its top level, as the first name below opd."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module == "opd":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("opd."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("opd.")}
    return found


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_imports_pieces_alone(name):
    assert imports_of(SOURCE / "methods" / f"{name}.py") <= PIECES | PURE


@pytest.mark.parametrize("name", sorted(PIECES - {"teachers", "method"}))
def test_a_piece_imports_maths_and_records_alone(name):
    assert imports_of(SOURCE / f"{name}.py") <= PURE


def test_pure_maths_imports_torch_alone():
    for name in ("divergences", "signals"):
        modules = re.findall(r"^(?:from|import) (\w+)", (SOURCE / f"{name}.py").read_text(), re.MULTILINE)
        assert set(modules) <= {"__future__", "collections", "functools", "math", "typing", "torch", "opd"}


def test_nothing_imports_the_loop_but_what_builds_stages():
    assert [f.name for f in FILES if "train" in imports_of(f)] == ["stages.py"]


def test_torch_distributed_stays_out():
    assert not [f for f in FILES if "torch.distributed" in f.read_text() and f.name != "parallel.py"]


def test_files_and_functions_are_short():
    for file in FILES:
        text = file.read_text()
        assert text.count("\n") <= 300, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                limit = 150 if file.name == "train.py" else 60
                assert node.end_lineno - node.lineno < limit, f"{file}: {node.name}"


def test_the_page_of_methods_is_generated():
    assert (ROOT / "docs" / "methods.md").read_text() == markdown(ROOT / "recipes"), "run `make docs`"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_recipe_is_named_like_its_file_and_says_what_to_expect(recipe):
    assert load_recipe(recipe).name == recipe.stem
    header = "".join(line for line in recipe.read_text().splitlines() if line.startswith("#"))
    assert re.search(r"seeds? \d", header), "the header names the seeds and the numbers that they gave"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_used_by_a_recipe_that_says_what_it_gave(name):
    """The recipe that the page of methods names: its header has the seeds, and an accuracy in percent."""
    recipes = recipes_of(ROOT / "recipes")[name]
    assert recipes == [name] if (ROOT / "recipes" / f"{name}.yaml").exists() else recipes
    for recipe in recipes:
        header = "".join(
            line for line in (ROOT / "recipes" / f"{recipe}.yaml").read_text().splitlines() if line[:1] == "#"
        )
        assert re.search(r"seeds? \d", header), recipe
        assert re.search(r"\d %", header), recipe


def test_a_method_without_a_recipe_has_no_page(tmp_path):
    (tmp_path / "opd.yaml").write_text((ROOT / "recipes" / "opd.yaml").read_text())
    with pytest.raises(ConfigError, match=r"uses grpo, gkd, .*Write one, recipes/grpo.yaml, or run this where"):
        recipes_of(tmp_path)


def test_no_two_files_of_tests_share_a_name():
    """pytest imports them by name, and refuses the second."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_the_layout_on_the_page_of_design_is_the_tree():
    """Every file has its place in the block, but those of methods/ and studies/, which are one each."""
    block = (ROOT / "docs" / "design.md").read_text().partition("## The layout")[2].split("```")[1]
    named = set(re.findall(r"\w+\.py\b", block))
    several = {"methods", "studies"}
    files = {f.name for f in FILES if f.parent.name not in several and f.name != "__init__.py"}
    assert not files - named, "name them in docs/design.md"
    assert not named - {f.name for f in FILES}, "they are no longer there"
    folders = {f.parent.name for f in FILES} - {"opd"}
    assert folders == set(re.findall(r"^  (\w+)/", block, re.MULTILINE))
    assert max(map(len, block.splitlines())) <= 120


def test_the_page_of_methods_of_ones_own_names_every_need():
    page = (ROOT / "docs" / "adding_a_method.md").read_text()
    named = {name for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    stages = [stage for file in (ROOT / "recipes").glob("*.yaml") for stage in load_recipe(file).stages]
    declared = [build(stage.method, stage.options).needs() for stage in stages]
    assert not frozenset().union(*declared) - named
    said = {
        name
        for file in FILES
        for call in re.findall(r"needing\(([^()]*)\)", file.read_text())
        for name in re.findall(r'"(\w+)"', call)
    }
    assert not said - named


def test_help_imports_no_torch():
    code = "import sys, opd, opd.cli, opd.recipe; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
