"""Rows that occur several times in the data: the offline balance of arXiv 2605.03677, by the student's pass rate.

The paper draws 8 responses per prompt. Where most prompts are never or always right, those with 1 to 7 right ones occur
more often; where most are never right, those with 1 to 8. No prompt is left out: in the paper that was worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from opd.errors import ConfigError, DataError, nearest
from opd.recipe.schema import UpsampleSection
from opd.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Upsampled:
    """`count` of `rows` rows of `source` occur several times."""

    source: str
    count: int
    rows: int
    section: UpsampleSection

    def __str__(self) -> str:
        s = self.section
        return (
            f"{self.source}: {self.count} of {self.rows} rows occur {s.times} times ({s.column} above {s.above:g} and "
            f"below {s.below:g})"
        )


def check_upsampling(section: UpsampleSection) -> None:
    """Raise ConfigError for bounds that no share meets."""
    if section.above >= section.below:
        raise ConfigError(
            f"`upsample` takes rows with a `{section.column}` above {section.above:g} and below {section.below:g}: "
            "there are none. Raise `below`, or lower `above`."
        )


def upsample(prompts: Sequence[Prompt], section: UpsampleSection, source: str) -> tuple[list[Prompt], Upsampled]:
    """(the prompts, and after them the further occurrences of some; the report).

    A further occurrence has an id of its own, so that its responses differ. Raises DataError for a row without a
    number from 0 to 1, and if no row is within the bounds.
    """
    chosen = [prompt for prompt in prompts if section.above < _share(prompt, section.column, source) < section.below]
    if not chosen:
        shares = sorted(_share(prompt, section.column, source) for prompt in prompts)
        raise DataError(
            f"`upsample` finds no row of {source} with a `{section.column}` above {section.above:g} and below "
            f"{section.below:g}: the values are {shares[0]:g} to {shares[-1]:g}. Change the bounds, or leave it out."
        )
    span = 1 + max(prompt.id for prompt in prompts)
    further = [replace(one, id=one.id + copy * span) for copy in range(1, section.times) for one in chosen]
    return [*prompts, *further], Upsampled(source=source, count=len(chosen), rows=len(prompts), section=section)


def _share(prompt: Prompt, column: str, source: str) -> float:
    """The value of the column, which is one that opd does not read otherwise."""
    value = prompt.metadata.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        has = "no such column" if column not in prompt.metadata else repr(value)
        raise DataError(
            f"`upsample` reads `{column}`, a number from 0 to 1, of every row of {source}, but row {prompt.id} has "
            f"{has}.{nearest(column, prompt.metadata)} Fill it with the share of the student's responses that are "
            "right, e.g. from the file of `opd eval --responses`, or name another `column`."
        )
    return float(value)
