"""Rewards of responses, by a function of the text or by LLM judges."""

__all__ = [
    "base",
    "functions",
    "registry",
    "rubric",
]
