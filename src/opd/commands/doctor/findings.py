"""Findings of the checks, the verdict over all of them, and the report as text and as JSON. No torch here."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Level: TypeAlias = Literal["ok", "change", "stop", "skipped"]


Verdict: TypeAlias = Literal["go", "go with these changes", "stop"]


WIDTH = 120  # characters of a line of the report


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check's result. `numbers` holds the measurements, in nats and tokens unless a name says otherwise.

    `change` and `stop` come with a `remedy`, which names the recipe's key, and a `study` that supports it. `skipped`
    says why the check could not measure; it does not count in favour of `go`.
    """

    name: str
    level: Level
    says: str
    numbers: Mapping[str, Any] = field(default_factory=dict[str, Any])
    remedy: str = ""
    study: str = ""

    def __post_init__(self) -> None:
        assert self.level in ("ok", "skipped") or (self.remedy and self.study), f"{self.name}: no remedy or no study"
        assert all(math.isfinite(v) for v in self.numbers.values() if isinstance(v, float)), f"{self.name}: {self}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All findings about one stage of a recipe; `seconds` is how long the doctor took."""

    recipe: str
    stage: str
    prompts: int
    seed: int
    seconds: float
    findings: Sequence[Finding]

    @property
    def verdict(self) -> Verdict:
        return verdict(self.findings)

    def count(self, level: Level) -> int:
        return sum(finding.level == level for finding in self.findings)


def verdict(findings: Sequence[Finding]) -> Verdict:
    """`stop` if one finding says so, else `go with these changes` if one asks for a change, else `go`."""
    levels = {finding.level for finding in findings}
    if "stop" in levels:
        return "stop"
    return "go with these changes" if "change" in levels else "go"


def skipped(name: str, why: str) -> Finding:
    """The finding of a check that could not run, and why."""
    return Finding(name=name, level="skipped", says=why)


def as_text(report: Report) -> str:
    """The report as text: the verdict, then findings by level: stop, change, ok, skipped."""
    order: dict[Level, int] = {"stop": 0, "change": 1, "ok": 2, "skipped": 3}
    findings = sorted(report.findings, key=lambda finding: order[finding.level])
    lines = [
        f"{report.recipe}, stage {report.stage}: {report.verdict.upper()}",
        f"({report.prompts} prompts, seed {report.seed}, {report.seconds:.0f} s; "
        + ", ".join(f"{report.count(level)} {level}" for level in order)
        + ")",
    ]
    for finding in findings:
        lines += ["", *_wrapped(f"{finding.level:8}{finding.name}: {finding.says}")]
        if finding.level in ("stop", "change"):
            lines += _wrapped(f"        do: {finding.remedy}") + _wrapped(f"        see: {finding.study}")
    return "\n".join(lines)


def as_json(report: Report) -> str:
    """The report as JSON: verdict, counts by level, and every finding with its numbers."""
    levels: tuple[Level, ...] = ("stop", "change", "ok", "skipped")
    return json.dumps(
        {
            "recipe": report.recipe,
            "stage": report.stage,
            "verdict": report.verdict,
            "prompts": report.prompts,
            "seed": report.seed,
            "seconds": report.seconds,
            "counts": {level: report.count(level) for level in levels},
            "findings": [
                {
                    "name": finding.name,
                    "level": finding.level,
                    "says": finding.says,
                    "numbers": dict(finding.numbers),
                    "remedy": finding.remedy,
                    "study": finding.study,
                }
                for finding in report.findings
            ],
        },
        indent=2,
        allow_nan=False,
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False)
