"""The card of a saved model: metadata that the hub reads, held-out numbers, the settings of its stage."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from opd.recipe.schema import Recipe, StageSpec
from opd.runs.saves import hub_id

LICENSE = ("license", "license_name", "license_link")
LOADING = {
    "merged": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")""",
    "images": """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER")""",
    "adapter": """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")""",
}


def write_card(
    folder: Path,
    recipe: Recipe,
    spec: StageSpec,
    metrics: Sequence[Mapping[str, Any]],
    kind: Literal["merged", "adapter"] = "merged",
    origin: Path | str | None = None,
) -> None:
    """Write README.md with the stage's settings and its held-out numbers. `origin`: folder or hub id of the weights."""
    measured = [row for row in metrics if any(key.startswith("eval/") for key in row)]
    lines = [
        "---",
        metadata_of(recipe, spec, kind, origin).to_yaml(),
        "---",
        "",
        f"# {recipe.name}: {spec.name}",
        "",
        f"Trained by `opd` with the method `{spec.method}`, {spec.steps} steps, seed {recipe.seed}.",
        "",
        "```python",
        LOADING["images" if kind == "merged" and (folder / "processor_config.json").exists() else kind],
        "```",
        "",
    ]
    if measured:
        names = sorted({key for row in measured for key in row if key.startswith("eval/")})
        lines += ["| held out | " + " | ".join(f"step {row['step']}" for row in measured) + " |"]
        lines += ["|---" * (len(measured) + 1) + "|"]
        for name in names:
            cells = (f"{row[name]:.4g}" if name in row else "" for row in measured)
            lines.append(f"| {name.removeprefix('eval/')} | " + " | ".join(cells) + " |")
        lines.append("")
    settings = {
        "models": {n: m.model_dump(exclude_defaults=True) for n, m in recipe.models.items()},
        "stage": spec.model_dump(mode="json", exclude_defaults=True),
    }
    lines += ["```yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip(), "```", ""]
    ModelCard("\n".join(lines)).save(folder / "README.md")


def metadata_of(
    recipe: Recipe, spec: StageSpec, kind: Literal["merged", "adapter"], origin: Path | str | None
) -> ModelCardData:
    """What the hub reads: the base model and its license, as far as they are known; data sets of the hub; tags.

    A local folder without a hub id passes on the base model that its own card names.
    """
    name = None if origin is None else hub_id(str(origin.absolute() if isinstance(origin, Path) else origin))
    card = {} if origin is None else _card_of(origin if isinstance(origin, Path) else name)
    sections = [task.data.path for task in spec.by_task.values()]
    adapter = recipe.models[spec.train].lora is not None or kind == "adapter"
    return ModelCardData(
        base_model=name or _ids_in(card.get("base_model")),
        library_name="peft" if kind == "adapter" else "transformers",
        datasets=sorted({path for path in sections if hub_id(path)}) or None,
        tags=["on-policy-distillation", "opd", *(["lora"] if adapter else [])],
        **{key: card[key] for key in LICENSE if key in card},
    )


def _ids_in(named: Any) -> list[str] | str | None:
    """Hub ids alone: the hub refuses a card with another base model, such as the folder that PEFT writes."""
    if not isinstance(named, list):
        return hub_id(named) if isinstance(named, str) else None
    return [one for one in named if isinstance(one, str) and hub_id(one)] or None


@functools.cache  # a request takes half a minute if the hub cannot be reached
def _hub_card(name: str) -> Path | None:
    try:
        return Path(hf_hub_download(name, "README.md"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        return None


def _card_of(path: Path | str | None) -> Mapping[str, Any]:
    """The metadata of a model's README.md; empty without one. From the hub's cache if there is no network."""
    file = path / "README.md" if isinstance(path, Path) else None if path is None else _hub_card(path)
    if file is None or not file.is_file():
        return {}
    _, mark, rest = file.read_text(encoding="utf-8", errors="replace").partition("---\n")
    try:
        found = yaml.safe_load(rest.partition("\n---")[0]) if mark else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
