"""A reward and a judge that recipes of tests name: `support.named:even`."""

from __future__ import annotations

import json
from typing import Any


def even(prompt: object, response: str) -> float:
    """1 for a response of an even number of characters."""
    return float(len(response) % 2 == 0)


def judge(question: Any) -> str:
    """Criteria are letters, and an answer meets those that it has."""
    if question.about["ask"] == "rubric":
        return json.dumps({"criteria": [{"criterion": f"has {c}", "points": 2} for c in "1234"]})
    met = [[int(c[-1] in text) for c in question.about["criteria"]] for text in question.about["answers"]]
    return json.dumps({"verdicts": met})


def adviser(question: Any) -> str | None:
    """Feedback that names the answer; none on responses that begin with 1."""
    if question.about["response"].startswith("1"):
        return None
    return json.dumps({"feedback": f"{question.about['answer']}"})
