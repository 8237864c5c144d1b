"""What a run returns: its folder, its numbers and its model. Also of a run whose process has ended: `load_run`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from opd.errors import ConfigError, RunError, nearest
from opd.evaluation.results import columns_of, of_task
from opd.files import expanded
from opd.recipe.load import load_recipe
from opd.recipe.schema import Recipe, StageSpec
from opd.runs.export import finished_student
from opd.runs.prepare import Given
from opd.stage.folder import RunDir, StageDir


class Run:
    """A run in its folder. Its rows are read at their first use, and so is the model of a run that was loaded."""

    def __init__(self, folder: Path, recipe: Recipe, models: tuple[Any, Any] | None = None) -> None:
        """`models`: (the last stage's trained model, its tokenizer); default: read from the folder."""
        self.folder, self.recipe = folder, recipe
        self._given = models

    @cached_property
    def _models(self) -> tuple[Any, Any]:
        if self._given is not None:
            return self._given
        last = self.recipe.stages[-1].name
        if self._stage(last).done() is None:
            # A copied or moved folder is not where its recipe writes.
            here = self.recipe.folder.resolve() == self.folder.resolve()
            command = f"opd train {self.folder / 'recipe.yaml'}{'' if here else f' output_dir={self.folder}'}"
            raise RunError(
                f"{self.folder}: stage {last!r} is not finished, so it has no model. `{command}` continues the run."
            )
        found = finished_student(self.recipe, Given(), RunDir(self.folder, False))
        return found.model, found.tokenizer

    @property
    def student(self) -> Any:
        """The last stage's model. Raises RunError if the run is not finished."""
        return self._models[0]

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer. Raises RunError if the run is not finished."""
        return self._models[1]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of all stages' metrics.jsonl, each with its stage."""
        return [{"stage": s.name, **row} for s in self.recipe.stages for row in self._stage(s.name).read_metrics()]

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The responses of the steps in all sample files, each with its stage and step: docs/run_folder.md.

        Raises RunError if the folder is gone.
        """
        return self._sampled(followed=False)

    @cached_property
    def followed(self) -> list[dict[str, Any]]:
        """The responses to the same held-out prompts at each step with a sample file. Raises as `samples`."""
        return self._sampled(followed=True)

    def _sampled(self, *, followed: bool) -> list[dict[str, Any]]:
        if not self.folder.is_dir():
            raise RunError(f"{self.folder} is gone, and the samples are read from it. Run again, or use a copy of it.")
        stages = [(s.name, self._stage(s.name).read_samples(followed=followed)) for s in self.recipe.stages]
        return [{"stage": name, **row} for name, rows in stages for row in rows]

    def held_out(self, when: str, stage: str | None = None) -> list[dict[str, Any]]:
        """The responses of an evaluation: `before`, `teacher` or `step_000050`. `stage`: default the last one.

        Raises ConfigError for a stage that the recipe does not have, and RunError for an evaluation that the run does
        not have or that cannot be read.
        """
        names = [one.name for one in self.recipe.stages]
        if stage is not None and stage not in names:
            raise ConfigError(f"The run has no stage {stage!r}; it has {', '.join(names)}.{nearest(stage, names)}")
        folder = self._stage(stage or names[-1])
        if when not in (there := folder.evaluations):
            has = ", ".join(there) or "none"
            raise RunError(f"{folder.path} has no evaluation {when!r}; it has {has}.{nearest(when, there)}")
        return folder.read_held_out(when)

    def _stage(self, name: str) -> StageDir:
        return RunDir(self.folder, False).stage(name)

    def _state(self, spec: StageSpec) -> str:
        made = max((row["step"] for row in self.metrics if row["stage"] == spec.name), default=0)
        done = self._stage(spec.name).done() is not None
        return f"{made} of {spec.steps} steps, {'finished' if done else 'not finished'}"

    def _results(self) -> Iterator[tuple[str, str, dict[str, str]]]:
        """(stage, setting, reward by column) of every sampling setting that has a reward."""
        for spec in self.recipe.stages:
            metrics = [row for row in self.metrics if row["stage"] == spec.name]
            for task, section in spec.by_task.items():
                rows = of_task(metrics, task)
                for setting in section.evaluate.sampling if rows and section.evaluate is not None else ():
                    key = f"eval/{setting}/reward"
                    cells = {name: _cell(column, key) for name, column in columns_of(rows).items() if key in column}
                    if cells:
                        yield spec.name, setting if task is None else f"{task}, {setting}", cells

    def __repr__(self) -> str:
        """About five lines: where, what, how far, and the held-out rewards of the last stage."""
        lines = [f"Run {self.recipe.name!r} in {self.folder}"]
        shown = self.recipe.stages[-2:]
        if len(self.recipe.stages) > len(shown):
            lines.append(f"  {len(self.recipe.stages) - len(shown)} earlier stages")
        lines += [f"  {one.name} ({one.method}): {self._state(one)}" for one in shown]
        results = [one for one in self._results() if one[0] == self.recipe.stages[-1].name]
        for _, setting, cells in results[:2]:
            lines.append(f"  held out, {setting}: reward " + ", ".join(f"{v} {name}" for name, v in cells.items()))
        lines.append("  .student, .tokenizer, .metrics, .samples, .held_out(when)")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The same with all held-out rewards as a table. Names come from a recipe, so all text is escaped."""
        head = [f"<b>{escape(self.recipe.name)}</b> in <code>{escape(str(self.folder))}</code>"]
        head += [escape(f"{one.name} ({one.method}): {self._state(one)}") for one in self.recipe.stages]
        rows = list(self._results())
        names = list(dict.fromkeys(name for _, _, cells in rows for name in cells))
        table = ""
        if rows:
            cells = [[stage, setting, *(found.get(name, "") for name in names)] for stage, setting, found in rows]
            table = "<table>" + _html(["stage", "held-out reward", *names], "th")
            table += "".join(_html(row, "td") for row in cells) + "</table>"
        return "<div>" + "<br>".join(head) + table + "</div>"


def load_run(path: str | Path) -> Run:
    """The run in a folder, also one that has stopped, or whose process is gone. Nothing in it is changed.

    Raises RunError for a folder that holds no run, ConfigError if its recipe is of another version of opd.
    """
    folder = expanded(path)
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise RunError(f"{folder} holds no run: it has no recipe.yaml. Give the folder of a run, such as runs/NAME.")
    return Run(folder, load_recipe(file))


def _cell(column: dict[str, float], key: str) -> str:
    low, high = column.get(f"{key}_low"), column.get(f"{key}_high")
    share = 0 <= column[key] <= 1 and (low is None or high is None or 0 <= low <= high <= 1)
    return f"{column[key]:.0%}" if share else f"{column[key]:.3g}"


def _html(cells: list[str], kind: str) -> str:
    return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"
