"""Export of a trained model, with a model card: its origin and its held-out numbers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

from opd.models import saving
from opd.models.language_model import LanguageModel
from opd.parallel import whole_tensor
from opd.recipe.schema import Recipe, StageSpec
from opd.runs.build import model_for
from opd.runs.prepare import Given
from opd.stage.folder import RunDir
from opd.stage.stage import Stage


def write_card(folder: Path, recipe: Recipe, spec: StageSpec, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Write README.md with the stage's settings and its held-out numbers."""
    measured = [row for row in metrics if any(key.startswith("eval/") for key in row)]
    metadata = ModelCardData(library_name="transformers", tags=["on-policy-distillation", "opd"])
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        "",
        f"# {recipe.name}: {spec.name}",
        "",
        f"Trained by `opd` with the method `{spec.method}`, {spec.steps} steps, seed {recipe.seed}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
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


def finish(recipe: Recipe, stage: Stage, seconds: float, given: Given, directory: RunDir) -> None:
    """Write the stage's model in Hugging Face format with a card, then mark the stage as done."""
    student = whole_student(recipe, stage, given, directory)
    if student is None:
        return
    target = stage.folder.model
    partial = target.with_name(f".writing-{target.name}")
    if partial.exists():
        shutil.rmtree(partial)
    saving.save(student, partial)
    write_card(partial, recipe, stage.spec, stage.folder.read_metrics())
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    stage.folder.mark_done({"seconds": seconds})


def whole_student(recipe: Recipe, stage: Stage, given: Given, directory: RunDir) -> LanguageModel | None:
    """The student in the process that saves it, None in the others.

    A sharded student is loaded again on the CPU, as it was before the stage; then the trained weights are copied in.
    """
    world = stage.world
    if world.size == 1:
        return stage.student
    trained: dict[str, torch.Tensor] = {}
    for name, parameter in stage.student.trainable().items():
        values = whole_tensor(parameter.detach())  # a collective operation of all processes
        if world.main:
            trained[name] = values.cpu()
    if not world.main:
        return None
    student = model_for(recipe, stage.spec, stage.spec.train, given, directory, device="cpu")
    with torch.no_grad():
        for name, parameter in student.trainable().items():
            parameter.copy_(trained[name])
    return student
