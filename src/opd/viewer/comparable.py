"""Whether runs are alike but for their seeds, and evaluations measured the same rows under the same conditions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from opd.messages import visible
from opd.viewer.groups import Entry, Group
from opd.viewer.keys import differing, flat
from opd.viewer.read import LineReader, RunView, StageView, read_object
from opd.viewer.results import settings_of, tasks_of

Number: TypeAlias = tuple[str | None, str | None, str]  # task, sampling setting (None: a divergence), key

SHOWN = 3  # keys that a reason names
HARMLESS = ("none", "rounding")  # effects of a change
ASIDE = ("evaluate", "checkpoint", "diagnostics", "samples", "samples_every", "save", "save_dtype")  # train no weight
SAID = ("prompt", "prompt_messages", "answer", "images", "box")  # columns that tell held-out rows apart


@dataclass(frozen=True, slots=True)
class Rows:
    """Held-out rows: for each column that tells them apart, the value of every row."""

    columns: dict[str, list[str]]

    def shared(self, other: Rows) -> tuple[int, int, int]:
        """How many rows are in both, in these and in the others, by the columns that both have."""
        names = [name for name in self.columns if name in other.columns]
        own, others = (Counter(zip(*(rows.columns[name] for name in names), strict=True)) for rows in (self, other))
        return (own & others).total(), own.total(), others.total()


class HeldOutRows:
    """The held-out rows behind numbers; each file of responses is read once.

    `by` "id": rows are the same by their place in the data; else by prompt, answer, images and box.
    """

    def __init__(self, by: str) -> None:
        self._by = by
        self._files: dict[tuple[Any, ...], dict[Any, Rows]] = {}

    def of(self, entry: Entry, run: RunView, number: Number) -> Rows | None:
        """The rows behind a number of a run; None if no file has them. Raises RunError as `read_columns`."""
        view, when = entry.view(run), entry.file(run, number[0])
        if (view.path, when) not in self._files:
            self._files[view.path, when] = _read(view, when, self._by)
        found = self._files[view.path, when]
        settings = settings_of(view, number[0]) if number[1] is None else [number[1]]
        return next((found[number[0], name] for name in settings if (number[0], name) in found), None)


def _read(view: StageView, when: str, by: str) -> dict[Any, Rows]:
    """The rows of a file by task and setting; the samples of one row count once."""
    table = view.held_out(when, ("task", "sampling", "prompt_id", *SAID))
    if table is None:
        return {}
    # Files of earlier versions lack columns, and the teacher's the images that the student reads.
    names = [name for name in SAID if name in table.names and (name, when) != ("images", "teacher")]
    names = ["prompt_id"] if by == "id" else names
    places: dict[Any, dict[Any, int]] = {}
    for i, (task, setting, place) in enumerate(zip(*map(table.values, ("task", "sampling", "prompt_id")), strict=True)):
        places.setdefault((task, setting), {}).setdefault(place, i)
    every = {name: [repr(value) for value in table.values(name)] for name in names}
    return {
        key: Rows({name: [values[i] for i in chosen.values()] for name, values in every.items()})
        for key, chosen in places.items()
    }


def unlike(group: Group) -> list[str]:
    """In what the runs of a group differ beside their seeds: versions, hardware, inputs and changes on the way."""
    runs = list(group.runs.values())
    reasons: list[str] = []
    for key, values in differing([{}] * len(runs), [run.environment for run in runs]):
        said = ", ".join(dict.fromkeys(value or "unknown" for value in values))
        reasons.append(f"{group.label}: {key} differs between its runs ({said}).")
    inputs = [_inputs(run) for run in runs]
    for key in dict.fromkeys(key for one in inputs for key in one):
        if len({one[key] for one in inputs if key in one}) > 1:
            reasons.append(f"{group.label}: not the same in all its runs: {visible(key)}.")
    for run in runs:
        changed = [row for row in LineReader(run.path / "changes.jsonl").read() if row.get("effect") not in HARMLESS]
        keys = ", ".join(dict.fromkeys(visible(str(row.get("key"))) for row in changed))
        if keys:
            reasons.append(f"{group.label}: {run.path} went on with accepted changes ({keys}).")
    return reasons


def _inputs(run: RunView) -> dict[str, str]:
    """The fingerprints of rows, models and code that a run read, by what they are of."""
    stages = read_object(run.path / "inputs.json") or {}
    return {f"{name} of stage {stage}": str(one) for stage, names in stages.items() for name, one in names.items()}


def rows_apart(name: str, rows: Rows | None, other: str, others: Rows | None) -> str | None:
    """How the held-out rows of two evaluations differ, in words; None if they are the same."""
    gone = [one for one, found in ((name, rows), (other, others)) if found is None]
    if rows is None or others is None:
        return f"without the file of the responses of {' and of '.join(gone)} nothing tells that the rows are the same"
    both, own, theirs = rows.shared(others)
    if both == own == theirs:
        return None
    return f"the held-out rows of {name} and {other} differ: {both} are in both, of {own} and {theirs}"


def conditions_apart(entry: Entry, other: Entry, number: Number) -> str | None:
    """The keys in which the conditions of two evaluations differ, with both values; None if they are the same."""
    first, second = _conditions(entry, number), _conditions(other, number)
    keys = [key for key in dict.fromkeys((*first, *second)) if first.get(key) != second.get(key)]
    if "teacher" in keys:
        return "the divergences are from different teachers"
    shown = [f"{key} is {_said(first.get(key))} and {_said(second.get(key))}" for key in keys[:SHOWN]]
    more = [f"{len(keys) - SHOWN} more keys differ"] if len(keys) > SHOWN else []
    return ", ".join((*shown, *more)) or None


def _said(value: Any) -> str:
    return visible("not set" if value is None else str(value))


def _conditions(entry: Entry, number: Number) -> dict[str, Any]:
    """What has to be equal for two numbers to be compared, by key. The number of samples (n) may differ."""
    task, setting, _ = number
    view, recipe = entry.first, entry.group.first.recipe
    own = view.spec if task is None else (view.spec.get("tasks") or {}).get(task) or {}
    section = tasks_of(view).get(task) or {}
    every = section.get("sampling") or {}
    sampling = {name: _without(one, "n") for name, one in every.items() if setting in (None, name)}
    environment = _without(own.get("environment") or view.spec.get("environment"), "workers")
    found = flat({"sampling": sampling, "environment": environment})
    if setting is not None:
        reward = section.get("reward") or own.get("reward") or view.spec.get("reward")
        return found | flat({"reward": _without(reward, "on_error", "max_failed")})
    names = own.get("teacher") or view.spec.get("teacher")
    earlier = _before(recipe, str(view.spec.get("name")))
    if names is None:  # the student teaches itself, as its method says
        itself = [
            view.spec.get("method"),
            view.spec.get("options"),
            *_origin(recipe, str(view.spec.get("train")), earlier),
        ]
        return found | {"teacher": itself}
    return found | {"teacher": [_origin(recipe, name, earlier) for name in str(names).split("+")]}


def _without(section: Any, *keys: str) -> Any:
    """A section without some keys, which do not change what a number means."""
    if not isinstance(section, dict):
        return section
    return {key: value for key, value in section.items() if key not in keys}


def _before(recipe: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The sections of the stages before the one of this name."""
    stages = list(recipe.get("stages") or [])
    return stages[: next((i for i, spec in enumerate(stages) if spec.get("name") == name), len(stages))]


def _origin(recipe: Mapping[str, Any], model: str, stages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What a model is made of after these stages: its section, those that trained it, and its origin's of another."""
    section = (recipe.get("models") or {}).get(model) or {}
    trained = [spec for spec in stages if model in (spec.get("train"), *(spec.get("peers") or []))]
    found = [section, *({key: value for key, value in spec.items() if key not in ASIDE} for spec in trained)]
    source = next((spec for spec in stages if spec.get("name") == section.get("from_stage")), None)
    if source is not None:
        name = str(source.get("name"))
        found += _origin(recipe, str(source.get("train")), [*_before({"stages": stages}, name), source])
    return found
