"""The number that a response earns: by a function of its text, or by LLM judges."""

# Files of this folder, imported when used.
# pyright: reportUnsupportedDunderAll=false
__all__ = [
    "base",
    "functions",
    "registry",
    "rubric",
]
