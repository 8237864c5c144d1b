"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness) by name: loaded, run with several samples, and summarised.

lm-eval has the tasks' data, prompts, filters and metrics; opd writes the responses (`evaluation.harness`) and computes
the intervals, over prompts.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opd.errors import ConfigError, DataError, nearest
from opd.evaluation.evaluate import summary
from opd.files import expanded
from opd.maths.intervals import SHARE, bounds_of, mean_interval
from opd.maths.statistics import pass_at_k

if TYPE_CHECKING:
    from opd.evaluation.harness import HarnessModel

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """`names`: of tasks, groups and tags of lm-eval, of YAML files, or NAME=FOLDER for data in a local folder.

    `folder` has further YAML files of tasks. `fewshot` and `limit` (of prompts per task) None: as the task says.
    """

    names: Sequence[str]
    folder: str | None = None
    fewshot: int | None = None
    limit: int | None = None
    chat: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResults:
    """`metrics` by name (TASK/METRIC or TASK/METRIC/FILTER), and `rows`, one per response, with its metrics."""

    metrics: Metrics = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """lm-eval's tasks and groups of tasks, by name."""

    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)


def require() -> None:
    """Raise ConfigError when lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except ImportError as error:
        raise ConfigError(
            f"--tasks runs tasks of lm-eval, which is not installed ({error}). "
            "Install it with `pip install 'opd[tasks]'`."
        ) from error


def load_tasks(tasks: Tasks) -> Loaded:
    """The tasks and groups with their data, and the number of examples that each prompt has.

    Raises ConfigError without lm-eval, for a name that it does not know, for examples of a task that allows none, and
    for tasks that run code or show images; DataError for data that cannot be read.
    """
    require()
    if tasks.limit is not None and tasks.limit < 1:
        raise ConfigError(f"--limit {tasks.limit} leaves no prompt of a task. Give at least 1, or leave it out.")
    if tasks.folder is not None and not Path(tasks.folder).is_dir():
        raise ConfigError(f"--task-folder {tasks.folder} is no folder. Give one with the YAML files of your tasks.")
    manager = _known() if tasks.folder is None else _manager(tasks.folder)
    found = Loaded()
    for name in tasks.names:
        one = _loaded(manager, name)
        found.tasks.update(one["tasks"])
        if "=" not in name:
            found.groups.update(one.get("groups") or {})
    for task in found.tasks.values():
        own = task.get_config("num_fewshot")
        if own == 0 and tasks.fewshot:
            raise ConfigError(
                f"Task {task.task_name} is one without examples (num_fewshot: 0), because its prompt has them already "
                f"or its data have none, and --fewshot is {tasks.fewshot}. Measure it alone, without --fewshot."
            )
        task.set_config(key="num_fewshot", value=(own or 0) if tasks.fewshot is None else tasks.fewshot)
    return found


def _manager(folder: str | None) -> Any:
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    return TaskManager(include_path=folder)


@functools.cache
def _known() -> Any:
    """The index of lm-eval's own tasks: 14,683 names, 6 s of CPU time."""
    return _manager(None)


def _loaded(manager: Any, name: str) -> Mapping[str, Any]:
    """The tasks and groups of one name, or of NAME=FOLDER."""
    task, _, folder = name.partition("=")
    if task not in manager.all_tasks and not expanded(task).is_file():
        raise ConfigError(
            f"lm-eval has no task {task!r}.{nearest(task, manager.all_tasks)} `lm-eval ls tasks` lists its "
            f"{len(manager.all_tasks)} tasks, groups and tags. A task of your own is a YAML file: give its path."
        )
    if folder and not expanded(folder).is_dir():
        raise ConfigError(f"--tasks {name}: {folder} is no folder. Give one with the data of {task}, as JSON lines.")
    spec: Any = task
    if folder:
        own = {"task": task, "dataset_path": str(expanded(folder)), "dataset_name": None}
        spec = {"group": f"{task} of {folder}", "task": [own]}
    try:
        loaded = manager.load([spec])
    except Exception as error:  # of the task's own code, or of any reader of its data
        raise DataError(
            f"Task {task} of lm-eval cannot be loaded ({type(error).__name__}: {error}). Its data come from the "
            f"Hugging Face hub or its cache on this machine. Give a local folder instead: --tasks {task}=FOLDER"
        ) from error
    for one in loaded["tasks"].values():
        if getattr(one, "UNSAFE_CODE", False) or getattr(one, "MULTIMODAL", False):
            what = "runs code that the model writes" if getattr(one, "UNSAFE_CODE", False) else "shows images"
            raise ConfigError(f"Task {one.task_name} {what}, which opd eval does not do. Use lm-eval's own command.")
    return loaded


