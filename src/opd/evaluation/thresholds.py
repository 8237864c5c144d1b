"""Values of metrics that ask for a look, as data, with the remedy: docs/diagnostics.md. No torch here.

A rule compares the mean of a metric over the first or the last rows that have it. It says that the number is unusual
in the papers' runs, not that a run has failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Rule:
    """`text` is a format with {v}, the value; `anchor` is a heading of docs/diagnostics.md."""

    metric: str
    window: Literal["first", "last"]
    count: int  # rows
    op: Literal[">", "<", "abs<"]
    limit: float
    text: str
    remedy: str
    anchor: str

    def holds(self, value: float) -> bool:
        """Whether the rule fires at this value."""
        if self.op == ">":
            return value > self.limit
        return (abs(value) if self.op == "abs<" else value) < self.limit


@dataclass(frozen=True, slots=True)
class Fired:
    """A rule that fires, with its value and one sentence for people."""

    rule: Rule
    value: float
    sentence: str


RULES: tuple[Rule, ...] = (
    Rule(
        *("rollout/cut_share", "last", 5, ">", 0.9, "{v:.0%} of the responses end at the limit"),
        "raise max_completion_length, or lower it to the depth at which the teacher still helps (opd probe)",
        "responses",
    ),
    Rule(
        *("rollout/repeat_ratio", "last", 5, ">", 0.9, "{v:.0%} of the tokens repeat a 3-gram of their response"),
        "the student loops: go back to an earlier checkpoint, lower the learning rate or max_completion_length",
        "responses",
    ),
    Rule(
        *("judge/failed_share", "last", 5, ">", 0.4, "{v:.0%} of the responses have no reward from the judge"),
        "read the judge's answers in STAGE/judges, and make its task or its format simpler",
        "responses",
    ),
    Rule(
        *("importance/ess", "last", 5, "<", 0.5, "importance weights leave {v:.0%} of the effective sample"),
        "use level: token, or ahead: 0",
        "responses",
    ),
    Rule(
        *("teacher/log_ratio", "first", 1, "abs<", 0.005, "the first step's mean log q - log p is {v:.4f} nats"),
        "this teacher has almost nothing to teach on these prompts: take another teacher, or run opd doctor",
        "the-teacher-on-the-sampled-tokens",
    ),
    Rule(
        *("teacher/log_ratio_p01", "first", 5, "<", -19.0, "1 % of the tokens have log q - log p below {v:.1f} nats"),
        "often a special token that the two templates write differently: mask it, or align the templates (opd check)",
        "the-teacher-on-the-sampled-tokens",
    ),
    Rule(
        *("teacher/negative_share", "first", 5, ">", 0.95, "the teacher likes {v:.0%} of the tokens less"),
        "the update mostly pushes down: use a top-k support, or the whole vocabulary",
        "the-teacher-on-the-sampled-tokens",
    ),
    Rule(
        "teacher/positive_reward_in_top_5_percent",
        *("first", 5, ">", 0.95, "5 % of the tokens hold {v:.0%} of the positive log-ratio"),
        "a few tokens, often fillers, carry all encouragement: use a top-k support",
        "the-teacher-on-the-sampled-tokens",
    ),
    Rule(
        *("support/overlap_ratio", "last", 5, "<", 0.7, "{v:.0%} of both models' top k are common"),
        "the models write differently: begin with sft on the teacher's responses",
        "the-support-the-update",
    ),
    Rule(
        *("support/empty_share", "last", 5, ">", 0.5, "{v:.0%} of the tokens have an empty support"),
        "raise k, or choose the support by the teacher",
        "the-support-the-update",
    ),
    Rule(
        *("units/unscored_share", "last", 5, ">", 0.05, "{v:.0%} of the tokens are in no unit"),
        "look at the samples: bytes that are no text, or text that the teacher's tokenizer changes",
        "the-support-the-update",
    ),
    Rule(
        *("compare/overlap_ratio", "last", 1, "<", 0.7, "{v:.0%} of both models' top k are common"),
        "the models write differently: begin with sft on the teacher's responses",
        "the-full-comparison",
    ),
    Rule(
        *("compare/teacher_mass_on_overlap", "last", 1, "<", 0.9, "the overlap holds {v:.0%} of the teacher's mass"),
        "use a support of the teacher's top k, or forward KL",
        "the-full-comparison",
    ),
    Rule(
        *("gate/spike_share", "last", 5, ">", 0.9, "{v:.0%} of the responses have strength 0"),
        "the term away from the teacher never acts: give the teacher a context that it understands",
        "the-gate-of-anti_sd",
    ),
    Rule(
        *("size/active_share", "last", 5, "<", 0.05, "the teacher sizes {v:.1%} of the tokens"),
        "use prompts with right and wrong responses, or a longer fade",
        "the-size-of-visd",
    ),
    Rule(
        *("size/clipped_share", "last", 5, ">", 0.95, "{v:.0%} of the sizes are at a bound"),
        "raise bound",
        "the-size-of-visd",
    ),
    Rule(
        *("margin/mixed_share", "last", 5, "<", 0.05, "{v:.1%} of the prompts have right and wrong responses"),
        "use easier or harder prompts, or raise sampling.n: the method is plain distillation now",
        "the-order-of-outcomes",
    ),
    Rule(
        *(
            "margin/gap",
            "first",
            5,
            "<",
            0.0,
            "right responses score {v:.3f} nats a token above wrong ones",
        ),
        "it prefers wrong ones: take another teacher",
        "the-order-of-outcomes",
    ),
    Rule(
        *("part/teacher/leaked", "last", 5, ">", 0.9, "{v:.0%} of the hinted responses repeat the hint"),
        "change hint: the teacher copies it",
        "rows-of-a-part",
    ),
)


def fired(metrics: Sequence[Mapping[str, Any]]) -> list[Fired]:
    """The rules that fire on the rows of a stage's `metrics.jsonl`, in the order of `RULES`."""
    out: list[Fired] = []
    for rule in RULES:
        values = [float(row[rule.metric]) for row in metrics if row.get(rule.metric) is not None]
        chosen = values[: rule.count] if rule.window == "first" else values[-rule.count :]
        if not chosen:
            continue
        value = sum(chosen) / len(chosen)
        if rule.holds(value):
            where, remedy = f"docs/diagnostics.md#{rule.anchor}", rule.remedy[0].upper() + rule.remedy[1:]
            out.append(Fired(rule, value, f"{rule.metric}: {rule.text.format(v=value)}. {remedy} ({where})"))
    return out


def markdown() -> str:
    """The rules as the table of docs/diagnostics.md."""
    lines = ["| metric | over | fires | what to do | see |", "|---|---|---|---|---|"]
    for rule in RULES:
        steps = "the " + rule.window + (" row" if rule.count == 1 else f" {rule.count} rows")
        sign = {">": "above", "<": "below", "abs<": "nearer to 0 than"}[rule.op]
        lines.append(
            f"| `{rule.metric}` | {steps} | {sign} {rule.limit:g} | {rule.remedy} | [{rule.anchor}](#{rule.anchor}) |"
        )
    return "\n".join(lines)
