"""Pure functions of tensors and numbers: divergences, closed forms, overlap, statistics, metrics.

Imports torch and numpy, and from this library only `errors` and `types`.
"""
