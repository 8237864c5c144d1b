"""One screen of a run in a terminal: state, numbers and their course, held-out results, warnings, the last response."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from opd.errors import ConfigError, nearest
from opd.messages import visible
from opd.viewer.facts import duration, head_of, silent, state_of, warned
from opd.viewer.read import RunView, StageView
from opd.viewer.results import settings
from opd.viewer.rows import COLUMNS

BLOCKS = "▁▂▃▄▅▆▇█"
SHOWN = (  # metric -> label, of those that a stage has
    ("train/loss", "loss"),
    ("teacher/log_ratio", "log q - log p"),
    ("rollout/reward", "reward"),
    ("rollout/kept_share", "kept"),
    ("rollout/length", "tokens"),
    ("rollout/cut_share", "cut at the limit"),
    ("rollout/policy_nll", "-log p"),
    ("optim/grad_norm", "gradient norm"),
)
CUTS = (0.2, 0.5, 1.0, 2.0, 4.0)  # nats, as in the page
# Background and text of each step in the 256 colours: orange where the teacher is below the student, blue where above.
BELOW = ("on color(230)", "on color(223)", "on color(215)", "on color(172)", "on color(94)")
ABOVE = ("on color(195)", "on color(153)", "on color(110)", "on color(68)", "on color(24)")
NARROW = 60  # columns below which the courses are left out
RESPONSE = 220  # tokens of the last response that are shown
RECENT = 20  # steps that the time per step is a mean of


def screen(run: RunView, name: str | None, width: int, *, colour: bool = True, now: float | None = None) -> Group:
    """What `opd watch` shows of a stage, by default the last that has begun; `colour`: else signs mark the tokens.

    Raises ConfigError for a stage that the run does not have, and RunError for a file that cannot be read.
    """
    stage = stage_of(run, name)
    parts: list[RenderableType] = [_head(run, stage, time.time() if now is None else now)]
    if (bar := _bar(stage, width)) is not None:
        parts.append(bar)
    parts += [Text(), _numbers(stage, width)]
    parts += [Text(), *lines] if (lines := _held_out(stage)) else []
    for one in warned(run, stage):
        where = f" ({one.where})" if one.where else ""
        parts.append(Text(visible(f"! {one.name + ': ' if one.name else ''}{one.says}{where}"), style="yellow"))
    parts += [Text(), *lines] if (lines := _last_response(stage, colour)) else []
    return Group(*parts)


def stage_of(run: RunView, name: str | None) -> StageView:
    """The stage of this name, by default the last that has begun. Raises ConfigError without one."""
    if not run.stages:
        raise ConfigError(f"{run.path} holds no step of any stage yet. Start it with `opd train`, or call this later.")
    if name is None:
        return list(run.stages.values())[-1]
    if name not in run.stages:
        raise ConfigError(
            f"The run has no stage {name!r} yet; it has {', '.join(run.stages)}.{nearest(name, run.stages)}"
        )
    return run.stages[name]


def _head(run: RunView, stage: StageView, now: float) -> Text:
    found = head_of(run, stage)
    planned = [str(spec.get("name")) for spec in run.recipe.get("stages") or []]
    place = planned.index(stage.name.split("/")[0]) + 1 if stage.name.split("/")[0] in planned else 1
    text = Text.assemble((visible(run.name), "bold"), f" / {visible(stage.name)} ({visible(found['method'])})")
    text.append(f"  stage {place} of {max(1, len(planned))}  {found['state_says']}")
    recent = [row["total"] for row in stage.timings[-RECENT:] if "total" in row]
    if recent:
        text.append(f"  {sum(recent) / len(recent):.2g} s per step")
    left = (stage.progress or {}).get("eta_seconds")
    if found["state"] == "running" and isinstance(left, int | float) and not silent(stage, now):
        text.append(f"  {duration(max(0.0, left - (now - (stage.progress or {}).get('updated', now))))} left")
    return text


def _bar(stage: StageView, width: int) -> Text | None:
    """What the run does now, with a bar where it counts; None for a run that does nothing."""
    progress = stage.progress or {}
    if state_of(stage) != "running" or not progress.get("phase"):
        return None
    done, of = progress.get("done"), progress.get("of")
    says = visible(str(progress["phase"]))
    if not isinstance(done, int) or not isinstance(of, int) or of <= 0:
        return Text(says, style="cyan")
    room = max(5, min(30, width - len(says) - len(f"  {done} of {of} ")))
    filled = round(room * min(1.0, done / of))
    return Text(f"{says} {'█' * filled}{'░' * (room - filled)} {done} of {of}", style="cyan")


def _numbers(stage: StageView, width: int) -> Table:
    """Metric, its first and its last value, and its course."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name, side in (("", "left"), ("first", "right"), ("now", "right"), ("", "left")):
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    room = min(60, width - 40) if width >= NARROW else 0
    for key, label in SHOWN:
        values = [row[key] for row in stage.metrics if isinstance(row.get(key), int | float)]
        if values:
            course = Text(spark(values, room), style="cyan") if room else Text()
            table.add_row(label, f"{values[0]:.3g}", f"{values[-1]:.3g}", course)
    return table


