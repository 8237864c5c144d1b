"""The section of a recipe that says who is asked, and what of it can be checked without asking. No torch here."""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from opd.errors import ConfigError
from opd.plugins import check_options, import_function

OF_A_SERVER = ("model", "api_key_env", "body", "timeout_s", "patience_s", "concurrency")


class JudgeSection(BaseModel):
    """Somebody who answers a text with a text: exactly one of `url`, `lm` and `function`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str | None = None  # of a server that speaks OpenAI's protocol, e.g. http://localhost:8000/v1
    model: str | None = None  # the server's name of the model
    api_key_env: str | None = None  # the environment variable that holds the key; the key itself stands nowhere
    body: dict[str, Any] = {}  # further fields of a request; null takes one of ours back
    timeout_s: float = Field(default=300.0, gt=0)  # of one request
    patience_s: float = Field(default=300.0, ge=0)  # of one question, to wait where the server says that it is too busy
    concurrency: int = Field(default=8, ge=1)  # requests at once
    lm: str | None = None  # one of the recipe's models, in this process
    function: str | None = None  # my_package.mine:function, called (question, **options); see `base.Question`
    options: dict[str, Any] = {}  # of the function
    max_tokens: int = Field(default=4096, ge=1)  # of an answer; a function is not told
    retries: int = Field(default=2, ge=0)  # after a request that failed, and as many after an unreadable answer

    @model_validator(mode="after")
    def _one_kind(self) -> JudgeSection:
        given = [name for name in ("url", "lm", "function") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"who is asked is exactly one of url, lm, function; given are {given or 'none'}")
        fields = type(self).model_fields
        names = [*([] if self.url else OF_A_SERVER), *([] if self.function else ["options"])]
        unread = [name for name in names if getattr(self, name) != fields[name].default]
        if unread:
            raise ValueError(f"`{given[0]}` does not read {', '.join(unread)}: leave it out")
        if self.url and not self.model:
            raise ValueError("a server is asked for a model by name: set `model`")
        return self


class Asks(BaseModel):
    """Those whom a reward asks."""

    judge: JudgeSection | None = None  # writes the rubric
    verifier: JudgeSection | None = None  # applies it; default: the judge
    author: JudgeSection | None = None  # writes the teacher's answers; default: the data

    @property
    def asks(self) -> dict[str, JudgeSection]:
        """Who is asked, by role."""
        given = {"judge": self.judge, "verifier": self.verifier, "author": self.author}
        return {role: section for role, section in given.items() if section is not None}


def check_judge(section: JudgeSection, where: str) -> None:
    """Refuse what cannot be asked: a bad address, a key that is not there, a function that is not. Raises ConfigError.

    No message repeats an address or a name that might hold a secret.
    """
    if section.url is not None:
        parts = urlsplit(section.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{where}: `url` is no address. It begins with http:// or https:// and names a host.")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError(
                f"{where}: `url` holds more than an address, and it is written to the run's folder. Put a key into an "
                "environment variable, and its name into `api_key_env`."
            )
    if section.api_key_env is not None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", section.api_key_env):
            raise ConfigError(
                f"{where}: `api_key_env` is not the name of an environment variable (letters, digits and _). It holds "
                "the name, never the key: recipes are written to the run's folder."
            )
        key = os.environ.get(section.api_key_env)
        if key and not re.fullmatch(r"[!-~]+", key):  # urllib would refuse it too, and show it
            raise ConfigError(
                f"{where}: the key in the environment variable {section.api_key_env} holds white space, such as a "
                "line's end, or another character that no key has. Export the key alone."
            )
        if not key:
            raise ConfigError(
                f"{where}: the environment variable {section.api_key_env} is not set or empty, and `api_key_env` says "
                "that it holds the key. Export it, or leave `api_key_env` out for a server without keys."
            )
    if section.function is not None:
        check_options(
            f"{where}: the function {section.function}", import_function(section.function), section.options, given=1
        )
