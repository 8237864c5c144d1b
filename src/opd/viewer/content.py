"""What a page holds of one stage: data for its script, blocks that are opened when they are shown, and the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from opd.messages import visible
from opd.viewer import facts, pack
from opd.viewer.curves import axes_of, charts_of, compact, evaluated_of, levels_of, series_of
from opd.viewer.figures import dots, spark
from opd.viewer.images import Album
from opd.viewer.read import RunView, StageView
from opd.viewer.responses import (
    HeldOut,
    follow_block,
    held_block,
    held_out,
    matrix,
    sample_block,
    sampled_steps,
    shown_keys,
    survey,
)
from opd.viewer.results import divergences, labels_of, reward_of, settings, settings_of, tasks_of, whens_of
from opd.viewer.thin import Budget

LIVE_HELD_OUT = 1000  # groups of held-out responses in a live page
SPARKS = ("train/loss", "teacher/log_ratio", "rollout/reward", "rollout/length", "rollout/cut_share", "optim/grad_norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a page may hold."""

    tokens: int = 150_000  # of responses, in all stages together
    samples: int = 8  # responses of each file of samples
    text: bool = True  # else numbers alone
    images: int = 250_000  # bytes of images, in all stages together

    def tokens_beside(self, stages: Sequence[StageView]) -> int:
        """Tokens of responses: images of any stage take a quarter, so that a page has less than 2 MB with them too."""
        return self.tokens * 3 // 4 if any((stage.path / "images").is_dir() for stage in stages) else self.tokens


@dataclass(slots=True)
class Content:
    """One stage in a page. `data` and `blocks` are for the script, `shown` for the template."""

    name: str
    data: dict[str, Any]
    shown: dict[str, Any]
    blocks: dict[str, bytes] = field(default_factory=dict)
    responses: int = 0  # how many of them the page holds


def stage_content(run: RunView, stage: StageView, options: Options | None = None) -> Content:
    """Everything that a page shows of a stage. Raises RunError if a file of the run cannot be read."""
    options = options or Options()
    series = series_of(stage)
    content = Content(stage.name, base_data(stage, series), shown_of(run, stage, series))
    content.blocks["curves"] = curves_block(stage, series)
    steps = sampled_steps(stage)
    surveys = [survey(stage, step, options.samples) for step in steps]
    content.data["position"] = matrix(surveys)
    if options.text:
        measured = measured_of(stage)
        keys = shown_keys(measured)
        lengths = [one.lengths[key] for one in measured for key in keys if key in one.lengths]
        budget = Budget.of(options.tokens_beside([stage]), [*lengths, *(n for one in surveys for n in one.lengths)])
        album = Album()
        add_held_out(content, measured, keys, budget, album)
        for one in surveys:
            content.blocks[f"s{one.step}"] = sample_block(stage, one.step, one.rows, budget, album)
            content.data["steps"].append({"step": one.step, "shown": len(one.rows), "of": one.of})
            content.responses += len(one.rows)
        followed = {one.step: one.followed for one in surveys if one.followed}
        if followed:
            content.blocks["follow"] = follow_block(stage, followed, budget, album)
            content.data["followed"] = max(map(len, followed.values()))
            content.responses += sum(map(len, followed.values()))
        add_images(content, album, options.images)
    return content


def live_content(run: RunView, stage: StageView) -> Content:
    """As `stage_content`, without blocks: a live page asks for each with `block_of` when it is shown.

    `data` alone is what a page needs to be brought up to date (`Stage.refresh` of start.js).
    """
    series = series_of(stage)
    content = Content(stage.name, base_data(stage, series), shown_of(run, stage, series))
    data, measured = content.data, measured_of(stage)
    data["state_says"] = content.shown["head"]["state_says"]
    data["whens"] = [one.label for one in measured]
    data["held"] = data["held_of"] = len(shown_keys(measured, LIVE_HELD_OUT))
    data["held_when"] = [one.when for one in measured]  # the block changes with it
    for step in stage.sample_steps:
        picks = stage.samples(step, ["pick"])
        followed = [] if picks is None else [pick for pick in picks.values("pick") if pick == "follow"]
        count = 0 if picks is None else len(picks) - len(followed)
        data["steps"].append({"step": step, "shown": count, "of": count})
        data["followed"] = max(data["followed"], len(followed))
    return content


def block_of(stage: StageView, name: str, options: Options | None = None) -> bytes | None:
    """One block of a live page by its name: `curves`, `held`, `follow`, or `s` and a step; None if there is none.

    Everything in full, but at most `options.tokens` tokens of a block. Raises RunError if a file cannot be read.
    """
    tokens = (options or Options()).tokens
    if name == "curves":
        return curves_block(stage, series_of(stage))
    if name == "held":
        measured = measured_of(stage)
        keys = shown_keys(measured, LIVE_HELD_OUT)
        lengths = [one.lengths[key] for one in measured for key in keys if key in one.lengths]
        return held_block(measured, keys, Budget.of(tokens, lengths)) if measured else None
    if name == "follow":
        rows = {step: _followed(stage, step) for step in sampled_steps(stage)}
        rows = {step: places for step, places in rows.items() if places}
        lengths = [n for step, places in rows.items() for n in _lengths(stage, step, places)]
        return follow_block(stage, rows, Budget.of(tokens, lengths)) if rows else None
    if name.startswith("s") and name[1:].isdecimal():
        columns = stage.samples(int(name[1:]), ["response_ids"])
        lengths = [] if columns is None else columns.lengths("response_ids").tolist()
        return sample_block(stage, int(name[1:]), None, Budget.of(tokens, lengths)) if lengths else None
    return None


