"""The house rules that a program can check: the rooms and their imports, sizes, generated pages, recipes."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from opd.errors import ConfigError
from opd.methods import METHODS
from opd.methods.describe import recipes_of
from opd.pieces.needs import Input, Reads, Trait
from opd.recipe.load import load_recipe
from opd_studies import STUDIES
from opd_studies.page.outcome import VERDICTS
from opd_studies.page.papers import PAPERS, page, table
from opd_studies.page.report import load

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
FILES = sorted(SOURCE.rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

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
    "engines": (),
    "loss": ("maths", "pieces", "method", "models"),
    "samplers": ("recipe", "maths", "pieces", "models", "engines"),
    "teachers": ("maths", "pieces", "models", "engines"),
    "rewards": ("recipe", "pieces", "models", "samplers"),
    "environments": ("recipe", "data", "models", "samplers", "rewards"),
    "evaluation": (
        *("recipe", "maths", "pieces", "method", "methods", "models", "loss", "samplers", "teachers", "rewards"),
        "environments",
    ),
}
ABOVE["stage"] = tuple(ABOVE)
ABOVE["viewer"] = ("recipe", "maths", "data", "evaluation", "stage")
ABOVE["train"] = tuple(ABOVE)
ABOVE["runs"] = tuple(ABOVE)
ABOVE["commands"] = tuple(room for room in ABOVE if room != "train")
ABOVE["studies"] = tuple(room for room in ABOVE if room != "train")
# Likewise the folders of studies; no claim imports another claim.
STUDIES_ABOVE: dict[str, tuple[str, ...]] = {
    "worlds": (),
    "lab": ("worlds",),
    "page": ("lab",),
    "claims": ("worlds", "lab", "page"),
}
ROOT_FILES = {
    *("train.py", "types.py", "method.py"),  # what to read first
    *("api.py", "cli.py", "__init__.py", "__main__.py", "errors.py", "messages.py", "files.py"),
    *("plugins.py", "parallel.py"),
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
def test_room_imports_only_rooms_above(room):
    modules = [module for module in MODULES if room_of(module) == room]
    assert modules
    edges = {(module, other) for module in modules for other in imports_of(module)} - EXCEPT
    wrong = {(module, other) for module, other in edges if room_of(other) not in (room, "ground", *ABOVE[room])}
    assert not wrong


def test_files_all_belong_to_rooms():
    assert {room_of(module) for module in MODULES} == set(ABOVE)
    assert {file.name for file in (SOURCE / "opd").glob("*.py")} == ROOT_FILES


def test_rooms_all_state_contract():
    rooms = [file for file in SOURCE.rglob("__init__.py") if file.parent.parent == SOURCE / "opd"]
    assert all(ast.get_docstring(ast.parse(file.read_text())) for file in rooms)


def contract_of(package: Path) -> str:
    """The first sentence of a package's docstring."""
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def rooms_of_the_page() -> dict[str, list[str]]:
    """Room -> its row in the table of docs/design.md: files, contract, what it may import."""
    section = (ROOT / "docs" / "design.md").read_text().partition("## The rooms")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:1] == "|"]
    named = {re.sub(r"\W.*", "", row[0].strip("`")): row for row in rows[2:]}
    return {name.removeprefix("opd_"): row for name, row in named.items()}


def test_design_page_lists_the_rooms_in_order():
    assert list(rooms_of_the_page()) == list(ABOVE)
    assert tuple(re.findall(r"`(\w+)`", rooms_of_the_page()["ground"][0])) == GROUND


@pytest.mark.parametrize("room", ABOVE)
def test_design_page_states_imports_of_room(room):
    names = list(ABOVE)
    said = rooms_of_the_page()[room][2]
    listed = set(re.findall(r"`(\w+)`", said))
    if said.startswith("all above"):
        listed = set(names[: names.index(room)]) - listed
    assert listed - {"ground"} == set(ABOVE[room]) - {"ground"}


@pytest.mark.parametrize("room", ABOVE)
def test_design_page_quotes_the_contract_of_a_room(room):
    package = SOURCE / "opd_studies" if room == "studies" else SOURCE / "opd" / room
    if package.is_dir():
        assert rooms_of_the_page()[room][1] == contract_of(package)


