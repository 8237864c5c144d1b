"""The house rules that a program can check: the rooms and their imports, sizes, generated pages, recipes."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from opd.errors import ConfigError
from opd.methods import METHODS, build
from opd.methods.describe import markdown, recipes_of
from opd.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
FILES = sorted(SOURCE.rglob("*.py"))

# Each room, in the one order, and the rooms above it that it may import. Every room may import the ground.
GROUND = ("errors", "types", "messages", "files", "plugins", "parallel")
ABOVE: dict[str, tuple[str, ...]] = {
    "ground": (),
    "recipe": (),
    "maths": (),
    "pieces": ("maths",),
    "method": ("maths", "pieces"),
    "methods": ("recipe", "pieces", "method"),
    "data": ("recipe",),
    "models": ("recipe", "maths"),
    "loss": ("maths", "pieces", "method", "models"),
    "samplers": ("recipe", "pieces", "models"),
    "teachers": ("maths", "pieces", "models"),
    "rewards": ("recipe", "pieces", "models", "samplers"),
    "evaluation": (
        *("recipe", "maths", "pieces", "method", "methods", "models", "loss", "samplers", "teachers", "rewards"),
    ),
}
ABOVE["stage"] = tuple(ABOVE)
ABOVE["train"] = tuple(ABOVE)
ABOVE["run"] = tuple(ABOVE)
ABOVE["commands"] = tuple(room for room in ABOVE if room != "train")
ABOVE["studies"] = tuple(room for room in ABOVE if room != "train")
ROOT_FILES = {
    *("train.py", "types.py", "method.py"),  # what to read first
    *("api.py", "cli.py", "__init__.py", "__main__.py", "errors.py", "messages.py", "files.py", "plugins.py"),
    "parallel.py",
}
# `opd study` is a command of the library whose code is in a package beside it, found when the command runs.
EXCEPT = {("opd.cli", "opd_studies.page.command")}
# Edges from before the rooms, each to be mended.
EXCEPT |= {("opd.teachers.incremental", "opd.method")}


def module_of(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def room_of(module: str) -> str:
    package, *inside = module.split(".")
    if package == "opd_studies":
        return "studies"
    if not inside or inside[0] in ("api", "cli", "__main__"):
        return "commands"
    return "ground" if inside[0] in GROUND else inside[0]


@cache
def imports_of(module: str) -> frozenset[str]:
    """Modules of this repository that a file imports anywhere: in functions and under TYPE_CHECKING, too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("opd", "opd_studies"):
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                found.add(inside if inside in MODULES else str(node.module))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in ("opd", "opd_studies")}
    return frozenset(found)


@pytest.mark.parametrize("room", ABOVE)
def test_a_room_imports_only_rooms_above_it(room):
    modules = [module for module in MODULES if room_of(module) == room]
    assert modules
    edges = {(module, other) for module in modules for other in imports_of(module)} - EXCEPT
    wrong = {(module, other) for module, other in edges if room_of(other) not in (room, "ground", *ABOVE[room])}
    assert not wrong


def test_every_file_is_in_a_room():
    assert {room_of(module) for module in MODULES} == set(ABOVE)
    assert {file.name for file in (SOURCE / "opd").glob("*.py")} == ROOT_FILES


def test_every_room_states_its_contract():
    rooms = [file for file in SOURCE.rglob("__init__.py") if file.parent.parent == SOURCE / "opd"]
    assert all(ast.get_docstring(ast.parse(file.read_text())) for file in rooms)


def test_no_import_is_part_of_a_circle():
    try:
        TopologicalSorter({module: imports_of(module) - {module} for module in MODULES}).prepare()
    except CycleError as error:
        if set(error.args[1]) != {"opd.data.prompts", "opd.data.selection"}:  # to be mended
            pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_the_loop_is_imported_by_run_stages_alone():
    assert [module for module in MODULES if "opd.train" in imports_of(module)] == ["opd.run.stages"]


def test_maths_imports_torch_and_numpy_alone():
    allowed = {"__future__", "collections", "dataclasses", "functools", "itertools", "math", "typing", "torch", "numpy"}
    for module in MODULES:
        if room_of(module) == "maths":
            names = re.findall(r"^(?:from|import) (\w+)", MODULES[module].read_text(), re.MULTILINE)
            assert set(names) <= allowed | {"opd", "triton"}, module


def test_a_reward_is_told_apart_in_its_room_alone():
    """Everywhere else it is a `Reward`, whatever its class."""
    classes = {
        node.name
        for module in MODULES
        if room_of(module) == "rewards"
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.ClassDef)
    } | {"Reward"}
    assert {"FunctionReward", "GroupReward"} <= classes
    checked = {
        (module, name)
        for module in MODULES
        if room_of(module) != "rewards"
        for call in re.findall(r"\bisinstance\([^\n]*", MODULES[module].read_text())
        for name in re.findall(r"\w+", call)
        if name in classes
    }
    assert not checked


def test_claims_of_studies_do_not_import_each_other():
    claims = [module for module in MODULES if module.startswith("opd_studies.claims.")]
    old = {"control_variate", "signal_shares", "prune", "one_token", "top_p", "estimators"}  # to be mended
    assert {a.split(".")[-1] for a in claims for b in imports_of(a) if b in claims} <= old


def test_torch_distributed_stays_in_parallel():
    assert [f.name for f in FILES if "torch.distributed" in f.read_text()] == ["parallel.py"]


def test_files_and_functions_are_short():
    for file in FILES:
        text = file.read_text()
        assert text.count("\n") <= 600, file
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
    code = (
        "import sys, opd, opd.cli, opd.recipe.load; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