def _followed(stage: StageView, step: int) -> list[int]:
    """The rows of a step's file that are of the same held-out prompts at every step."""
    picks = stage.samples(step, ["pick"])
    return [] if picks is None else [i for i, pick in enumerate(picks.values("pick")) if pick == "follow"]


def _lengths(stage: StageView, step: int, rows: list[int]) -> list[int]:
    """Tokens of these responses of a step's file."""
    columns = stage.samples(step, ["response_ids"], rows)
    return [] if columns is None else columns.lengths("response_ids").tolist()


def base_data(stage: StageView, series: dict[str, Any]) -> dict[str, Any]:
    """What the script needs of a stage before it opens a block."""
    known = series | evaluated_of(stage)
    return {
        "name": stage.name,
        "compared": False,
        "made": stage.steps_done,
        "planned": int(stage.spec.get("steps") or 0),
        "finished": stage.done is not None,
        "labels": labels_of(stage),
        "whens": [],
        "rewards": [[task, *reward_of(stage, task)] for task in tasks_of(stage)],
        "settings": [setting for task in tasks_of(stage) for setting in settings_of(stage, task)],
        "charts": charts_of(stage, known),
        "steps": [],
        "held": 0,
        "held_of": 0,
        "followed": 0,
        "position": None,
        "images": None,
        "teacher": bool(stage.spec.get("teacher") or (stage.keys or {}).get("teacher")),
        "scored": (stage.spec.get("samples") or {}).get("held_out"),
    }


def curves_block(stage: StageView, series: dict[str, Any]) -> bytes:
    """The points of all curves: `lines` by step, `points` of evaluations."""
    content = {"lines": compact(series), "points": compact(evaluated_of(stage)), "levels": levels_of(stage)}
    return pack.plain({**content, "axes": [axes_of(stage)]})


def measured_of(stage: StageView) -> list[HeldOut]:
    """The evaluations that a page compares: before, teacher, and the last one after."""
    whens = stage.whens
    last = [when for when in whens if when.startswith("step_")][-1:]
    asked = [("before", "before"), ("teacher", "teacher"), *(("after", when) for when in last)]
    found = [held_out(label, stage, when) for label, when in asked if when in whens]
    return [one for one in found if one is not None and one.rows]


def add_images(content: Content, album: Album, most: int) -> None:
    """Put the copies of the images that the page's rows name into the page, at most `most` bytes."""
    if (found := album.bytes(most)) is not None:
        content.blocks["images"], content.data["images"] = found


def add_held_out(content: Content, measured: list[HeldOut], keys: list[Any], budget: Budget, album: Album) -> None:
    """Put the held-out responses with these keys into a page."""
    if not measured:
        return
    content.blocks["held"] = held_block(measured, keys, budget, album)
    content.data["whens"] = [one.label for one in measured]
    content.data["held"] = len(keys)
    content.data["held_of"] = len({key for one in measured for key in one.rows})
    content.responses += sum(key in one.rows for one in measured for key in keys)


def shown_of(run: RunView, stage: StageView, series: dict[str, Any]) -> dict[str, Any]:
    """What the template shows of a stage without a script."""
    found = settings(stage)
    labels = labels_of(stage)
    return {
        "name": stage.name,
        "compared": False,
        "last": labels["after"],
        "head": facts.head_of(run, stage),
        "warnings": facts.warned(run, stage),
        "verdict": facts.verdict_of(run, stage),
        "missing": facts.missing_of(stage),
        "settings": found,
        "columns": [labels[when] for when in whens_of(stage)],
        "divergences": divergences(stage),
        "dots": [(one.caption, dots(one)) for one in found if one.points],
        "sparks": [(key, spark(*series[key]), series[key][1]) for key in SPARKS if key in series],
        "phases": facts.phases_of(stage),
        "files": facts.files_of(stage),
    }


def run_shown(run: RunView, *, text: bool = True) -> dict[str, Any]:
    """What the template shows of the run. Without `text` neither its description nor its recipe, which quote data."""
    return {
        "name": visible(run.name),
        "description": visible(str(run.recipe.get("description") or "")) if text else "",
        "folder": facts.folder_of(run.path),
        "environment": facts.environment_of(run),
        "recipe": visible(run.recipe_text) if text else "",
        "version": str((run.environment.get("packages") or {}).get("opd", "")),
    }
