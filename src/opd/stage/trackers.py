"""Send metrics to tensorboard, wandb and trackio."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class _Tracker:
    log: Callable[[str, int, Mapping[str, float]], None]
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
    checkpoint are sent again, with the same numbers. With several processes, only one creates a writer.

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
    ) -> None:
        names = list(report_to)
        check_report_to(names)
        if names:
            folder.mkdir(parents=True, exist_ok=True)
        self._trackers = [_TRACKERS[tracker][1](folder, name, project, dict(config or {})) for tracker in names]

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Send one point per metric, at this step of this stage."""
        for tracker in self._trackers:
            tracker.log(stage, step, metrics)

    def close(self) -> None:
        """Flush and finish; a second call does nothing."""
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            tracker.close()


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

    def close() -> None:
        for writer in writers.values():
            writer.close()

    return _Tracker(log, close)


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

    def close() -> None:
        if callers_run is None:
            open_run.finish()

    return _Tracker(log, close)


def _trackio(folder: Path, name: str, project: str, config: dict[str, Any]) -> _Tracker:
    import trackio  # pyright: ignore[reportMissingImports]

    # trackio identifies a run by its name, so the name must be unique to this folder.
    open_run = trackio.init(project=project, name=f"{name}-{_run_id(folder)}", config=config, resume="allow")

    def log(stage: str, step: int, metrics: Mapping[str, float]) -> None:
        open_run.log({f"{stage}/{name}": value for name, value in metrics.items()}, step=step)

    return _Tracker(log, open_run.finish)


_TRACKERS: dict[str, tuple[str, Callable[[Path, str, str, dict[str, Any]], _Tracker]]] = {
    "tensorboard": ("torch.utils.tensorboard", _tensorboard),
    "wandb": ("wandb", _wandb),
    "trackio": ("trackio", _trackio),
}
