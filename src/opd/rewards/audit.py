"""An audit of a reward: what it pays for wrong texts, and for the row's own answer in several forms.

`opd check` and `opd doctor` run it. It calls the reward on texts that are made from the rows, and no model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from opd.plugins import RAISED, torch
from opd.rewards.base import FunctionReward, rewarded
from opd.types import Prompt, Reward, Rollout

ROWS = 16  # rows that `opd check` and `opd doctor` try
PART = 0.005  # ours: what is paid a smaller share of the right answer counts as not paid
SECONDS = 20.0  # after this time no further row is tried

Form: TypeAlias = Callable[[str], str]

RIGHT: Mapping[str, Form] = {
    "the answer": lambda answer: answer,
    "in a sentence": lambda answer: f"The answer is {answer}.",
    "in a box": lambda answer: f"\\boxed{{{answer}}}",
    "with a full stop": lambda answer: f"{answer}.",
    "in bold": lambda answer: f"**{answer}**",
    "in answer tags": lambda answer: f"<answer>{answer}</answer>",
}
REFERENCE = "the row's `response`"
WRONG = ("an empty text", '"hello"', "another row's answer", "a longer number")

Level: TypeAlias = Literal["stop", "change", "ok"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The mean reward of each kind of text over the rows, and how often the reward failed.

    A row without a text of a kind (another answer, if all are equal), or on which the reward failed, counts as 0; a
    kind without any reward is left out.
    """

    name: str
    rows: int
    right: Mapping[str, float]
    wrong: Mapping[str, float]
    failed: int = 0
    texts: int = 0
    why: str | None = None  # of the first failure

    @property
    def best(self) -> float:
        """The mean reward of the best paid form of the right answer."""
        return max(self.right.values(), default=0.0)

    @property
    def worst(self) -> float:
        """The mean reward of the best paid wrong text."""
        return max(self.wrong.values(), default=0.0)

    @property
    def level(self) -> Level:
        """stop: a wrong text is paid as much as the right answer; change: it is paid in part, or the reward failed."""
        if self.worst >= self.best and self.worst != 0.0:
            return "stop"
        return "change" if self.paid_in_part or self.best <= 0.0 or self.failed else "ok"

    @property
    def paid_in_part(self) -> dict[str, float]:
        """The wrong texts that are paid at least the share `PART` of the right answer."""
        return {kind: value for kind, value in self.wrong.items() if value > 0.0 and value >= PART * self.best}

    @property
    def line(self) -> str:
        """What each kind of text is paid."""
        right = ", ".join(f"{kind} {value:.2f}" for kind, value in self.right.items())
        wrong = ", ".join(f"{kind} {value:.2f}" for kind, value in self.wrong.items())
        return f"the reward {self.name} pays on {self.rows} rows: right: {right}; wrong: {wrong}"

    @property
    def verdict(self) -> str | None:
        """What is wrong with the reward, as sentences; None if nothing is."""
        says: list[str] = []
        if self.level == "stop":
            kind = max(self.wrong, key=lambda name: self.wrong[name])
            says.append(
                f"It cannot tell right from wrong: {kind} is paid {self.wrong[kind]:.2f}, the right answer at most "
                f"{self.best:.2f}."
            )
        elif self.best <= 0.0:
            says.append("None of these forms of the right answer is paid: try one response that should be.")
        elif paid := self.paid_in_part:
            says.append(f"It pays wrong texts in part: {', '.join(f'{kind} {paid[kind]:.2f}' for kind in paid)}.")
        if self.failed:
            says.append(f"It failed on {self.failed} of {self.texts} texts: {self.why}.")
        return " ".join(says) or None


def audit(reward: Reward, prompts: Sequence[Prompt], *, rows: int = ROWS, seconds: float = SECONDS) -> Audit | None:
    """The audit on up to `rows` prompts, evenly spread; None if the reward compares with no answer, or needs judges.

    Tries no further prompt after `seconds`.
    """
    answered = [prompt for prompt in prompts if prompt.answer is not None and str(prompt.answer).strip()]
    if reward.asks or not answered or not compares_answers(reward):
        return None
    step = max(1, len(answered) // rows)
    chosen = answered[::step][:rows]
    started = time.monotonic()
    paid: dict[str, list[float]] = {}
    failures: list[str] = []
    tried = texts = 0
    for i, prompt in enumerate(chosen):
        if tried and time.monotonic() - started > seconds:
            break
        tried += 1
        for kind, text in texts_of(prompt, chosen, i).items():
            texts += 1
            value = value_of(reward, prompt, text)
            if isinstance(value, str):
                failures.append(value)
            else:
                paid.setdefault(kind, []).append(value)
    means = {kind: math.fsum(values) / tried for kind, values in paid.items()}
    return Audit(
        name=reward.name,
        rows=tried,
        right={kind: value for kind, value in means.items() if kind not in WRONG},
        wrong={kind: means[kind] for kind in WRONG if kind in means},
        failed=len(failures),
        texts=texts,
        why=f"{failures[0]:.200}" if failures else None,
    )


def value_of(reward: Reward, prompt: Prompt, text: str) -> float | str:
    """The reward of a text, or why it has none."""
    try:
        if isinstance(reward, FunctionReward):  # which reads texts, so that no tensor is made
            return reward.value(prompt, text)
        (one,) = rewarded(reward, [as_rollout(prompt, text)])
    except RAISED as error:
        return str(error.__cause__ or error)
    return str(one.unjudged) if one.reward is None else one.reward


def compares_answers(reward: Reward) -> bool:
    """Whether a reward reads the rows' answers, or may: a user's function need not say so."""
    undeclared = isinstance(reward, FunctionReward) and reward.undeclared
    return undeclared or "answer" in reward.needs or reward.name == "reasoning_gym"


def texts_of(prompt: Prompt, prompts: Sequence[Prompt], place: int) -> dict[str, str]:
    """The texts by kind. The other row is the next one with another answer; the longer number ends with the answer."""
    answer = str(prompt.answer)
    others = [str(one.answer) for one in (*prompts[place + 1 :], *prompts[:place])]
    other = next((one for one in others if one.strip().casefold() != answer.strip().casefold()), None)
    texts = {kind: form(answer) for kind, form in RIGHT.items()}
    if prompt.response:
        texts[REFERENCE] = prompt.response
    longer = f"1{answer}" if answer.isdecimal() else None
    wrong = zip(WRONG, ("", "hello", other, longer), strict=True)
    return texts | {kind: text for kind, text in wrong if text is not None}


def as_rollout(prompt: Prompt, text: str) -> Rollout:
    """A text as a response, for a reward that reads texts."""
    one = torch.ones(1, dtype=torch.int64)
    return Rollout(
        prompt=prompt,
        sample=0,
        prompt_ids=(0,),
        response_ids=one,
        trained=one.bool(),
        turn=one * 0,
        finished=True,
        text=text,
    )
