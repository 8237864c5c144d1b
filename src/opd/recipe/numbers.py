"""Numbers of a recipe: neither true nor false, which pydantic reads as 1 and 0, and no larger than 64 bits."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError


def _not_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("boolean", "Input should be a number, not true or false")
    return value


Int: TypeAlias = Annotated[int, BeforeValidator(_not_boolean), Field(le=2**63 - 1)]
Float: TypeAlias = Annotated[float, BeforeValidator(_not_boolean)]
