"""Scores of the student's tokens: by one teacher, a teacher per row, or one with another tokenizer."""

__all__ = [
    "cross_tokenizer",
    "incremental",
    "local",
    "routed",
]
