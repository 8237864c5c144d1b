"""torch and numpy, imported at their first use, so that a command that touches no tensor does not load them.

A file that such a command imports writes `from opd.deferred import torch`, and `from torch import Tensor` under
TYPE_CHECKING.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


class Deferred:
    """Stands for a module, which is imported when an attribute of it is first read.

    From then on it has the module's own dictionary: reading an attribute costs what it costs on the module, and a value
    that is set on the module is seen here.
    """

    __slots__ = ("__dict__", "_name")

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        module = importlib.import_module(self._name)
        self.__dict__ = module.__dict__
        return getattr(module, attribute)  # also what the module makes on demand


if TYPE_CHECKING:
    import numpy as np
    import torch

    __all__ = ["np", "torch"]
else:
    torch = Deferred("torch")
    np = Deferred("numpy")