def run_tasks(tasks: Tasks, loaded: Loaded, model: HarnessModel) -> TaskResults:
    """Metrics of every task with 95 % intervals over prompts, pass@k, and the responses."""
    from lm_eval import evaluate  # pyright: ignore[reportMissingImports]

    runs: list[Mapping[str, Any]] = []
    chosen: Any = {"tasks": loaded.tasks, "groups": loaded.groups}  # the decorated function has another's signature
    for sample in range(model.override.n):
        model.sample = sample
        for task in loaded.tasks.values():
            task.set_fewshot_seed(seed=model.seed)  # the same examples for every sample
        random.seed(model.seed)  # some tasks shuffle with it
        np.random.seed(model.seed)
        result = evaluate(
            model,
            chosen,
            limit=tasks.limit,
            bootstrap_iters=0,  # the intervals are opd's
            apply_chat_template=tasks.chat,
            fewshot_as_multiturn=tasks.chat,
        )
        assert result is not None, "a process of rank 0"
        runs.append(result)
    found = TaskResults()
    for task in runs[0]["samples"]:
        found.metrics.update(_metrics_of(task, runs))
        if written := model.of_task.get(task):
            found.metrics.update({f"{task}/{name}": value for name, value in summary(written).items()})
    for group in runs[0].get("groups") or {}:
        found.metrics.update(_of_group(group, runs))
    found.rows.extend(_rows(runs))
    return found


def _metrics_of(task: str, runs: Sequence[Mapping[str, Any]]) -> Metrics:
    """The means of a task's metrics by filter; the value that lm-eval aggregates, where it is not the mean.

    Only means have an interval.
    """
    scores: dict[tuple[str, str], dict[int, list[Any]]] = {}  # metric and filter: values of each prompt
    for run in runs:
        for row in run["samples"][task]:
            for metric in row["metrics"]:
                scores.setdefault((metric, row["filter"]), {}).setdefault(row["doc_id"], []).append(row[metric])
    out: Metrics = {"prompts": float(max((len(of_prompt) for of_prompt in scores.values()), default=0))}
    for (metric, filtered), by_prompt in scores.items():
        aggregated = [run["results"][task].get(f"{metric},{filtered}") for run in runs]
        if not all(isinstance(value, int | float) for value in aggregated):
            continue  # lm-eval aggregates nothing of it
        name = _name(metric, filtered)
        groups = list(by_prompt.values())
        firsts = [group[0] for group in groups]
        if not all(isinstance(v, int | float) for v in firsts) or not _same(sum(firsts) / len(firsts), aggregated[0]):
            out[name] = sum(aggregated) / len(aggregated)
            continue
        values = [float(value) for group in groups for value in group]
        out |= mean_interval([sum(group) / len(group) for group in groups], bounds_of(values)).numbers(name)
        if all(value in (0.0, 1.0) for value in values):
            out |= _passes(name, groups)
    return {f"{task}/{name}": value for name, value in out.items()}


def _passes(name: str, groups: Sequence[Sequence[float]]) -> Metrics:
    """pass@2, pass@4, ... up to the number of samples, with intervals."""
    out: Metrics = {}
    n = min(map(len, groups))
    for k in (2**i for i in range(1, n.bit_length())):
        each = [pass_at_k(len(group), int(sum(group)), k) for group in groups]
        out |= mean_interval(each, SHARE).numbers(f"{name}/pass@{k}")
    return out


def _of_group(group: str, runs: Sequence[Mapping[str, Any]]) -> Metrics:
    """The values that lm-eval aggregates over a group's tasks, as means over samples, without an interval."""
    out: Metrics = {}
    for key, value in runs[0]["groups"][group].items():
        metric, _, filtered = key.partition(",")
        if filtered and not metric.endswith("_stderr") and isinstance(value, int | float):
            values = [run["groups"][group][key] for run in runs]
            out[f"{group}/{_name(metric, filtered)}"] = sum(values) / len(values)
    return out


def _rows(runs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row per task, prompt and sample, with the metrics of all filters."""
    for sample, run in enumerate(runs):
        for task, rows in run["samples"].items():
            by_prompt: dict[int, dict[str, Any]] = {}
            for row in rows:
                merged = by_prompt.setdefault(
                    row["doc_id"],
                    {
                        "task": task,
                        "prompt_id": row["doc_id"],
                        "sample": sample,
                        "prompt": [arguments[0] for arguments in row["arguments"]],
                        "target": row["target"],
                        "response": [response[0] for response in row["resps"]],
                        "metrics": {},
                    },
                )
                merged["metrics"] |= {_name(metric, row["filter"]): row[metric] for metric in row["metrics"]}
            yield from by_prompt.values()


def _name(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric}/{filtered}"


def _same(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=1e-9, abs_tol=1e-12)
