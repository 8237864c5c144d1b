"""Text with its token ids: rollouts by a model, a teacher or the data; answers of LLM judges (`asked`)."""

# Files of this folder, imported when used.
# pyright: reportUnsupportedDunderAll=false
__all__ = [
    "asked",
    "hf",
    "writers",
]
