"""The pieces of a method, one file per kind, as functions of a record.

Use the names in `__all__` for your own methods. The other files serve single published methods.
"""

# Strict files take no rules from pyproject.toml. The names are files of this folder, imported when used.
# pyright: reportUnsupportedDunderAll=false
__all__ = [
    "contexts",
    "credit",
    "filters",
    "memory",
    "needs",
    "normalise",
    "packed",
    "signals",
    "sources",
    "supports",
    "teacher_rules",
    "updates",
    "weights",
]
