"""Compare a trained student and its teacher on held-out prompts, after training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from opd_studies.lab.lab import Task

# Numbers of `opd.evaluation.compare` by their name in tables: shares in 0..1, the others in nats per token.
COMPARED = {
    "overlap ratio": "overlap_ratio",
    "student mass on overlap": "student_mass_on_overlap",
    "teacher mass on overlap": "teacher_mass_on_overlap",
    "entropy gap": "entropy_gap",
    "student entropy": "student_entropy",
    "teacher entropy": "teacher_entropy",
    "KL": "reverse_kl",
}


def look(
    student: Path,
    teacher: Path,
    task: Task,
    data: Mapping[str, Any],
    *,
    seed: int,
    k: int,
    writer: Literal["student", "teacher"] = "student",
) -> dict[str, float]:
    """Sample the writer's responses at temperature 1 to the prompts of a data section; compare both models on them.

    Returns `COMPARED`, the writer's accuracy (share), and NLL of its tokens under the student in nats per token. The
    overlap is that of each model's k most likely tokens. Raises the kinds of `opd.errors`.
    """
    from opd.data.prompts import load_prompts
    from opd.evaluation.compare import compare
    from opd.models.loading import load_model
    from opd.recipe.schema import DataSection, ModelSpec
    from opd.rewards.registry import one_by_one
    from opd.samplers.hf import TransformersSampler
    from opd.teachers.local import LocalTeacher
    from opd.types import Sampling

    models = {
        name: load_model(ModelSpec(path=str(path), device="cpu"), name=name)
        for name, path in (("student", student), ("teacher", teacher))
    }
    prompts = load_prompts(DataSection(**data))
    sampler = TransformersSampler(lm=models[writer], sampling=Sampling(max_completion_length=task.longest))
    written = sampler(prompts, seed=(seed, 0))
    reward = one_by_one(task.reward)
    scorer = LocalTeacher(lm=models["teacher"], micro_batch_tokens=4096, student_device=models["student"].device)
    compared = compare(models["student"], scorer, written, [one.prompt for one in written], k=k)
    summary = compared.summary()
    return {
        "accuracy": sum(bool(reward(one.prompt, one.text)) for one in written) / len(written),
        "NLL": -summary["student_logp"],
        **{name: summary[theirs] for name, theirs in COMPARED.items()},
    }