def spark(values: Sequence[float], width: int) -> str:
    """The course of values in block characters, at most `width`: each is the mean of its share of the values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    n = min(width, len(finite))
    edges = [i * len(finite) // n for i in range(n + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in means)


def _held_out(stage: StageView) -> list[Text]:
    """One line for each sampling setting: the reward by name, before, of the teacher and now."""
    lines: list[Text] = []
    for one in settings(stage):
        shown = [f"{point.label} {_share(point.mean, one.scale)}" for point in one.points]
        lines.append(Text(f"held out, {visible(one.title)}, {visible(one.reward)}: {'   '.join(map(visible, shown))}"))
    return lines


def _share(value: float, scale: tuple[float, float]) -> str:
    return f"{value:.0%}" if scale == (0.0, 1.0) else f"{value:.2f}"


def _last_response(stage: StageView, colour: bool) -> list[Text]:
    """The first response of the newest file of samples that a step trained on, with log q - log p of its tokens."""
    steps = stage.sample_steps
    if not steps:
        return []
    picks = stage.samples(steps[-1], ["pick", "prompt_id"])
    rows = [] if picks is None else [i for i, pick in enumerate(picks.values("pick")) if pick != "follow"]
    columns = stage.samples(steps[-1], COLUMNS, rows[:1])
    if columns is None or not len(columns):
        return []
    tokens = columns.value("response_tokens", 0) or [columns.value("response", 0) or ""]
    p, q = columns.numbers("policy_logp", 0), columns.numbers("teacher_logp", 0)
    values = q - p if p is not None and q is not None and len(p) == len(q) == len(tokens) else None
    reward = columns.value("reward", 0)
    about = f"step {steps[-1]}, prompt {columns.value('prompt_id', 0)}" + (
        "" if reward is None else f", reward {reward:.3g}"
    )
    prompt = Text(visible(_line(columns.value("prompt", 0) or "", 200)), style="dim")
    body = Text(overflow="fold")
    for i, token in enumerate(tokens[:RESPONSE]):
        body.append_text(marked(token or "", None if values is None else float(values[i]), colour))
    if len(tokens) > RESPONSE:
        body.append(f" … {len(tokens) - RESPONSE:,} tokens left out", style="dim")
    return [Text(about, style="dim"), prompt, body]


def marked(token: str, value: float | None, colour: bool) -> Text:
    """A token with the step of its value: a background, or without colour a sign and a number from 1 nat on."""
    text = visible(token).replace("\n", "↵").replace("\t", "⇥")
    if value is None or not math.isfinite(value):
        return Text(text)
    step = sum(abs(value) >= cut for cut in CUTS)
    if not colour:
        return Text(f"{text}[{value:+.1f}]" if abs(value) >= 1 else text)
    if step == 0:
        return Text(text)
    ground = (ABOVE if value > 0 else BELOW)[step - 1]
    return Text(text, style=f"{'color(231)' if step == len(CUTS) else 'color(16)'} {ground}")


def _line(text: str, most: int) -> str:
    whole: str = " ".join(text.split())
    return whole if len(whole) <= most else f"{whole[:most]} …"
