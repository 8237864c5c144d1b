"""Teachers that debate a prompt before they score its responses: the source, the contexts, the weights, the counts.

In round 1 every teacher answers alone; in each later round it reads all turns of the earlier ones. The student reads
the prompt alone. A response is then scored by all teachers, each of which reads the debate, with the weights

    w_k = softmax_k( c_k / 100 / tau )        c_k in 0..100, the confidence that k states in the last round

The transcripts are in the folder of the stage (`texts`), where a resumed run finds them. arXiv 2605.01347.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from opd.errors import ConfigError
from opd.messages import fields_of, with_question
from opd.pieces.memory import SavedAttributes
from opd.pieces.needs import Input, Trait, needing
from opd.types import (
    Author,
    Batch,
    Context,
    Gather,
    MakeMemory,
    Prompt,
    Record,
    Rollout,
    Source,
    Unwritten,
    Writers,
    teachers_in,
)

Missing: TypeAlias = Literal["uniform", "zero"]
NAME = "debate"  # in Prompt.metadata, of the transcript


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a teacher wrote in one round. `confidence` None: it stated none from 0 to 100."""

    teacher: str
    text: str
    confidence: float | None
    answered: bool  # there is text beside the statement of the confidence
    finished: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Rounds, texts and weights of a debate. The texts have the fields {prompt}, {teacher} and {debate}.

    `turn` is how a turn is shown in {debate}, with the fields {teacher}, {round} and {text}. `tag` is a regular
    expression with one group, the number; the last one of a turn counts. `missing`: what a teacher without a
    confidence does to the weights of a row: "uniform" makes all equal (the released code), "zero" gives that teacher 0.
    A teacher without an answer has weight 0 with either. Raises ConfigError for texts without their fields and for
    impossible numbers.
    """

    rounds: int = 2
    tau: float = 1.0
    missing: Missing = "uniform"
    opening: str = (
        "{prompt}\n\nYou are Expert {teacher}. Solve the problem. Then state your confidence in your answer from 0 to "
        "100 as <<CONFIDENCE=N>>."
    )
    reply: str = (
        "{prompt}\n\nYou are Expert {teacher} in a debate with other experts.\n[Debate Start]\n{debate}[Debate End]\n"
        "Check all answers, yours included, and solve the problem again. Then state your confidence in your answer "
        "from 0 to 100 as <<CONFIDENCE=N>>."
    )
    reads: str = (
        "{prompt}\n\nYou are Expert {teacher}.\n[Debate Start]\n{debate}[Debate End]\n"
        "Now, based on the debate, solve the problem."
    )
    turn: str = "Expert {teacher}, round {round}: {text}\n"
    tag: str = r"<<CONFIDENCE=(\d+(?:\.\d+)?)>>"

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"A debate has at least one round, got {self.rounds}.")
        if not 0.0 < self.tau < math.inf:
            raise ConfigError(f"`tau` divides the confidences: give a number above 0, got {self.tau}.")
        fields_of("The text `opening` of a debate", self.opening, ("prompt", "teacher"), needed="prompt")
        for name in ("reply", "reads"):
            text = getattr(self, name)
            found = fields_of(f"The text `{name}` of a debate", text, ("prompt", "teacher", "debate"), needed="debate")
            if "prompt" not in found:
                raise ConfigError(f"The text `{name}` of a debate needs the field {{prompt}}; got {text!r:.80}.")
        fields_of("The text `turn` of a debate", self.turn, ("teacher", "round", "text"), needed="text")
        try:
            groups = re.compile(self.tag).groups
        except re.error as error:
            raise ConfigError(f"`tag` is not a regular expression: {error}, in {self.tag!r}.") from error
        if groups != 1:
            raise ConfigError(f"`tag` has one group, the number from 0 to 100; {self.tag!r} has {groups}.")

    def said(self, teacher: str, response: Rollout) -> Turn:
        """A response as a turn. A number outside 0 to 100 is no confidence."""
        stated = [float(number) for number in re.findall(self.tag, response.text) if _is_number(number)]
        confidence = stated[-1] if stated and 0.0 <= stated[-1] <= 100.0 else None
        answered = bool(re.sub(self.tag, "", response.text).strip())
        return Turn(
            teacher=teacher,
            text=response.text,
            confidence=confidence,
            answered=answered,
            finished=response.finished,
        )

    def shown(self, text: str, prompt: Prompt, teacher: str, rounds: Sequence[Sequence[Turn]]) -> Prompt:
        """The prompt as one of `opening`, `reply` and `reads` for a teacher."""
        turns = [
            self.turn.format(teacher=one.teacher, round=number, text=one.text)
            for number, turns in enumerate(rounds, 1)
            for one in turns
        ]

        def rewritten(question: str) -> str:
            return text.format(prompt=question, teacher=teacher, debate="".join(turns))

        return replace(prompt, content=with_question(prompt.content, rewritten, f"Prompt {prompt.id}"))

    def weights(self, turns: Sequence[Turn]) -> dict[str, float]:
        """The weights of the teachers after their last turns: of sum 1, or all 0."""
        able = {one.teacher: one.confidence for one in turns if one.answered}
        if self.missing == "uniform" and None in able.values():
            able = dict.fromkeys(able, 0.0)
        known = {name: c / 100 / self.tau for name, c in able.items() if c is not None}
        largest = max(known.values(), default=0.0)
        powers = {name: math.exp(power - largest) for name, power in known.items()}
        total = math.fsum(powers.values())
        return {one.teacher: powers.get(one.teacher, 0.0) / total if total else 0.0 for one in turns}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def debated(rules: Rules) -> Source:
    """The student, after a debate of the prompt's teachers; the transcript is in the rollouts' `metadata`."""

    def source(prompts: Sequence[Prompt], writers: Writers, seed: tuple[int, int], record: Record) -> list[Rollout]:
        transcripts = held(rules, prompts, writers.authors, seed)
        shown = [
            replace(prompt, metadata={**prompt.metadata, NAME: transcript})
            for prompt, transcript in zip(prompts, transcripts, strict=True)
        ]
        return writers.student(shown, seed=seed, record=record)

    return needing(source, Input.TEACHER_MODEL, Trait.FILTERS)


def held(
    rules: Rules, prompts: Sequence[Prompt], authors: Mapping[str | None, Author], seed: tuple[int, int]
) -> list[list[list[Turn]]]:
    """The debates about the prompts: turns by round, in the order of the teachers.

    Raises DataError for a transcript that is longer than a teacher's positions.
    """
    found: list[list[list[Turn]]] = [[] for _ in prompts]
    panels: dict[str | None, list[int]] = {}
    for i, prompt in enumerate(prompts):
        panels.setdefault(prompt.teacher_id, []).append(i)
    for panel, rows in panels.items():
        mine = [prompts[i] for i in rows]
        for number in range(rules.rounds):
            text = rules.reply if number else rules.opening
            turns: list[list[Turn]] = [[] for _ in rows]
            for teacher in teachers_in(panel):
                contexts = [rules.shown(text, prompts[i], teacher, found[i]) for i in rows]
                responses = authors[teacher](mine, seed=seed, contexts=contexts, first=number)
                for of_row, response in zip(turns, responses, strict=True):
                    of_row.append(rules.said(teacher, response))
            for i, of_row in zip(rows, turns, strict=True):
                found[i].append(of_row)
    return found


def after_debate(rules: Rules) -> Context:
    """Each teacher reads the prompt with the debate, and weighs as its confidence in the last round says.

    A prompt without a debate, such as a held-out one, is read as it is, by all teachers with equal weights. Before
    anything is written, as in `opd check`, the turns of the debate are empty.
    """

    def context(rollouts: Sequence[Rollout]) -> list[Prompt]:
        return [_read(rules, rollout.prompt, isinstance(rollout, Unwritten)) for rollout in rollouts]

    return needing(context)


def _read(rules: Rules, prompt: Prompt, unwritten: bool) -> Prompt:
    empty = [Turn(teacher=name, text="", confidence=None, answered=True) for name in teachers_in(prompt.teacher_id)]
    rounds = prompt.metadata.get(NAME, [empty] * rules.rounds if unwritten and empty else None)
    if rounds is None:
        return prompt
    views = {one.teacher: rules.shown(rules.reads, prompt, one.teacher, rounds) for one in rounds[-1]}
    return replace(prompt, views=views, teacher_weights=rules.weights(rounds[-1]))


class Debates(SavedAttributes):
    """Metrics debate/... of a step's rows, over all processes; a row is a response, and its debate's last round counts.

    `confidence`, the mean of those that were stated; `missing_confidence` and `no_answer`, turns without; `unfinished`,
    turns of all rounds that were cut; `left_out`, rows in which no teacher has a weight, which are not trained;
    `largest_weight`, the mean over the other rows.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules

    def observe(self, batch: Batch, gather: Gather) -> Mapping[str, float]:
        """The metrics of a step. Saves nothing."""
        debates = [rollout.prompt.metadata[NAME] for rollout in batch.rollouts if NAME in rollout.prompt.metadata]
        last = [one for rounds in debates for one in rounds[-1]]
        weights = [max(self.rules.weights(rounds[-1]).values()) for rounds in debates]
        own = (
            [one.confidence for one in last if one.confidence is not None],
            [one.confidence is None for one in last],
            [not one.answered for one in last],
            [not one.finished for rounds in debates for turns in rounds for one in turns],
            [not weight for weight in weights],
            [weight for weight in weights if weight],
        )
        confidences, missing, silent, cut, left_out, largest = (
            [value for part in of_all for value in part] for of_all in zip(*gather(own), strict=True)
        )
        counts = {"missing_confidence": missing, "no_answer": silent, "unfinished": cut, "left_out": left_out}
        means = {"confidence": confidences, "largest_weight": largest}
        return {
            **{f"debate/{name}": float(sum(values)) for name, values in counts.items()},
            **{f"debate/{name}": math.fsum(values) / len(values) for name, values in means.items() if values},
        }


def counted(rules: Rules) -> MakeMemory:
    """A maker of `Debates`."""
    return needing(lambda: Debates(rules))
