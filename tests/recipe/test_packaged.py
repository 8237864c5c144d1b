"""The recipes in the package: their names, the rule for a name that is also a file, and copies."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.runs import command

from opd.errors import ConfigError, DataError, RunError
from opd.recipe import packaged
from opd.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_are_those_of_the_repository():
    assert packaged.names() == sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))
    assert "quickstart" in packaged.names()


@pytest.mark.parametrize("one", packaged.listed(), ids=lambda one: one.name)
def test_listed_recipe_has_description_of_one_line(one: packaged.Listed):
    assert 20 < len(one.description) <= 110
    assert "\n" not in one.description
    assert one.methods


def test_listed_has_methods_in_order_of_the_stages():
    assert next(one.methods for one in packaged.listed() if one.name == "reverse_kl") == ("sft", "reverse_kl")


def test_load_recipe_reads_name_of_the_package():
    assert load_recipe("quickstart") == load_recipe(ROOT / "recipes" / "quickstart.yaml")
    assert load_recipe("package:opd/recipes/quickstart.yaml") == load_recipe("quickstart")


@pytest.mark.parametrize("file", ["quickstart", "quickstart.yaml", "quickstart.yml"])
def test_recipe_file_refuses_name_that_is_another_file(work: Path, file: str):
    (work / file).write_text("name: mine\n")
    with pytest.raises(ConfigError, match=rf"'quickstart' is a recipe of the package, and {file} is another .*Write "):
        packaged.recipe_file("quickstart")
    assert packaged.recipe_file(f"./{file}") == Path(file)


def test_recipe_file_takes_name_beside_its_unchanged_copy(work: Path):
    packaged.copy("quickstart", work)
    assert packaged.recipe_file("quickstart").read_bytes() == (work / "quickstart.yaml").read_bytes()


def test_recipe_file_takes_file_without_ending(work: Path):
    (work / "mine").write_text("name: mine\n")
    assert packaged.recipe_file("mine") == Path("mine")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("quikstart", "none of that name in the package. Did you mean 'quickstart'.*`opd recipes` lists"),
        ("min", "none of that name in the package. Did you mean 'mine.yaml'"),
        ("quickstart.yaml", "There is no recipe at quickstart.yaml. Give the path"),
        ("./quickstart", "There is no recipe at quickstart. Give the path"),
    ],
)
def test_recipe_file_names_nearest_when_missing(work: Path, text: str, said: str):
    (work / "mine.yaml").touch()
    with pytest.raises(ConfigError, match=said):
        packaged.recipe_file(text)


def test_recipe_file_refuses_missing_file_of_package():
    with pytest.raises(DataError, match=r"the package 'opd' has no 'recipes/none.yaml'"):
        packaged.recipe_file("package:opd/recipes/none.yaml")


def test_copy_writes_recipe_and_the_schema_that_it_names(work: Path):
    assert packaged.copy("gkd", work) == [work / "gkd.yaml", work / "recipe.schema.json"]
    first = (work / "gkd.yaml").read_text().splitlines()[0]
    assert (work / first.partition("$schema=")[2]).read_text() == packaged.SCHEMA.read_text()
    assert packaged.copy("opd", work) == [work / "opd.yaml"]


def test_copy_refuses_existing_file_and_unknown_name(work: Path):
    (work / "gkd.yaml").write_text("mine")
    with pytest.raises(RunError, match=r"gkd\.yaml exists"):
        packaged.copy("gkd", work)
    assert (work / "gkd.yaml").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"no recipe 'gdk' in the package. Did you mean 'gkd'"):
        packaged.copy("gdk", work)


def test_recipes_lists_and_copies(work: Path):
    listed = command("recipes").out.splitlines()
    assert [line.split()[0] for line in listed] == packaged.names()
    ended = command("recipes", "--copy", "gkd")
    assert ended.out.splitlines() == [
        "gkd.yaml written",
        "recipe.schema.json written",
        "Run it with: opd train gkd.yaml",
    ]
    assert command("check", "gkd.yaml").code == 0
    assert command("recipes", "--copy", "gkd").code == 1
