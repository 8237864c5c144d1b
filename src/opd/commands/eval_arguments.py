"""The arguments of `opd eval`: what they measure, and which of them say nothing together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd.commands.eval import Evaluated, Subject, evaluate_model, output
from opd.commands.eval_stage import evaluate_as_stage
from opd.errors import ConfigError
from opd.evaluation.tasks import Tasks
from opd.files import expanded, unfit
from opd.recipe.load import load_recipe
from opd.recipe.yaml_text import parse_value


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """The arguments of one call. None, an empty list and a false flag are not given."""

    model: str
    data: str | None
    reward: str | None
    options: Sequence[str]  # of the reward
    task_names: Sequence[str]
    task_folder: str | None
    fewshot: int | None
    sampling: Mapping[str, Any]  # the settings that are given
    limit: int | None
    columns: Sequence[str]
    chat: bool
    teacher: str | None
    seed: int | None
    recipe: str | None
    stage: str | None
    settings: Sequence[str]  # overrides of the recipe
    responses: str | None

    def lines(self, say: Callable[[str], None], *, as_json: bool) -> list[str]:
        """Measure, and return what to print; writes the responses to their file. Raises the errors of `opd.errors`."""
        self.check()
        found = self._as_stage(self.recipe, say) if self.recipe is not None else self._own(say)
        return output(found, self.model, as_json=as_json, responses=self.responses)

    def _as_stage(self, recipe: str, say: Callable[[str], None]) -> Evaluated:
        return evaluate_as_stage(
            self._model,
            load_recipe(recipe, self.settings),
            stage=self.stage,
            limit=self.limit,
            teacher=self._teacher,
            seed=self.seed,
            say=say,
        )

    @property
    def _model(self) -> Subject:
        return Subject(name="model", given=self.model, where="opd eval MODEL")

    @property
    def _teacher(self) -> Subject | None:
        if self.teacher is None:
            return None
        return Subject(name="teacher", given=self.teacher, where="opd eval --teacher")

    def _own(self, say: Callable[[str], None]) -> Evaluated:
        pairs = [option.partition("=") for option in self.options]
        options = {key: parse_value(value, f"--option {key}") for key, _, value in pairs}
        columns = {name: column for name, _, column in (one.partition("=") for one in self.columns)}
        tasks = Tasks(
            names=[*self.task_names], folder=self.task_folder, fewshot=self.fewshot, limit=self.limit, chat=self.chat
        )
        data = {"path": self.data, "limit": self.limit, "chat": self.chat, "columns": columns}
        return evaluate_model(
            self._model,
            data=None if self.data is None else data,
            reward=None if self.reward is None else {"name": self.reward, "options": options},
            tasks=tasks if self.task_names else None,
            sampling=self.sampling,
            teacher=self._teacher,
            seed=self.seed or 0,
            say=say,
        )

    def check(self) -> None:
        """Raise ConfigError for options that say nothing together, and for a file that cannot be written."""
        if not self.model or self.teacher == "":
            raise ConfigError("opd eval got an empty path of a model. Give a folder, a hub id or a GGUF file.")
        if self.recipe is None:
            self._check_own()
        else:
            self._check_recipe()
        if self.responses is not None and (why := unfit(expanded(self.responses))):
            raise ConfigError(f"--responses {self.responses} {why}. Give the path of a file in an existing folder.")

    def _check_recipe(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"opd eval got --limit {self.limit}. Give at least 1, or leave --limit out.")
        given = {
            f"DATA ({self.data})": self.data,
            "--reward": self.reward,
            "--option": self.options,
            "--tasks": self.task_names,
            "--task-folder": self.task_folder,
            "--fewshot": self.fewshot,
            "--column": self.columns,
            "--chat": self.chat,
            **{f"--{name.replace('_', '-')}": value for name, value in self.sampling.items()},
        }
        other = [name for name, value in given.items() if value is not None and value is not False and value != []]
        if other:
            raise ConfigError(
                f"opd eval got --recipe {self.recipe} and {', '.join(other)}. The recipe has the prompts, the reward "
                "and the sampling. Leave them out, or change the recipe with "
                "--set stages.STAGE.evaluate.sampling.SETTING.n=8."
            )

    def _check_own(self) -> None:
        for name, value in (("--stage", self.stage), ("--set", " ".join(self.settings))):
            if value:
                raise ConfigError(f"opd eval got {name} {value} without --recipe. Name it, or leave {name} out.")
        if self.data is None and not self.task_names:
            raise ConfigError(
                "opd eval got neither held-out prompts nor --tasks. Give a file of prompts, tasks of lm-eval, e.g. "
                "--tasks gsm8k, or --recipe."
            )
        if self.options and self.reward is None:
            raise ConfigError(
                f"opd eval got --option {' --option '.join(self.options)}, but options belong to a reward, and "
                "--reward is not given. Name it, e.g. --reward max_words, or leave --option out."
            )
        if self.reward is not None and self.data is None:
            raise ConfigError(
                f"opd eval got --reward {self.reward} without held-out prompts, and the tasks of lm-eval have metrics "
                "of their own. Give a file of prompts, or leave --reward out."
            )
        if self.teacher is not None and self.data is None:
            raise ConfigError(
                f"opd eval got --teacher {self.teacher} without held-out prompts, and the divergence from a teacher is "
                "measured on those. Give a file of prompts, or leave --teacher out."
            )
        for name, value in (("--fewshot", self.fewshot), ("--task-folder", self.task_folder)):
            if value is not None and not self.task_names:
                raise ConfigError(f"opd eval got {name} {value} without --tasks. Name the tasks, or leave {name} out.")
