"""Writers of text: rollouts by the student, a teacher or the data, and answers of LLM judges (`asked`)."""

__all__ = [
    "asked",
    "hf",
    "writers",
]
