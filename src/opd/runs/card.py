"""The card of a saved model: metadata that the hub reads, held-out numbers, the settings of its stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from opd.errors import ConfigError
from opd.models.paths import resolved_path
from opd.recipe.schema import Recipe, StageSpec, origin_of
from opd.runs.saves import hub_id

LICENSE = ("license", "license_name", "license_link")
LOADING = {
    "merged": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")""",
    "adapter": """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")""",
}


def write_card(
    folder: Path,
    recipe: Recipe,
    spec: StageSpec,
    metrics: Sequence[Mapping[str, Any]],
    kind: Literal["merged", "adapter"] = "merged",
) -> None:
    """Write README.md with the stage's settings and its held-out numbers."""
    measured = [row for row in metrics if any(key.startswith("eval/") for key in row)]
    lines = [
        "---",
        metadata_of(recipe, spec, kind).to_yaml(),
        "---",
        "",
        f"# {recipe.name}: {spec.name}",
        "",
        f"Trained by `opd` with the method `{spec.method}`, {spec.steps} steps, seed {recipe.seed}.",
        "",
        "```python",
        LOADING[kind],
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


def metadata_of(recipe: Recipe, spec: StageSpec, kind: Literal["merged", "adapter"]) -> ModelCardData:
    """What the hub reads: the base model and its license, as far as they are known; data sets of the hub; tags."""
    base, card = _origin(recipe, spec)
    sections = [task.data.path for task in spec.by_task.values()]
    adapter = recipe.models[spec.train].lora is not None
    return ModelCardData(
        base_model=base,
        library_name="peft" if kind == "adapter" else "transformers",
        datasets=sorted({path for path in sections if hub_id(path)}) or None,
        tags=["on-policy-distillation", "opd", *(["lora"] if adapter else [])],
        **{key: card[key] for key in LICENSE if key in card},
    )


def _origin(recipe: Recipe, spec: StageSpec) -> tuple[str | None, Mapping[str, Any]]:
    """The hub id of the model's origin, or None, and the metadata of its card.

    A local folder without a hub id passes on the base model that its own card names.
    """
    origin = origin_of(recipe, spec.train)
    if origin.path is None:
        return None, {}
    try:
        path = resolved_path(origin, spec.train)
    except ConfigError:  # "(a LlamaForCausalLM given in Python)"
        return None, {}
    card = _card_of(path)
    if isinstance(path, Path):
        return hub_id(str(path.absolute())) or card.get("base_model"), card
    return path, card


def _card_of(path: Path | str) -> Mapping[str, Any]:
    """The metadata of a model's README.md; empty without one. From the hub's cache if there is no network."""
    try:
        file = path / "README.md" if isinstance(path, Path) else Path(hf_hub_download(path, "README.md"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        return {}
    if not file.is_file():
        return {}
    _, mark, rest = file.read_text(encoding="utf-8", errors="replace").partition("---\n")
    try:
        found = yaml.safe_load(rest.partition("\n---")[0]) if mark else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
