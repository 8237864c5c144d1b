"""The reward `feedback`: another reward gives the number, and an LLM judge writes feedback on each response.

The text goes to `Rollout.feedback`, for a context that shows it to the teacher (`solutions.from_feedback`). In arXiv
2605.06094 the judge says whether the answer is right and gives one likely cause, in 2 to 4 sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opd.models.language_model import LanguageModel
from opd.recipe.schema import JudgeSection
from opd.rewards.base import FunctionReward
from opd.rewards.rubric import shown
from opd.rewards.rubric_texts import json_of, without_thought
from opd.samplers.asked.cache import AnswerCache, CachedJudge
from opd.samplers.asked.protocol import Failure, Question, UnreadableError
from opd.types import Gather, Prompt, Reward, Rollout

WRITE = """\
Below are a task, its verified answer, and an answer that was checked and is {verdict}. Write feedback that helps to \
solve the task: 2 to 4 sentences that say whether the answer is right, whether its reasoning agrees with it, and the \
one most likely cause of a mistake. Do not solve the task.

Reply with JSON alone: {{"feedback": "..."}}

# Task
{prompt}

# Verified answer
{answer}

# Answer
{response}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackReward(Reward):
    """`inner` gives the number; the judge's text is cut to `limit` characters. Call `for_stage` before use.

    A response whose judge failed keeps its reward, has no feedback, and is counted (`judge/feedback`, the share of
    responses that have one).
    """

    name: str = "feedback"
    inner: FunctionReward
    asks: Mapping[str, JudgeSection] = field()
    needs: frozenset[str]
    limit: int
    temperature: float
    gives_feedback: bool = True
    judge: CachedJudge | None = None

    @property
    def unreadable(self) -> Callable[[Prompt], str | None] | None:
        """Why the inner reward cannot read a row."""
        return self.inner.unreadable

    def for_stage(
        self, models: Mapping[str, LanguageModel], origins: Mapping[str, Mapping[str, Any]], folder: Path, rank: int
    ) -> FeedbackReward:
        """The reward with its judge; `folder` keeps the judge's answers. Raises RunError as `AnswerCache`."""
        from opd.samplers.asked.build import judge_of

        section = self.asks["judge"]
        judge = judge_of(section, models, origins)
        return replace(self, judge=CachedJudge(judge=judge, cache=AnswerCache(folder, rank), retries=section.retries))

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Raises as the inner reward, and the judge's errors."""
        rewarded = self.inner(rollouts)
        judged = [i for i, rollout in enumerate(rewarded) if rollout.reward is not None]
        assert self.judge is not None, "only the training of a stage calls a reward that needs judges"
        questions = [feedback_question(rewarded[i], self.limit, self.temperature) for i in judged]
        for i, text in zip(judged, self.judge.ask(questions, read_feedback), strict=True):
            given = not isinstance(text, Failure)
            rewarded[i] = replace(
                rewarded[i], feedback=text if isinstance(text, str) else None, judged={"feedback": float(given)}
            )
        return rewarded

    def check_failures(self, rollouts: Sequence[Rollout], gather: Gather) -> None:
        """As the inner reward: a judge that failed stops nothing."""
        self.inner.check_failures(rollouts, gather)

    def pop_requests(self) -> dict[str, float]:
        """The judge's counts since the last call."""
        if self.judge is None:
            return {}
        found = {f"judge_{name}": number for name, number in self.judge.counts.items()}
        self.judge.counts.clear()
        return found


def feedback_question(rollout: Rollout, limit: int, temperature: float) -> Question:
    """The question for feedback on a response that has a reward."""
    assert rollout.reward is not None
    prompt, response = shown(rollout.prompt), without_thought(rollout.prompt.prefill + rollout.text)
    answer = "(not given)" if rollout.prompt.answer is None else str(rollout.prompt.answer)
    verdict = "correct" if rollout.reward >= 1.0 else "incorrect"
    text = WRITE.format(verdict=verdict, prompt=prompt, answer=answer, response=response)
    about = {
        "ask": "feedback",
        "prompt": prompt,
        "answer": rollout.prompt.answer,
        "response": response,
        "reward": rollout.reward,
        "limit": limit,
    }
    return Question(content=({"role": "user", "content": text},), temperature=temperature, about=about)


def read_feedback(question: Question, text: str) -> str:
    """The feedback in an answer to `feedback_question`, cut to its limit. Raises UnreadableError for other texts."""
    given = json_of(text).get("feedback")
    if not isinstance(given, str) or not given.strip():
        raise UnreadableError(f"the answer has no text `feedback`: {text.strip()[:120]!r}")
    return given.strip()[: question.about["limit"]]
