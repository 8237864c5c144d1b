"""Changes between two starts of one run: of its recipe, and of its inputs (rows, models, the user's code).

Changes without effect on the numbers are accepted, and so are more steps under a constant learning rate. Other changes
need `--accept-changes`. Every accepted change becomes a line of the run's changes.jsonl.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from opd.errors import RunError
from opd.recipe.schema import Recipe, StageSpec

# The effect of a change on the steps to come; after a change of structure there is no checkpoint to go on from.
Effect = Literal["none", "rounding", "numbers", "structure"]

# The first pattern that matches a key decides; `*` also matches dots. Judges' servers are among the keys of rewards. In
# place of names that the recipe gives (of models, stages, tasks, sampling settings) keys have NAME here.
EFFECTS: tuple[tuple[str, Effect], ...] = (
    ("name", "none"),
    ("description", "none"),
    ("output_dir", "none"),
    ("report_to*", "none"),
    ("models.NAME.offload", "none"),
    ("models.NAME.device", "rounding"),
    ("models.NAME.attn_implementation", "rounding"),
    ("models.NAME.gradient_checkpointing", "rounding"),
    ("stages.*.options.*", "numbers"),  # of methods, rewards and data, whatever their names
    ("stages.*.sampler_options.*", "numbers"),
    ("stages.*.columns.*", "numbers"),
    ("stages.*.body.*", "numbers"),  # of requests to judges
    ("stages.*.micro_batch_tokens", "rounding"),
    ("stages.*.checkpoint.*", "none"),
    ("stages.*.samples_every", "none"),
    ("stages.*.samples.*", "none"),
    ("stages.*.diagnostics.*", "none"),
    ("stages.*.evaluate.every", "none"),  # unless `until` ends the stage at one of them: `recipe_changes`
    ("stages.*.evaluate.pass_at*", "none"),
    ("stages.*.save", "none"),
    ("stages.*.save_dtype", "none"),
    ("stages.*.url", "none"),
    ("stages.*.api_key_env", "none"),
    ("stages.*.timeout_s", "none"),
    ("stages.*.patience_s", "none"),
    ("stages.*.concurrency", "none"),
    ("stages.*.retries", "none"),
    ("stages.*.on_error", "none"),
    ("stages.*.max_failed", "none"),
    ("*.start.flags", "rounding"),
    ("*.start.dtype", "rounding"),
    ("*.start.path", "numbers"),
    ("models.NAME.server.*", "none"),  # another model on the servers is recognised by its log-probs
    ("stages.NAME.engine.*", "none"),  # its servers get the student's weights and prove it
    ("models.NAME.path", "numbers"),
    ("models.NAME.chat_template", "numbers"),
    ("models.NAME.template_options.*", "numbers"),
    ("models.*", "structure"),
    ("stages.NAME.train", "structure"),
    ("stages.NAME.peers*", "structure"),
    ("stages.NAME.topology", "structure"),
    ("stages.NAME.tasks.NAME.train", "structure"),
    ("stages.NAME.method", "structure"),
    ("*", "numbers"),
)

MISSING = "(not there)"


@dataclass(frozen=True, slots=True)
class Change:
    """A key of the recipe, or an input, with its values at the two starts."""

    key: str
    before: Any
    after: Any
    effect: Effect

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.after}"


def recipe_changes(old: Recipe, new: Recipe) -> list[Change]:
    """The keys that differ. Stages go by name; other names or another order is a single change of structure."""
    names = [[stage.name for stage in recipe.stages] for recipe in (old, new)]
    if names[0] != names[1]:
        return [Change("the stages", ", ".join(names[0]), ", ".join(names[1]), "structure")]
    flat = [dict(_flat(_by_name(recipe))) for recipe in (old, new)]
    both = {**flat[0], **flat[1]}
    paths = [path for path in both if flat[0].get(path, MISSING) != flat[1].get(path, MISSING)]
    # A stage with a goal ends at one of its evaluations, so their steps decide which weights are its last.
    ends = {(*path[:-2], "every") for path in both if path[-3:-1] == ("evaluate", "until")}
    return [
        Change(
            ".".join(path),
            flat[0].get(path, MISSING),
            flat[1].get(path, MISSING),
            "numbers" if path in ends else _effect(path),
        )
        for path in paths
    ]


def input_changes(stage: str, old: Mapping[str, str], new: Mapping[str, str]) -> list[Change]:
    """The inputs of a stage that differ, of those that both starts have."""
    both = [name for name in old if name in new and old[name] != new[name]]
    return [Change(f"{stage}, {name}", old[name], new[name], "numbers") for name in both]


def check_steps(stage: StageSpec, steps: int, *, made: int, later: Sequence[str], limited: bool) -> None:
    """Refuse another number of steps, `steps`, where the run cannot be as if it had had it from the start.

    `stage` has the old number, `made` steps are done, `later` are the stages after it that have begun. `limited`: a
    time limit or a goal of the stage has ended it. Raises RunError, which says why.
    """
    where = f"Stage {stage.name!r} had {stage.steps} steps, and now has {steps}"
    schedule = stage.optimizer.schedule
    if made and schedule != "constant":
        raise RunError(
            f"{where}. Its learning rate falls to 0 at the last step (`schedule: {schedule}`), so the {made} steps "
            "that are made would have had other rates. Use `schedule: constant` from the start, or a new stage with "
            "`from_stage`, or another output_dir=..."
        )
    if steps < made:
        raise RunError(f"{where}, but {made} are made. Use at least {made}, or another output_dir=...")
    if later:
        raise RunError(
            f"{where}, but stage {later[0]!r}, which begins after it, has begun. Use another output_dir=..., or remove "
            f"the folders of {', '.join(later)} to make them again."
        )
    if stage.ahead and made == stage.steps:
        raise RunError(
            f"{where}. With `ahead: 1` the next step's responses would be of the weights after step {made - 1}, which "
            "are gone. Use a new stage with `from_stage`, or another output_dir=..."
        )
    if limited:
        raise RunError(
            f"{where}, but `seconds_of` or `evaluate.until` has ended it. Leave the number of steps as it was."
        )


def refuse(folder: str, changes: Sequence[Change], *, accept: bool) -> None:
    """Raise RunError for changes that `accept` has to allow and does not, and for those that nothing allows."""
    changed = [change for change in changes if change.effect in ("numbers", "structure")]
    if not changed or (accept and all(change.effect == "numbers" for change in changed)):
        return
    shown = "\n".join(f"  {change}" for change in changed[:_SHOWN])
    more = f"\n  ... and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    fixed = [change.key for change in changed if change.effect == "structure"]
    way = (
        f"A run cannot go on after a change of {fixed[0]}. "
        if fixed
        else "To go on with the new values from here, add --accept-changes (in Python accept_changes=True); they are "
        "then recorded in changes.jsonl. "
    )
    raise RunError(
        f"{folder} holds a run with other values:\n{shown}{more}\n{way}Use another output_dir=... to keep both, or "
        "remove the folder to start again there."
    )


_SHOWN = 12


def _effect(path: tuple[str, ...]) -> Effect:
    key = _pattern_key(path)
    return next(effect for pattern, effect in EFFECTS if fnmatchcase(key, pattern))


def _pattern_key(path: tuple[str, ...]) -> str:
    """The dotted key with NAME for names: a task may be called `checkpoint`, and any name may have dots."""
    parts = list(path)
    named = [0] if parts[0] in ("models", "stages") else []
    if parts[0] == "stages":
        named += [2] if parts[2:3] == ["tasks"] else []
        named += [i for i in range(2, len(parts)) if parts[i - 1 : i + 1] == ["evaluate", "sampling"]]
    for i in named:
        if i + 1 < len(parts):
            parts[i + 1] = "NAME"
    return ".".join(parts)


def _by_name(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(mode="json")
    return {**values, "stages": {stage["name"]: stage for stage in values["stages"]}}


def _flat(values: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The paths of keys, and values; empty mappings have no path."""
    for name, value in values.items():
        path = (*before, name)
        if isinstance(value, Mapping):
            yield from _flat(value, path)
        else:
            yield path, value
