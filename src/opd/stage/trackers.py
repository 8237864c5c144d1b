"""Send metrics, and a table of responses from each sample file, to tensorboard, wandb and trackio."""

from __future__ import annotations

import html
import importlib
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.errors import ConfigError, nearest
from opd.messages import visible
from opd.stage.images import file_of

TABLE = "completions"  # the table's name, behind the stage's
TEXT = 2000  # characters of a prompt or response in a table


@dataclass(frozen=True, slots=True)
class _Tracker:
    log: Callable[[str, int, Mapping[str, float]], None]
    table: Callable[[str, int, list[dict[str, Any]]], None]  # rows with the same keys
    close: Callable[[], None]


def check_report_to(report_to: Iterable[str]) -> None:
    """Check, before weights are loaded, that the trackers can be used. Does not open them.

    Raises:
        ConfigError: an unknown name, a duplicate name, or a package that is not installed.
    """
    names = list(report_to)
    for name in names:
        if name not in _TRACKERS:
            raise ConfigError(f"report_to: {name!r} is unknown.{nearest(name, _TRACKERS)} Known: {sorted(_TRACKERS)}.")
        if names.count(name) > 1:
            raise ConfigError(f"report_to names {name!r} twice. Every point would be written twice; name it once.")
        module, _ = _TRACKERS[name]
        try:
            if importlib.import_module(module).__file__ is None:
                raise ImportError(f"only a folder named {name} without code is found")  # such as ./wandb, of past runs
        except ImportError as error:
            raise ConfigError(
                f"report_to: {name} cannot be imported ({error}). Install it with: pip install 'opd[report]' "
                f"or leave {name!r} out: metrics.jsonl is written in any case."
            ) from error


class ReportWriter:
    """Sends metrics to trackers; with an empty `report_to` it does nothing and imports nothing.

    `folder` is the run's folder: TensorBoard's event files go to `folder/tensorboard`, one TensorBoard run per stage;
    wandb's local files go to `folder/wandb`; trackio keeps its own database (`TRACKIO_DIR`). In wandb and trackio the
    names are `stage/namespace/name`. A resumed run continues the same wandb and trackio run; the steps since the last
    checkpoint are sent again, with the same numbers. With several processes, only one creates a writer. `samples`: the
    number of responses in a table; 0: no tables.

    Raises:
        ConfigError: see `check_report_to`; also when wandb refuses to start (not logged in, no network).
    """

    def __init__(
        self,
        report_to: Iterable[str],
        *,
        folder: Path,
        name: str,
        project: str = "opd",
        config: Mapping[str, Any] | None = None,
        samples: int = 8,
    ) -> None:
        names, self._samples = list(report_to), samples
        check_report_to(names)
        if names:
            folder.mkdir(parents=True, exist_ok=True)
        self._trackers = [_TRACKERS[tracker][1](folder, name, project, dict(config or {})) for tracker in names]

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Send one point per metric, at this step of this stage."""
        for tracker in self._trackers:
            tracker.log(stage, step, metrics)

    def table(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send a table STAGE/completions of some rows of a step's sample file: the picked ones first."""
        if self._trackers and (shown := completions(rows, self._samples)):
            for tracker in self._trackers:
                tracker.table(stage, step, shown)

    def close(self) -> None:
        """Flush and finish; a second call does nothing."""
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            tracker.close()


def completions(rows: Sequence[Mapping[str, Any]], most: int) -> list[dict[str, Any]]:
    """Rows of a table: prompt, response, reward and the mean of log q - log p in nats; at most `most`.

    Rows that were picked come first, those of prompts that are followed over time last. With images in any row a column
    names the student's copies in the stage's folder: a tracker gets no pixels.
    """
    order = sorted(rows, key=lambda row: (row.get("pick") == "follow", row.get("pick") is None))
    seen = any(row.get("images") for row in rows)
    return [
        {
            "prompt_id": row["prompt_id"],
            "sample": row["sample"],
            "picked": row.get("pick") or "",
            "prompt": _cut(row["prompt"] or ""),
            **({"images": " ".join(map(file_of, row.get("images") or ()))} if seen else {}),
            "response": _cut("".join(row["response_tokens"]) if row.get("response_tokens") else row["response"]),
            "reward": row["reward"],
            "finished": row["finished"],
            "log_ratio": _mean_ratio(row),
        }
        for row in order[:most]
    ]


