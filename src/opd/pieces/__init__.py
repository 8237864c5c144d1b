"""The decisions of a method, one file for each kind, as functions of a record.

The names in `__all__` are for methods of your own; the other files serve single published methods.
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
