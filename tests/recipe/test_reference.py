"""docs/recipe_reference.md: generated, with every key of every section."""

from __future__ import annotations

import re
from pathlib import Path

from opd.recipe.json_schema import sections
from opd.recipe.reference import markdown
from opd.recipe.schema import OptimizerSection, Section

PAGE = Path(__file__).parents[2] / "docs" / "recipe_reference.md"


def rows() -> dict[str, dict[str, list[str]]]:
    """Heading -> key -> the cells behind it."""
    found: dict[str, dict[str, list[str]]] = {}
    for section in markdown().split("\n## ")[1:]:
        heading, _, text = section.partition("\n")
        cells = [re.split(r"(?<!\\) ?\| ?", line)[1:-1] for line in text.splitlines() if line.startswith("| `")]
        found[heading] = {row[0].strip("`"): row[1:] for row in cells}
    return found


def test_recipe_reference_page_is_generated():
    assert PAGE.read_text() == markdown(), "run `make docs`"


def test_recipe_reference_has_every_key_with_its_meaning():
    shown = rows()
    held = [one for one in sections().values() if issubclass(one, Section) and one is not Section]
    for section in held:
        if section.__subclasses__():  # Servers: its keys are those of the two kinds of servers
            continue
        assert any(set(section.model_fields) == set(keys) for keys in shown.values()), section.__name__
    assert all(len(cells) == 3 and cells[2] for keys in shown.values() for cells in keys.values())


def test_recipe_reference_says_types_defaults_and_places():
    shown = rows()
    optimizer, evaluate = shown["stages[].optimizer"], shown["stages[].evaluate"]
    rate = OptimizerSection.model_fields["learning_rate"].default
    assert optimizer["learning_rate"][:2] == ["number > 0", f"`{rate}`"]
    assert optimizer["schedule"][:2] == ["`constant`, `linear`, `cosine`", '`"constant"`']
    assert evaluate["data"][:2] == ["[stages[].data](#stagesdata)", "required"]
    assert evaluate["sampling"][0] == "names to [stages[].sampling](#stagessampling)"
    assert set(shown["stages[].tasks.NAME"]) > {"share", "train"}
    assert "\n## stages[].data\n\nAlso at `stages[].tasks.NAME.data`, `stages[].evaluate.data`" in markdown()


def test_recipe_reference_links_lead_to_its_headings():
    text = markdown()
    made = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in re.findall(r"^## (.+)$", text, re.M)}
    linked = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert linked == made
