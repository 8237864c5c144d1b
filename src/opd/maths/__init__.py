"""Pure functions of tensors and numbers: divergences, closed forms, overlap, statistics, metrics.

Imports torch and numpy, and of this library `errors` and `types` alone.
"""
