"""Scores of the student's tokens: by one teacher, a teacher per row, or one with another tokenizer."""

# Files of this folder, imported when used.
# pyright: reportUnsupportedDunderAll=false
__all__ = [
    "cross_tokenizer",
    "incremental",
    "local",
    "routed",
]
