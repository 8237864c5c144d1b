"""The card of a trained model: metadata that the hub reads, held-out numbers, the settings of its stage."""

from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from opd.recipe.load import load_recipe
from opd.runs.card import write_card

RECIPE = load_recipe(Path(__file__).parents[2] / "recipes" / "opd.yaml")
STAGE = RECIPE.stages[-1]


def card(folder: Path, *rows: dict[str, float]) -> ModelCard:
    write_card(folder, RECIPE, STAGE, rows)
    return ModelCard.load(folder / "README.md")


def test_write_card_has_metadata_and_settings(tmp_path: Path):
    written = card(tmp_path)
    assert written.data.to_dict() == {"library_name": "transformers", "tags": ["on-policy-distillation", "opd"]}
    assert written.text.startswith(
        f"\n# opd: {STAGE.name}\n\nTrained by `opd` with the method `opd`, {STAGE.steps} steps"
    )
    settings = yaml.safe_load(written.text.split("```yaml\n")[1].split("```")[0])
    assert set(settings["models"]) == set(RECIPE.models)
    assert settings["stage"]["name"] == STAGE.name
    assert "held out" not in written.text


def test_write_card_has_a_column_for_each_evaluation(tmp_path: Path):
    written = card(
        tmp_path,
        {"step": 0, "eval/reward": 0.25, "train/loss": 1.0},
        {"step": 1, "train/loss": 1.0},
        {"step": 5, "eval/reward": 0.5, "eval/kl": 0.123456},
    )
    table = "| held out | step 0 | step 5 |\n|---|---|---|\n| kl |  | 0.1235 |\n| reward | 0.25 | 0.5 |\n\n"
    assert table in written.text
