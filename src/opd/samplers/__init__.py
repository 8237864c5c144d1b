"""Text with its token ids: rollouts by a model, a teacher or the data; answers of LLM judges (`asked`)."""

__all__ = [
    "asked",
    "hf",
    "writers",
]
