"""The card of a trained model: where it comes from and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from opd.recipe import Recipe, StageSpec


def write_card(folder: Path, recipe: Recipe, spec: StageSpec, metrics: Sequence[Mapping[str, Any]]) -> None:
    """README.md with the stage's settings and its held-out numbers."""
    measured = [row for row in metrics if any(key.startswith("eval/") for key in row)]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [on-policy-distillation, opd]",
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
    (folder / "README.md").write_text("\n".join(lines))