def _mean_ratio(row: Mapping[str, Any]) -> float | None:
    p, q = row.get("policy_logp"), row.get("teacher_logp")
    return None if not p or not q else sum(b - a for a, b in zip(p, q, strict=True)) / len(p)


def _cut(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]} … {len(text) - TEXT:,} characters left out"


def as_markdown(value: Any) -> str:
    """A value as Markdown that shows it as it is: no markup of a model or a user is markup there."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if not isinstance(value, str):
        return "" if value is None else str(value)
    escaped = re.sub(r"([\\`*_{}\[\]()#+\-.!|])", r"\\\1", html.escape(visible(value), quote=False))
    return escaped.replace("\n", "<br>")


def _run_id(folder: Path) -> str:
    """An id stored in the folder: a resumed run continues the same curve, a new folder starts another."""
    file = folder / "report_id.txt"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:8] + "\n")
    return file.read_text().strip()


def _tensorboard(folder: Path, *_: Any) -> _Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writers: dict[str, SummaryWriter] = {}

    def log(stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if stage not in writers:
            # purge_step hides points that an interrupted process wrote after the checkpoint of this start.
            writers[stage] = SummaryWriter(str(folder / "tensorboard" / stage), purge_step=step)
        for name, value in metrics.items():
            writers[stage].add_scalar(name, value, step)

    def table(stage: str, step: int, rows: list[dict[str, Any]]) -> None:
        lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
        lines += ["| " + " | ".join(map(as_markdown, row.values())) + " |" for row in rows]
        if stage not in writers:
            log(stage, step, {})
        writers[stage].add_text(TABLE, "\n".join(lines), step)

    def close() -> None:
        for writer in writers.values():
            writer.close()

    return _Tracker(log, table, close)


def _wandb(folder: Path, name: str, project: str, config: dict[str, Any]) -> _Tracker:
    import wandb  # pyright: ignore[reportMissingImports]

    # A run that the caller opened is used and left open.
    callers_run = wandb.run
    home = str(folder.absolute())
    try:
        open_run = callers_run or wandb.init(
            project=project, name=name, id=_run_id(folder), resume="allow", dir=home, config=config
        )
    except wandb.Error as error:
        raise ConfigError(
            f"report_to: wandb did not start a run ({error}). Log in with `wandb login`, set WANDB_MODE=offline to "
            "record on this machine only, or leave 'wandb' out of report_to."
        ) from error
    stages: set[str] = set()

    def log(stage: str, step: int, metrics: Mapping[str, float]) -> None:
        # wandb drops points with a `step=` below an earlier one, as in a second stage or a resumed run. A separate
        # axis per stage avoids that.
        if stage not in stages:
            open_run.define_metric(f"{stage}/step")
            open_run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            stages.add(stage)
        open_run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in metrics.items()}})

    def table(stage: str, step: int, rows: list[dict[str, Any]]) -> None:
        made = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        open_run.log({f"{stage}/step": step, f"{stage}/{TABLE}": made})

    def close() -> None:
        if callers_run is None:
            open_run.finish()

    return _Tracker(log, table, close)


def _trackio(folder: Path, name: str, project: str, config: dict[str, Any]) -> _Tracker:
    import trackio  # pyright: ignore[reportMissingImports]

    # trackio identifies a run by its name, so the name must be unique to this folder.
    open_run = trackio.init(project=project, name=f"{name}-{_run_id(folder)}", config=config, resume="allow")

    def log(stage: str, step: int, metrics: Mapping[str, float]) -> None:
        open_run.log({f"{stage}/{name}": value for name, value in metrics.items()}, step=step)

    def table(stage: str, step: int, rows: list[dict[str, Any]]) -> None:
        # trackio shows texts of a table as Markdown.
        data = [
            {key: as_markdown(value) if isinstance(value, str) else value for key, value in row.items()} for row in rows
        ]
        open_run.log({f"{stage}/{TABLE}": trackio.Table(data=data)}, step=step)

    return _Tracker(log, table, open_run.finish)


_TRACKERS: dict[str, tuple[str, Callable[[Path, str, str, dict[str, Any]], _Tracker]]] = {
    "tensorboard": ("torch.utils.tensorboard", _tensorboard),
    "wandb": ("wandb", _wandb),
    "trackio": ("trackio", _trackio),
}
