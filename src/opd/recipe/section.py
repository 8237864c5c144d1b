"""The base of every section of a recipe, and the types of names and texts in it."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from opd.recipe.other_names import renamed


class Section(BaseModel):
    """A frozen section that refuses unknown keys, NaN and infinity. Some names of other trainers are accepted."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _names_of_other_trainers(cls, values: Any) -> Any:
        return renamed(values, cls.__name__)


Name: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]  # of a file or folder
SettingName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]*$")]  # part of metrics' names
Text: TypeAlias = Annotated[str, Field(min_length=1)]
