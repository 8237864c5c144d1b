"""A judge from its section of a recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from opd.judges.base import Judge
from opd.judges.endpoint import Endpoint
from opd.judges.local import LocalJudge
from opd.judges.program import Program
from opd.judges.section import JudgeSection
from opd.models import LanguageModel
from opd.plugins import import_function


def judge_of(
    section: JudgeSection, models: Mapping[str, LanguageModel], origins: Mapping[str, Mapping[str, Any]]
) -> Judge:
    """Who a checked section means: `models` are loaded, `origins` are their sections of the recipe.

    The key is read from the environment here, and is held in memory alone.
    """
    if section.url is not None and section.model is not None:
        return Endpoint(
            url=section.url,
            model=section.model,
            key=None if section.api_key_env is None else os.environ[section.api_key_env],
            body=section.body,
            max_tokens=section.max_tokens,
            retries=section.retries,
            timeout_s=section.timeout_s,
            patience_s=section.patience_s,
            concurrency=section.concurrency,
        )
    if section.lm is not None:
        return LocalJudge(lm=models[section.lm], origin=origins[section.lm], max_tokens=section.max_tokens)
    assert section.function is not None, "a section that names nobody is refused before this"
    return Program(function=import_function(section.function), name=section.function, options=section.options)
