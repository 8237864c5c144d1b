"""The section of an environment: a file of its own, because `schema` is long."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from opd.recipe.numbers import Float, Int
from opd.recipe.section import Section, Text


class EnvironmentSection(Section):
    """An environment: each response is a conversation with it, of several turns. See docs/environments.md."""

    name: Text = "tools"  # tools, textarena:GAME, or my_package.mine:function, which returns an Environment
    tools: list[Text] = []  # of `tools`: calculator, python, or my_package.mine:function
    options: dict[str, Any] = {}  # of the environment; of `tools` by tool
    # How the model writes a call; auto: as its chat template does. See `opd.environments.formats`.
    format: Literal["auto", "hermes", "qwen3_coder", "llama3", "mistral", "harmony", "text"] = "auto"
    max_turns: Int = Field(default=8, ge=1)  # of the student
    max_turn_length: Int | None = Field(default=None, ge=1)  # tokens of a turn; default: what is left of the response
    timeout_s: Float = Field(default=10.0, gt=0)  # seconds per action; one that takes longer is an error, and counted
    # Actions at once, in threads, for tools that wait for a process or a server. Your own code has to allow it.
    workers: Int = Field(default=1, ge=1, le=256)
    max_characters: Int = Field(default=2000, ge=1)  # of an observation; a longer one is cut
    error: str = "error: {why}"  # what the student reads for an action that failed
    # Where the chat template writes an earlier turn otherwise later (drops its thinking): refuse, or keep its tokens.
    rewritten: Literal["refuse", "keep"] = "refuse"

    @model_validator(mode="after")
    def _fits(self) -> EnvironmentSection:
        if self.tools and self.name != "tools":
            raise ValueError(f"`tools` is of `name: tools`, and {self.name} does not read it: leave it out")
        if not self.tools and self.name == "tools":
            raise ValueError("it names no tool: set `tools`, e.g. [calculator], or the `name` of another environment")
        if unknown := sorted({*re.findall(r"\{\w+\}", self.error)} - {"{why}"}):
            raise ValueError(f"`error` holds {unknown[0]}, and only {{why}} is filled in")
        return self
