"""The number that a response earns: by a function of its text, or by LLM judges."""

__all__ = [
    "base",
    "functions",
    "registry",
    "rubric",
]