def test_public_names_of_room_are_files():
    for file in (SOURCE / "opd").glob("*/__init__.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                assert {f"opd.{file.parent.name}.{name}" for name in ast.literal_eval(node.value)} <= set(MODULES)


def test_imports_form_no_circle():
    try:
        TopologicalSorter({module: imports_of(module) - {module} for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("file", [*BENCHMARKS, *EXAMPLES], ids=lambda file: file.name)
def test_benchmarks_and_examples_import_existing_names(file):
    """No test runs them, and a name that moved would show on the day of a benchmark."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("opd", "opd_studies"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.util.find_spec(inside), f"{file.name}: {inside}"


def test_isinstance_of_teacher_or_sampler_stays_in_rooms():
    """Elsewhere a teacher is a `Teacher` and a sampler a `Sampler`: a user's own is as good."""
    classes: set[str] = {"NoTeacher"}
    for module, file in MODULES.items():
        if room_of(module) in ("teachers", "samplers"):
            classes |= {
                node.name
                for node in ast.parse(file.read_text()).body
                if isinstance(node, ast.ClassDef)
                and {"Teacher", "Sampler", "Writer"} & {base.id for base in node.bases if isinstance(base, ast.Name)}
            }
    for module, file in MODULES.items():
        if room_of(module) in ("teachers", "samplers"):
            continue
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "isinstance":
                named = {node.id for node in ast.walk(call.args[1]) if isinstance(node, ast.Name)}
                assert not named & classes, f"{module}: isinstance of {named & classes}"


def test_train_is_imported_by_run_stages_alone():
    assert [module for module in MODULES if "opd.train" in imports_of(module)] == ["opd.runs.stages"]


def test_maths_imports_torch_and_numpy_alone():
    allowed = {*sys.stdlib_module_names, "numpy", "torch", "triton", "opd"}
    for module in MODULES:
        if room_of(module) == "maths":
            names = re.findall(r"^(?:from|import) (\w+)", MODULES[module].read_text(), re.MULTILINE)
            assert set(names) <= allowed, module


@pytest.mark.parametrize("folder", STUDIES_ABOVE)
def test_studies_folder_imports_only_folders_above(folder):
    modules = [module for module in MODULES if module.startswith(f"opd_studies.{folder}.")]
    assert modules
    edges = {(module, other) for module in modules for other in imports_of(module) if other.startswith("opd_studies")}
    allowed = STUDIES_ABOVE[folder] if folder == "claims" else (folder, *STUDIES_ABOVE[folder])
    wrong = {(module, other) for module, other in edges if other.partition(".")[2].partition(".")[0] not in allowed}
    # The command finds a study by its name, the table of papers the studies of each.
    assert wrong <= {("opd_studies.page.command", "opd_studies"), ("opd_studies.page.papers", "opd_studies")}


def test_isinstance_of_reward_stays_in_rewards():
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


def test_torch_distributed_stays_in_parallel():
    assert [f.name for f in FILES if "torch.distributed" in f.read_text()] == ["parallel.py"]


def test_files_and_functions_are_short():
    for file in FILES:
        text = file.read_text()
        assert text.count("\n") <= 600, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                limit = 35 if file.name == "train.py" else 60  # the loop: a reader takes it in at once
                assert node.end_lineno - node.lineno < limit, f"{file}: {node.name}"


@pytest.mark.parametrize("name", METHODS)
def test_method_file_fits_a_screen_of_80_lines(name):
    assert (SOURCE / "opd" / "methods" / f"{name}.py").read_text().count("\n") <= 80


def test_design_page_quotes_loop_of_train():
    """All lines of it but the clock's, in their order; comments apart."""

    def statements(text):
        lines = (line.partition("  #")[0].strip() for line in text.splitlines())
        return [line for line in lines if line and not line.startswith("time")]

    page = (ROOT / "docs" / "design.md").read_text().partition("```python\nfor step")[2].partition("```")[0]
    loop = (
        (SOURCE / "opd" / "train.py").read_text().partition("    for step")[2].partition("    return stage.outcome")[0]
    )
    assert statements(page) == statements(loop)


def test_methods_page_is_generated():
    assert (ROOT / "docs" / "methods.md").read_text() == page(ROOT / "recipes", ROOT / "docs"), "run `make docs`"


def test_every_paper_is_built_and_judged():
    """Of 19 papers: something that runs, a recipe unless it is a command alone, and a verdict of a study."""
    assert len({paper.arxiv for paper in PAPERS}) == 19
    rows = dict(
        zip(
            (paper.arxiv for paper in PAPERS),
            table(load(ROOT / "docs", list(STUDIES)), ROOT / "recipes")[2:],
            strict=True,
        )
    )
    for paper in PAPERS:
        _, _, built, recipes, verdicts, _ = rows[paper.arxiv].split("|")
        assert set(paper.methods) <= set(METHODS)
        assert built.strip(), paper
        assert recipes.strip() or paper.commands, paper
        assert any(verdict in verdicts for verdict in VERDICTS), paper


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipe_is_named_as_file_and_states_seeds(recipe):
    assert load_recipe(recipe).name == recipe.stem
    header = "".join(line for line in recipe.read_text().splitlines() if line.startswith("#"))
    assert re.search(r"seeds? \d", header), "the header names the seeds and the numbers that they gave"


@pytest.mark.parametrize("name", METHODS)
def test_method_has_recipe_with_seeds_and_accuracy(name):
    """The recipe that the page of methods names: its header has the seeds, and an accuracy in percent."""
    recipes = recipes_of(ROOT / "recipes")[name]
    assert recipes == [name] if (ROOT / "recipes" / f"{name}.yaml").exists() else recipes
    for recipe in recipes:
        header = "".join(
            line for line in (ROOT / "recipes" / f"{recipe}.yaml").read_text().splitlines() if line[:1] == "#"
        )
        assert re.search(r"seeds? \d", header), recipe
        assert re.search(r"\d %", header), recipe


def test_recipes_of_raises_config_error_when_method_has_none(tmp_path):
    (tmp_path / "opd.yaml").write_text((ROOT / "recipes" / "opd.yaml").read_text())
    with pytest.raises(ConfigError, match=r"uses grpo, gkd, .*Write recipes/grpo.yaml, or run this in the folder"):
        recipes_of(tmp_path)


def test_tests_mirror_the_rooms():
    """A file of tests of one file of the library stands in its room's folder and has its name."""
    rooms = {file.parent.name for file in SOURCE.glob("opd/*/__init__.py")} | {"studies"}
    others = {"cli", "conformance", "distributed", "golden", "support"}
    folders = {folder.name for folder in (ROOT / "tests").iterdir() if folder.is_dir() and folder.name[0] != "_"}
    assert folders - others <= rooms


def test_adding_a_method_page_lists_every_need():
    page = (ROOT / "docs" / "adding_a_method.md").read_text()
    rows = re.findall(r"^\| (`(?:Input|Reads|Trait)\..*?) \|", page, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+\.\w+)`", row)]
    assert named == [f"{kind.__name__}.{one.name}" for kind in (Input, Reads, Trait) for one in kind]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_WORDS = {  # before a dot on a page: keys of a recipe, records, other packages' objects
    *("data", "diagnostics", "evaluate", "models", "options", "sampling", "teacher_sampling"),
    *("optimizer", "checkpoint", "engine", "environment", "reward", "prompt"),
    *("batch", "method", "tokens", "model", "torch", "datasets", "os"),
}


def code_spans(page: Path) -> list[str]:
    """The texts in single backticks of a page."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))


def has_attribute(module: str, names: str) -> bool:
    found = importlib.import_module(module)
    for name in names.split("."):
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_names_existing_files(page):
    for path in {path for text in code_spans(page) for path in re.findall(r"[\w/.<>]+\.py\b", text)}:
        if not path.startswith("my_") and path != "src/opd/methods/skew_kl.py":
            assert any((root / path).exists() for root in (ROOT, SOURCE / "opd", SOURCE / "opd" / "methods")), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_names_existing_library_names(page):
    """`opd.a.b` in full, and `file.name` of a file in a room."""
    for text in code_spans(page):
        if full := re.match(r"opd(?:_studies)?(?:[.:][A-Za-z_]\w*)+", text):
            name = full[0].replace(":", ".")
            module = max((m for m in MODULES if f"{name}.".startswith(f"{m}.")), key=len)
            assert name == module or has_attribute(module, name[len(module) + 1 :]), text
        elif (short := re.fullmatch(r"([a-z_]+)\.(\w+)(\(.*\))?", text)) and short[1] not in OTHER_WORDS:
            if short[2] in ("html", "json", "jsonl", "md", "parquet", "py", "txt", "yaml"):
                continue
            assert any(has_attribute(m, short[2]) for m in MODULES if m.endswith(f".{short[1]}")), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_links_lead_to_existing_targets(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert link.startswith("http") or target.exists(), link
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            made = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in made, link


def test_readme_and_design_stay_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 150
    assert (ROOT / "docs" / "design.md").read_text().count("\n") <= 80


def test_help_imports_no_torch():
    code = (
        "import sys, opd, opd.cli, opd.recipe.load; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
